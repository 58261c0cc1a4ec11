"""Core ML, lowering: Apple's layouts and factor, attention, chunks, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import QUIET
from small_coreml import Small, evaluated_db, kinds, small, to, weight_bytes
from tiny_bundle import tiny
from torch import nn

from edgeflash.bundle import Bundle, Component, Image, Latent, Lineage, TensorSpec, describe_file
from edgeflash.errors import EdgeflashError
from edgeflash.export import coreml_norms, coreml_resources
from edgeflash.export.capture import Captured, Network, Sample
from edgeflash.export.coreml_attention import split_einsum
from edgeflash.export.coreml_networks import TextEncoder
from edgeflash.export.line import export_student
from edgeflash.export.pack import write_manifest
from edgeflash.export.program import to_program
from edgeflash.export_options import ExportOptions
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.runtimes.mil_program import Program
from edgeflash.student import Student, folder_sha256
from edgeflash.verify import refuse_below, verify

INSTALL = "is not installed: pip install 'edgeflash[coreml-export]'"
pytest.importorskip("coremltools", reason=f"coremltools {INSTALL}")
pytest.importorskip("sklearn", reason=f"scikit-learn {INSTALL}")


def test_sums_beyond_half_precision_are_caught(tmp_path: Path) -> None:
    """Weights that fit and an answer that fits, but what lies between does not."""
    target = to(precision="fp16")
    unet = small(target, Small(factor=3e4))
    target.lower(unet, tmp_path)
    assert not evaluated_db(tmp_path / "Unet.mlpackage", unet) > 45
    found = target.diverged("unet", lambda: unet, tmp_path, 45.0)
    assert found.startswith("add add") and "e+04" in found, "the first sum beyond 65504"
    assert found.endswith("its values are beyond float16's 65,504: --precision fp32")
    fine = to(precision="fp32")
    fine.lower(small(fine, Small(factor=3e4)), tmp_path / "fp32")
    assert evaluated_db(tmp_path / "fp32/Unet.mlpackage", unet) > 80


class Normed(nn.Module):
    """A group norm of numbers whose squares half precision cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.enter.weight.data *= 300

    def forward(self, sample: Any, _: Any) -> Any:
        return self.leave(self.norm(self.enter(sample)))


def test_norms_are_scaled_where_half_precision_ends(tmp_path: Path) -> None:
    target = to(precision="fp16")
    plain, scaled = small(target, Normed()), Normed().eval()
    coreml_norms.watch(scaled)
    for sample in plain.samples:
        scaled(*map(torch.from_numpy, sample.inputs.values()))
    coreml_norms.unwatch(scaled)
    assert scaled.norm.largest > 256
    coreml_norms.rescale(scaled)
    assert isinstance(scaled.norm, coreml_norms.ScaledGroupNorm)
    mended = small(target, scaled)
    for before, after in zip(plain.samples, mended.samples, strict=True):
        np.testing.assert_allclose(after.outputs["noise_pred"], before.outputs["noise_pred"], 1e-4)
    floors_db = []
    for name, captured in (("plain", plain), ("mended", mended)):
        target.lower(captured, tmp_path / name)
        floors_db.append(evaluated_db(tmp_path / name / "Unet.mlpackage", captured))
    assert floors_db[0] < 45 < floors_db[1]


# --- networks -------------------------------------------------------------------------------------


class Moments(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.cat([x, x - 40], 1)


@pytest.mark.parametrize("tiny", [False, True])
def test_apple_s_factor_is_folded_in(tiny: bool) -> None:
    latent = Latent(channels=4, downsampling=2, scale=0.5, shift=0.25)
    target = to()
    x = torch.randn(1, 4, 2, 2)
    as_student = x / latent.scale + latent.shift
    apple = target.scales(latent)
    as_apple = x / apple.scale + apple.shift

    def adapted(component: str, module: nn.Module, role: str) -> nn.Module:
        spec = TensorSpec(name="x", role=role, shape=("n", 4, 2, 2), dtype="float32")
        return target.adapt(Network(component, module, (spec,), (spec,)), latent).module

    decoded = adapted("vae_decoder", nn.Identity(), "image")(as_apple)
    torch.testing.assert_close(decoded, as_student)
    encoder = nn.Identity() if tiny else Moments()
    mean, log_variance = adapted("vae_encoder", encoder, "latent")(as_student).chunk(2, 1)
    torch.testing.assert_close(mean, as_apple)
    torch.testing.assert_close((mean - apple.shift) * apple.scale, x)
    if tiny:
        assert (log_variance == -30).all()
    else:
        wanted = (as_student - 40).clamp(-30, 20).exp().sqrt() * latent.scale
        torch.testing.assert_close(log_variance.exp().sqrt() * apple.scale, wanted)


def test_types_of_timesteps() -> None:
    spec = TensorSpec(name="timestep", role="timestep", shape=("n",), dtype="float32")
    half = to(precision="fp16")
    assert half.takes(spec, whole=True).dtype == "float16", "as Apple's Python runner feeds it"
    assert half.takes(spec, whole=False).dtype == "float32", "halves cannot hold 999.5"
    assert to().takes(spec, whole=True).dtype == "float32"


def test_what_stays_in_fp32_takes_floats() -> None:
    target = to(precision="int8", quantized=("unet",), rest="fp32")
    for role, dtype in (("latent", "float32"), ("image", "float32"), ("sample", "float16")):
        spec = TensorSpec(name="x", role=role, shape=("n", 4, 2, 2), dtype="float32")
        assert target.takes(spec, whole=True).dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        {"only_cross_attention": (False, True), "mid_block_type": None},
    ],
    ids=str,
)
def test_split_attention_gives_the_same(options: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    plain: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**plain | options).eval()
    given = (torch.randn(1, 4, 8, 6), torch.tensor(500), torch.randn(1, 5, 24))
    with torch.no_grad():
        wanted = unet(*given).sample
        split_einsum(unet)
        found = unet(*given).sample
    assert not any(isinstance(m, nn.LayerNorm) for m in unet.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_that_cannot_be_split_is_refused() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        attention_type="gated",
    )
    said = "gated self-attention cannot be split; use attention=original"
    with pytest.raises(EdgeflashError, match=said):
        split_einsum(unet)


def test_split_attention_passes_for_the_original(one_step_student: Path, tmp_path: Path) -> None:
    """A whole UNet, its timestep folded in, in int8 and in two chunks, held to plain torch."""
    options = {"attention": "split_einsum", "ios": 17, "smallest": 200, "chunk_mib": 0.042}
    target = to(precision="int8", **options)
    student = Student.open(one_step_student)
    options = ExportOptions(prompts=("a red star",))
    bundle = export_student(student, target, tmp_path / "out", options, console=QUIET)
    assert all(f.passed for f in bundle.manifest.parity)
    assert bundle.component("unet").precision == "int8"
    chunks = [bundle.folder / f"UnetChunk{number}.mlpackage" for number in (1, 2)]
    assert not (bundle.folder / "Unet.mlpackage").exists(), "chunks outrank it in Swift"
    assert "einsum" in kinds(chunks[0]) + kinds(chunks[1])
    assert all("constexpr_affine_dequantize" in kinds(chunk) for chunk in chunks)
    sizes = [weight_bytes(chunk) for chunk in chunks]
    assert max(sizes) < 0.65 * sum(sizes)
    refuse_below(verify(Bundle.open(bundle.folder)), bundle.folder)
    assert any("--keep-timestep" in told for told in coreml_resources.lacks(bundle.folder))


# --- chunks and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("ios", [16, 18])
def test_chunks_give_what_the_whole_gives(ios: int, tmp_path: Path) -> None:
    target = to(precision="fp16", ios=ios, chunk_mib=0.014)
    unet = small(target)
    files = target.lower(unet, tmp_path)
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {
        "UnetChunk1.mlpackage",
        "UnetChunk2.mlpackage",
    }
    last = None
    for sample in unet.samples:
        known = dict(sample.inputs)
        for number in (1, 2):
            last = Program(tmp_path / f"UnetChunk{number}.mlpackage")
            known |= last(known)
        assert psnr_db(sample.outputs["noise_pred"], known["noise_pred"]) > 45
    assert last is not None and last.outputs == ("noise_pred",)


def decoder_at(target: Target, height: int, width: int) -> Captured:
    """A decoder of always the same weights at some size, on one random latent."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 99, 3), nn.ReLU(), nn.Conv2d(99, 3, 3)).eval()
    z = TensorSpec(name="z", role="latent", shape=("n", 4, height, width), dtype="float32")
    image = z.model_copy(
        update={"name": "image", "role": "image", "shape": (1, 3, height - 4, width - 4)}
    )
    inputs = (target.takes(z, whole=True),)
    given = torch.randn(inputs[0].shape)
    with torch.no_grad():
        sample = Sample({"z": given.numpy()}, {"image": module(given).numpy()})
    return Captured("vae_decoder", to_program(module, inputs, sample), inputs, (image,), (sample,))


def test_sizes_share_their_weights(tmp_path: Path) -> None:
    target = to(precision="fp16", ios=18)
    square, wide = decoder_at(target, 16, 16), decoder_at(target, 16, 24)
    other = tmp_path / "other"
    target.lower(square, other)
    paths = [path.relative_to(other) for path in sorted(other.rglob("*")) if path.is_file()]
    decoder = Component(
        name="vae_decoder",
        target="coreml",
        precision="fp16",
        files=tuple(describe_file(other, path.as_posix()) for path in paths),
        inputs=square.inputs,
        outputs=square.outputs,
    )
    told = {"components": (decoder,), "image": Image(height=16, width=16)}
    manifest = Bundle.open(tiny(tmp_path / "tiny")).manifest.model_copy(update=told)
    (other / "edgeflash.json").write_text(manifest.model_dump_json())
    joining = target.model_copy(update={"join": (str(other),)})
    target.lower(wide, tmp_path / "alone")
    joining.lower(wide, tmp_path / "both")
    package = tmp_path / "both/VAEDecoder.mlpackage"
    assert weight_bytes(package) < 1.1 * weight_bytes(tmp_path / "alone/VAEDecoder.mlpackage")
    for captured, function in ((wide, ""), (square, "size_16x16")):
        sample = captured.samples[0]
        found = Program(package, function)(sample.inputs)["image"]
        assert psnr_db(sample.outputs["image"], found) > 45
    with pytest.raises(EdgeflashError, match="is of the same size, 16x16"):
        joining.lower(square, tmp_path / "again")


def test_large_token_ids_survive_half_precision(tmp_path: Path) -> None:
    """Ids come as floats, and half precision holds whole numbers up to 2048 only."""
    table = nn.Embedding(49408, 2)
    table.weight.data = (
        torch.stack([torch.arange(49408) // 256, torch.arange(49408) % 256], 1) * 1.0
    )
    ids = np.array([[2049, 49407, 32769]], np.float32)
    spec = TensorSpec(name="input_ids", role="tokens", shape=("n", 3), dtype="int64")
    output = TensorSpec(name="out", role="conditioning", shape=(1, 3, 2), dtype="float32")
    for ios in (16, 17):
        target = to(precision="fp16", ios=ios)
        inputs = (target.takes(spec, whole=True),)
        sample = Sample({"input_ids": ids}, {})
        program = to_program(TextEncoder(table), inputs, sample)
        captured = Captured("text_encoder", program, inputs, (output,), (sample,))
        target.lower(captured, tmp_path / str(ios))
        found = Program(tmp_path / f"{ios}/TextEncoder.mlpackage")(sample.inputs)["out"]
        assert (found[0] @ [256, 1]).tolist() == ids[0].tolist()


def test_bundles_to_join_are_refused_before_the_work(
    one_step_student: Path, tmp_path: Path
) -> None:
    student, folders = Student.open(one_step_student), []
    for name in ("a", "b", "other"):
        manifest = Bundle.open(tiny(tmp_path / name)).manifest
        made_from = None if name == "other" else folder_sha256(student.folder)
        told = {"lineage": Lineage(student_sha256=made_from)}
        told |= {"image": Image(height=16, width=24 if name == "a" else 32)}
        write_manifest(manifest.model_copy(update=told), tmp_path / name)
        folders.append(str(tmp_path / name))

    def refused(*join: str) -> str:
        target = to(precision="fp16", ios=18, join=join)
        with pytest.raises(EdgeflashError) as caught:
            export_student(student, target, tmp_path / "out", console=QUIET)
        assert not list(tmp_path.glob("out*"))
        return str(caught.value)

    to(precision="fp16", ios=18, join=tuple(folders[:2])).check_student(student)
    assert refused(*folders) == f"join: {folders[2]}: was made from another student"
    said = refused(folders[0], folders[1], folders[0])
    assert said == f"join: {folders[0]}: is of the size of {folders[0]}, 16x24: leave one out"
