"""What a ControlNet adds to a denoiser (arXiv 2302.05543): names, shapes, and how it is called.

What it shares with T2I-Adapters stands here too; `edgeflash/adapter.py` has the rest of those.

A ControlNet is a UNet's way down once more, which also sees a picture: edges, depth, a pose. What
it gives is added to what the UNet hands from its way down to its way up, and to its middle. Whoever
runs the loop does this at every call of the denoiser, with the prompt and without::

    residual.0 … residual.k = controlnet(sample, timestep, conditioning, control)
    output = denoiser(sample, timestep, conditioning, scale * residual.0 … scale * residual.k)

Both see the same sample. The last residual is the middle's. The picture is as large as the one that
is made, its values from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeflash.errors import EdgeflashError

if TYPE_CHECKING:
    from edgeflash.student import Student

Array = NDArray[Any]
Float32 = NDArray[np.float32]

NAME, ADAPTER = "controlnet", "adapter"  # components, and their folders in students
CALLED = {NAME: "ControlNet", ADAPTER: "T2I-Adapter"}  # by people: what sees a control picture
CLASSES = {NAME: "ControlNetModel", ADAPTER: "T2IAdapter"}  # of diffusers
ROLE = "residual."  # of its outputs and of the denoiser's inputs, before their number
PICTURE = "control"  # role of the picture
LEAST_SLOPE = 0.1  # of an edge, in any colour from -1 to 1, a px


class Network(Protocol):
    """A component called by role: arrays [n, ...] in and out."""

    def answers(self, **by_role: Array) -> dict[str, Array]:
        """All outputs that have a role."""


def shapes(config: Mapping[str, Any], z: Sequence[int | str]) -> list[tuple[int | str, ...]]:
    """Of the residuals that a UNet takes, [n, c, h, w] each, in order; the middle's is the last.

    Args:
        config: of the UNet, or of a ControlNet, which says the same of what that gives.
        z: shape of x_t, [n, c, h, w].
    """
    rows, height, width = z[0], int(z[2]), int(z[3])
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else layers
    found: list[tuple[int | str, ...]] = [(rows, widths[0], height, width)]
    for i, (channels, deep) in enumerate(zip(widths, layers, strict=True)):
        found += [(rows, channels, height, width)] * deep
        if i + 1 < len(widths):
            height, width = -(-height // 2), -(-width // 2)
            found.append((rows, channels, height, width))
    return [*found, (rows, widths[-1], height, width)]


def check_named(student: Student, pipelines: Mapping[str, str]) -> None:
    """Raises where a ControlNet or an adapter lies in a student whose index does not ask for it.

    ``pipelines``: component -> diffusers' class of folders that have one.
    """
    for name, pipeline in pipelines.items():
        home = student.folder / name
        if name != student.family.steering and home.is_dir():
            raise EdgeflashError(
                f"{home}: lies there, but model_index.json does not ask for it: set _class_name "
                f'in that to {pipeline} and {name} to ["diffusers", "{CLASSES[name]}"], or take '
                "the folder away"
            )


def check(student: Student) -> None:
    """Raises where a student's ControlNet does not fit the UNet beside it."""
    home = student.folder / NAME
    own, unet = student.config(NAME), student.config("unet")
    times = 2 ** (len(own["conditioning_embedding_out_channels"]) - 1)
    wanted = {
        "in_channels": (own["in_channels"], unet["in_channels"]),
        "cross_attention_dim": (
            _all(own["cross_attention_dim"]),
            _all(unet["cross_attention_dim"]),
        ),
        "addition_embed_type": (own.get("addition_embed_type"), unet.get("addition_embed_type")),
        "residuals of": (_channels(own), _channels(unet)),
        "conditioning_channels": (own.get("conditioning_channels", 3), 3),
        "global_pool_conditions": (bool(own.get("global_pool_conditions")), False),
        "a picture scaled down": (times, student.family.latent(student).downsampling),
    }
    for what, (has, fits) in wanted.items():
        if has != fits:
            raise EdgeflashError(
                f"{home}: has {what} {has}, where {fits} goes with this unet, and is served: it is "
                "for another base"
            )


def _all(width: int | list[int]) -> int | list[int]:
    """A width; where layers differ, all of them."""
    widths = sorted({*width} if isinstance(width, list) else {width})
    return widths[0] if len(widths) == 1 else widths


def _channels(config: Mapping[str, Any]) -> list[int | str]:
    return [shape[1] for shape in shapes(config, (1, 1, 1, 1))]


def residuals(
    controlnet: Network, by_role: Mapping[str, Array], picture: Array, scale: float = 1.0
) -> dict[str, Array]:
    """What a ControlNet adds to a call of the denoiser, by role.

    Args:
        controlnet: the ControlNet.
        by_role: what the denoiser is given, with n rows.
        picture: [m, 3, H, W] in [0, 1]; n is m, or with guidance a multiple: the rows repeat.
        scale: of all that it gives.
    """
    repeats = len(by_role["sample"]) // len(picture)
    seen = picture if repeats == 1 else np.tile(picture, (repeats, 1, 1, 1))
    return _scaled(controlnet.answers(**by_role, **{PICTURE: seen}), scale)


def maps(adapter: Network, picture: Array, rows: int, scale: float = 1.0) -> dict[str, Array]:
    """What an adapter adds to every call of the denoiser, by role, [rows, c, h, w] each.

    Args:
        adapter: the adapter.
        picture: [1, 3, H, W] in [0, 1].
        rows: of a call: the same for all, with the prompt and without.
        scale: of all that it gives.
    """
    found = _scaled(adapter.answers(**{PICTURE: picture}), scale)
    return {role: np.repeat(array, rows, axis=0) for role, array in found.items()}


def added(told: Mapping[str, Array]) -> dict[str, Array]:
    """Of a golden's table, what was added to the denoiser, by role."""
    return {role: array for role, array in told.items() if role.startswith(ROLE)}


def _scaled(found: dict[str, Array], scale: float) -> dict[str, Array]:
    if scale == 1:
        return found
    return {role: (scale * array).astype(array.dtype, copy=False) for role, array in found.items()}


class Controlled:
    """A denoiser as the loop calls it, with a ControlNet that is asked before, of one picture.

    Attributes:
        told: for a golden: the picture, and what the ControlNet gave in the first call, by role.
    """

    def __init__(self, network: Any, controlnet: Network, picture: Array) -> None:
        self._network, self._controlnet = network, controlnet
        self.told: dict[str, Array] = {PICTURE: picture}

    def __call__(self, **by_role: Array) -> Array:
        found: Array = self._network(**by_role, **self._residuals(by_role))
        return found

    def answers(self, **by_role: Array) -> dict[str, Array]:
        """All outputs of the denoiser that have a role."""
        found: dict[str, Array] = self._network.answers(**by_role, **self._residuals(by_role))
        return found

    def _residuals(self, by_role: dict[str, Array]) -> dict[str, Array]:
        found = residuals(self._controlnet, by_role, self.told[PICTURE])
        self.told = found | self.told  # the first call's stay
        return found


def edges(pictures: Float32) -> Float32:
    """Edges of pictures [n, 3, h, w] in [-1, 1], white on black: [n, 3, h, w], 0 or 1.

    Where Sobel's slope is steep in any colour, and steeper than beside it, across the edge. As
    Canny's edges do (doi 10.1109/TPAMI.1986.4767851), they follow outlines in thin lines.
    """
    padded = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    across = (padded[..., 2:] - padded[..., :-2]) / 2
    along = (padded[..., 2:, :] - padded[..., :-2, :]) / 2
    dx = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4
    dy = (along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]) / 4
    strongest = np.hypot(dx, dy).argmax(1, keepdims=True)
    dx, dy = (np.take_along_axis(slope, strongest, 1)[:, 0] for slope in (dx, dy))
    steep = np.hypot(dx, dy)  # [n, h, w]
    around = np.pad(steep, ((0, 0), (1, 1), (1, 1)))
    sideways = (steep >= around[:, 1:-1, :-2]) & (steep > around[:, 1:-1, 2:])
    upright = (steep >= around[:, :-2, 1:-1]) & (steep > around[:, 2:, 1:-1])
    thin = np.where(np.abs(dx) >= np.abs(dy), sideways, upright) & (steep > LEAST_SLOPE)
    return thin[:, None].repeat(3, 1).astype(np.float32)


def edges_of(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The edges of one picture [h, w, 3], as a picture."""
    shown = picture.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(edges(shown)[0].transpose(1, 2, 0) * 255).astype(np.uint8)
