"""Networks that tell real from made, for adversarial terms."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


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


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's hinge loss (arXiv 1705.02894), 0 when both are a margin of 1 away."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
