"""The pipeline over hand-made ONNX networks whose few-step loop has a closed form."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import (
    ENTRY,
    IDS,
    LENGTH,
    ROWS,
    SCALE,
    SHIFT,
    Spy,
    closed_form,
    mean_of,
    pixels_of,
    tiny,
)

from edgeflash import noise, shelf
from edgeflash.bundle import Bundle, describe_file
from edgeflash.disk import MANIFEST
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Runtime
from edgeflash.runtimes.on_onnx import OnnxRuntime
from edgeflash.runtimes.pipeline import Request, TextToImage


def altered(folder: Path, **fields: Any) -> Bundle:
    """The bundle with fields of its manifest replaced."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return Bundle.open(folder)


def spied(folder: Path, **options: Any) -> tuple[TextToImage, Spy]:
    spy = Spy(provider="cpu", threads=1)
    return TextToImage(Bundle.open(folder), spy, **options), spy


def assert_close(latent: Any, expected: Any) -> None:
    np.testing.assert_allclose(latent, expected, rtol=0, atol=2e-6)


# --- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [(), (1,), ("n",)], ids=["rank 0", "[1]", "[n]"])
def test_three_steps_match_the_closed_form(tmp_path: Path, timestep: Any) -> None:
    batch = 1 if timestep == (1,) else "n"
    pipeline, _ = spied(tiny(tmp_path / "b", timestep=timestep, batch=batch))
    result = pipeline.generate(Request("a red star", seed=7))
    expected = closed_form(7, mean_of("a red star"))
    assert_close(result.latent[0], expected)
    assert result.images.shape == (1, 8, 8, 3) and result.images.dtype == np.uint8
    assert np.abs(result.images[0].astype(int) - pixels_of(expected)).max() <= 1
    assert result.tokens.tolist() == [list(IDS["a red star"])]


@pytest.mark.parametrize("batch", ["n", 1, 2], ids=["free", "one", "two"])
def test_image_j_of_a_batch_is_the_image_of_seed_plus_j(tmp_path: Path, batch: Any) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", batch=batch))
    prompts = ("a red star", "blue ring", "a red star")
    result = pipeline.generate(Request(prompts, seed=11))
    for j, prompt in enumerate(prompts):
        assert_close(result.latent[j], closed_form(11 + j, mean_of(prompt)))
    assert len(spy.calls("unet")) == 3 * {"n": 1, 1: 3, 2: 2}[batch]
    assert [len(call["input_ids"]) for call in spy.calls("text_encoder")] == [2]  # each text once


@pytest.mark.parametrize("batch", ["n", 1, 2], ids=["free", "one", "two"])
def test_cfg_joins_the_empty_prompt_and_the_prompt(tmp_path: Path, batch: Any) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", guidance={"kind": "cfg", "scale": 4}, batch=batch))
    result = pipeline.generate(Request(("a red star", "blue ring"), seed=1))
    for j, prompt in enumerate(("a red star", "blue ring")):
        mixed = mean_of("") + 4 * (mean_of(prompt) - mean_of(""))
        assert_close(result.latent[j], closed_form(1 + j, mixed))
    assert len(spy.calls("unet")) == 3 * {"n": 1, 1: 4, 2: 2}[batch]


def test_one_timestep_serves_every_row(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b", timestep=(1,), guidance={"kind": "cfg", "scale": 4})
    pipeline, spy = spied(folder)
    result = pipeline.generate(Request(("a red star", "blue ring"), seed=1))
    for j, prompt in enumerate(("a red star", "blue ring")):
        mixed = mean_of("") + 4 * (mean_of(prompt) - mean_of(""))
        assert_close(result.latent[j], closed_form(1 + j, mixed))
    assert {call["timestep"].shape for call in spy.calls("unet")} == {(1,)}


def test_cfg_scale_and_negative_come_from_the_request(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", guidance={"kind": "cfg", "scale": 4}))
    result = pipeline.generate(Request("a red star", guidance=2.5, negative="blue ring"))
    mixed = mean_of("blue ring") + 2.5 * (mean_of("a red star") - mean_of("blue ring"))
    assert_close(result.latent[0], closed_form(0, mixed))
    spy.log.clear()
    unguided = pipeline.generate(Request("a red star", guidance=1))
    assert_close(unguided.latent[0], closed_form(0, mean_of("a red star")))
    assert [len(call["sample"]) for call in spy.calls("unet")] == [1, 1, 1]  # half the work


def test_pixels_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    pipeline, _ = spied(tiny(tmp_path / "b", guidance={"kind": "cfg", "scale": 4}))
    images = [pipeline.generate(Request("blue ring", guidance=g)).images for g in (0, 60)]
    assert images[0].max() < 255 or images[0].min() > 0  # not all at one end anyway
    assert np.unique(images[1]).tolist() in ([0], [255])  # a wrap-around would give others


def test_embedded_guidance_feeds_the_embedding_of_the_scale(tmp_path: Path) -> None:
    guidance = {"kind": "embedded", "scale": 3.0, "channels": 6}
    pipeline, _ = spied(tiny(tmp_path / "b", guidance=guidance))
    for scale in (None, 5.0):
        result = pipeline.generate(Request(("a red star",) * 2, guidance=scale))
        w = 1000 * ((scale or 3.0) - 1)
        angles = w * 10000.0 ** -(np.arange(3) / 2)
        wave = np.concatenate([np.sin(angles), np.cos(angles)]).mean()
        for j in (0, 1):
            expected = closed_form(j, mean_of("a red star") + wave)
            np.testing.assert_allclose(result.latent[j], expected, atol=2e-5)


def test_a_large_batch_is_cut(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", rows=ROWS[:1]))
    result = pipeline.generate(Request(("a red star",) * 40, seed=1))
    assert [len(call["sample"]) for call in spy.calls("unet")] == [32, 8]
    for j in (0, 31, 32, 39):
        assert_close(result.latent[j], closed_form(1 + j, mean_of("a red star"), rows=ROWS[:1]))


def test_a_folded_timestep_is_not_fed(tmp_path: Path) -> None:
    rows = (ROWS[0] | {"c": 0.0},)
    pipeline, spy = spied(tiny(tmp_path / "b", timestep=None, rows=rows))
    result = pipeline.generate(Request("a red star", seed=5))
    assert_close(result.latent[0], closed_form(5, mean_of("a red star"), rows=rows, timed=False))
    assert set(spy.calls("unet")[0]) == {"sample", "encoder_hidden_states"}


def test_a_half_precision_network_is_fed_and_read_as_such(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", dtype="float16"))
    result = pipeline.generate(Request("a red star", seed=7))
    assert spy.calls("unet")[0]["sample"].dtype == np.float16
    assert result.latent.dtype == np.float32  # the loop itself keeps float32
    np.testing.assert_allclose(result.latent[0], closed_form(7, mean_of("a red star")), atol=3e-3)


def test_image_to_image_enters_where_the_strength_says(tmp_path: Path) -> None:
    pipeline, _ = spied(tiny(tmp_path / "b", encoder=True))
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    request = Request(("a red star", "blue ring"), seed=3, image=picture, strength=0.67)
    events = list(pipeline.stream(request))
    assert [e.stage for e in events] == [
        "text_encoder",
        "vae_encoder",
        "unet",
        "unet",
        "vae_decoder",
    ]
    cells = (picture / 127.5 - 1).reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    latent = (cells[[0, 1, 2, 0]] - SHIFT) * SCALE
    result = events[-1].result
    assert result is not None
    for j, prompt in enumerate(("a red star", "blue ring")):
        start = 0.4 * latent + 0.9 * noise.randn((4, 4, 4), 3 + j, 0)
        first: Any = ENTRY["first"]
        expected = closed_form(3 + j, mean_of(prompt), rows=(first, ROWS[2]), start=start)
        assert_close(result.latent[j], expected)


def test_nan_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    rows = (ROWS[0], ROWS[2] | {"d": 0.0, "b": 1e39})
    pipeline, _ = spied(tiny(tmp_path / "b", rows=rows))
    told = r"unet gave NaN or infinity at step 2 of 2.*fp32"
    with pytest.raises(EdgeflashError, match=told), np.errstate(over="ignore"):
        pipeline.generate(Request("a red star"))


# --- events, cancel, memory -------------------------------------------------------------------


def test_events_tell_every_stage(tmp_path: Path) -> None:
    pipeline, _ = spied(tiny(tmp_path / "b"))
    events = list(pipeline.stream(Request("a red star", seed=7)))
    assert [(e.stage, e.step, e.steps) for e in events] == [
        ("text_encoder", 0, 3),
        *[("unet", i, 3) for i in (1, 2, 3)],
        ("vae_decoder", 3, 3),
    ]
    first, last = events[1], events[-1].result
    assert first.latent is not None and first.result is None and first.elapsed_ms > 0
    assert_close(first.latent[0], closed_form(7, mean_of("a red star"), rows=ROWS[:1]))
    assert last and (pipeline.preview(events[3]) == last.images).all()


def test_components_are_opened_once_and_kept(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b", encoder=True))
    with pipeline:
        assert spy.life() == []
        pipeline.generate(Request("a red star"))
        pipeline.generate(Request("a red star"))
        opened = ["open text_encoder", "open unet", "open vae_decoder"]
        assert spy.life() == opened  # and no vae_encoder
    assert sorted(spy.life()[3:]) == ["close text_encoder", "close unet", "close vae_decoder"]


def test_low_memory_holds_one_component_at_a_time(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b")
    pipeline, spy = spied(folder, low_memory=True)
    frugal = pipeline.generate(Request("a red star", seed=2))
    names = ("text_encoder", "unet", "vae_decoder")
    assert spy.life() == [f"{verb} {name}" for name in names for verb in ("open", "close")]
    kept = spied(folder)[0].generate(Request("a red star", seed=2))
    np.testing.assert_array_equal(frugal.images, kept.images)


def test_closing_the_stream_cancels_and_frees(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b"), low_memory=True)
    stream = pipeline.stream(Request("a red star"))
    assert [next(stream).stage, next(stream).stage] == ["text_encoder", "unet"]
    stream.close()
    assert len(spy.calls("unet")) == 1 and spy.life()[-1] == "close unet"
    assert "open vae_decoder" not in spy.life()


def test_what_did_not_fit_of_a_prompt_is_told(tmp_path: Path) -> None:
    pipeline, _ = spied(tiny(tmp_path / "b"))
    result = pipeline.generate(Request(("a red star", "a red  Star blue ring")))
    assert result.cut == ("", "blue ring")
    np.testing.assert_array_equal(result.tokens[0], result.tokens[1])


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", steps=2), "cannot draw in 2 steps: its schedules are for 3"),
        (Request("a", guidance=3), "guidance scale 3: its guidance kind is 'none'"),
        (Request("a", negative="b"), "negative prompt: its guidance kind is 'none'"),
        (Request("a", size=(9, 8)), "draw 9x8 px: sides must be multiples of 2"),
        (Request("a", size=(0, 8)), "draw 0x8 px: sides must be multiples of 2"),
        (Request("a", size=(16, 8)), "draw 16x8 px: it was exported for 8x8"),
        (Request("a", image=np.zeros((8, 8, 3), np.uint8)), "from an image: it has no vae_encoder"),
        (Request("a", seed=-1), "seed -1 is outside"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_met(tmp_path: Path, request_: Request, message: str) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b"))
    with pytest.raises(EdgeflashError, match=message):
        pipeline.generate(request_)
    assert spy.log == []  # told before anything is loaded


def test_a_wrong_picture_or_scale_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b", encoder=True, guidance={"kind": "cfg", "scale": 2})
    pipeline, _ = spied(folder)
    with pytest.raises(EdgeflashError, match=r"image \(4, 8, 3\): it takes \(8, 8, 3\)"):
        pipeline.generate(Request("a", image=np.zeros((4, 8, 3), np.uint8)))
    with pytest.raises(EdgeflashError, match="scale -1: scales are 0 or more"):
        pipeline.generate(Request("a", guidance=-1))


def _edit(folder: Path, component: int, **changes: Any) -> dict[str, Any]:
    components = json.loads((folder / MANIFEST).read_text())["components"]
    part = components[component]
    for key, value in changes.items():
        if key in part:
            part[key] = value
        else:
            part["inputs"][-1][key] = value
    return {"components": components}


def test_bundles_that_cannot_be_honoured_name_the_field(tmp_path: Path) -> None:
    def refused(number: int, edit: Any, message: str, **options: Any) -> None:
        folder = tiny(tmp_path / str(number), **options)
        with pytest.raises(EdgeflashError, match=message) as caught:
            TextToImage(altered(folder, **edit(folder)), OnnxRuntime())
        assert "\n" not in str(caught.value)

    whole = {"kind": "embedded", "scale": 2.0, "channels": 6}
    refused(0, lambda f: _edit(f, 1, target="coreml"), "components.unet.target: is 'coreml'")
    refused(1, lambda f: _edit(f, 1, role="depth"), "unet.inputs: role 'depth' is not known")
    refused(2, lambda f: _edit(f, 0, dtype="bfloat16"), "input_ids.dtype: 'bfloat16' is none of")
    refused(3, lambda f: _edit(f, 2, layout="NHWC"), "latent_sample.layout: 'NHWC' is not NCHW")
    refused(
        4, lambda f: _edit(f, 2, name="vae"), "components: 'vae' is not known|vae_decoder is miss"
    )
    refused(5, lambda f: _edit(f, 1, dtype="int64"), "int64 cannot hold the timestep 900.5")
    refused(6, lambda f: {"default_steps": 4}, "schedules: none for 4 steps")
    refused(7, lambda f: {}, "use 3 timesteps, but components.unet has its timestep", timestep=None)
    refused(
        8, lambda f: {"guidance": whole}, "guidance.kind: is 'embedded', .* has no input of role"
    )
    refused(
        9, lambda f: {"guidance": {}}, "kind: is 'none', .* has an input of role", guidance=whole
    )
    wider = whole | {"channels": 8}
    refused(10, lambda f: {"guidance": wider}, "channels: is 8, .* takes 6", guidance=whole)


# --- runtimes ---------------------------------------------------------------------------------


def test_onnx_errors_are_one_line(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b")
    bundle = Bundle.open(folder)
    unet = bundle.component("unet")
    with pytest.raises(EdgeflashError, match=r"provider cuda: .*edgeflash\[onnx-gpu\]"):
        OnnxRuntime(provider="cuda").open(folder, unet)
    renamed = unet.inputs[0].model_copy(update={"name": "x"})
    other = unet.model_copy(update={"inputs": (renamed, *unet.inputs[1:])})
    with pytest.raises(EdgeflashError, match=r"components.unet: the model has no tensor 'x'"):
        OnnxRuntime().open(folder, other)
    (folder / "unet/model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(
        EdgeflashError, match=r"model.onnx: ONNX Runtime does not load it"
    ) as caught:
        OnnxRuntime().open(folder, unet)
    assert "\n" not in str(caught.value)


def test_the_bound_path_of_a_device_gives_the_same(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "b")
    unet = Bundle.open(folder).component("unet")
    plain, bound = (OnnxRuntime(provider="cpu").open(folder, unet) for _ in range(2))
    bound._bound = True  # as on CUDA, here with the CPU as the device
    conditioning = np.ones((1, LENGTH, 2), np.float32)
    conditioning.flags.writeable = False
    copies = []
    for k in (0, 1):
        inputs = {
            "sample": noise.randn((1, 4, 4, 4), 3, k),
            "encoder_hidden_states": conditioning,
            "timestep": np.array(500 + k, np.float32),
        }
        expected, found = plain(inputs)["out_sample"], bound(inputs)["out_sample"]
        np.testing.assert_array_equal(found, expected)
        copies.append({name: value for name, (_, value) in bound._held.items()})
    assert copies[0].keys() == {"encoder_hidden_states"}  # only what cannot change is kept
    assert copies[0]["encoder_hidden_states"] is copies[1]["encoder_hidden_states"]


def test_torch_runtime_agrees_with_onnx(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, sample: Any, encoder_hidden_states: Any, timestep: Any) -> Any:
            mean = encoder_hidden_states.mean((1, 2))[:, None, None, None]
            return (sample / 2 + mean + timestep / 1000,)

    folder = tiny(tmp_path / "b", batch=1)
    example = (torch.zeros(1, 4, 4, 4), torch.zeros(1, LENGTH, 2), torch.tensor(0.0))
    torch.export.save(torch.export.export(Net(), example), folder / "unet/model.pt2")
    bundle = Bundle.open(folder)
    unet = bundle.component("unet")
    file = describe_file(folder, "unet/model.pt2")
    runtime = shelf.make(Runtime, "torch", {"device": "cpu", "threads": 1})
    session = runtime.open(folder, unet.model_copy(update={"files": (file,)}))
    x = noise.randn((1, 4, 4, 4), 0)
    cond = np.ones((1, LENGTH, 2), np.float32)
    cond.flags.writeable = False
    inputs = {"timestep": np.array(500, np.float32), "encoder_hidden_states": cond, "sample": x}
    ours = OnnxRuntime().open(folder, unet)(inputs)["out_sample"]
    np.testing.assert_allclose(session(inputs)["out_sample"], ours, atol=1e-6)
    with pytest.raises(EdgeflashError, match=r"model.onnx: torch does not load it"):
        runtime.open(folder, unet)


def test_nothing_in_the_room_needs_torch() -> None:
    script = """
import importlib, pathlib, sys
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["transformers"] = None
import edgeflash.runtimes, edgeflash.tokenizer
room = pathlib.Path(edgeflash.runtimes.__file__).parent
for path in sorted(room.glob("*.py")):
    importlib.import_module(f"edgeflash.runtimes.{path.stem}")
assert "onnxruntime" not in sys.modules, "onnxruntime is imported before it is used"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_seed_of_a_request_is_the_seed_of_its_noise(tmp_path: Path) -> None:
    pipeline, spy = spied(tiny(tmp_path / "b"))
    request = Request("a red star", seed=2**63)
    pipeline.generate(request)
    pipeline.generate(replace(request, seed=1))
    first, other = spy.calls("unet")[0]["sample"], spy.calls("unet")[3]["sample"]
    np.testing.assert_allclose(first, 0.9 * 1.5 * noise.randn((1, 4, 4, 4), 2**63), rtol=1e-6)
    assert not np.array_equal(first, other)
