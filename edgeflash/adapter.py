"""What a T2I-Adapter adds to a UNet (arXiv 2302.08453): maps of a picture, made once.

An adapter is a small network that sees a picture, as a ControlNet does, but neither x_t nor time
nor prompt. It gives a few maps, each of which is added to what the UNet has on its way down at that
scale (sec. 3.3). So whoever runs the loop asks it once a picture, and hands every call the same::

    residual.0 … residual.k = adapter(control)
    output = denoiser(sample, timestep, conditioning, scale * residual.0 … scale * residual.k)

UNets of diffusers take a map before they halve where a stage has cross-attention, and behind that
where it has none. The three kinds of diffusers' `T2IAdapter` halve at other places: which of them
goes with a UNet, and how far down, follows from its stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeflash.control import ADAPTER
from edgeflash.errors import EdgeflashError

if TYPE_CHECKING:
    from edgeflash.student import Student

FULL, XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
CROSSED, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"  # stages that diffusers adds maps to
RES_BLOCKS = 2  # a stage, arXiv 2302.08453, sec. 3.3


class Map(NamedTuple):
    """One map, of whatever picture: its channels, and the side of a cell in px of the picture."""

    channels: int
    cell_px: int

    def __str__(self) -> str:
        return f"{self.channels}@{self.cell_px}px"


def gives(config: Mapping[str, Any]) -> list[Map]:
    """What a `T2IAdapter` of that config makes of a picture, in order."""
    kind, widths = config["adapter_type"], list(config["channels"])
    if kind == LIGHT:
        widths.append(widths[-1])  # and halves once more
    halved = [min(i // 2, 1) if kind == XL else i for i in range(len(widths))]
    factor = config["downscale_factor"]
    return [Map(width, factor * 2**times) for width, times in zip(widths, halved, strict=True)]


def takes(unet: Mapping[str, Any], cell_px: int) -> list[Map]:
    """What a UNet of that config can take, in order; the last is its middle's, if it has one.

    It makes do with the first ones.

    Args:
        unet: its config.
        cell_px: side of a cell of the latent.

    Raises:
        EdgeflashError: stages of a kind that diffusers adds nothing to.
    """
    widths, kinds = unet["block_out_channels"], unet["down_block_types"]
    if other := set(kinds) - {CROSSED, PLAIN}:
        raise EdgeflashError(
            f"unet: has a {min(other)}, where T2I-Adapters add to {CROSSED} and {PLAIN} alone"
        )
    deepest = len(widths) - 1
    found = [
        Map(width, cell_px * 2 ** min(i + (kind == PLAIN), deepest))
        for i, (width, kind) in enumerate(zip(widths, kinds, strict=True))
    ]
    middle = Map(widths[-1], cell_px * 2**deepest)
    return found + [middle] * bool(unet.get("mid_block_type", True))  # silent ones have it


def fitting(unet: Mapping[str, Any], cell_px: int) -> dict[str, Any]:
    """The config of the new `T2IAdapter` that reaches furthest down a UNet; see `takes`."""
    wanted = takes(unet, cell_px)

    def made(kind: str, count: int) -> dict[str, Any]:
        channels, factor = [each.channels for each in wanted[:count]], wanted[0].cell_px
        found = {"adapter_type": kind, "channels": channels, "downscale_factor": factor}
        return found | {"in_channels": 3, "num_res_blocks": RES_BLOCKS}

    all_ = [made(kind, n + 1) for kind in (FULL, XL) for n in range(len(wanted))]
    fit = [config for config in all_ if gives(config) == wanted[: len(config["channels"])]]
    return max(fit, key=lambda config: len(config["channels"]))


def shapes(
    config: Mapping[str, Any], rows: int | str, size: tuple[int, int]
) -> list[tuple[int | str, ...]]:
    """Of the maps of a picture of ``size`` (height, width) in px: [n, c, h, w] each."""
    return [
        (rows, each.channels, *(-(-side // each.cell_px) for side in size))
        for each in gives(config)
    ]


def check(student: Student) -> None:
    """Raises where a student's adapter is not for the UNet beside it, or not served here."""
    home, own = student.folder / ADAPTER, student.config(ADAPTER)
    if own["adapter_type"] not in (FULL, XL, LIGHT):
        raise EdgeflashError(f"{home}: adapter_type {own['adapter_type']!r} is not known here")
    if own["in_channels"] != 3:
        raise EdgeflashError(
            f"{home}: sees pictures of {own['in_channels']} channels, where 3 are served"
        )
    found = gives(own)
    wanted = takes(student.config("unet"), student.family.latent(student).downsampling)
    if found != wanted[: len(found)]:
        raise EdgeflashError(
            f"{home}: gives maps of {_told(found)} (channels@cell), where this unet takes "
            f"{_told(wanted)}, from the first on: it is for another base"
        )


def _told(maps: Sequence[Map]) -> str:
    return ", ".join(map(str, maps))
