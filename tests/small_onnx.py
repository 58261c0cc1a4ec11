"""Small ONNX networks in the place of a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def network(path: Path, *nodes: Any, recorded: Any = (), **data: Any) -> Path:
    """From sample [n, 4, 4, 4] to y.

    Args:
        path: file to write.
        nodes: its operators.
        recorded: names and sides of float32 results, as exporters write them down.
        data: constants, as arrays or messages.
    """
    sample = helper.make_tensor_value_info("sample", FLOAT, ["n", 4, 4, 4])
    y = helper.make_tensor_value_info("y", FLOAT, None)
    constants = [
        value
        if isinstance(value, TensorProto)
        else numpy_helper.from_array(np.asarray(value), name)
        for name, value in data.items()
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [sample],
        [y],
        constants,
        value_info=[helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in recorded],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path)
    return path
