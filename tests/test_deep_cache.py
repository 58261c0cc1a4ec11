"""DeepCache: the cached graph against the whole one, and an export against diffusers' own loop."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import test_t_gate
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from exported import attempt
from rich.console import Console

from edgeflash import shelf
from edgeflash.bundle import Bundle, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.export import onnx_graph
from edgeflash.export.caching import check_rows, rows_of, without
from edgeflash.export.capture import Captured, Eager, Network, Sample
from edgeflash.export.line import export_student
from edgeflash.export.program import to_program
from edgeflash.export.ways import DeepCache, way_of
from edgeflash.export_options import AS_USUAL, ExportOptions
from edgeflash.golden import Sampler, load_tensors
from edgeflash.networks_sd import Unet
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance, Schedule, Step
from edgeflash.student import Student

WIDTH = 12


def unet(*down: str, layers: int = 1, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 8)[: len(down)],
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **changes,
    )
    return made.eval().requires_grad_(False)


def network(unet: UNet2DConditionModel, cells: tuple[int, int]) -> Network:
    n = "batch_size"
    told = {
        "sample": ("sample", (n, 4, *cells)),
        "timestep": ("timestep", ()),
        "encoder_hidden_states": ("conditioning", (n, 5, WIDTH)),
    }
    inputs = tuple(
        TensorSpec(name=name, role=role, shape=shape, dtype="float32")
        for name, (role, shape) in told.items()
    )
    out = inputs[0].model_copy(update={"name": "out_sample", "role": "prediction"})
    return Network("unet", Unet(unet), inputs, (out,))


def given(cells: tuple[int, int], rows: int = 1, seed: int = 1) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, *cells, generator=random)
    return [x, torch.tensor(500.0), torch.randn(rows, 5, WIDTH, generator=random)]


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


@pytest.mark.parametrize(
    ("made", "branches"),
    [
        (dict(down=(PLAIN,)), 2),
        (dict(down=(PLAIN, CROSS), mid_block_type=None), 4),
        (dict(down=(CROSS, PLAIN), layers=2), 6),
        (dict(down=(PLAIN, CROSS, PLAIN, PLAIN)), 8),
    ],
    ids=["one stage", "two, no middle", "two of two layers", "four"],
)
def test_fed_by_the_same_step_every_branch_gives_what_the_whole_gives(
    made: dict[str, Any], branches: int
) -> None:
    down = made.pop("down")
    whole_unet, cells = unet(*down, **made), (9, 13)  # odd sides: halved they are rounded up
    plain, sizes = network(whole_unet, cells), []
    x, t, text = given(cells)
    alone = plain.module(x, t, text)
    for branch in range(branches - 1):
        whole, cached = DeepCache(2, branch).cut(plain, cells)
        prediction, left = whole.module(x, t, text)
        assert torch.equal(prediction, alone)
        assert left.shape[1:] == whole.outputs[-1].shape[1:] == cached.inputs[-1].shape[1:]
        heard = [s.role for s in cached.inputs]
        told = [x, t, text] if "conditioning" in heard else [x, t]
        assert torch.equal(cached.module(*told, left), prediction)
        names = {name.removeprefix("network.network.") for name, _ in cached.module.named_modules()}
        assert "mid_block.resnets" not in names, "the middle is left out"
        assert f"up_blocks.{len(down) - 1}.resnets.{made.get('layers', 1)}" in names, "named so"
        sizes.append(sum(p.numel() for p in cached.module.parameters()))
    assert sizes == sorted(set(sizes)), "each branch runs more"
    assert sizes[-1] < sum(p.numel() for p in whole_unet.parameters())
    with pytest.raises(EdgeflashError, match=f"has the branches 0 to {branches - 2}"):
        DeepCache(2, branches - 1).cut(plain, cells)


@pytest.mark.parametrize("added", ["text", "text_time"], ids=["text in the time", "as SDXL"])
def test_what_else_tells_of_the_prompt_is_heard(added: str) -> None:
    """The outermost layers attend to nothing, but the prompt comes with the time too."""
    plain = test_t_gate.network(added)
    whole, cached = DeepCache(2).cut(plain, test_t_gate.CELLS)
    told = test_t_gate.given(plain, rows=2)
    prediction, left = whole.module(*told)
    heard = {spec.role for spec in cached.inputs}
    own = [each for spec, each in zip(plain.inputs, told, strict=True) if spec.role in heard]
    assert torch.equal(cached.module(*own, left), prediction)
    said = {"conditioning"} if added == "text" else {"pooled", "time_ids"}
    assert heard == {"sample", "timestep", "cache.0", *said}, "and nothing that is not listened to"


def test_other_blocks_are_refused() -> None:
    odd = unet("SimpleCrossAttnDownBlock2D", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    with pytest.raises(EdgeflashError, match="has a SimpleCrossAttnDownBlock2D"):
        DeepCache(2).cut(network(odd, (8, 8)), (8, 8))


def table(count: int) -> Schedule:
    steps = tuple(Step(t=900 - 100 * i, in_scale=1, a=0.9, b=-0.2) for i in range(count))
    return Schedule(sampler="s", prediction="epsilon", init=1, steps=steps)


def test_every_so_many_rows_are_whole() -> None:
    found = rows_of(DeepCache(3), table(8))
    assert [step.graph is None for step in found.steps] == [i % 3 == 0 for i in range(8)]
    assert without(found) == table(8)
    with pytest.raises(EdgeflashError, match="--deep-cache 3: in 1 step there is nothing"):
        check_rows(DeepCache(3), table(1))
    assert rows_of(DeepCache(3), table(1)) == table(1), "beside longer ones it stays whole"
    with pytest.raises(EdgeflashError, match="goes with --deep-cache alone"):
        way_of(ExportOptions(cache_branch=1))
    assert way_of(AS_USUAL) is None


def test_whole_at_every_row_it_draws_bit_for_bit_the_same() -> None:
    plain = network(unet(PLAIN, CROSS), (8, 8))
    whole, _ = DeepCache(2).cut(plain, (8, 8))
    sampler = Sampler(table(3), Guidance(kind="cfg", scale=2.0), (1, 4, 8, 8))
    text, bare = ({"conditioning": given((8, 8), seed=i)[2].numpy()} for i in (1, 2))
    ours, theirs = (sampler.loop(Eager(each), text, bare, 3) for each in (whole, plain))
    np.testing.assert_array_equal(ours, theirs)


def test_onnx_runs_both_graphs_on_any_number_of_pictures(tmp_path: Path) -> None:
    cells = (8, 8)
    graphs = DeepCache(2).cut(network(unet(CROSS, mid_block_type=None), cells), cells)
    feed: dict[str, Any] = {}
    for rows in (1, 3):
        for each in graphs:
            if rows == 1:
                x, t, text = given(cells)
                left = graphs[0].module(x, t, text)[1]
                named = zip(each.inputs, (x, t, text, left), strict=False)
                sample = Sample({spec.name: array.numpy() for spec, array in named}, {})
                program = to_program(each.module, each.inputs, sample)
                captured = Captured(each.component, program, each.inputs, each.outputs, (sample,))
                model = onnx_graph.translate(captured)
                onnx_graph.save(model, tmp_path / f"{each.component}.onnx", 2**20)
            path = tmp_path / f"{each.component}.onnx"
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            x, t, text = given(cells, rows)
            arrays = (x.numpy(), t.numpy(), text.numpy())
            feed |= dict(zip(("sample", "timestep", "encoder_hidden_states"), arrays, strict=True))
            told = {spec.name: feed[spec.name] for spec in each.inputs}
            answers = session.run([spec.name for spec in each.outputs], told)
            feed |= dict(zip([spec.name for spec in each.outputs], answers, strict=True))
            wanted = graphs[0].module(x, t, text)[0].numpy()
            np.testing.assert_allclose(feed["out_sample"], wanted, rtol=0, atol=1e-5)


def drawn_by_hand(folder: Path, interval: int, steps: int, scale: float) -> Any:
    """Latent and picture of the prompt "a red star" from seed 0: the whole UNet at every step.

    Where the paper takes the feature over, a hook puts the old one into the last layer.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    last = pipeline.unet.up_blocks[-1].resnets[-1]
    kept: list[torch.Tensor] = []
    calls = iter(range(steps))

    def hook(_: Any, told: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = told
        width = hidden.shape[1] - pipeline.unet.conv_in.out_channels
        if next(calls) % interval == 0:
            kept[:] = [hidden[:, :width].clone()]
        return (torch.cat([kept[0], hidden[:, width:]], 1), *others)

    last.register_forward_pre_hook(hook)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    noise = torch.from_numpy(randn((1, 4, 8, 8), 0))
    options = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise}
    return pipeline("a red star", **options, output_type="pt").images.numpy()


def test_an_export_draws_as_the_paper_says_and_tells_the_loss(
    guided_student: Path, tmp_path: Path
) -> None:
    told = Console(file=StringIO(), record=True, width=200)
    bundle = export_student(
        Student.open(guided_student),
        shelf.make(Target, "torch", {}),
        tmp_path / "bundle",
        ExportOptions(
            steps=(5,),
            guidance=Guidance(kind="cfg", scale=3.0),
            prompts=("a red star",),
            deep_cache=3,
        ),
        console=told,
    )
    manifest = Bundle.open(bundle.folder).manifest
    graphs = [step.graph for step in manifest.schedules[5].steps]
    assert graphs == [None, "cached", "cached", None, "cached"]
    assert manifest.format_version == 2
    figures = {(f.rung, f.component, f.metric): f.value for f in manifest.parity}
    assert figures["L3", "pipeline", "psnr_db"] > 80
    assert figures["L1", "unet_cached", "psnr_db"] > 80
    assert figures["L2", "unet_cached", "delta_ratio"] == pytest.approx(1, abs=1e-3)
    assert figures["L2", "unet_cached", "timestep_ratio"] == pytest.approx(1, abs=1e-3)

    golden = load_tensors(bundle.folder / "goldens/0.safetensors")
    ours = golden["image"].clip(-1, 1) / 2 + 0.5
    assert psnr_db(drawn_by_hand(guided_student, 3, 5, 3.0), ours, peak=1.0) > 80
    apart_db = psnr_db(drawn_by_hand(guided_student, 1, 5, 3.0), ours, peak=1.0)
    assert manifest.caching and manifest.caching.interval == 3
    assert manifest.caching.image_psnr_db == pytest.approx(apart_db, abs=0.05)
    assert 20 < apart_db < 70, "caching shows, and not too much"
    assert f"deep-cache 3: the pictures are {apart_db:.1f} dB from" in told.export_text()

    runtime = shelf.make(Runtime, "torch", {})
    with TextToImage(bundle, runtime, low_memory=True) as pipeline:
        found = pipeline.generate(Request("a red star")).latent
    np.testing.assert_allclose(found, golden["latent"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "options", "why"),
    [("coreml", {}, "knows one graph"), ("onnx", {"fused": 1}, "into fused=1 so far")],
)
def test_what_cannot_lower_two_graphs_says_so_before_the_work(
    guided_student: Path, tmp_path: Path, to: str, options: dict[str, Any], why: str
) -> None:
    target = shelf.make(Target, to, options)
    said = attempt(guided_student, tmp_path / "b", target, deep_cache=2, steps=(4,))
    assert said.startswith(f"--deep-cache 2: --to {to} ") and why in said
    assert said.endswith("leave one of them out")
    torch_target = shelf.make(Target, "torch", {})
    said = attempt(guided_student, tmp_path / "b", torch_target, deep_cache=2, steps=(1,))
    assert "in 1 step there is nothing" in said


def test_way_keeps_the_student_s_own_network_whole() -> None:
    made = unet(PLAIN, CROSS)
    plain = network(made, (8, 8))
    names = [name for name, _ in made.named_modules()]
    before = plain.module(*given((8, 8)))
    DeepCache(2).cut(plain, (8, 8))
    assert [name for name, _ in made.named_modules()] == names
    assert torch.equal(plain.module(*given((8, 8))), before)
