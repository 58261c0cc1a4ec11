"""Core ML, fewer bits: weights linear and by palettes, int8 activations, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_coreml import Small, evaluated_db, kinds, small, to, weight_bytes
from torch import nn

from edgeflash.arguments import read_options
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Sample
from edgeflash.export.quantize_coreml import check_kept
from edgeflash.floors import PRECISIONS

INSTALL = "is not installed: pip install 'edgeflash[coreml-export]'"
pytest.importorskip("coremltools", reason=f"coremltools {INSTALL}")
pytest.importorskip("sklearn", reason=f"scikit-learn {INSTALL}")


@pytest.mark.parametrize(
    ("options", "kind", "share", "floor_db"),
    [
        ({"precision": "int8"}, "constexpr_affine_dequantize", 0.6, 40),
        ({"precision": "int8", "ios": 18}, "constexpr_blockwise_shift_scale", 0.6, 40),
        ({"precision": "lut6"}, "constexpr_lut_to_dense", 0.5, 30),
        ({"precision": "lut4", "ios": 18, "group": 4}, "constexpr_lut_to_dense", 0.4, 22),
        ({"precision": "w8a8", "ios": 17}, "quantize", 0.6, 30),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_fewer_bits(
    options: dict[str, Any], kind: str, share: float, floor_db: float, tmp_path: Path
) -> None:
    half = to(precision="fp16", ios=options.get("ios", 16))
    half.lower(small(half), tmp_path / "fp16")
    target = to(**options, smallest=500)
    unet = small(target)
    target.lower(unet, tmp_path)
    package = tmp_path / "Unet.mlpackage"
    assert kind in kinds(package)
    assert evaluated_db(tmp_path / "fp16/Unet.mlpackage", unet) > evaluated_db(package, unet) + 3
    assert evaluated_db(package, unet) > floor_db
    if options["precision"] != "w8a8":
        assert weight_bytes(package) < share * weight_bytes(tmp_path / "fp16/Unet.mlpackage")
    assert options["precision"] in PRECISIONS


def test_masks_and_what_is_kept_stay(tmp_path: Path) -> None:
    plain = to(precision="lut2", smallest=0)
    plain.lower(small(plain), tmp_path / "plain")
    held = kinds(tmp_path / "plain/Unet.mlpackage").count("constexpr_lut_to_dense")
    assert held == 3, "two convolutions and a linear layer, not the mask"
    target = to(precision="lut2", smallest=0, keep=("conv*",))
    target.lower(small(target), tmp_path)
    assert kinds(tmp_path / "Unet.mlpackage").count("constexpr_lut_to_dense") < held
    check_kept(("conv*",), tmp_path)
    with pytest.raises(EdgeflashError, match=r"keep: no convol.* called 'attn\*': .* like conv"):
        check_kept(("conv*", "attn*"), tmp_path)


def test_what_cannot_be_squeezed_is_refused(tmp_path: Path) -> None:
    def refused(module: nn.Module | None = None, **options: Any) -> str:
        with pytest.raises(EdgeflashError) as caught:
            target = to(**options)
            target.lower(small(target, module), tmp_path / "out")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    broken = Small()
    broken.inner.weight.data[0, 0] = torch.inf
    assert "weight inner.weight holds infinities" in refused(broken, precision="lut4")
    told = "target 'coreml': precision w8a8: is known since iOS 17: set ios=17, or leave it"
    assert refused(precision="w8a8") == told
    assert "set ios=18" in refused(precision="lut3", ios=17)
    assert "group: is known since iOS 18" in refused(precision="lut4", group=8)
    assert "'unt'" in refused(precision="int8", quantized=("unt",))
    odd = refused(precision="lut4", group=48, ios=18, smallest=0)
    assert "does not divide into groups of 48 channels" in odd
    assert "join: is known since iOS 18" in refused(join=("nowhere",))
    assert "cannot be joined" in refused(join=("nowhere",), ios=18, chunk_mib=1)
    assert "chunk 1 of 2 has" in refused(precision="fp16", chunk_mib=0.001)
    assert "w8a8" in refused(precision="w8a8", ios=17, chunk_mib=0.001)


def test_astray_after_quantization_is_named_and_mended(tmp_path: Path) -> None:
    target = to(precision="lut1", smallest=0)
    unet = small(target)
    target.lower(unet, tmp_path)
    found = target.diverged("unet", lambda: unet, tmp_path, 25.0)
    assert found.startswith("conv ") and "leave it alone: --set 'keep=" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Unet.mlpackage"]
    option = found.partition("--set '")[2].removesuffix("'")
    again = to(precision="lut1", smallest=0, **read_options([option]))
    again.lower(unet, tmp_path / "again")
    check_kept(again.model_dump()["keep"], tmp_path / "again")
    held = [
        kinds(folder / "Unet.mlpackage").count("constexpr_lut_to_dense")
        for folder in (tmp_path, tmp_path / "again")
    ]
    assert held == [3, 2]
    following = again.diverged("unet", lambda: unet, tmp_path / "again", 25.0)
    assert not following or option.removesuffix("]") + ", " in following, "it stays left alone"


def test_the_call_that_went_astray_is_looked_into(tmp_path: Path) -> None:
    """The mask of minus infinity is the same in all; only the last call leaves float16's range."""
    target = to(precision="fp16")
    unet = small(target, Small(factor=30))
    target.lower(unet, tmp_path)
    assert target.diverged("unet", lambda: unet, tmp_path, 45.0) == ""
    given = {name: 1e4 * array for name, array in unet.samples[0].inputs.items()}
    with torch.no_grad():
        gives = unet.program.module()(*map(torch.from_numpy, given.values())).numpy()
    loud = replace(unet, samples=(*unet.samples, Sample(given, {"noise_pred": gives})))
    found = target.diverged("unet", lambda: loud, tmp_path, 45.0)
    assert "beyond float16's 65,504" in found
