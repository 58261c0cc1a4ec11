"""The guidance weight w as an input of a student's UNet, as diffusers' LCM UNets have it.

It is told in waves, which a linear layer without bias adds to those of the timestep
(`time_cond_proj_dim`; arXiv 2310.04378, sec. 4.2, after arXiv 2210.03142).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from edgeflash.errors import EdgeflashError

KEY = "time_cond_proj_dim"  # of a UNet's config: how many waves it is told, if any


def waves(w: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of 1000 w, [n, width]: those of `Guidance.embedding`, scale 1 + w."""
    told: Tensor = get_timestep_embedding(1000 * w, width)
    return told


def listen(unet: Any, width: int) -> None:
    """Gives a UNet an input of so many waves; until that is trained, it does not matter."""
    embedding = unet.time_embedding
    embedding.cond_proj = nn.Linear(width, embedding.linear_1.in_features, bias=False)
    nn.init.zeros_(embedding.cond_proj.weight)
    embedding.cond_proj.to(embedding.linear_1.weight.device)


def insist(unet: Any, folder: Path) -> None:
    """Has a UNet with this input refuse to be asked without it, which diffusers would let pass.

    ``folder``: where it comes from, for the complaint.
    """
    if not unet.config.get(KEY):
        return

    def told(_: Any, __: Any, named: dict[str, Any]) -> None:
        if named.get("timestep_cond") is None:
            raise EdgeflashError(
                f"{folder}: its UNet is told the guidance ({KEY}), and lcm alone tells it, of a "
                "student: name another teacher or base, or let lcm with w_embedding come last"
            )

    unet.register_forward_pre_hook(told, with_kwargs=True)
