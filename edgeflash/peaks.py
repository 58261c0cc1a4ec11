"""What this machine does at best: large products by the type of their sums, and a large copy."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection

import numpy as np

SIDE = 2048  # of the matrices
BLOCK = 2**27  # numbers that are copied, 512 MiB: more than caches hold
TRIES = 7
SUMS = {"int8": "int8", "int8-dynamic": "int8", "w8a8": "int8", "bf16": "bf16"}  # others: fp32


def sums_of(precision: str, inference_precision: object = "") -> str:
    """The type in which products are summed, by a component's precision and a runtime's option.

    fp16 is summed in float32 on CPUs, and weights alone in what they are multiplied with.
    """
    usual = "bf16" if inference_precision == "bf16" else "fp32"
    return SUMS.get(precision, usual)


def peaks(kinds: Collection[str] = ("fp32", "bf16", "int8")) -> dict[str, float]:
    """GFLOP/s of large products, by type, and GB/s of a large copy, read and written."""
    products = {"fp32": _float32, "bf16": _bfloat16, "int8": _int8}
    found = {kind: 2 * SIDE**3 / 1e9 / _best_s(products[kind]()) for kind in kinds}
    return found | {"GB/s": 2 * 4 * BLOCK / 1e9 / _best_s(_copy())}


def _best_s(call: Callable[[], object]) -> float:
    """Seconds, the best of some calls after one that warms up."""
    call()
    spent = []
    for _ in range(TRIES):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    del call
    gc.collect()
    return min(spent)


def _float32() -> Callable[[], object]:
    a = np.ones((SIDE, SIDE), np.float32)
    return lambda: a @ a


def _bfloat16() -> Callable[[], object]:
    import torch

    a = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    return lambda: a @ a


def _int8() -> Callable[[], object]:
    """A product of uint8 and int8 as ONNX Runtime does it, which is what int8 graphs run."""
    import onnxruntime
    from onnx import TensorProto, helper

    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [SIDE, SIDE])
    b = helper.make_tensor_value_info("b", TensorProto.INT32, [SIDE, SIDE])
    ones = np.ones((SIDE, SIDE), np.int8).tobytes()
    weight = helper.make_tensor("w", TensorProto.INT8, [SIDE, SIDE], ones, raw=True)
    node = helper.make_node("MatMulInteger", ["a", "w"], ["b"])
    graph = helper.make_graph([node], "product", [a], [b], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=cpu)
    given = {"a": np.ones((SIDE, SIDE), np.uint8)}
    return lambda: session.run(None, given)


def _copy() -> Callable[[], object]:
    import torch

    block = torch.ones(BLOCK)
    other = torch.empty_like(block)
    return lambda: other.copy_(block)
