"""An OpenVINO bundle in int8 as NNCF makes it when it is asked for nothing.

    python nncf_defaults.py FP32_BUNDLE OUT

Denoiser and decoder are quantized, text encoders get int8 weights. Ranges come from noise: the time
of a call does not depend on them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino

MODEL = "openvino_model.xml"


def quantized(path: Path) -> openvino.Model:
    model = openvino.Core().read_model(path)
    if path.parent.name.startswith("text_encoder"):
        return nncf.compress_weights(model)
    rng = np.random.default_rng(0)
    calls = [{port.get_any_name(): noise(port, rng) for port in model.inputs} for _ in range(2)]
    kind = nncf.ModelType.TRANSFORMER if path.parent.name == "unet" else None
    return nncf.quantize(model, nncf.Dataset(calls), model_type=kind, subset_size=len(calls))


def noise(port: openvino.Output, rng: np.random.Generator) -> np.ndarray:
    """An input for one picture; a timestep where whole numbers are asked for."""
    shape = [1 if side.is_dynamic else side.get_length() for side in port.partial_shape]
    kind = port.element_type.to_dtype()
    return np.full(shape, 999, kind) if kind == np.int64 else rng.normal(size=shape).astype(kind)


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    draft = out.with_name(f".{out.name}")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(given, draft)
    for path in sorted(given.glob(f"*/{MODEL}")):
        openvino.save_model(quantized(path), draft / path.relative_to(given))
    draft.rename(out)
