"""Two graphs of one denoiser: the whole one gives what a cheaper one takes at later steps.

DeepCache (arXiv 2312.00858): from step to step the deep features of a UNet hardly change. Every
few steps all of it runs and keeps the feature that enters one of its last layers; in between only
that layer and those around it run, on the skip connections of the outermost layers alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from edgeflash.bundle import Caching, TensorSpec
from edgeflash.caching import ROLE, cached_name
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import Schedule

from .merging import unet_in

if TYPE_CHECKING:
    from .capture import Network

BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


class Way(Protocol):
    """A way to do without some of a denoiser at some steps."""

    @property
    def flag(self) -> str:
        """How it was asked for."""

    @property
    def gated(self) -> bool:
        """Whether the cached graph hears no prompt."""

    def reuses(self, row: int) -> bool:
        """Whether a row of a schedule runs the cached graph."""

    def cut(self, network: Network, cells: tuple[int, int]) -> tuple[Network, Network]:
        """The whole graph and the cached one, sharing all weights.

        Args:
            network: the denoiser, as its family describes it.
            cells: (height, width) of the latent.
        """

    def told(self, image_psnr_db: float) -> Caching:
        """For the manifest."""


def way_of(interval: int | None, branch: int) -> Way | None:
    """What ``--deep-cache`` and ``--cache-branch`` ask for.

    Raises:
        EdgeflashError: the second without the first.
    """
    if interval is not None:
        return DeepCache(interval, branch)
    if branch:
        raise EdgeflashError(f"--cache-branch {branch}: goes with --deep-cache alone")
    return None


def rows_of(way: Way, schedule: Schedule) -> Schedule:
    """The schedule with the graph of each row in it.

    Raises:
        EdgeflashError: too few steps to take anything over from one to the next.
    """
    steps = tuple(
        step.model_copy(update={"graph": "cached"}) if way.reuses(i) else step
        for i, step in enumerate(schedule.steps)
    )
    if steps == schedule.steps:
        raise EdgeflashError(
            f"{way.flag}: in {len(steps)} step{'s' * (len(steps) != 1)} there is nothing to take "
            "over from one to the next: ask for more --steps, or leave it out"
        )
    return schedule.model_copy(update={"steps": steps})


def without(schedule: Schedule) -> Schedule:
    """The schedule as it was before `rows_of`."""
    steps = tuple(step.model_copy(update={"graph": None}) for step in schedule.steps)
    return schedule.model_copy(update={"steps": steps})


@dataclass(frozen=True)
class DeepCache:
    """Runs the whole UNet every ``interval`` steps.

    Attributes:
        interval: N of the paper, at least 2.
        branch: the skip connection, counted from the outermost, at whose height the feature is
            kept: the layers that it and those before it belong to run in every step.
    """

    interval: int
    branch: int = 0

    @property
    def flag(self) -> str:
        return f"--deep-cache {self.interval}"

    @property
    def gated(self) -> bool:
        return False

    def reuses(self, row: int) -> bool:
        return row % self.interval > 0

    def told(self, image_psnr_db: float) -> Caching:
        return Caching(
            method="deep-cache",
            interval=self.interval,
            branch=self.branch,
            image_psnr_db=image_psnr_db,
        )

    def cut(self, network: Network, cells: tuple[int, int]) -> tuple[Network, Network]:
        unet = unet_in(network.module)
        layers, level = _last_layers(unet, self.branch)
        resnet = unet.get_submodule(layers[0])
        width = resnet.in_channels - _skip_channels(unet)[self.branch]
        rows, columns = (-(-side // 2**level) for side in cells)
        first = network.inputs[0].shape[0]
        spec = TensorSpec(
            name="cache_0",
            role=f"{ROLE}0",
            shape=(first, width, rows, columns),
            dtype="float32",
            layout="NCHW",
        )
        given = Given()
        shallow = replaced(network.module, _under(network.module, unet, _cuts(unet, layers, given)))
        attends = any(path.endswith("attn2") for path, _ in shallow.named_modules())
        deaf = () if attends or unet.config.addition_embed_type else ("conditioning",)
        whole = Leaving(network.module, [(resnet, width)])
        return (
            replace(network, module=whole, outputs=(*network.outputs, spec)),
            taking(network, shallow, [given], (spec,), deaf),
        )


def _last_layers(unet: UNet2DConditionModel, branch: int) -> tuple[list[str], int]:
    """Paths of the resnets that run in every step, in order, and how often the first halves.

    Raises:
        EdgeflashError: blocks of another kind than Stable Diffusion's, or no such branch.
    """
    blocks = (*unet.down_blocks, *unet.up_blocks)
    if strange := [b for b in blocks if type(b).__name__ not in BLOCKS]:
        raise EdgeflashError(
            f"--deep-cache: this unet has a {type(strange[0]).__name__}, where Stable Diffusion's "
            f"have {', '.join(BLOCKS)}: leave it out"
        )
    paths = [
        (f"up_blocks.{i}.resnets.{j}", len(unet.up_blocks) - 1 - i)
        for i, block in enumerate(unet.up_blocks)
        for j in range(len(block.resnets))
    ]
    if branch > len(paths) - 2:  # the first layer has nothing before it but the middle
        raise EdgeflashError(
            f"--cache-branch {branch}: this unet has the branches 0 to {len(paths) - 2}: give one"
        )
    last = paths[-1 - branch :]
    return [path for path, _ in last], last[0][1]


def _skip_channels(unet: UNet2DConditionModel) -> list[int]:
    """Channels of the skip connections, from the outermost."""
    found = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        found += [resnet.out_channels for resnet in block.resnets]
        found += [block.resnets[-1].out_channels] * (block.downsamplers is not None)
    return found


def _cuts(
    unet: UNet2DConditionModel, layers: list[str], given: Given
) -> dict[str, nn.Module | None]:
    """What a UNet of these last layers alone has elsewhere: path -> module, or none.

    What its middle gives is what is taken over, whatever the layers before it made.
    """
    cuts: dict[str, nn.Module | None] = {"mid_block": given}
    skips = len(layers) - 1  # made by layers of the way down; the first is that of conv_in
    for i, block in enumerate(unet.down_blocks):
        own = len(block.resnets)
        if skips <= 0:
            cuts[f"down_blocks.{i}"] = None
        elif skips <= own:
            cuts |= _parts(block, f"down_blocks.{i}", range(skips, own))
            cuts[f"down_blocks.{i}.downsamplers"] = None
        skips -= own + (block.downsamplers is not None)
    for i, block in enumerate(unet.up_blocks):
        kept = [j for j in range(len(block.resnets)) if f"up_blocks.{i}.resnets.{j}" in layers]
        if not kept:
            cuts[f"up_blocks.{i}"] = None
        else:
            cuts |= _parts(block, f"up_blocks.{i}", range(kept[0]))
    return cuts


def _parts(block: nn.Module, path: str, layers: range) -> dict[str, nn.Module | None]:
    """Takes layers out of a block: each a resnet, and an attention where it has them."""
    kinds = [kind for kind in ("resnets", "attentions") if getattr(block, kind, None) is not None]
    return {f"{path}.{kind}.{j}": None for kind in kinds for j in layers}


def _under(
    module: nn.Module, unet: nn.Module, cuts: Mapping[str, nn.Module | None]
) -> dict[str, nn.Module | None]:
    """Paths within a UNet as those within what wraps it."""
    home = next(name for name, each in module.named_modules() if each is unet)
    return {f"{home}.{path}" if home else path: each for path, each in cuts.items()}


def replaced(module: nn.Module, changes: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module that shares all with another but what is at these paths; none takes it out.

    What is left keeps its name.
    """
    found = copy.copy(module)
    found._modules = dict(module._modules)  # else a change would be one of the original
    below: dict[str, dict[str, nn.Module | None]] = {}
    for path, each in changes.items():
        name, dot, rest = path.partition(".")
        if dot:
            below.setdefault(name, {})[rest] = each
        elif each is None and isinstance(module, nn.ModuleList):
            del found._modules[name]
        else:
            found._modules[name] = each
    for name, some in below.items():
        child = module._modules[name]
        assert child is not None, name
        found._modules[name] = replaced(child, some)
    return found


def taking(
    network: Network,
    module: nn.Module,
    layers: list[Given],
    specs: tuple[TensorSpec, ...],
    deaf: tuple[str, ...],
) -> Network:
    """The cached graph of a denoiser.

    Args:
        network: the denoiser.
        module: the same without what is taken over.
        layers: what stands in for that.
        specs: of what is taken over, in their order.
        deaf: roles of inputs that nothing is left to hear.
    """
    absent = {
        i: tuple(1 if isinstance(side, str) else side for side in spec.shape)
        for i, spec in enumerate(network.inputs)
        if spec.role in deaf
    }
    return replace(
        network,
        component=cached_name(network.component),
        module=Taking(module, layers, absent),
        inputs=(*(spec for spec in network.inputs if spec.role not in deaf), *specs),
    )


class Given(nn.Module):
    """Gives what was put there for this call, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.put: list[Tensor] = []

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.put[0]


class Leaving(nn.Module):
    """A network that also gives the first channels of what some of its layers are given.

    Args:
        network: what it gives comes first.
        layers: each with the number of those channels.
    """

    def __init__(self, network: nn.Module, layers: list[tuple[nn.Module, int]]) -> None:
        super().__init__()
        self.network = network
        self._layers = layers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._watched() as seen:
            out = self.network(*inputs)
        return (out, *seen)

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, given, width=width: seen.append(given[0][:, :width])
            )
            for layer, width in self._layers
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class Taking(nn.Module):
    """A network whose last inputs are what stands in for its layers, in their order.

    ``absent``: by position, the shapes of inputs that it does not hear, and does not get.
    """

    def __init__(
        self, network: nn.Module, layers: list[Given], absent: Mapping[int, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.network = network
        self._layers, self._absent = layers, dict(absent)

    def forward(self, *inputs: Tensor) -> Tensor:
        own, taken = list(inputs[: -len(self._layers)]), inputs[-len(self._layers) :]
        for position, shape in self._absent.items():
            own.insert(position, torch.zeros(shape))
        for layer, array in zip(self._layers, taken, strict=True):
            layer.put.append(array)
        try:
            out: Tensor = self.network(*own)
        finally:
            for layer in self._layers:
                layer.put.clear()
        return out
