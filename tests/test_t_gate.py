"""T-GATE: the graph that hears no prompt against the whole one, and an export against hooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from exported import QUIET, attempt

from edgeflash import networks_sd, networks_sdxl, shelf
from edgeflash.bundle import TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.export.caching import rows_of
from edgeflash.export.capture import Network, Sample, Tape
from edgeflash.export.line import export_student
from edgeflash.export.merging import MergingBlock, merge_tokens
from edgeflash.export.program import to_program
from edgeflash.export.ways import Gate, way_of
from edgeflash.export_options import ExportOptions
from edgeflash.golden import Sampler, load_tensors
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student

WIDTH, POOLED, CELLS = 12, 10, (9, 13)
CFG = Guidance(kind="cfg", scale=3.0)
ADDED = {
    None: {},
    "text": {"addition_embed_type_num_heads": 2},
    "text_time": {
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    },
}


def network(added: str | None = None, **changes: Any) -> Network:
    """A UNet of two stages that listens, as the families wrap it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "addition_embed_type": added,
        }
        | ADDED[added]
        | changes
    )
    for name, parameter in unet.named_parameters():
        if name.endswith("attn2.to_out.0.weight"):
            parameter.data.mul_(10)
    unet.eval().requires_grad_(False)
    wrap = networks_sdxl.Unet if added == "text_time" else networks_sd.Unet
    roles: dict[str, tuple[int, ...]] = {
        "sample": (4, *CELLS),
        "timestep": (),
        "conditioning": (5, WIDTH),
    }
    if added == "text_time":
        roles |= {"pooled": (POOLED,), "time_ids": (6,)}
    inputs = tuple(
        TensorSpec(name=role, role=role, shape=("n", *sides) if sides else (), dtype="float32")
        for role, sides in roles.items()
    )
    out = inputs[0].model_copy(update={"name": "out_sample", "role": "prediction"})
    return Network("unet", wrap(unet), inputs, (out,))


def given(network: Network, rows: int = 1) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn([rows, *map(int, spec.shape[1:])], generator=random)
        if spec.shape
        else torch.tensor(500.0)
        for spec in network.inputs
    ]


@pytest.mark.parametrize(
    ("added", "changes", "count"),
    [
        (None, {}, 4),
        (None, {"mid_block_type": None, "only_cross_attention": True}, 6),
        ("text", {}, 5),
        ("text_time", {}, 5),
    ],
    ids=["plain", "crossing alone", "text in the time", "pooled text and sizes"],
)
def test_fed_by_the_same_step_it_gives_what_the_whole_gives(
    added: str | None, changes: dict[str, Any], count: int
) -> None:
    plain = network(added, **changes)
    whole, deaf = Gate(1).cut(plain, CELLS)
    told = given(plain, rows=2)
    prediction, *left = whole.module(*told)
    assert torch.equal(prediction, plain.module(*told))
    assert len(left) == count
    assert [each.shape[1:] for each in left] == [spec.shape[1:] for spec in whole.outputs[1:]]
    assert [spec.role for spec in deaf.inputs[:2]] == ["sample", "timestep"]
    assert deaf.inputs[2:] == whole.outputs[1:], "nothing else is heard"
    assert torch.equal(deaf.module(*told[:2], *left), prediction)
    other = [each + 1 for each in left]
    assert not torch.allclose(deaf.module(*told[:2], *other), prediction)
    assert torch.equal(plain.module(*told), prediction), "the student's own is as it was"


@pytest.mark.slow
def test_its_program_holds_nothing_of_the_text() -> None:
    plain = network(
        "text_time",
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    whole, deaf = Gate(1).cut(plain, CELLS)
    told = given(plain)
    left = whole.module(*told)[1:]
    named = zip(deaf.inputs, (*told[:2], *left), strict=True)
    sample = Sample({spec.name: array.numpy() for spec, array in named}, {})
    program = to_program(deaf.module, deaf.inputs, sample)
    names = set(program.state_dict)
    assert not [name for name in names if re.search("attn2|blocks.0.norm2|add_embedding", name)]
    assert any("attn1" in name for name in names)
    assert "zeros" not in str(program.graph), "what stands for the absent is gone"
    three = [each.repeat(3, *[1] * (each.ndim - 1)) if each.ndim else each for each in told]
    again = whole.module(*three)
    found = program.module()(*three[:2], *again[1:])
    torch.testing.assert_close(found, again[0], rtol=1e-5, atol=1e-5)


def test_it_goes_with_merged_tokens() -> None:
    plain = network()
    merge_tokens(plain.module, 0.5, CELLS)
    whole, deaf = Gate(1).cut(plain, CELLS)
    assert any(isinstance(each, MergingBlock) for each in deaf.module.modules())
    told = given(plain)
    prediction, *left = whole.module(*told)
    assert torch.equal(deaf.module(*told[:2], *left), prediction)


def drawn_by_hand(folder: Path, gate: int, steps: int, scale: float) -> Any:
    """The picture of "a red star" from seed 0, by hooks on diffusers' own UNet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.register_to_config(clip_sample=False, steps_offset=1)
    kept: dict[str, torch.Tensor] = {}
    step = 0

    def hook(name: str) -> Any:
        def seen(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            if step >= gate:
                return kept[name]
            kept[name] = (output[:1] + output[1:]) / 2
            return output

        return seen

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        text, bare = pipeline.encode_prompt("a red star", "cpu", 1, True)
        scheduler.set_timesteps(steps)
        x = torch.from_numpy(randn((1, 4, 8, 8), 0))
        for step, t in enumerate(scheduler.timesteps):
            if step < gate:
                two = unet(torch.cat([x, x]), t, torch.cat([bare, text])).sample
                output = two[:1] + scale * (two[1:] - two[:1])
            else:
                output = unet(x, t, bare).sample
            x = scheduler.step(output, t, x).prev_sample
        return pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample.numpy()


def recorded(folder: Path, gate: int, merge: float = 0.0) -> Tape:
    """What the student draws in four guided steps, and its components by the way."""
    student = Student.open(folder)
    way, schedule = Gate(gate), student.schedules((4,))[4]
    sampler = Sampler(rows_of(way, schedule), CFG, (1, 4, 8, 8), way.gated)
    target = shelf.make(Target, "torch", {})
    tape = Tape(student, target, sampler, ("a red star",), (16, 16), merge=merge, way=way)
    for name in ("text_encoder", "unet", "vae_decoder"):
        tape.record(name)
    return tape


def test_the_loss_by_merging_is_told_against_graphs_that_both_merge_nothing(
    guided_student: Path,
) -> None:
    plain, merged = (recorded(guided_student, 2, share) for share in (0.0, 0.5))
    (golden,), (unmerged,) = plain.goldens, merged.plain["merging"]
    assert np.array_equal(unmerged, golden["latent"])
    assert not np.array_equal(merged.goldens[0]["latent"], golden["latent"])


def test_the_loop_is_that_of_the_paper(guided_student: Path) -> None:
    tape = recorded(guided_student, 2)
    (golden,) = tape.goldens
    assert psnr_db(drawn_by_hand(guided_student, 2, 4, 3.0), golden["image"], peak=2.0) > 80
    kept = {name for name in golden if name.startswith("cache")}
    assert kept and all(name.endswith(".1") for name in kept), "once, as the gate left it"
    plain = drawn_by_hand(guided_student, 4, 4, 3.0)
    ours, wanted = (each.clip(-1, 1) for each in (golden["image"], plain))
    (apart_db,) = tape.loss_db["caching"]
    assert apart_db == pytest.approx(psnr_db(wanted, ours, peak=2.0), abs=0.01)
    assert apart_db < 60, "it shows"
    network, samples = tape.record("unet_cached")
    assert [spec.role for spec in network.inputs[:2]] == ["sample", "timestep"]
    assert len(samples) == 3, "unguided: one call a step, and one at another time"
    assert not tape.ahead
    assert len(tape.record("unet_cached")[1]) == 3, "asked once more, the loop runs again"


@pytest.mark.slow
def test_an_export_climbs_the_ladder_and_draws_the_same(
    guided_student: Path, tmp_path: Path
) -> None:
    bundle = export_student(
        Student.open(guided_student),
        shelf.make(Target, "torch", {}),
        tmp_path / "bundle",
        ExportOptions(steps=(1, 4), guidance=CFG, prompts=("a red star",), gate=2),
        console=QUIET,
    )
    manifest = bundle.manifest
    graphs = {n: [step.graph for step in table.steps] for n, table in manifest.schedules.items()}
    assert graphs == {1: [None], 4: [None, None, "cached", "cached"]}
    assert manifest.gated and manifest.caching and manifest.caching.gate == 2
    figures = {(f.rung, f.component, f.metric): f.value for f in manifest.parity}
    assert figures["L3", "pipeline", "psnr_db"] > 80
    assert figures["L1", "unet_cached", "psnr_db"] > 80
    assert ("L2", "unet_cached", "delta_ratio") not in figures, "it hears no prompt"
    golden = load_tensors(bundle.folder / "goldens/0.safetensors")
    with TextToImage(bundle, shelf.make(Runtime, "torch", {})) as pipeline:
        found = pipeline.generate(Request("a red star")).latent
    np.testing.assert_allclose(found, golden["latent"], rtol=0, atol=1e-4)


def test_what_has_nothing_to_gate_is_refused(guided_student: Path, tmp_path: Path) -> None:
    bare = network(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    with pytest.raises(EdgeflashError, match="no cross-attention"):
        Gate(1).cut(bare, CELLS)
    odd = network(mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    with pytest.raises(EdgeflashError, match="has a UNetMidBlock2DSimpleCrossAttn"):
        Gate(1).cut(odd, CELLS)
    target = shelf.make(Target, "torch", {})
    said = attempt(guided_student, tmp_path / "b", target, gate=4, steps=(4,))
    assert said.startswith("--gate 4: in 4 steps there is nothing to take over")
    with pytest.raises(EdgeflashError, match="do not go together so far"):
        way_of(ExportOptions(deep_cache=2, gate=3))
    assert way_of(ExportOptions(gate=3)) == Gate(3)
