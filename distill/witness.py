"""A classifier on latents, trained beside a network, that says which objects its x_0 shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError

from .judge import Judge, known_cross_entropy
from .process import Process, noise_like
from .stage import Batch, Player, Terms, Workshop

WEIGHT = "of the attributes that a classifier reads off x_0; 0: no classifier"


class Witness(nn.Module):
    """Reads attributes off square latents with a little noise, which hides what is only blurred.

    The error of a latent is nearly the same whether an object is red or orange; a classifier sees
    little else (auxiliary classifiers: arXiv 1610.09585, sec. 4). It has no part in the judge that
    measures.
    """

    COLOURS, OUTLINES = (3, 6), (2, 4, 5, 7)  # heads of both objects: outlines are shape and size

    def __init__(self, channels: int, size: int, process: Process) -> None:
        super().__init__()
        halvings = (size // 4).bit_length() - 1  # to 4 x 4
        self.judge = Judge((64, *[128] * (halvings - 1)), channels=channels)
        self.process = process

    @classmethod
    def at(cls, shop: Workshop, method: str, sample: Batch, process: Process) -> Witness:
        """One for a workshop's latents, of which ``sample`` is a batch.

        Raises:
            EdgeflashError: the data are not the shapes scenes; ``method`` is whose
                ``attribute_weight`` asks for one.
        """
        if "labels" not in sample:
            raise EdgeflashError(f"{method}.attribute_weight needs [data] kind = 'shapes'")
        _, channels, size, _ = sample["x_0"].shape
        return cls(channels, size, process).to(shop.device)

    def players(self) -> dict[str, Player]:
        """Itself, to be trained before the network it looks at."""
        return {"witness": Player(self, self.loss, learning_rate=2e-3)}

    def forward(self, x_0: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Logits of `shapes.HEADS`, [n, values] each."""
        t = torch.full((len(x_0),), self.process.timesteps // 16, device=x_0.device)
        logits: list[Tensor]
        logits, _ = self.judge(self.process.noised(x_0, noise_like(x_0, generator), t))
        return logits

    def loss(self, network: Any, batch: Batch, generator: torch.Generator) -> Terms:
        heads = zip(network(batch["x_0"], generator), batch["labels"].T, strict=True)
        losses = [known_cross_entropy(logits.float(), known) for logits, known in heads]
        return {"witness": torch.stack(losses).sum()}

    def doubt(
        self, x_0: Tensor, labels: Tensor, generator: torch.Generator, t: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of colours, shapes and sizes, summed, [n].

        Args:
            x_0: what a network makes of x_t.
            labels: of `shapes.HEADS`, int64 [n, heads]; -1 where there is no such object.
            generator: for the noise.
            t: int64 [n], where x_0 is a mean: the noisier x_t was, the less can be told of
                outlines, and they count (1 - t/T)^2. None for samples: theirs are always sharp.
        """
        logits = self(x_0, generator)

        def part(heads: tuple[int, ...]) -> Tensor:
            losses = [
                F.cross_entropy(logits[i].float(), labels[:, i], ignore_index=-1, reduction="none")
                for i in heads
            ]
            return torch.stack(losses).sum(0)

        outlines = part(self.OUTLINES)
        if t is not None:
            outlines = (1 - t / self.process.timesteps) ** 2 * outlines
        return part(self.COLOURS) + outlines
