"""Removes blocks of a UNet, copies the weights that stay, and trains it back to the teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.architecture import FROM_THE_TOP, spelled
from edgeflash.disk import read_json
from edgeflash.errors import EdgeflashError
from edgeflash.networks_sd import quiet
from edgeflash.roles import Method

from .draws import rand, randint, randn
from .encoded import cached_samples
from .features import Taps
from .seen import dropped
from .skipping import SKIP, Skipping
from .stage import Batch, Player, Stage, Terms, Workshop, average
from .witness import WEIGHT, Witness

Rule = Literal["base", "small", "tiny", "sdxs", "sdxs-0.9", "vega"]
VEGA_DEPTHS = (1, 1, 2)  # Segmind-Vega's, in SDXL's stages


class Blocks(Method):
    """BK-SDM (arXiv 2305.15798, eq. 1-4) and the UNet of SDXS (arXiv 2403.16627, sec. 3.1).

    L = |target - S|^2 + |T - S|^2 + sum over blocks of |F_T - F_S|^2, each with its weight, on the
    conditional branch and without guidance. SDXS has no first term: ``denoising_weight = 0``. With
    ``attribute_weight`` a `Witness` says which objects the student's x_0 shows. With ``skip`` it is
    trained to lose more blocks, which `edgeflash search` may then choose (`Skipping`).

    A step asks teacher and student once each; in memory are both with what their blocks put out,
    and an average of the student where ``ema`` keeps one, as BK-SDM does. 50 K steps of 256
    pictures of 512 px, 64 at once, took 300 hours of an A100 and 53 GB for base. Published for SD
    1.4 at 25 steps, COCO 2014, 30 k: FID 13.1, pruned 15.8 (base), 17.0 (small), 17.1 (tiny); of
    SDXS's pruning alone nothing was found.
    """

    wants: ClassVar[tuple[str, ...]] = ("teacher",)
    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")  # it looks into a UNet
    conditioned: ClassVar[bool] = True
    keeps_control: ClassVar[bool] = False  # it makes another UNet

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of AdamW")
    rule: Rule = Field(
        "base",
        description="base: one pair per block; small: and no mid block; tiny: and no innermost "
        "stage; sdxs: and no transformers at the highest resolution; sdxs-0.9: tiny, whose "
        "transformers there attend to the prompt alone, as the released SDXS-512-0.9; vega: depths "
        "1,1,2 and one resnet in the middle, which makes Segmind-Vega of SDXL, as SDXS-1024 has it",
    )
    depths: tuple[int, ...] | None = Field(
        None,
        description="transformer layers kept, the first of each block, per stage; none: all. SDXL "
        "with base and 1,2,6 has the size of KOALA-1B, with small and 1,2,5 that of KOALA-700M",
    )
    architecture: str | None = Field(
        None,
        description="instead of a rule: config.json of the UNet that is left, as edgeflash search "
        "writes one; where it is narrower than the teacher's its weights are fresh, and features "
        "of another width are not compared",
    )
    denoising_weight: float = Field(1.0, ge=0, description="of the data term")
    output_weight: float = Field(1.0, ge=0, description="of the teacher's output")
    feature_weight: float = Field(1.0, ge=0, description="of the teacher's block outputs")
    relative_features: bool = Field(
        False, description="divide a block's error by the mean square of the teacher's output"
    )
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of empty captions; ours, BK-SDM has none"
    )
    skip: float = Field(0.0, ge=0, lt=1, description=SKIP)
    attribute_weight: float = Field(0.0, ge=0, description=WEIGHT)

    def begin(self, shop: Workshop) -> Stage:
        assert shop.teacher
        torch.manual_seed(0)
        teacher = shop.frozen(shop.teacher)
        before = shop.load(shop.student, "unet")
        if _plain(before.config) != _plain(teacher.config):
            raise EdgeflashError("method 'blocks' prunes the teacher's UNet: let it come first")
        student, copied = prune_to(before, self.left_of(dict(before.config)))
        student = shop.listening(student)
        student.to(shop.device, memory_format=torch.channels_last)
        names = {module: name for name, module in student.named_modules()}
        process = shop.process()
        batch, nothing = cached_samples(shop)
        pairs = feature_pairs(teacher, student)
        skipping = Skipping(student, self.skip)
        taught, learnt = Taps([t for t, _ in pairs]), Taps([s for _, s in pairs])
        places = [f"features.{names[ours]}" for _, ours in pairs]
        witness = None
        if self.attribute_weight:
            witness = Witness.at(shop, "blocks", batch(np.arange(1)), process)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            x_0, count = batch["x_0"], len(batch["x_0"])
            eps = randn(x_0.shape, generator).to(x_0.device)
            t = randint(0, process.timesteps, count, generator).to(x_0.device)
            empty = rand(count, generator) < self.caption_dropout
            c = dropped(batch["c"], nothing, empty)
            x_t = process.noised(x_0, eps, t)
            with torch.no_grad():
                wanted = teacher(x_t, t, c).sample.float()
            with skipping(generator):
                output = network(x_t, t, c).sample.float()
            features = zip(places, learnt.outputs, taught.outputs, strict=True)
            denoising = F.mse_loss(output, process.target(x_0, eps, t))
            terms = {
                "denoising": self.denoising_weight * denoising,
                "output": self.output_weight * F.mse_loss(output, wanted),
            }
            for place, ours, theirs in features:
                distance = self.distance(ours.float(), theirs.float())
                terms[place] = self.feature_weight * distance
            if witness:
                doubt = witness.doubt(process.x_0(output, x_t, t), batch["labels"], generator, t)
                doubt = torch.where(empty.to(x_0.device), 0, doubt)
                terms["attributes"] = self.attribute_weight * doubt.mean()
            return terms

        players = witness.players() if witness else {}
        return Stage(
            players=players | {"student": Player(student, loss)},
            batch=batch,
            results={"unet": student},
            averages={"unet": average(student, self.ema)} if self.ema else {},
            finish=lambda _: {"copied_share": copied},
        )

    def left_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the UNet that is left of a teacher's.

        Raises:
            EdgeflashError: nothing would go, or it could not stand in for the teacher.
        """
        if self.architecture is None:
            return pruned_config(config, self.rule, self.depths)
        if self.depths:
            raise EdgeflashError("depths: the architecture has its own: leave one of them out")
        whole = _plain(config)
        told = spelled(read_json(Path(self.architecture)))
        for key in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"):
            if told[key] != whole[key]:
                raise EdgeflashError(
                    f"{self.architecture}: {key} is {told[key]}, the teacher's is {whole[key]}: "
                    "search with this teacher"
                )
        if told == spelled(whole):
            raise EdgeflashError(f"{self.architecture}: nothing to remove, it is the teacher's")
        return told

    def distance(self, learnt: Tensor, taught: Tensor) -> Tensor:
        """Of two block outputs, of which some may be far larger than others."""
        scale = taught.square().mean() if self.relative_features else 1.0
        return F.mse_loss(learnt, taught) / scale


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without diffusers' own notes, such as where the network was loaded from."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def pruned_config(
    config: dict[str, Any], rule: Rule, depths: Sequence[int] | None = None
) -> dict[str, Any]:
    """The config of a UNet after a rule, derived from the teacher's own config.

    Raises:
        EdgeflashError: a rule that would leave no stage, or nothing to remove; depths for other
            stages than there are.
    """
    new = _plain(config)
    if rule == "vega":
        new["mid_block_type"], depths = "UNetMidBlock2D", depths or VEGA_DEPTHS
    else:
        new["layers_per_block"] = 1
        if rule != "base":
            new["mid_block_type"] = None
    if rule in ("tiny", "sdxs", "sdxs-0.9"):
        new |= _without_a_stage(new, rule)
    if rule == "sdxs":
        new["down_block_types"] = ["DownBlock2D", *new["down_block_types"][1:]]
        new["up_block_types"] = [*new["up_block_types"][:-1], "UpBlock2D"]
    if rule == "sdxs-0.9":
        new["only_cross_attention"] = [i == 0 for i in range(len(new["down_block_types"]))]
    if depths:
        if len(depths) != (stages := len(new["down_block_types"])):
            raise EdgeflashError(f"depths {depths}: rule {rule!r} leaves {stages} stages")
        new["transformer_layers_per_block"] = list(depths)
        new["reverse_transformer_layers_per_block"] = None
    if all(value == config.get(key) for key, value in new.items()):
        raise EdgeflashError(f"rule {rule!r}: nothing to remove, the teacher is as small already")
    return new


def _without_a_stage(config: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """What a config says of its stages, less the innermost one."""
    depth = len(config["down_block_types"])
    if depth < 2:
        raise EdgeflashError(f"rule {rule!r}: the teacher's UNet has one stage, none can go")
    return {
        key: list(value[1:] if key in FROM_THE_TOP else value[:-1])
        for key, value in config.items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }


def prune(
    teacher: UNet2DConditionModel, rule: Rule, depths: Sequence[int] | None = None
) -> tuple[UNet2DConditionModel, float]:
    """`prune_to` what a rule leaves."""
    return prune_to(teacher, pruned_config(dict(teacher.config), rule, depths))


def prune_to(
    teacher: UNet2DConditionModel, config: dict[str, Any]
) -> tuple[UNet2DConditionModel, float]:
    """A UNet with blocks removed, and the share of its weights that come from the teacher.

    Weights are copied by name. Down blocks keep their first pairs; up blocks the first, which takes
    what comes from below, and of the others the last, to which the skips of those lead; they count
    on from the stages removed below them. What fits no teacher tensor keeps its fresh
    initialisation, as keys and values of the prompt do where self-attention was.
    """
    with quiet():  # of what edgeflash has noted there
        student = UNet2DConditionModel.from_config(config)
    dropped = len(teacher.up_blocks) - len(student.up_blocks)
    kept = zip(student.up_blocks, teacher.up_blocks[dropped:], strict=True)
    lasts = [(len(our.resnets) - 1, len(their.resnets) - 1) for our, their in kept]
    theirs, ours = teacher.state_dict(), student.state_dict()
    copied = 0
    for name, weight in ours.items():
        source = theirs.get(teacher_name(name, dropped, lasts))
        if source is not None and source.shape == weight.shape:
            weight.copy_(source)
            copied += weight.numel()
    return student, copied / sum(w.numel() for w in ours.values())


def teacher_name(name: str, dropped: int, lasts: Sequence[tuple[int, int]]) -> str:
    """Where a student's tensor comes from.

    Args:
        name: of the student's tensor.
        dropped: stages removed at the bottom.
        lasts: indices of the last pair of each up block, the student's and the teacher's.
    """

    def up(match: re.Match[str]) -> str:
        block, kind, pair = match.groups()
        ours, theirs = lasts[int(block)]
        if kind in ("resnets", "attentions") and pair != "0":
            pair = str(int(pair) + theirs - ours)
        return f"up_blocks.{int(block) + dropped}.{kind}.{pair}."

    return re.sub(r"^up_blocks\.(\d+)\.(\w+)\.(\d+)\.", up, name)


def feature_pairs(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> list[tuple[nn.Module, nn.Module]]:
    """Modules of teacher and student whose outputs are compared: every down and up block.

    The innermost down block of a student that lost a stage has no downsampler; the teacher's output
    before its own downsampler is its match: the last transformer's whole output, where BK-SDM's
    script takes what it adds (``proj_out``). Blocks of other widths have none.
    """
    dropped = len(teacher.up_blocks) - len(student.up_blocks)
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for ours, theirs in zip(student.down_blocks, teacher.down_blocks, strict=False):
        if ours.downsamplers is None and theirs.downsamplers is not None:
            pairs.append((_last_layer(theirs), _last_layer(ours)))
        else:
            pairs.append((theirs, ours))
    pairs += zip(teacher.up_blocks[dropped:], student.up_blocks, strict=True)
    return [(theirs, ours) for theirs, ours in pairs if _width(theirs) == _width(ours)]


def _width(block: Any) -> int:
    """Of what a block, or its last layer, gives, in channels."""
    last = block.resnets[-1] if hasattr(block, "resnets") else block
    return int(last.out_channels)


def _last_layer(block: Any) -> nn.Module:
    layers = getattr(block, "attentions", None) or block.resnets
    layer: nn.Module = layers[-1]
    return layer
