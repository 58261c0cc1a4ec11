"""Prompts -> conditioning, over the text encoders of a bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeflash.bundle import Bundle
from edgeflash.conditioning import Conditioning, joined
from edgeflash.runtimes.feed import Part
from edgeflash.tokenizer import read_tokenizer, unread


class Prompts:
    """What a bundle knows of prompts.

    Attributes:
        tokenizers: of each text encoder, in order.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.tokenizers = {
            component.name: read_tokenizer(
                bundle.folder, component.tokenizer or bundle.manifest.tokenizer
            )
            for component in bundle.text_encoders
        }
        self._inputs = bundle.denoiser.inputs
        self._zeros = bundle.manifest.no_prompt == "zeros"

    def read(self, part: Part, prompts: Sequence[str], negative: str | None) -> Conditioning:
        """What a text encoder makes of n prompts, role -> [n, ...].

        ``negative``: to steer away from; it makes 2n rows, the negatives first.
        """
        tokenize, texts = self.tokenizers[part.component.name], list(prompts)
        zeros = negative == "" and self._zeros
        if negative is not None and not zeros:
            texts = [negative] * len(texts) + texts
        wanted = [tokenize(text).ids for text in texts]
        distinct = list(dict.fromkeys(wanted))
        rows = [distinct.index(ids) for ids in wanted]
        found = part.answers(tokens=np.array(distinct))
        told = {role: array[rows] for role, array in found.items()}
        if zeros:
            told = {k: np.concatenate([np.zeros_like(v), v]) for k, v in told.items()}
        return told

    def unread(self, prompt: str) -> str:
        """The end of a prompt that no text encoder reads; "" where one reads all of it."""
        return unread(self.tokenizers.values(), prompt)

    def joined(self, answers: Sequence[Conditioning], size: tuple[int, int]) -> Conditioning:
        """What the denoiser takes of all answers, for pictures of ``size`` (height, width)."""
        told = joined(answers, self._inputs, size)
        for array in told.values():
            array.flags.writeable = False  # a session may keep its copy on the device
        return told
