"""A bundle of hand-made ONNX networks whose few-step loop has a closed form, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field

from edgeflash import noise
from edgeflash.bundle import describe_file
from edgeflash.disk import MANIFEST
from edgeflash.roles import Session
from edgeflash.runtimes.on_onnx import OnnxRuntime

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "star</w>", "blue</w>", "ring</w>"]
EMBEDDING = np.linspace(-1, 1, 2 * len(WORDS), dtype=np.float32).reshape(-1, 2)
LENGTH, SCALE, SHIFT = 5, 0.5, 0.25
ROWS: tuple[dict[str, float], ...] = (
    {"t": 900.5, "in_scale": 0.9, "a": 0.7, "b": -0.3, "c": 0.2},
    {"t": 500.0, "in_scale": 0.8, "a": 0.6, "b": -0.4, "c": 0.1, "d": 0.3, "e": -0.2},
    {"t": 100.0, "in_scale": 1.0, "a": 0.5, "b": -0.5, "d": 0.2},
)
ENTRY = {"start": 1, "p": 0.4, "q": 0.9, "first": {"t": 500, "in_scale": 0.8, "a": 0.6, "b": -0.4}}


def _graph(
    path: Path, nodes: list[Any], ins: dict[str, Any], outs: dict[str, Any], **data: Any
) -> None:
    def values(table: dict[str, Any]) -> list[Any]:
        kinds = {
            "float32": TensorProto.FLOAT,
            "float16": TensorProto.FLOAT16,
            "int64": TensorProto.INT64,
        }
        return [helper.make_tensor_value_info(n, kinds[k], s) for n, (k, s) in table.items()]

    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in data.items()]
    graph = helper.make_graph(nodes, "tiny", values(ins), values(outs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def _text_encoder(path: Path) -> tuple[Any, Any]:
    """conditioning = EMBEDDING[tokens]"""
    ins = {"input_ids": ("int64", ["n", LENGTH])}
    outs = {"last_hidden_state": ("float32", ["n", LENGTH, 2])}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    _graph(path, nodes, ins, outs, table=EMBEDDING)
    return ({"input_ids": "tokens"}, ins), ({"last_hidden_state": "conditioning"}, outs)


def _unet(path: Path, batch: Any, *, timestep: Any, guided: bool, dtype: str) -> tuple[Any, Any]:
    """prediction = sample / 2 + mean(conditioning) + timestep / 1000 + mean(guidance)"""
    ins = {
        "sample": (dtype, [batch, 4, 4, 4]),
        "encoder_hidden_states": (dtype, [batch, LENGTH, 2]),
    }
    roles = {"sample": "sample", "encoder_hidden_states": "conditioning"}
    mean = {"keepdims": 1}
    nodes = [
        helper.make_node("Mul", ["sample", "half"], ["v0"]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["m"], **mean),
        helper.make_node("Unsqueeze", ["m", "last"], ["m4"]),
        helper.make_node("Add", ["v0", "m4"], ["v1"]),
    ]
    if timestep is not None:
        ins["timestep"], roles["timestep"] = ("float32", timestep), "timestep"
        shape = [-1, 1, 1, 1] if timestep else [1, 1, 1, 1]
        nodes += [
            helper.make_node("Constant", [], ["tshape"], value_ints=shape),
            helper.make_node("Reshape", ["timestep", "tshape"], ["t4"]),
            helper.make_node("Mul", ["t4", "milli"], ["tm"]),
            helper.make_node("CastLike", ["tm", "sample"], ["tc"]),
            helper.make_node("Add", ["v1", "tc"], ["v2"]),
        ]
    if guided:
        ins["timestep_cond"], roles["timestep_cond"] = (dtype, [batch, 6]), "guidance"
        nodes += [
            helper.make_node("ReduceMean", ["timestep_cond", "one"], ["g"], **mean),
            helper.make_node("Unsqueeze", ["g", "last2"], ["g4"]),
            helper.make_node("Add", [nodes[-1].output[0], "g4"], ["v3"]),
        ]
    nodes.append(helper.make_node("Identity", [nodes[-1].output[0]], ["out_sample"]))
    outs = {"out_sample": (dtype, [batch, 4, 4, 4])}
    constants = {
        "half": np.asarray(0.5, dtype),
        "milli": np.float32(1e-3),
        "axes": [1, 2],
        "last": [3],
    }
    _graph(path, nodes, ins, outs, **constants, one=[1], last2=[2, 3])
    return (roles, ins), ({"out_sample": "prediction"}, outs)


def _decoder(path: Path) -> tuple[Any, Any]:
    """image = the first three channels, each cell as 2x2 px"""
    ins = {"latent_sample": ("float32", ["n", 4, "h", "w"])}
    outs = {"sample": ("float32", ["n", 3, "H", "W"])}
    nodes = [
        helper.make_node("Slice", ["latent_sample", "zero", "three", "axis"], ["rgb"]),
        helper.make_node("Resize", ["rgb", "", "scales"], ["sample"], mode="nearest"),
    ]
    scales = np.array([1, 1, 2, 2], np.float32)
    _graph(path, nodes, ins, outs, zero=[0], three=[3], axis=[1], scales=scales)
    return ({"latent_sample": "latent"}, ins), ({"sample": "image"}, outs)


def _encoder(path: Path) -> tuple[Any, Any]:
    """(mean, log-variance) = (2x2 means and their first channel again, 8 channels in all)"""
    ins = {"sample": ("float32", ["n", 3, 8, 8])}
    outs = {"latent_parameters": ("float32", ["n", 8, 4, 4])}
    nodes = [
        helper.make_node("AveragePool", ["sample"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Gather", ["p", "channels"], ["latent_parameters"], axis=1),
    ]
    _graph(path, nodes, ins, outs, channels=[0, 1, 2, 0, 2, 2, 2, 2])
    return ({"sample": "image"}, ins), ({"latent_parameters": "latent"}, outs)


def _component(folder: Path, name: str, described: tuple[Any, Any]) -> dict[str, Any]:
    def specs(roles: dict[str, str], table: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"name": n, "role": roles[n], "shape": s, "dtype": k} for n, (k, s) in table.items()
        ]

    file = describe_file(folder, f"{name}/model.onnx").model_dump()
    common = {"name": name, "target": "onnx", "precision": "fp32", "files": [file]}
    return common | {"inputs": specs(*described[0]), "outputs": specs(*described[1])}


def tiny(
    folder: Path,
    *,
    guidance: dict[str, Any] | None = None,
    batch: Any = "n",
    timestep: Any = (),
    rows: tuple[dict[str, float], ...] = ROWS,
    encoder: bool = False,
    dtype: str = "float32",
) -> Path:
    """A whole bundle: 8x8 px, 4x4x4 latents."""
    guidance = guidance or {"kind": "none"}
    shape = None if timestep is None else list(timestep)
    guided = guidance["kind"] == "embedded"
    unet = _unet(folder / "unet/model.onnx", batch, timestep=shape, guided=guided, dtype=dtype)
    described = {
        "text_encoder": _text_encoder(folder / "text_encoder/model.onnx"),
        "unet": unet,
        "vae_decoder": _decoder(folder / "vae_decoder/model.onnx"),
    }
    if encoder:
        described["vae_encoder"] = _encoder(folder / "vae_encoder/model.onnx")
    (folder / "tokenizer").mkdir()
    vocabulary = {word: i for i, word in enumerate([*WORDS, *"aredstbluing"])}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    merges = "r e|re d</w>|s t|st a|sta r</w>|b l|bl u|blu e</w>|r i|ri n|rin g</w>"
    pieces = {m.replace(" ", "") for m in merges.split("|")} | {c + "</w>" for c in "degr"}
    vocabulary |= {p: len(vocabulary) + i for i, p in enumerate(sorted(pieces - vocabulary.keys()))}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges.replace("|", "\n"))
    table = {"sampler": "made-up", "prediction": "epsilon", "init": 1.5, "steps": rows}
    entries = [{"start": i, "p": 0.1, "q": 0.2} for i in range(len(rows))]
    entries[1:2] = [ENTRY] if len(rows) > 1 else []
    manifest = {
        "format_version": 1,
        "kind": "bundle",
        "family": "sd",
        "name": "tiny",
        "components": [_component(folder, name, value) for name, value in described.items()],
        "tokenizer": dict(
            kind="clip", folder="tokenizer", max_length=LENGTH, start_id=0, end_id=1, pad_id=1
        ),
        "latent": {"channels": 4, "downsampling": 2, "scale": SCALE, "shift": SHIFT},
        "image": {"height": 8, "width": 8},
        "schedules": {len(rows): table | {"entries": entries}},
        "default_steps": len(rows),
        "guidance": guidance,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


IDS = {"a red star": (0, 2, 3, 4, 1), "blue ring": (0, 5, 6, 1, 1), "": (0, 1, 1, 1, 1)}


def mean_of(prompt: str) -> float:
    return float(EMBEDDING[list(IDS[prompt])].mean(dtype=np.float64))


def closed_form(
    seed: int,
    conditioning: float,
    *,
    rows: tuple[dict[str, float], ...] = ROWS,
    start: np.ndarray[Any, Any] | None = None,
    timed: bool = True,
) -> np.ndarray[Any, Any]:
    """The loop of one image in float64, written from house rules and not from the code."""
    draw = [noise.randn((4, 4, 4), seed, k).astype(np.float64) for k in range(len(rows) + 1)]
    x = 1.5 * draw[0] if start is None else start
    before: tuple[Any, Any] = (0, 0)
    for i, row in enumerate(rows):
        output = row["in_scale"] * x / 2 + conditioning + timed * row["t"] / 1000
        after = row["a"] * x + row["b"] * output + row.get("c", 0) * draw[i + 1]
        after = after + row.get("d", 0) * before[1] + row.get("e", 0) * before[0]
        x, before = after, (x, output)
    return x


def pixels_of(latent: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 [8, 8, 3] of one latent, through the tiny decoder."""
    z = (latent / SCALE + SHIFT)[:3].repeat(2, 1).repeat(2, 2)
    return np.rint(((z + 1) / 2).clip(0, 1) * 255).transpose(1, 2, 0).astype(np.uint8)


class Spy(OnnxRuntime):
    """Writes down what is opened, closed and called."""

    log: list[tuple[str, Any]] = Field(default_factory=list)

    def open(self, folder: Path, component: Any) -> Any:
        return SpySession(super().open(folder, component), component.name, self.log)

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [inputs for what, inputs in self.log if what == name]

    def life(self) -> list[str]:
        return [what for what, _ in self.log if " " in what]


class SpySession(Session):
    def __init__(self, inner: Session, name: str, log: list[tuple[str, Any]]) -> None:
        self.inner, self.name, self.log = inner, name, log
        log.append((f"open {name}", None))

    def __call__(self, inputs: Any) -> Any:
        self.log.append((self.name, dict(inputs)))
        return self.inner(inputs)

    def close(self) -> None:
        self.log.append((f"close {self.name}", None))
        self.inner.close()
