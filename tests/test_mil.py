"""The evaluator of Core ML packages: against torch, against coremltools, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError
from edgeflash.runtimes import mil_operators as mil
from edgeflash.runtimes.mil_program import Program, data_folder
from edgeflash.runtimes.mil_weights import STORED, Weights, unpacked

ct = pytest.importorskip(
    "coremltools", reason="coremltools is not installed: pip install 'edgeflash[coreml-export]'"
)
cto = pytest.importorskip("coremltools.optimize.coreml")

from coremltools.converters.mil import Builder as mb  # noqa: E402 - only where it is installed

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def built(function: Callable[[Any], Any], *shape: int, ios: int = 16, half: bool = False) -> Any:
    """A model of one function of x."""
    target = ct.target[f"iOS{ios}"]
    program = mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=target)(function)
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    return ct.convert(
        program,
        minimum_deployment_target=target,
        compute_precision=precision,
        outputs=[ct.TensorType(dtype=np.float32)],
        skip_model_load=True,
    )


def saved(model: Any, folder: Path) -> Path:
    path = folder / "m.mlpackage"
    model.save(str(path))
    return path


def answer(package: Path, x: Any, **options: bool) -> Any:
    program = Program(package, **options)
    (name,), (given,) = program.outputs, program.inputs
    return program({given: x})[name]


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strides", "pad", "dilations", "groups"),
    [
        ((1, 1), (0, 0, 0, 0), (1, 1), 1),
        ((2, 2), (1, 1, 1, 1), (1, 1), 1),
        ((2, 1), (0, 1, 2, 0), (1, 2), 2),
    ],
)
def test_convolutions(strides: Any, pad: Any, dilations: Any, groups: int) -> None:
    x, weight, bias = normal(2, 4, 9, 8), normal(6, 4 // groups, 3, 2), normal(6)
    padded = F.pad(torch.from_numpy(x), (pad[2], pad[3], pad[0], pad[1]))
    wanted = F.conv2d(
        padded,
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        stride=strides,
        dilation=dilations,
        groups=groups,
    )
    found = mil.conv(x, weight, bias, strides, "custom", pad, dilations, groups)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_norms() -> None:
    x, gamma, beta = normal(2, 5, 3), normal(3), normal(3)
    t = [torch.from_numpy(a) for a in (x, gamma, beta)]
    wanted = F.layer_norm(t[0], (3,), t[1], t[2], 1e-3).numpy()
    for axes in ([2], [-1]):
        found = mil.layer_norm(x, np.array(axes), gamma, beta, 1e-3)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    channels = mil.layer_norm(x, np.array([1]), normal(5) * 0 + 2)
    wanted = 2 * F.layer_norm(t[0].transpose(1, 2), (5,)).transpose(1, 2).numpy()
    np.testing.assert_allclose(channels, wanted, rtol=1e-4, atol=1e-5)
    mean, variance = normal(5), abs(normal(5))
    given = [torch.from_numpy(a) for a in (mean, variance, mean, variance)]
    wanted = F.batch_norm(t[0], given[0], given[1], given[2], given[3], eps=0.1).numpy()
    found = mil.batch_norm(x, mean, variance, mean, variance, 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_activations() -> None:
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    exact = np.array([math.erf(v) for v in x])
    assert abs(mil.erf(x) - exact).max() < 1e-6
    t = torch.from_numpy(x)
    for mode, approximate in (("EXACT", "none"), ("TANH_APPROXIMATION", "tanh")):
        wanted = F.gelu(t, approximate=approximate).numpy()
        np.testing.assert_allclose(mil.gelu(x, mode), wanted, atol=3e-6)
    np.testing.assert_allclose(mil.silu(x), F.silu(t).numpy(), atol=1e-6)


def test_attention() -> None:
    q, k, v, mask = normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6), normal(4, 5)
    t = [torch.from_numpy(a) for a in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*t).numpy()
    np.testing.assert_allclose(mil.attention(q, k, v), wanted, atol=1e-5)
    for given in (mask, mask > 0):
        given[:, 0] = 1
        wanted = F.scaled_dot_product_attention(*t, attn_mask=torch.from_numpy(given)).numpy()
        np.testing.assert_allclose(mil.attention(q, k, v, given), wanted, atol=1e-5)


def test_what_only_moves_numbers() -> None:
    x = normal(2, 3, 4)
    cut = mil.slice_by_index(
        x, np.array([0, 1, 0]), np.array([9, 3, 4]), np.array([1, 1, 2]), end_mask=[True, 0, 0]
    )
    np.testing.assert_array_equal(cut, x[:, 1:3, 0:4:2])
    alone = mil.slice_by_index(
        x, np.array([1, 0, 0]), np.array([2, 3, 4]), squeeze_mask=[True, 0, 0]
    )
    np.testing.assert_array_equal(alone, x[1])
    parts = mil.split(x, 2, split_sizes=np.array([1, 3]))
    assert [part.shape[2] for part in parts] == [1, 3]
    assert mil.reshape(x, np.array([0, -1])).shape == (2, 12)
    np.testing.assert_array_equal(mil.gather(x, np.array([2, 0]), 1), x[:, [2, 0]])
    np.testing.assert_array_equal(mil.gather_nd(x, np.array([[1, 2], [0, 1]])), x[[1, 0], [2, 1]])
    up = F.interpolate(torch.from_numpy(x)[None], scale_factor=(2, 3), mode="nearest")[0].numpy()
    np.testing.assert_array_equal(mil.upsample(x, np.float32(2), np.float32(3)), up)
    padded = mil.pad(x, np.array([1, 2]), "replicate")
    np.testing.assert_array_equal(padded, np.pad(x, [(0, 0), (0, 0), (1, 2)], mode="edge"))


def test_quantized_activations() -> None:
    x, scale = np.array([-9.0, -0.26, 0.24, 9.0], np.float32), np.float32(0.5)
    found = mil.quantize(x, np.array(scale), "uint8", np.array(4, np.uint8))
    assert found.tolist() == [0, 3, 4, 22]
    back = mil.dequantize(found.astype(np.uint8), np.array(scale), np.array(4, np.uint8))
    assert back.tolist() == [-2.0, -0.5, 0.0, 9.0]


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_blobs_are_read_as_coremltools_wrote_them(kind: str, tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import types
    from coremltools.libmilstoragepython import _BlobStorageWriter

    bits = int("".join(filter(str.isdigit, kind)))
    calls = {"FLOAT32": "float", "FLOAT16": "fp16"}
    write = getattr(
        _BlobStorageWriter(str(tmp_path / "weight.bin")),
        f"write_{calls.get(kind, kind.lower())}_data",
    )
    if kind.startswith("FLOAT"):
        wanted = normal(5, 7).astype(f"f{bits // 8}")
    else:
        low, high = (0, 2**bits) if kind[0] == "U" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        wanted = RANDOM.integers(low, high, (5, 7)).astype(
            types.nptype_from_builtin(types.string_to_builtin(kind.lower()))
        )
    flat = np.ascontiguousarray(wanted.ravel())
    start = write(flat.view(np.uint16) if kind == "FLOAT16" else flat)
    found = Weights(tmp_path).read("weight.bin", start, kind, (5, 7))
    np.testing.assert_array_equal(found, wanted)


def test_packed_bits_run_on_over_bytes() -> None:
    packed = np.array([0b10_110_001, 0b1_010_011_0], np.uint8)
    assert unpacked(packed, 3, 5).tolist() == [0b001, 0b110, 0b010, 0b011, 0b010]


@pytest.mark.parametrize(
    ("ios", "config"),
    [
        (16, cto.OpLinearQuantizerConfig(dtype="int8", weight_threshold=0)),
        (16, cto.OpLinearQuantizerConfig(mode="linear", dtype="uint8", weight_threshold=0)),
        (16, cto.OpPalettizerConfig(nbits=6, weight_threshold=0)),
        (18, cto.OpLinearQuantizerConfig(dtype="int8", weight_threshold=0)),
        (18, cto.OpPalettizerConfig(nbits=3, weight_threshold=0)),
        (
            18,
            cto.OpPalettizerConfig(
                nbits=2, weight_threshold=0, granularity="per_grouped_channel", group_size=4
            ),
        ),
    ],
)
def test_weights_in_fewer_bits(ios: int, config: Any, tmp_path: Path) -> None:
    """What a palette or a scale stands for, as coremltools itself unpacks it."""
    weight, x = normal(8, 16, 3, 3), normal(1, 16, 6, 6)
    model = built(lambda x: mb.conv(x=x, weight=weight), 1, 16, 6, 6, ios=ios)
    compress = (
        cto.linear_quantize_weights
        if isinstance(config, cto.OpLinearQuantizerConfig)
        else cto.palettize_weights
    )
    small = compress(model, cto.OptimizationConfig(global_config=config))
    kinds = {op.type for op in _operations(small)}
    assert any(kind.startswith("constexpr") for kind in kinds), kinds
    plain = cto.decompress_weights(small)
    (tmp_path / "plain").mkdir()
    found, wanted = answer(saved(small, tmp_path), x), answer(saved(plain, tmp_path / "plain"), x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert abs(found - mil.conv(x, weight)).max() > 1e-4, "nothing was compressed"


def _operations(model: Any) -> Any:
    function = model.get_spec().mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


# --- programs -------------------------------------------------------------------------------------


def test_it_rounds_where_the_program_does(tmp_path: Path) -> None:
    package = saved(built(lambda x: mb.square(x=x), 1, 3, half=True), tmp_path)
    x = np.array([[1.0009766, 300.0, 1e-4]], np.float32)
    rounded, whole = answer(package, x), answer(package, x, halves=False)
    assert rounded[0, 1] == np.inf, "300² is beyond half precision"
    assert rounded[0, 0] == np.float32(np.float16(1.0009766) ** 2) != whole[0, 0]
    np.testing.assert_allclose(whole, x * x, rtol=1e-6)


def test_what_it_lacks_is_named(tmp_path: Path) -> None:
    package = saved(built(lambda x: mb.erf(x=x, name="odd"), 1, 3), tmp_path)
    with pytest.raises(EdgeflashError, match=r"operator erf \(odd\) is not known"):
        Program(package)


def test_altered_packages_are_refused(tmp_path: Path) -> None:
    weight = normal(16, 64)
    package = saved(built(lambda x: mb.linear(x=x, weight=weight), 1, 64), tmp_path)
    program = Program(package)
    with pytest.raises(EdgeflashError, match=r"input x is \(1, 3\), not \(1, 64\)"):
        program({"x": normal(1, 3)})
    with pytest.raises(EdgeflashError, match="has no function 'other': main"):
        Program(package, "other")
    blob = data_folder(package) / "weights/weight.bin"
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-8])
    with pytest.raises(EdgeflashError, match="bytes are too few"):
        Program(package)
    blob.write_bytes(whole.replace(b"\xef\xbe\xad\xde", bytes(4)))
    with pytest.raises(EdgeflashError, match="no weights begin here"):
        Program(package)
    blob.unlink()
    with pytest.raises(EdgeflashError, match=r"weight\.bin: not readable"):
        Program(package)
    (data_folder(package) / "model.mlmodel").write_bytes(b"\xff" * 99)
    with pytest.raises(EdgeflashError, match="does not read as a Core ML model"):
        Program(package)
    (package / "Manifest.json").write_text(json.dumps({}))
    with pytest.raises(EdgeflashError, match="not the manifest of a Core ML package"):
        Program(package)
