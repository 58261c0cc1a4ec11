"""The mean of the weights that several stages of one method ended with (arXiv 1803.05407, alg. 1).

Stages whose learning rate begins anew end in different places, around a better one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeflash.errors import EdgeflashError

from .stage import Stage, Workshop


def join(stage: Stage, name: str, ends: int, shop: Workshop) -> None:
    """Has a stage of method ``name`` save the mean of its end and of those right before it.

    Raises:
        EdgeflashError: there are not ``ends`` stages of it up to here, or they trained networks of
            other shapes.
    """
    number = int(shop.folder.name.partition("-")[0])
    homes = [shop.folder.with_name(f"{number - back}-{name}") for back in range(1, ends)]
    folders = [home / "student" for home in homes]
    if not all(folder.is_dir() for folder in folders):
        raise EdgeflashError(
            f"{name}.ends = {ends}: there are not so many stages of {name} up to here; lower it"
        )
    for folder in folders:
        for part, network in _networks(stage.final()).items():
            if _shapes(shop.load(folder, part)) != _shapes(network):
                raise EdgeflashError(
                    f"{name}.ends: {folder / part} is another network than this stage trains: "
                    "lower it"
                )
    finish = stage.finish

    def averaged(results: dict[str, Any]) -> dict[str, float]:
        for part, network in _networks(results).items():
            _average(network, [shop.load(folder, part) for folder in folders])
        return finish(results)

    stage.finish = averaged


def _networks(results: dict[str, Any]) -> dict[str, nn.Module]:
    return {k: v for k, v in results.items() if isinstance(v, nn.Module)}


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in network.state_dict().items()}


def _average(network: nn.Module, others: list[nn.Module]) -> None:
    """Gives a network the mean of its own weights and those of the others, in place."""
    told = [each.state_dict() for each in (network, *others)]
    network.load_state_dict({k: torch.stack([each[k] for each in told]).mean(0) for k in told[0]})
