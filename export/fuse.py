"""A whole bundle as one ONNX graph: token ids and noise in, pictures out.

The lowered networks, called as `runtimes/pipeline.py` calls them, with the sampler's table unrolled
in between. Every weight is there once, however many steps there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edgeflash.bundle import ANSWER, Bundle, Component, Manifest, TensorSpec, describe_file
from edgeflash.calls import Part
from edgeflash.roles import Runtime
from edgeflash.schedule import Schedule, Step
from edgeflash.tokenizer import read_tokenizer

from . import onnx_graph

NAME = "pipeline"
DOMAIN = "edgeflash"  # of the networks, until they are inlined


def fuse(
    bundle: Bundle, runtime: Runtime, rows: int, precision: str, external_bytes: int
) -> Component:
    """Writes `pipeline.onnx` beside the components of a bundle.

    It draws in the bundle's default steps, with the guidance scale of the manifest. Its inputs are
    the text encoder's tokens [n, s] and float32 noise [k, n, c, h, w]: draw 0 is what pictures
    start from, draw i + 1 what step i adds (`edgeflash/noise.py`), up to the last that adds any.
    It gives uint8 pictures [n, H, W, 3]. For classifier-free guidance it holds what the text
    encoder makes of the empty prompt.

    All shapes are fixed. With a free n ONNX Runtime plans the memory of so many operators in time
    that grows with their square: 5.7 s of CPU to load four steps of the embedded student, not 0.9.

    Args:
        bundle: whole but for this file.
        runtime: opens the text encoder, for the empty prompt.
        rows: n, pictures of a call.
        precision: of the components, for the record.
        external_bytes: more weights than this go to a file of their own.
    """
    manifest = bundle.manifest
    schedule = manifest.schedules[manifest.default_steps]
    graph = _Graph(bundle)
    text_encoder, latent, image = bundle.component("text_encoder"), manifest.latent, manifest.image
    cells = (image.height // latent.downsampling, image.width // latent.downsampling)
    tokens = text_encoder.inputs[0]
    tokens = tokens.model_copy(update={"shape": (rows, *tokens.shape[1:])})
    noise = TensorSpec(
        name="noise",
        role="noise",
        shape=(_draws(schedule), rows, latent.channels, *cells),
        dtype="float32",
    )
    pixels = TensorSpec(
        name="images",
        role="pixels",
        shape=(rows, image.height, image.width, 3),
        dtype="uint8",
        layout="NHWC",
        low=0,
        high=255,
    )
    ids, drawn = _value(tokens), _value(noise)
    conditioning = _condition(graph, bundle, runtime, ids, rows)
    x = _loop(graph, manifest, schedule, drawn, conditioning, rows)
    output = _decode(graph, manifest, x)
    output.name, output.dtype, output.shape = pixels.name, ir.DataType.UINT8, ir.Shape(pixels.shape)
    files = onnx_graph.save(
        graph.model([ids, drawn], output), bundle.folder / f"{NAME}.onnx", external_bytes
    )
    return Component(
        name=NAME,
        target=text_encoder.target,
        precision=precision,
        files=tuple(describe_file(bundle.folder, path.name) for path in files),
        inputs=(tokens, noise),
        outputs=(pixels,),
    )


class _Graph:
    """An ONNX graph in the making, that can call the networks of a bundle by role."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tape = ir.tape.Tape()
        self.functions: dict[str, ir.Function] = {}
        self.weights: dict[str, list[ir.Value]] = {}
        self.ir_version = 0

    def op(self, kind: str, *inputs: ir.Value | float, **attributes: Any) -> ir.Value:
        """One operator; numbers among its inputs are float32."""
        values = [v if isinstance(v, ir.Value) else self.constant(np.float32(v)) for v in inputs]
        return self.tape.op(kind, values, attributes)

    def constant(self, array: Any) -> ir.Value:
        name = f"constant_{len(self.tape.initializers)}"
        return self.tape.initializer(ir.tensor(np.asarray(array), name=name))

    def call(self, name: str, **by_role: ir.Value) -> ir.Value:
        """What a network answers; roles that it lacks are left out."""
        component = self.bundle.component(name)
        if name not in self.functions:
            self._add(component)
        inputs = [by_role[spec.role] for spec in component.inputs]
        answers = self.tape.op_multi_out(
            name,
            [*inputs, *self.weights[name]],
            num_outputs=len(component.outputs),
            domain=DOMAIN,
        )
        return answers[component.outputs.index(component.output(ANSWER[name]))]

    def _add(self, component: Component) -> None:
        """Reads a network as a function of its inputs and its weights."""
        model = onnx_graph.load(self.bundle.folder / component.files[0].path)
        graph, name = model.graph, component.name
        weights = list(graph.initializers.values())
        graph.initializers.clear()
        graph.inputs.extend(weights)
        for node in graph:
            node.metadata_props.clear()  # its layer, again at every step
            for value in node.outputs:
                value.shape = None  # told for any number of rows
        self.weights[name] = [
            self.tape.initializer(weight.const_value, f"{name}.{weight.name}")
            for weight in weights
            if weight.const_value is not None
        ]
        self.functions[name] = ir.Function(DOMAIN, name, graph=graph, attributes=[])
        self.ir_version = max(self.ir_version, model.ir_version)

    def model(self, inputs: list[ir.Value], output: ir.Value) -> ir.Model:
        """All of it, the networks in place of the calls, and nothing computed twice."""
        imports = [function.opset_imports for function in self.functions.values()]
        opset = {
            domain: max(each.get(domain, 1) for each in imports) for domain in set().union(*imports)
        }
        graph = ir.Graph(
            inputs,
            [output],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports=opset | {DOMAIN: 1},
            name=NAME,
        )
        model = ir.Model(
            graph,
            ir_version=self.ir_version,
            producer_name="edgeflash",
            functions=list(self.functions.values()),
        )
        for change in (
            passes.InlinePass(),
            passes.CommonSubexpressionEliminationPass(),  # as of each step's keys of the prompt
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.NameFixPass(),
        ):
            change(model)
        return model


def _value(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
    return ir.val(spec.name, dtype=dtype, shape=spec.shape)


def _draws(schedule: Schedule) -> int:
    """How many draws of noise a picture takes."""
    fresh = [i + 2 for i, step in enumerate(schedule.steps) if step.needs_noise]
    return max(fresh, default=1)


def _condition(
    graph: _Graph, bundle: Bundle, runtime: Runtime, ids: ir.Value, rows: int
) -> ir.Value:
    """Conditioning [n, s, d]; [2n, s, d] for guidance, that of the empty prompt first."""
    prompt = graph.call("text_encoder", tokens=ids)
    if not bundle.manifest.guidance.doubles:
        return prompt
    text_encoder = bundle.component("text_encoder")
    encode = Part(runtime.open(bundle.folder, text_encoder), text_encoder)
    empty = read_tokenizer(bundle.folder, bundle.manifest.tokenizer)("").ids
    bare = graph.constant(np.repeat(encode(tokens=np.array([empty])), rows, axis=0))
    encode.session.close()
    return graph.op("Concat", bare, prompt, axis=0)


def _loop(
    graph: _Graph,
    manifest: Manifest,
    schedule: Schedule,
    noise: ir.Value,
    conditioning: ir.Value,
    rows: int,
) -> ir.Value:
    """The latent after the last row of the table."""

    def draw(k: int) -> ir.Value:
        return graph.op("Gather", noise, graph.constant(np.int64(k)), axis=0)

    x, previous = graph.op("Mul", draw(0), schedule.init), None
    for i, step in enumerate(schedule.steps):
        output = _predict(graph, manifest, step, x, conditioning, rows)
        following = graph.op("Mul", x, step.a)
        terms = [(step.b, output)]
        if step.needs_noise:
            terms.append((step.c, draw(i + 1)))
        if step.needs_previous:
            assert previous is not None
            terms += zip((step.e, step.d), previous, strict=True)
        for factor, term in terms:
            following = graph.op("Add", following, graph.op("Mul", term, factor))
        x, previous = following, (x, output)
    return x


def _predict(
    graph: _Graph, manifest: Manifest, step: Step, x: ir.Value, conditioning: ir.Value, rows: int
) -> ir.Value:
    """The denoiser's guided answer [n, c, h, w] at a step."""
    denoiser = graph.bundle.denoiser
    guidance, spec = manifest.guidance, denoiser.input("timestep")
    roles = {"sample": graph.op("Mul", x, step.in_scale), "conditioning": conditioning}
    if spec is not None:
        roles["timestep"] = graph.constant(np.array(step.t, spec.dtype))
    if guidance.kind == "embedded":
        roles["guidance"] = graph.constant(np.repeat(guidance.embedding(), rows, axis=0))
    if not guidance.doubles:
        return graph.call(denoiser.name, **roles)
    roles["sample"] = graph.op("Concat", roles["sample"], roles["sample"], axis=0)
    both = graph.call(denoiser.name, **roles)
    bare, told = graph.tape.op_multi_out(
        "Split", [both], {"axis": 0, "num_outputs": 2}, num_outputs=2
    )
    difference = graph.op("Sub", told, bare)
    return graph.op("Add", bare, graph.op("Mul", difference, guidance.scale))


def _decode(graph: _Graph, manifest: Manifest, x: ir.Value) -> ir.Value:
    """Pictures uint8 [n, H, W, 3] of latents [n, c, h, w]."""
    latent, spec = manifest.latent, graph.bundle.component("vae_decoder").output("image")
    if (latent.scale, latent.shift) != (1, 0):
        x = graph.op("Add", graph.op("Div", x, latent.scale), latent.shift)
    image = graph.call("vae_decoder", latent=x)
    low, high = spec.range
    pixels = graph.op("Mul", graph.op("Sub", image, low), 255 / (high - low))
    pixels = graph.op("Clip", graph.op("Round", pixels), 0, 255)
    pixels = graph.op("Cast", pixels, to=ir.DataType.UINT8)
    return graph.op("Transpose", pixels, perm=[0, 2, 3, 1])
