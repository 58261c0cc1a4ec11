"""The judge of the shapes benchmark: a small CNN that reads every attribute off a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from edgeflash import shapes
from edgeflash.embedded import embedded


class Judge(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Convolutions down to 1 / 2^widths, a hidden layer, a head per attribute of `shapes.HEADS`.

    What is left must be 4 x 4: four widths for pictures of 64 px, two for latents of 16 x 16.

    Pooling is left out on purpose: most attributes depend on where things are.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, widths: Sequence[int] = (32, 64, 96, 128), features: int = 128, channels: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_stride(channels, widths[0], 1)]
        for before, after in zip(widths, [*widths[1:], widths[-1]], strict=True):
            layers.append(_stride(before, after, 2))
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1] * 16, features)
        self.heads = nn.Linear(features, sum(map(len, shapes.HEADS.values())))

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of every head, [n, values] each, and the features [n, f] they are read from.

        Args:
            pictures: float [n, channels, h, w]; pictures in [-1, 1].
        """
        features = nn.functional.silu(self.hidden(self.body(pictures).flatten(1)))
        logits = self.heads(features).split(list(map(len, shapes.HEADS.values())), 1)
        return list(logits), features


def _stride(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU())


def known_cross_entropy(logits: Tensor, known: Tensor) -> Tensor:
    """Mean over the rows whose label is known; 0 where none is, as of object b in small batches."""
    total = nn.functional.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
    return total / (known >= 0).sum().clamp(min=1)


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a set of pictures.

    Attributes:
        prompt_accuracy: share of pictures on which every named attribute is right.
        by_count: the same for captions of one and of two objects.
        by_attribute: share right among the pictures whose caption names the attribute.
        fd: Fréchet distance of features to held-out renders; None below 500 pictures.
    """

    prompt_accuracy: float
    by_count: dict[int, float]
    by_attribute: dict[str, float]
    fd: float | None


def load_judge() -> Judge:
    judge: Judge = Judge.from_pretrained(str(embedded("shapes-judge") / "judge"))
    judge.float().eval()
    return judge


def held_out_captions(count: int) -> list[shapes.Caption]:
    """The benchmark's prompts: half of them ask for one object, half for two."""
    scenes = [shapes.scene(shapes.HELD_OUT_SEED, i) for i in range(count)]
    return [shapes.caption(s, shapes.HELD_OUT_SEED, i) for i, s in enumerate(scenes)]


@torch.no_grad()
def look(judge: Judge, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [n, 8] and features float64 [n, f] of pictures uint8 [n, 64, 64, 3]."""
    labels, features = [], []
    for part in np.array_split(pictures, max(1, len(pictures) // 250)):
        x = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
        logits, feature = judge(x.to(judge.device))
        labels.append(torch.stack([head.argmax(1) for head in logits], 1).cpu().numpy())
        features.append(feature.cpu().double().numpy())
    return np.concatenate(labels), np.concatenate(features)


def verdict(pictures: np.ndarray, captions: Sequence[shapes.Caption]) -> Verdict:
    """What the shipped judge says of pictures uint8 [n, 64, 64, 3] made for n captions."""
    labels, features = look(load_judge(), pictures)
    found = [shapes.satisfied(c.demand, row) for c, row in zip(captions, labels, strict=True)]
    right = np.array([all(f.values()) for f in found])
    counts = np.array([len(c.demand.things) for c in captions])
    names = dict.fromkeys(name for f in found for name in f)
    attributes = {n: float(np.mean([f[n] for f in found if n in f])) for n in names}
    fd = None
    if len(pictures) >= 500:
        fd = frechet_distance(features, held_out_features(len(pictures)))
    by_count = {int(k): float(right[counts == k].mean()) for k in np.unique(counts)}
    return Verdict(float(right.mean()), by_count, attributes, fd)


@cache
def held_out_features(count: int) -> np.ndarray:
    """What the shipped judge sees in so many held-out renders, [n, f]."""
    pictures, _, _ = shapes.batch(shapes.HELD_OUT_SEED + 1, range(count))
    return look(load_judge(), pictures)[1]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two feature sets [n, f].

    arXiv 1706.08500 eq. 6. The trace of the root is the sum of the roots of the eigenvalues of
    C_a C_b, which are real and not negative.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())
