"""Teaches a fresh text encoder what captions say, before any picture is seen."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from edgeflash import shapes
from edgeflash.roles import Method

from .encoded import token_ids
from .judge import known_cross_entropy
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .vocabulary import small_clip_tokenizer


class Reading(Method):
    """Cross-entropy of the attributes of the scene, read off each state from the end token on.

    A UNet learns to obey a prompt an order of magnitude sooner when the states it attends to
    already tell attributes apart, as CLIP's do for Stable Diffusion. Attributes that a caption
    leaves open teach nothing but their prior; objects whose relation it leaves open count as named.
    """

    wants: ClassVar[tuple[str, ...]] = ("shapes",)
    families: ClassVar[tuple[str, ...]] = ("sd",)

    text_width: int = Field(128, ge=8, description="width of the text encoder")
    text_layers: int = Field(3, ge=1, description="layers of the text encoder")
    heads: int = Field(4, ge=1, description="attention heads of the text encoder")
    max_tokens: int = Field(24, ge=4, description="length every prompt is padded to")

    @model_validator(mode="after")
    def _whole_heads(self) -> Reading:
        if self.text_width % self.heads:
            raise ValueError(f"text_width {self.text_width} is no multiple of heads {self.heads}")
        return self

    def begin(self, shop: Workshop) -> Stage:
        assert shop.store.labels is not None
        torch.manual_seed(0)
        tokenizer = small_clip_tokenizer(shop.store.captions, self.max_tokens)
        encoder = self.text_encoder(tokenizer).to(shop.device)
        ids = token_ids(tokenizer, shop.store.captions)
        labels = torch.from_numpy(as_named(shop.store.captions, shop.store.labels))
        end = tokenizer.eos_token_id

        def loss(network: _Reader, batch: Batch, generator: torch.Generator) -> Terms:
            logits = network(batch["ids"])
            after = batch["ids"] == end  # the end token and the padding, which is the same token
            known = batch["labels"][:, None].expand(-1, after.shape[1], -1)[after]
            parts = zip(shapes.HEADS, logits[after].split(SIZES, 1), known.T, strict=True)
            return {name: known_cross_entropy(out, k) for name, out, k in parts}

        def batch(indices: np.ndarray) -> Batch:
            return {"ids": ids[indices], "labels": labels[indices]}

        return Stage(
            players={"reader": Player(_Reader(encoder), loss)},
            batch=batch,
            results={"text_encoder": encoder, "tokenizer": tokenizer},
            averages={"text_encoder": average(encoder, self.ema)} if self.ema else {},
        )

    def text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.text_width,
                intermediate_size=4 * self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=self.heads,
                max_position_embeddings=self.max_tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


SIZES = [len(values) for values in shapes.HEADS.values()]
RELATION_WORDS = {"left", "right", "above", "over", "below", "under"}


def as_named(captions: list[str], labels: np.ndarray) -> np.ndarray:
    """Labels [n, 8] with object a the one named first, where a caption tells no relation."""
    labels, colours = labels.copy(), tuple(shapes.COLOURS)
    for row, caption in zip(labels, captions, strict=True):
        if row[-1] < 0 or RELATION_WORDS & set(caption.split()):
            continue
        a, b = (f"{colours[row[i + 1]]} {shapes.SHAPES[row[i]]}" for i in (2, 5))
        if caption.find(b) < caption.find(a):
            row[2:] = np.roll(row[2:], 3)
    return labels


class _Reader(nn.Module):
    """A text encoder with one linear head on all of its states."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, sum(SIZES))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of all heads side by side, [n, s, values], from token ids [n, s]."""
        logits: Tensor = self.head(self.encoder(ids).last_hidden_state)
        return logits
