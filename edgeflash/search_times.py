"""What blocks and other parts of a student take: measured here on a runtime, or estimated.

Latency does not depend on the weights, so a block is measured alone, once, with random ones: it is
exported and run as a whole student would be.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from edgeflash.bundle import Component, TensorSpec, describe_file
from edgeflash.devices import Device
from edgeflash.errors import EdgeflashError
from edgeflash.price import Way
from edgeflash.roles import Session, Target
from edgeflash.search_blocks import Block, gflop_of, tensors_in
from edgeflash.shelf import make

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeflash.export.capture import Captured, Network
    from edgeflash.student import Student

RUNS, SECONDS = 5, 0.3  # of a block, at least; of the two, whatever is later
FREE = "n"  # the batch, as in exports of whole students


class Times(ABC):
    """Of blocks and parts, in ms for one picture; each is looked up once."""

    told: str  # how they were come by, in a word

    @abstractmethod
    def block_ms(self, block: Block) -> float:
        """One call of a block of the UNet."""

    @abstractmethod
    def part_ms(self, student: Student, component: str, size: tuple[int, int]) -> float:
        """One call of a text encoder or the decoder; no weights are read. ``size`` is in px."""


class Estimated(Times):
    """By what others published for a device, in proportion to the work."""

    told = "estimated"

    def __init__(self, device: Device) -> None:
        self.device = device

    def block_ms(self, block: Block) -> float:
        return self.device.estimate_ms("unet", gflop_of(block))

    def part_ms(self, student: Student, component: str, size: tuple[int, int]) -> float:
        from edgeflash.work import gflops

        return self.device.estimate_ms(component, gflops(student, size, [component])[component])


class MeasuredTimes(Times):
    """On a runtime of this machine, in this process: medians, as those of whole students are."""

    told = "measured by block"

    def __init__(self, way: Way, console: Console) -> None:
        from edgeflash.price import check_ways
        from edgeflash.runtimes.bench import timed_on

        check_ways([way])
        self.way, self._console = way, console
        self._target = make(Target, way.on, {"precision": way.precision})
        self._target.check()
        self._runtime = timed_on(self._target.runtime, {})
        self.blocks = 0  # measured so far
        self._ms: dict[Block, float] = {}

    def block_ms(self, block: Block) -> float:
        if block not in self._ms:
            self.blocks += 1
            with self._console.status(f"measuring block {self.blocks}: {block.name}"):
                self._ms[block] = self._measured(alone(block))
        return self._ms[block]

    def part_ms(self, student: Student, component: str, size: tuple[int, int]) -> float:
        with self._console.status(f"measuring {component}"):
            return self._measured(self._part(student, component, size))

    def _part(self, student: Student, component: str, size: tuple[int, int]) -> Network:
        """A component with random weights, as the target's ecosystem calls it."""
        from edgeflash.export.capture import Network
        from edgeflash.networks_sd import quiet, without_weights

        family = student.family
        with quiet():
            module = family.wrap(without_weights(student, component), component).eval()
        takes, gives = family.signature(student, component, size)
        takes = tuple(self._target.takes(spec, whole=True) for spec in takes)
        network = Network(component, module.requires_grad_(False), takes, gives)
        return self._target.adapt(network, family.latent(student))

    def _captured(self, network: Network) -> Captured:
        """Of one call, with random numbers."""
        from edgeflash.export.capture import Captured, Eager
        from edgeflash.export.program import to_program

        given = {spec.name: _numbers(spec) for spec in network.inputs}
        eager = Eager(network)
        eager.answers(**{s.role: given[s.name] for s in network.inputs})
        network = self._target.rewrite(network)
        program = to_program(network.module, network.inputs, eager.samples[0])
        name, takes, gives = network.component, network.inputs, network.outputs
        return Captured(name, program, takes, gives, tuple(eager.samples))

    def _measured(self, network: Network) -> float:
        """Lowers and runs it -> ms."""
        captured = self._captured(network)
        name = captured.component
        with tempfile.TemporaryDirectory(prefix="edgeflash-block-") as scratch:
            folder = Path(scratch)
            files, precision = self._lowered(captured, folder)
            paths = [path.relative_to(folder).as_posix() for path in files]
            component = Component(
                name=name,
                target=self.way.on,
                precision=precision,
                files=tuple(describe_file(folder, path) for path in paths),
                inputs=captured.inputs,
                outputs=captured.outputs,
                engine=self._target.engine_of(name),
            )
            session = self._runtime.open(folder, component)
            try:
                return _median_ms(session, captured.samples[0].inputs)
            finally:
                session.close()

    def _lowered(self, captured: Captured, folder: Path) -> tuple[list[Path], str]:
        """Its files and precision; a block that the way's leaves alone, as a whole UNet has it."""
        name = captured.component
        try:
            return self._target.lower(captured, folder), self._target.precision_of(name)
        except EdgeflashError:
            floats = self._floats(name)
            if floats == self.way.precision:
                raise
            target = make(Target, self.way.on, {"precision": floats})
            return target.lower(captured, folder), floats

    def _floats(self, component: str) -> str:
        """The precision of what a quantized component leaves alone: fp32 beside int8 in ONNX."""
        from edgeflash.export.plan import Quantizing
        from edgeflash.export.which import FLOATS

        target = self._target
        if target.precision in FLOATS:
            return target.precision
        if isinstance(target, Quantizing) and not target.halves(component):
            return "fp32"
        return str(getattr(target, "rest", target.precision))


def _median_ms(session: Session, given: dict[str, Any]) -> float:
    session(given)
    start, taken = time.perf_counter(), list[float]()
    while len(taken) < RUNS or time.perf_counter() - start < SECONDS:
        began = time.perf_counter()
        session(given)
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def _numbers(spec: TensorSpec) -> Any:
    """Random ones for an input; of whole numbers, zeros."""
    sides = [1 if isinstance(side, str) else side for side in spec.shape]
    if not spec.dtype.startswith("float"):
        return np.zeros(sides, spec.dtype)
    return np.random.default_rng(0).standard_normal(sides).astype(np.float32)


def alone(block: Block) -> Network:
    """A block as a network of its own on the CPU, with random weights."""
    import torch

    from edgeflash.export.capture import Network

    module = copy.deepcopy(block.module).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.normal_(std=0.02, generator=generator)
    tensors, (*roles, made) = tensors_in(block.args, block.kwargs), block.roles
    if block.joined:  # where they meet is part of the block: a plan looks for it
        tensors, roles = [*tensors[0].chunk(2, 1), *tensors[1:]], ["", *roles]
    ends = enumerate(zip(tensors, roles, strict=True))
    takes = tuple(_spec(f"x{i}", tensor, role) for i, (tensor, role) in ends)
    gives = block.gives if isinstance(block.gives, torch.Tensor) else block.gives[0]
    return Network("unet", _called(block, module), takes, (_spec("y", gives, made),))


def _spec(name: str, tensor: Tensor, role: str) -> TensorSpec:
    """Of float32, the batch free. What has no role in a UNet has its own."""
    shape = (FREE, *tensor.shape[1:])
    return TensorSpec(name=name, role=role or name, shape=shape, dtype="float32")


def _called(block: Block, module: nn.Module) -> nn.Module:
    """The layer as it was called, its tensors by position."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x0: Tensor, x1: Any = None, x2: Any = None, x3: Any = None) -> Tensor:
            given = [x0, x1, x2, x3]  # by name: a capture takes a list of them for one input
            if block.joined:
                given[:2] = [torch.cat(given[:2], 1)]
            left = iter(given)

            def put(value: Any) -> Any:
                return next(left) if isinstance(value, torch.Tensor) else value

            args = [put(value) for value in block.args]
            made = self.layer(*args, **{k: put(v) for k, v in block.kwargs.items()})
            return made if isinstance(made, torch.Tensor) else made[0]

    return Called()
