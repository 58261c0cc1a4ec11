"""Ways to leave some of a denoiser out at some steps, without training.

DeepCache (arXiv 2312.00858): from step to step the deep features of a UNet hardly change. Every
few steps all of it runs and leaves the feature that enters one of its last layers; in between only
that layer and those around it run, on the skip connections of the outermost layers alone.

T-GATE (arXiv 2404.02747): after a few steps what a prompt says is said. From then on every
cross-attention gives what it gave before, the mean of with and without the prompt, and nothing is
guided any more. What else tells the denoiser of the prompt, as pooled text does, stays as it was
too; the paper's own code takes that of no prompt. Of self-attention, which that code also keeps at
times, nothing is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from edgeflash.bundle import Caching, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.export_options import ExportOptions

from .caching import Given, Tap, Way, graphs, left, replaced, under
from .merging import transformers, unet_in

if TYPE_CHECKING:
    from .capture import Network

BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


def way_of(options: ExportOptions) -> Way | None:
    """What ``--deep-cache``, ``--cache-branch`` and ``--gate`` ask for.

    Raises:
        EdgeflashError: two that do not go together.
    """
    interval, branch, gate = options.deep_cache, options.cache_branch, options.gate
    if interval is not None and gate is not None:
        raise EdgeflashError("--deep-cache and --gate do not go together so far: leave one out")
    if branch and interval is None:
        raise EdgeflashError(f"--cache-branch {branch}: goes with --deep-cache alone")
    if gate is not None:
        return Gate(gate)
    return None if interval is None else DeepCache(interval, branch)


def check_kind(flag: str, block: nn.Module, kinds: tuple[str, ...]) -> None:
    """Raises where a UNet has a block of another kind than these."""
    if (found := type(block).__name__) not in kinds:
        raise EdgeflashError(
            f"{flag}: this unet has a {found}, where Stable Diffusion's have {', '.join(kinds)}: "
            "leave it out"
        )


def halved(cells: tuple[int, int], times: int) -> tuple[int, int]:
    """(rows, columns) of a latent after that many stages."""
    rows, columns = (-(-side // 2**times) for side in cells)
    return rows, columns


@dataclass(frozen=True)
class Gate:
    """Hears the prompt in the first ``step`` steps alone: m of the paper."""

    step: int

    @property
    def flag(self) -> str:
        return f"--gate {self.step}"

    @property
    def cuts(self) -> str:
        return "t-gate"

    @property
    def gated(self) -> bool:
        return True

    def reuses(self, row: int) -> bool:
        return row >= self.step

    def check(self, unet: UNet2DConditionModel) -> None:
        _cross_attentions(unet)

    def told(self, image_psnr_db: float) -> Caching:
        return Caching(method="t-gate", gate=self.step, image_psnr_db=image_psnr_db)

    def cut(self, network: Network, cells: tuple[int, int]) -> tuple[Network, Network]:
        unet = unet_in(network.module)
        names = {id(module): name for name, module in unet.named_modules()}
        taps: list[Tap] = []
        specs: list[TensorSpec] = []
        cuts: dict[str, nn.Module | None] = {}
        for level, attention, norm in _cross_attentions(unet):
            rows, columns = halved(cells, level)
            shape = (rows * columns, attention.to_out[0].out_features)
            specs.append(left(len(taps), network, shape, "NSC"))
            taps.append(Tap(attention))
            cuts |= {names[id(attention)]: Given(), names[id(norm)]: nn.Identity()}
        if unet.config.addition_embed_type:
            wide = unet.config.time_embedding_dim or 4 * unet.config.block_out_channels[0]
            specs.append(left(len(taps), network, (wide,), "NC"))
            taps.append(Tap(unet.add_embedding))
            cuts["add_embedding"] = Given()
        deafened = replaced(network.module, under(network.module, unet, cuts))
        givens = [each for each in cuts.values() if isinstance(each, Given)]
        deaf = ("conditioning", "pooled", "time_ids")
        return graphs(network, taps, tuple(specs), deafened, givens, deaf)


def _cross_attentions(unet: UNet2DConditionModel) -> list[tuple[int, Any, nn.Module]]:
    """How often the latent was halved before each, the attention, and the norm before it.

    Raises:
        EdgeflashError: none, or blocks of another kind than Stable Diffusion's.
    """
    for block in (*unet.down_blocks, *unet.up_blocks):
        check_kind("--gate", block, BLOCKS)
    if unet.mid_block is not None:
        check_kind("--gate", unet.mid_block, MIDDLES)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for each in getattr(block, "attentions", None) or ():
            check_kind("--gate", each, (Transformer2DModel.__name__,))
    found = []
    for level, transformer in transformers(unet):
        for block in transformer.transformer_blocks:
            if getattr(block, "only_cross_attention", False):
                found.append((level, block.attn1, block.norm1))
            if block.attn2 is not None:
                found.append((level, block.attn2, block.norm2))
    if not found:
        raise EdgeflashError("--gate: this unet has no cross-attention: leave it out")
    return found


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
    def cuts(self) -> str:
        return f"deep-cache, branch {self.branch}"

    @property
    def gated(self) -> bool:
        return False

    def reuses(self, row: int) -> bool:
        return row % self.interval > 0

    def check(self, unet: UNet2DConditionModel) -> None:
        _last_layers(unet, self.branch)

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
        spec = left(0, network, (width, *halved(cells, level)), "NCHW")
        given = Given()
        shallow = replaced(network.module, under(network.module, unet, _cuts(unet, layers, given)))
        attends = any(path.endswith("attn2") for path, _ in shallow.named_modules())
        deaf = () if attends or unet.config.addition_embed_type == "text" else ("conditioning",)
        return graphs(network, [Tap(resnet, width)], (spec,), shallow, [given], deaf)


def _last_layers(unet: UNet2DConditionModel, branch: int) -> tuple[list[str], int]:
    """Paths of the resnets that run in every step, in order, and how often the first halves.

    Raises:
        EdgeflashError: blocks of another kind than Stable Diffusion's, or no such branch.
    """
    blocks = (*unet.down_blocks, *unet.up_blocks)
    for block in blocks:
        check_kind("--deep-cache", block, BLOCKS)
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
