"""Networks that tell real from made, for adversarial terms."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .inner import EncoderHalf, across, encoder_blocks, encoder_taps


class PatchCritic(nn.Module):
    """Strided convolutions over patches of some 30 px, one score per patch (arXiv 1611.07004).

    Spectral norms stand in for gradient penalties (arXiv 1802.05957).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, spectral_norm(nn.Conv2d(sizes[-1], 1, 3, 1, 1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores [n, 1, H / 8, W / 8] of pictures [n, 3, H, W]; positive means real."""
        scores: Tensor = self.body(pictures)
        return scores


class Judged(NamedTuple):
    """A denoiser's output, [n, c, h, w], and scores of what it saw, [n, 1]; positive means real."""

    sample: Tensor
    logits: Tensor


class DenoiserCritic(nn.Module):
    """A denoiser that also judges, by a head on its inmost features (arXiv 2405.14867, sec. 4.3).

    It is called as the denoiser itself is. DMD2's heads are convolutions down to one cell for one
    size of latents; this one takes a mean over what a single one leaves, so that any size will do.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        (*_, inner), (*_, width) = encoder_blocks(denoiser)
        self.head = _inner_head(width)
        self._taps = encoder_taps(denoiser, [inner])

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Judged:
        sample = self.denoiser(x_t, t, c).sample
        (features,) = self._taps.outputs
        return Judged(sample, self.head(across(features, x_t)))


class EncoderCritic(nn.Module):
    """The first half of a denoiser, with a head on its innermost features.

    The head's last layer begins at zero, so that at first the critic knows nothing.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        _, (*_, width) = encoder_blocks(denoiser)
        self.encoder, self.head = EncoderHalf(denoiser), _inner_head(width)
        for parameter in self.head[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Logits [n, 1] of noised samples [n, c, h, w] at t [n] under c [n, s, d]."""
        logits: Tensor = self.head(self.encoder(x_t, t, c))
        return logits.float()


class FrozenCritic(nn.Module):
    """Patches judged by a frozen denoiser's inmost features; the head alone is trained and saved.

    The layers are Flash Diffusion's (arXiv 2406.02347, its authors' code); theirs ends in one score
    for 8x8 features, this one in a score for every second cell, so that any size will do. Of PixArt
    and SD 3 their code judges what the whole teacher puts out, by convolutions on latents; here the
    middle block is what sees, as of a UNet, for half the work.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self._sees = partial(EncoderHalf(denoiser))  # so that this is no module of the critic's
        _, (*_, width) = encoder_blocks(denoiser)
        self.head = nn.Sequential(
            nn.Conv2d(width, 64, 3, 1, 1),
            nn.SiLU(),
            nn.Conv2d(64, 128, 3, 2, 1, bias=False),
            nn.SiLU(),
            nn.GroupNorm(4, 128),
            nn.Conv2d(128, 1, 3, 1, 1, bias=False),
        )

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Scores [n, 1, h, w] of noised samples at t [n] under c [n, s, d]; positive means real."""
        scores: Tensor = self.head(self._sees(x_t, t, c))
        return scores.float()


def _inner_head(width: int) -> nn.Sequential:
    """One logit of innermost features [n, width, h, w], of any size."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, 2, 1),
        nn.GroupNorm(gcd(width // 4, 32), width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 1),
    )


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's hinge loss (arXiv 1705.02894), 0 when both are a margin of 1 away."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def least_squares_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's least squares (arXiv 1611.04076, eq. 2) on sigmoids, 1/4 when it knows nothing.

    The other side's loss is ``(1 - sigmoid(fake)).square()``.
    """
    return 0.5 * ((1 - real.sigmoid()).square().mean() + fake.sigmoid().square().mean())


def softplus_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's cross-entropy (arXiv 1406.2661, eq. 1) on logits, 2 log 2 when it knows nothing.

    The other side's non-saturating loss is ``softplus(-fake)``.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()
