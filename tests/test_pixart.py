"""PixArt-alpha through the whole line: small ones draw what diffusers' own pipeline draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from exported import Exported, attempt, export
from onnxruntime import InferenceSession
from PIL import Image
from tiny_pixart import WIDTH, write_pixart
from transformers import T5Tokenizer

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.distill import encoded
from edgeflash.distill.data import open_store
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.errors import EdgeflashError
from edgeflash.export import onnx_graph
from edgeflash.family_pixart import LENGTH
from edgeflash.lora import Lora
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.recipe import Data, recipe_of
from edgeflash.roles import Target
from edgeflash.rounding import rounded
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.tokenizer import read_tokenizer
from edgeflash.verify import refuse_below, runtime_for

PROMPT, SEED, STEPS = "a Red star", 5, 2  # the pipeline makes letters small
XL_2: dict[str, Any] = {  # PixArt-XL-2-512x512 and -1024-MS, transformer/config.json
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
    "norm_type": "ada_norm_single",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixart(tmp_path_factory.mktemp("pixart") / "small", sized=True)


@pytest.fixture(scope="module")
def diffusers_pipeline(folder: Path) -> Any:
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def onnx(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        return export(
            patch,
            folder,
            tmp_path_factory.mktemp("bundles") / "onnx",
            shelf.make(Target, "onnx", {}),
            steps=(STEPS,),
            guidance=Guidance(kind="cfg", scale=4.0),
            prompts=(PROMPT,),
            size=(16, 16),
        )


def test_pictures_are_those_that_diffusers_draws(onnx: Exported, diffusers_pipeline: Any) -> None:
    """The ladder has passed, of a transformer that also hears the size."""
    refuse_below(onnx.bundle.manifest.parity, onnx.bundle.folder)
    with TextToImage(onnx.bundle, runtime_for(onnx.bundle)) as pipeline:
        for scale, negative in ((4.0, ""), (1.0, ""), (4.0, "blue ring")):
            request = Request(PROMPT, seed=SEED, guidance=scale, negative=negative)
            drawn = pipeline.generate(request)
            theirs = _drawn(diffusers_pipeline, scale, negative)
            assert np.abs(theirs * 255 - drawn.images.transpose(0, 3, 1, 2)).max() < 1
            assert theirs.std() > 0.05, "it is no even grey"
        both = pipeline.generate(Request(("a ring", PROMPT), seed=SEED - 1, guidance=1.0)).latent
        alone = pipeline.generate(Request(PROMPT, seed=SEED, guidance=1.0)).latent
        np.testing.assert_allclose(both[1:], alone, atol=1e-4)
        assert not np.allclose(both[:1], alone, atol=1e-2), "it hears the prompt"


def _drawn(pipeline: Any, scale: float, negative: str) -> Any:
    """By diffusers: [1, 3, h, w], 0 to 1."""
    told = pipeline(
        PROMPT,
        negative_prompt=negative,
        guidance_scale=scale,
        latents=torch.from_numpy(randn((1, 4, 8, 8), SEED)),
        num_inference_steps=STEPS,
        height=16,
        width=16,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    )
    return told.images.numpy()


def test_the_manifest_names_denoiser_mask_and_sizes(onnx: Exported) -> None:
    bundle = onnx.bundle
    assert [c.name for c in bundle.manifest.components] == [
        "text_encoder",
        "transformer",
        "vae_decoder",
    ]
    assert bundle.denoiser.name == "transformer" and (bundle.folder / "transformer").is_dir()
    roles = ["sample", "timestep", "conditioning", "mask", "resolution", "aspect_ratio"]
    assert [spec.role for spec in bundle.denoiser.inputs] == roles
    given = onnx.captured["transformer"].samples[0].inputs
    assert given["resolution"].tolist() == [[16, 16]] and given["aspect_ratio"].tolist() == [[1]]
    tokens = read_tokenizer(bundle.folder, bundle.manifest.tokenizer)(PROMPT)
    assert given["encoder_attention_mask"].sum() == tokens.used < LENGTH
    fewer = bundle.manifest.components[:1] + bundle.manifest.components[2:]
    lame = Bundle(bundle.folder, bundle.manifest.model_copy(update={"components": fewer}))
    with pytest.raises(EdgeflashError, match="components: unet or transformer is missing"):
        TextToImage(lame, runtime_for(bundle))


def _in_halves(model: ir.Model, folder: Path, given: Any) -> tuple[Any, Any]:
    """First answers of an ONNX model, and of its half, every result of which is rounded."""
    onnx_graph.save(model, folder / "whole.onnx", 2**30)
    onnx_graph.to_half(model)
    onnx_graph.save(model, folder / "half.onnx", 2**30)
    models = (folder / "whole.onnx", rounded((folder / "half.onnx").read_bytes()))
    wanted, found = (InferenceSession(each).run(None, given)[0] for each in models)
    return wanted, found


@pytest.mark.parametrize("folded", [False, True], ids=["timestep-given", "timestep-folded"])
def test_half_precision_leaves_angles_alone(onnx: Exported, folded: bool, tmp_path: Path) -> None:
    """Timesteps, and 1024 px, as angles of up to some 1000 radians."""
    model = onnx_graph.load(onnx.bundle.folder / "transformer/model.onnx")
    given = dict(onnx.captured["transformer"].samples[0].inputs)
    given["resolution"] = np.array([[1023, 771]], np.float32)
    if folded:
        t = next(value for value in model.graph.inputs if value.name == "timestep")
        model.graph.inputs.remove(t)
        t.const_value = ir.tensor(given.pop("timestep"), name="timestep")
        model.graph.register_initializer(t)
    wanted, found = _in_halves(model, tmp_path, given)
    assert psnr_db(wanted, found) > 50


def test_half_precision_holds_what_t5_adds_up(onnx: Exported, tmp_path: Path) -> None:
    """T5-XXL's feed-forward layers leave float16's range; its norms bring the sums back."""
    model = onnx_graph.load(onnx.bundle.folder / "text_encoder/model.onnx")
    for node in model.graph:
        if node.metadata_props.get("layer", "").endswith(".wo"):
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            loud = 1e6 * weight.const_value.numpy()
            weight.const_value = ir.tensor(loud, name=weight.name)
    given = onnx.captured["text_encoder"].samples[0].inputs
    wanted, found = _in_halves(model, tmp_path, given)
    assert psnr_db(wanted, found) > 50


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    texts = ["a red star", "", "  Blue  RING? s ", "ring " * 200]
    texts += ["a\tred\nstar\u3000ring\u00a0s", "É \ufb01 \U0001f600", "a <pad> b</s><unk>"]
    student = Student.open(folder)
    theirs = T5Tokenizer.from_pretrained(folder / "tokenizer")(
        [text.lower().strip() for text in texts],
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
    )
    found = student.family.tokenize(folder / "tokenizer", texts)
    np.testing.assert_array_equal(found, theirs["input_ids"])
    read = read_tokenizer(folder, student.family.tokenizer(student))
    assert read(texts[3]).cut.startswith("ring") and not read(texts[0]).cut


def test_captions_are_encoded_anew_for_another_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is read once, for all captions."""
    home = shutil.copytree(folder, tmp_path / "student")
    data = Data(kind="folder", path=str(_pictures(tmp_path / "in")), size_px=16)
    store = open_store(data, 0, tmp_path / "cache")
    shop = Workshop(None, home, store, tmp_path, torch.device("cpu"))
    reads: list[str] = []

    def read(folder: Path, spec: Any) -> Any:
        reads.append(spec.folder)
        return read_tokenizer(folder, spec)

    monkeypatch.setattr(encoded, "read_tokenizer", read)
    rows, (before, _) = np.arange(len(store)), encoded.cached_conditioning(shop)
    assert len(store) > 1 and len(reads) == 2, "for the captions, and for none"
    path = home / "tokenizer/tokenizer.json"
    told = json.loads(path.read_text())
    swapped = {"▁red": "▁blue", "▁blue": "▁red"}
    for piece in told["model"]["vocab"]:
        piece[0] = swapped.get(piece[0], piece[0])
    path.write_text(json.dumps(told))
    after, _ = encoded.cached_conditioning(shop)
    assert not torch.equal(before(rows), after(rows))
    again, _ = encoded.cached_conditioning(shop)
    assert len(reads) == 5 and torch.equal(again(rows), after(rows)), "else it is taken up"


def test_methods_and_pipeline_hear_the_same(folder: Path, diffusers_pipeline: Any) -> None:
    """One tensor c is what the pipeline hands over in four; variances are left out."""
    student, pipeline = Student.open(folder), diffusers_pipeline
    texts = ["a red star", "ring"]
    transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer").eval()
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([500, 20])
    with torch.no_grad():
        ids = torch.from_numpy(student.family.tokenize(folder / "tokenizer", texts))
        c = student.family.encode_prompt([pipeline.text_encoder], [ids])
        assert c.shape == (2, LENGTH + -(-LENGTH // WIDTH), WIDTH)
        text, mask, _, _ = pipeline.encode_prompt(texts, False, device=x.device)
        sizes = {
            "resolution": torch.tensor([[16.0, 8.0]] * 2),
            "aspect_ratio": torch.full((2, 1), 2.0),
        }
        wanted = transformer(
            x, text, t, added_cond_kwargs=sizes, encoder_attention_mask=mask
        ).sample[:, :4]
        heard = student.family.listening(student, transformer)
        torch.testing.assert_close(heard(x, t, c).sample, wanted)
        torch.testing.assert_close(heard(x, 500, c).sample[:1], wanted[:1])


def test_a_folded_timestep_still_hears_the_rest(tmp_path: Path) -> None:
    """Under the name that its hub repository still has, and without sizes."""
    student = Student.open(write_pixart(tmp_path / "s", called="Transformer2DModel"))
    family = student.family
    specs = family.signature(student, "transformer", (16, 16), folded=True)[0]
    assert [spec.role for spec in specs] == ["sample", "conditioning", "mask"]
    whole = family.load(student, "transformer")
    folded = family.load(student, "transformer", timestep=749.0)
    mask = torch.ones(2, LENGTH)
    mask[:, 9:] = 0
    given = [torch.randn(2, 4, 8, 8), torch.randn(2, LENGTH, WIDTH), mask]
    with torch.no_grad():
        found = folded(*given)
        torch.testing.assert_close(found, whole(given[0], torch.tensor(749.0), *given[1:]))
        assert not torch.allclose(found, folded(*given[:2], torch.ones_like(mask)), atol=1e-5)


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for i, caption in enumerate(("a red star", "blue ring", "", "a star")):
        Image.new("RGB", (16, 16), (60 * i, 99, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_a_recipe_gives_a_student_that_diffusers_loads(folder: Path, tmp_path: Path) -> None:
    data = {"kind": "folder", "path": str(_pictures(tmp_path / "in")), "size_px": 16}
    stage = {"by": "lcm", "w_min": 1, "w_max": 2, "steps": 2, "batch_size": 2, "weight_decay": 0}
    plain = {"name": "small", "teacher": str(folder), "data": data, "stage": [stage]}
    out = distill(recipe_of(plain, "test"), tmp_path / "student")
    student, pipeline = Student.open(out), PixArtAlphaPipeline.from_pretrained(str(out))
    assert student.family.name == "pixart" and student.guidance() == Guidance()
    taught = PixArtTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    ours = pipeline.transformer.state_dict()
    assert set(ours) == set(taught)
    name = "proj_out.bias"
    moved = (ours[name] - taught[name]).view(4, 8) != 0
    assert moved[:, :4].all() and not moved[:, 4:].any(), "the variance is not trained"
    plain["stage"] = [{"by": "sdxs"}]
    with pytest.raises(
        EdgeflashError, match=r"'sdxs' .* sd, sdxl alone.* by .*dmd,.*lcm"
    ) as caught:
        distill(recipe_of(plain, "test"), tmp_path / "other")
    assert "\n" not in str(caught.value)
    plain["stage"] = [{"by": "lcm", "lora_rank": 2, "steps": 1, "batch_size": 1}]
    with pytest.raises(EdgeflashError, match=r"lcm.lora_rank: no LoRA is put on transformers"):
        distill(recipe_of(plain, "test"), tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"by": "tcd"},
        {"by": "perflow", "windows": 2, "solver_steps": 2},
        {"by": "dmd", "fake_updates": 1, "gan_weight": 1e-3},
        {"by": "progressive"},
        {"by": "consistency"},
        {"by": "scm"},
        {"by": "add", "student_steps": 2},
        {"by": "ladd", "solver_steps": 2, "critic_updates": 1},
        {"by": "imagine"},
        {"by": "flash"},
        {"by": "ufogen"},
        {"by": "gan", "solver_steps": 2, "r1_every": 1},
    ],
    ids=lambda options: options["by"],
)
def test_methods_that_need_no_unet_train_it(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    data = {"kind": "folder", "path": str(_pictures(tmp_path / "in")), "size_px": 16}
    stage = options | {"steps": 2, "batch_size": 2, "weight_decay": 0, "clip_norm": 1e3}
    plain = {"name": "small", "teacher": str(folder), "data": data, "stage": [stage]}
    out = distill(recipe_of(plain, "test"), tmp_path / "student")
    taught, ours = (
        PixArtTransformer2DModel.from_pretrained(each / "transformer").state_dict()
        for each in (folder, out)
    )
    moved = {name for name in taught if not torch.equal(ours[name], taught[name])}
    assert {"pos_embed.proj.weight", "proj_out.bias"} <= moved
    assert all(tensor.isfinite().all() for tensor in ours.values())


def test_full_size_networks_have_the_published_parameters() -> None:
    """The size embedders of 1024 px come on top: 611,349,152."""
    counts = {}
    for size in (64, 128):
        with torch.device("meta"):
            transformer = PixArtTransformer2DModel(**XL_2, sample_size=size)
        counts[size] = transformer.num_parameters()
        names = transformer.state_dict()
        assert names["caption_projection.linear_1.weight"].shape == (1152, 4096)
        assert names["proj_out.weight"].shape == (32, 1152)
        sized = "adaln_single.emb.resolution_embedder.linear_1.weight" in names
        assert sized == (size == 128)
    assert counts == {64: 610_856_096, 128: 611_349_152}


def test_what_does_not_fit_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    broken = write_pixart(tmp_path / "broken")
    for component, changes, told in (
        ("transformer", {"caption_channels": 77}, "width 77 .*gives 16"),
        ("transformer", {"norm_type": "ada_norm_zero"}, "norm_type 'ada_norm_zero'"),
        ("transformer", {"out_channels": 5}, "takes 4 and gives 5 channels"),
        ("text_encoder", {"pad_token_id": 2}, "pads with 0, but .* takes 2"),
    ):
        path = broken / component / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(EdgeflashError, match=told) as caught:
            Student.open(broken)
        assert "\n" not in str(caught.value)
        path.write_text(before)
    with pytest.raises(EdgeflashError, match="LoRAs are fused into UNets alone"):
        Student.open(broken, [Lora(tmp_path / "style.safetensors")])
    with pytest.raises(EdgeflashError, match="multiples of 4 px"):
        student = Student.open(broken)
        student.family.signature(student, "transformer", (16, 18))
    target = shelf.make(Target, "onnx", {})
    said = attempt(broken, tmp_path / "bundle", target, merge_tokens=0.5)
    assert "--merge-tokens: merges those of UNets alone" in said
    for asked in ({"deep_cache": 2}, {"gate": 1}):
        said = attempt(broken, tmp_path / "bundle", target, **asked)
        assert "cuts UNets alone so far, and" in said and "has a transformer: leave it out" in said
    (broken / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(EdgeflashError, match=r"sentencepiece.*makes it of spiece\.model"):
        Student.open(broken)
