"""ExecuTorch programs for phones and boards, by XNNPACK on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import EACH_STEP, TensorSpec
from edgeflash.caching import cached_name
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Target

from .quiet import quiet
from .which import Components, check_quantized

if TYPE_CHECKING:
    from .capture import Captured


class ExecuTorchTarget(Target):
    """One program (`model.pte`) a component; what XNNPACK has no kernel for runs on portable ones.

    fp32, or int8 by XNNPACK's quantizer: convolutions and linear layers, weights by output channel,
    activations with ranges from what was recorded. One picture a call: memory is planned ahead, and
    for a free batch it would be that of the largest one.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "executorch",
        "torchao",
    )
    runtime: ClassVar[str] = "executorch"

    precision: Literal["fp32", "int8"] = Field("fp32", description="of weights and sums")
    quantized: Components = Field(
        (*EACH_STEP, "vae_decoder", "vae_encoder"),
        description="components that int8 applies to",
    )

    @classmethod
    def idle(cls, precision: str) -> dict[str, str]:
        return {"quantized": "int8"} if precision == "fp32" else {}

    def check_components(self, components: Collection[str]) -> None:
        check_quantized(self, components)

    def precision_of(self, component: str) -> str:
        chosen = (*self.quantized, *map(cached_name, self.quantized))
        return self.precision if component in chosen else "fp32"

    def calibrates(self, component: str) -> bool:
        return self.precision_of(component) == "int8"

    def takes(self, spec: TensorSpec, *, whole: bool) -> TensorSpec:
        shape = tuple(1 if isinstance(side, str) else side for side in spec.shape)
        return spec.model_copy(update={"shape": shape})

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            with quiet():
                whole = captured.program
                if self.precision_of(captured.component) == "int8":
                    whole = _quantized(captured)
                edge = to_edge_transform_and_lower(whole, partitioner=[XnnpackPartitioner()])
                program = edge.to_executorch()
        except Exception as error:  # of many kinds: its passes share no base class
            said = " ".join(str(error).split())[:300]
            raise EdgeflashError(f"{captured.component}: no ExecuTorch for it: {said}") from error
        path = out / captured.component / "model.pte"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            program.write_to_file(stream)
        return [path]


def _quantized(captured: Captured) -> Any:
    """The program in int8, ranges taken on the recorded calls."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    module = captured.program.module()
    names = _worth_it(module.graph, captured)
    quantizer = XNNPACKQuantizer()
    quantizer.set_filter_function(  # it asks for weights too
        lambda node: node.op != "call_function" or node.name in names
    )
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    calls = [
        tuple(torch.tensor(sample.inputs[spec.name]) for spec in captured.inputs)
        for sample in captured.calibration
    ]
    watched = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for call in calls:
            watched(*call)
    arguments = captured.program.example_inputs[0]
    return torch.export.export(convert_pt2e(watched), arguments, strict=False)


def _worth_it(graph: Any, captured: Captured) -> set[str]:
    """Names of the products to quantize: those that `quantize.away` would not leave alone.

    Left are what works on the timestep alone, what stands next to latents, images and conditioning,
    and the shortcuts of skip connections. All that XNNPACK can quantize gave 20 dB on the worst of
    four outputs of the embedded student's UNet, these alone 32 dB.
    """
    import torch

    aten = torch.ops.aten
    products, relus = (aten.conv2d.default, aten.linear.default), (aten.relu.default,)
    given = [node for node in graph.nodes if node.op == "placeholder"]
    specs = zip(given, captured.inputs, strict=True)
    reached = {node for node, spec in specs if spec.role != "timestep"}
    last = set(graph.output_node().all_input_nodes)
    names: set[str] = set()
    for node in graph.nodes:
        if not reached.intersection(node.all_input_nodes):
            continue
        reached.add(node)
        source = node.all_input_nodes[0]
        edge = source in given or source.target is aten.cat.default or node in last
        if node.target in products and not edge:
            names.add(node.name)
        elif node.target in relus and source.name in names:
            names.add(node.name)  # the quantizer asks for both by the second
    return names
