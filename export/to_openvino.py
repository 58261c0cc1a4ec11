"""OpenVINO IR, laid out as OpenVINO GenAI's and optimum-intel's pipelines read it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from edgeflash.bundle import Component, TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.shelf import absent
from edgeflash.student import INDEX, Student

from .ecosystem import FOLDED, denoiser_input, write_configs, write_json
from .plan import Quantizing
from .which import FLOATS

if TYPE_CHECKING:
    from .capture import Captured

ONNX_BYTES = 2**30  # of weights within the ONNX file on the way; protobuf holds 2 GiB
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")  # in the order they are made
NO_TOKENIZER = "OpenVINO GenAI will not open this bundle, edgeflash and optimum-intel will"
SCHEDULERS = (  # of GenAI
    *("LCMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
)


class OpenVinoTarget(Quantizing):
    """One IR a component (`openvino_model.xml`, `.bin`): fp32, fp16, or int8 by NNCF.

    int8-weights leaves activations as they are: smaller, closer to fp32, but hardly faster. NNCF
    does so with embeddings too, of which plans do not speak.

    fp16 and int8 are those of the file: tensors in and out stay as they are in fp32, and in what
    floating-point type sums run is up to the runtime. Stock pipelines want the timestep as an
    input, also of one-step students (``--keep-timestep``), and GenAI wants it int64 [1]: so it is
    where the student's timesteps are whole numbers, else float32 of rank 0, for edgeflash and
    optimum-intel alone. GenAI knows six schedulers, among them LCM, DDIM, Euler and PNDM, and
    squares alone by itself: other sizes it must be told.

    OpenVINO's converter and NNCF carry usage telemetry; their ``opt_in_out --opt_out`` ends it.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "openvino",
        "nncf",
    )
    runtime: ClassVar[str] = "openvino"
    islands: ClassVar[bool] = False  # the runtime decides in what sums run

    precision: Literal["fp32", "fp16", "int8", "int8-weights"] = Field(
        "fp32", description="of weights and sums"
    )

    narrow: bool = Field(
        False,
        description="int8: weights of 7 bits, for CPUs with AVX2 and without VNNI, where products "
        "of 8 overflow",
    )

    @property
    def honours(self) -> tuple[str, ...]:
        return ("int8", "int8-weights")

    def takes(self, spec: TensorSpec, *, whole: bool) -> TensorSpec:
        if spec.role != "timestep" or not whole:
            return spec
        return spec.model_copy(update={"dtype": "int64", "shape": (1,)})

    def lower(self, captured: Captured, out: Path) -> list[Path]:
        import openvino

        from . import onnx_graph
        from .quantize_openvino import LAYERS, decide, to_half, to_int8

        path = out / captured.component / "openvino_model.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        precision = self.precision_of(captured.component)
        graph = onnx_graph.translate(captured)
        with tempfile.TemporaryDirectory(dir=out, prefix=".onnx-") as scratch:
            whole = onnx_graph.save(graph, Path(scratch) / "model.onnx", ONNX_BYTES)[0]
            model, layers = _converted(whole, captured.component), onnx_graph.layers(graph)
            if precision not in FLOATS:
                words = decide(model, captured, self, layers, out)
                model = to_int8(model, captured, words, narrow=self.narrow)
            if self.halves(captured.component):
                to_half(model)
            model.set_rt_info(json.dumps(layers), LAYERS)
            openvino.save_model(model, path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    def diverged(
        self, component: str, capture: Callable[[], Captured], out: Path, floor_db: float
    ) -> str:
        """Lowers the component once more in float32, and compares tensor by tensor."""
        from .bisect import lowered_again

        suspect = out / component / "openvino_model.xml"
        return lowered_again(self, component, capture, suspect, floor_db)

    def furnish(self, student: Student, components: Sequence[Component], out: Path) -> str:
        """Configs, scheduler, index and tokenizer models where GenAI and optimum-intel look."""
        index = write_configs(student, components, out)
        index["vae"] = ["diffusers", "AutoencoderKL"]  # which `write_configs` makes of a tiny one
        write_json(out / INDEX, index)
        family = student.family
        specs = [family.tokenizer(student, name) for name in family.text_encoders]
        told = [_write_tokenizer_models(out / spec.folder, spec.kind) for spec in specs]
        lacking = [each for each in told if each][:1]
        return "; ".join([*lacking, *_misses(student, components)])


def _misses(student: Student, components: Sequence[Component]) -> Iterator[str]:
    """What GenAI and optimum-intel look for in vain in the components, or cannot do."""
    timestep = denoiser_input(components, "timestep")
    if timestep is None:
        yield f"GenAI and optimum-intel feed a timestep, and {FOLDED}"
    elif timestep.dtype != "int64":
        yield "GenAI feeds whole timesteps, which this student's are not"
    name = student.class_of("scheduler")[1]
    if name not in SCHEDULERS:
        yield f"GenAI knows no {name}"


def _converted(path: Path, component: str) -> Any:
    """The ONNX file as an `openvino.Model` with the same names.

    Raises:
        EdgeflashError: it holds an operator that OpenVINO does not know.
    """
    import openvino

    try:
        return openvino.convert_model(str(path))
    except Exception as error:  # of its own kinds, by what went wrong
        said = " ".join(str(error).split())[:300]
        raise EdgeflashError(f"{component}: OpenVINO does not convert it: {said}") from error


def _write_tokenizer_models(folder: Path, kind: str) -> str:
    """The tokenizer in ``folder`` as the models that GenAI runs in its place.

    Returns why there are none; "" when they are written. edgeflash itself does without.
    """
    if kind != "clip":
        return f"no {TOKENIZERS[0]} in {folder.name}: {NO_TOKENIZER}"
    if absent(["openvino_tokenizers"]):
        return f"no {TOKENIZERS[0]}: {NO_TOKENIZER}: pip install openvino-tokenizers, export again"
    import openvino
    from transformers import CLIPTokenizer

    try:
        from openvino_tokenizers import convert_tokenizer

        models = convert_tokenizer(CLIPTokenizer.from_pretrained(folder), with_detokenizer=True)
    except Exception as error:  # it follows both its neighbours' versions closely
        said = " ".join(str(error).split())[:300]
        return f"no {TOKENIZERS[0]}: {NO_TOKENIZER}: {said}"
    for model, name in zip(models, TOKENIZERS, strict=True):
        openvino.save_model(model, folder / name)
    return ""
