"""Which engine of a component to open on this machine: one built here, one that ships, or none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflash.bundle import Component, Engine
from edgeflash.engine import AHEAD, ENGINE, ONNX, build, load_vendor, logger, started
from edgeflash.errors import EdgeflashError
from edgeflash.gpu import NO_GPU, Gpu, find_gpu, use
from edgeflash.runtimes import engine_cache as cache
from edgeflash.shelf import absent

USUAL_ROWS = (1, 1, 2)  # for ONNX bundles, which tell none: one picture, or one guided


@dataclass(frozen=True)
class Here:
    """A component on this machine.

    Attributes:
        folder: of the bundle.
        component: what it says of the component.
        engine: how its engine is built.
        trt: the vendor's package.
        gpu: what it runs on.
        index: its number among the GPUs here.
        places: folder of the engines that were built here.
    """

    folder: Path
    component: Component
    engine: Engine
    trt: Any
    gpu: Gpu
    index: int
    places: Path

    def __str__(self) -> str:
        return f"{self.engine.vendor} {self.trt.__version__}, {self.gpu}"

    @property
    def key(self) -> cache.Key:
        return cache.key_of(self.component, self.engine, self.trt.__version__, self.gpu)

    @property
    def kept(self) -> Path:
        """Where an engine that was built here lies, or would."""
        return cache.path_of(self.places, self.key)

    @property
    def command(self) -> str:
        """What builds an engine for this machine."""
        options = [
            "--on tensorrt" if self.component.target != "tensorrt" else "",
            f"--set gpu={self.index}" if self.index else "",
            f"--set cache_dir={self.places}" if self.places != cache.folder_of("") else "",
        ]
        return " ".join(["edgeflash build", str(self.folder), *filter(None, options)])

    @property
    def shipped(self) -> Path | None:
        return next((self.folder / f.path for f in self.component.files if _is(f, ENGINE)), None)


def look(folder: Path, component: Component, gpu: int, cache_dir: str) -> Here:
    """Finds the GPU and the package for a component.

    Raises:
        EdgeflashError: one of them is not here: a GPU, with what the engine was built for; a
            package, with the line that installs it.
    """
    try:
        found = find_gpu(gpu)
    except EdgeflashError as error:
        what = f"{component.name}: its engine {_made_for(component.engine)}"
        remedy = ": without one, export --to onnx" if NO_GPU in str(error) else ""
        raise EdgeflashError(f"{what}; this machine: {error}{remedy}") from None
    usual = AHEAD if absent(["tensorrt"]) else "tensorrt"
    engine = component.engine or Engine.model_validate({"vendor": usual, "rows": USUAL_ROWS})
    places = cache.folder_of(cache_dir)
    return Here(folder, component, engine, load_vendor(engine.vendor), found, gpu, places)


def choose(here: Here, *, build_missing: bool) -> Path:
    """The engine that was built here, else the one that ships, else one that is built now.

    Raises:
        EdgeflashError: what ships is for other machines, or nothing is there and nothing may be
            built; with what it was built for and the command that builds it for this machine.
    """
    if here.kept.is_file():
        return here.kept
    if here.shipped:
        if reasons := reasons_against(here):
            raise _mismatch(here, _made_for(here.engine), f" ({reasons})")
        return here.shipped
    earlier = "; ".join(str(key) for key in cache.others(here.places, here.key))
    if not build_missing:
        raise _mismatch(here, f"was built for {earlier or 'no machine yet'}", "")
    before = f" (there is one for {earlier})" if earlier else ""
    name = here.component.name
    told = f"{name}: building an engine for {here}{before}: this takes minutes, once"
    print(told, file=sys.stderr, flush=True)
    return build_here(here)


def build_here(here: Here) -> Path:
    """Builds the engine for this machine from the ONNX file, and keeps it."""
    use(here.index)
    here.places.mkdir(parents=True, exist_ok=True)
    timings = here.places / f"{here.engine.vendor}-{here.gpu.capability}.timings"
    source = onnx_file(here.folder, here.component)
    made = build(source, here.component, here.engine, timing_cache=timings)
    return cache.keep(here.places, here.key, made)


def reasons_against(here: Here) -> str:
    """Why the vendor would not run the engine that ships, in its words; "" where it would."""
    assert here.shipped is not None
    log = logger(here.trt)
    runtime = started(here.trt.Runtime, log)
    with here.shipped.open("rb") as file:
        verdict, bits = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    if verdict != here.trt.EngineValidity.INVALID:
        return ""
    known = here.trt.EngineInvalidityDiagnostics.__members__.items()
    found = [name.lower().replace("_", " ") for name, bit in known if int(bit) & int(bits)]
    return ", ".join(found) or "invalid"


def onnx_file(folder: Path, component: Component) -> Path:
    """What a component's engines are built from.

    Raises:
        EdgeflashError: the bundle has no such file.
    """
    found = next((folder / file.path for file in component.files if _is(file, ONNX)), None)
    if found is None:
        raise EdgeflashError(
            f"{folder}: its {component.name}, {component.target}, is no ONNX file: "
            "export it --to tensorrt or --to onnx"
        )
    return found


def _is(file: Any, suffix: str) -> bool:
    return str(file.path).endswith(suffix)


def _made_for(engine: Engine | None) -> str:
    if engine is None or not engine.built_for:
        return "is built where it runs, on an NVIDIA GPU"
    numbers = ", ".join(engine.built_for)
    return f"was built for {engine.vendor} {engine.built_with}, compute capability {numbers}"


def _mismatch(here: Here, built: str, why: str) -> EdgeflashError:
    return EdgeflashError(
        f"{here.component.name}: its engine {built}; this machine has {here}{why}: {here.command}"
    )
