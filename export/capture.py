"""One component as a `torch.export` program, with what it did in the student's real few-step loop.

The same recorded calls serve as example for the capture, as data for calibration and, for some
prompts, as goldens that ship with the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.export import ExportedProgram

from edgeflash import control
from edgeflash.bundle import ANSWER, Latent, TensorSpec, kind_of
from edgeflash.caching import ROLE, cached_name
from edgeflash.conditioning import told_of
from edgeflash.families import tokenizer_of
from edgeflash.golden import Array, Sampler, Tensors, heard, rows_to_record, told_by
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.student import Student

from .caching import Leaving, Way, without
from .merging import merge_tokens, unmerged
from .program import to_program
from .steering import controlnet_of, look, seen_beside, steered

MOST_PLAIN = 3  # goldens that are drawn once more to see what merging, caching or time does


@dataclass(frozen=True, eq=False)
class Network:
    """A component in torch, with what it takes and gives in this order."""

    component: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """One recorded call: arrays by tensor name, batch 1; halves as the float32 that torch saw.

    What a denoiser leaves for later steps is not among its outputs: it would fill the memory.
    """

    inputs: Tensors
    outputs: Tensors


@dataclass(frozen=True, eq=False)
class Captured:
    """One component, ready to be lowered.

    Attributes:
        component: its name, as in `edgeflash.bundle.ANSWER`.
        program: takes the inputs by position; dimensions that are strings in the specs are free.
        inputs: what it takes.
        outputs: what it gives.
        samples: calls recorded in the student's own loop.
        held_out: so many of the first are for proof alone.
    """

    component: str
    program: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    samples: tuple[Sample, ...]
    held_out: int = 0

    @property
    def calibration(self) -> tuple[Sample, ...]:
        """The calls that ranges may be measured on."""
        return self.samples[self.held_out :]


Keep = Callable[[tuple[Sample, ...]], object]


class Eager:
    """A network called by role, as the exported component will be; remembers every call."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.samples: list[Sample] = []

    def __call__(self, **by_role: Array) -> Array:
        return self.answers(**by_role)[ANSWER[self.network.component]]

    def answers(self, **by_role: Array) -> Tensors:
        """All outputs that have a role."""
        network = self.network
        given = {s.name: as_one_row(by_role[s.role], s) for s in network.inputs}
        with torch.no_grad():
            answer = network.module(*(torch.from_numpy(array) for array in given.values()))
        answers = answer if isinstance(answer, tuple) else (answer,)
        used = [
            (spec, answer.numpy())
            for spec, answer in zip(network.outputs, answers, strict=True)
            if spec.role != "unused"
        ]
        kept = [(spec, array) for spec, array in used if not spec.role.startswith(ROLE)]
        self.samples.append(Sample(given, {spec.name: array for spec, array in kept}))
        return {spec.role: array for spec, array in used}


@dataclass
class Tape:
    """What the student draws from a few prompts, recorded as its components pass by in turn.

    Attributes:
        student: the student.
        target: what it will be lowered to.
        sampler: the schedule that is run.
        prompts: one golden each.
        size: of the images, (height, width) in px.
        timestep: fold this one into the denoiser; None: it is an input.
        whole: every timestep is a whole number.
        merge: share of the denoiser's tokens that are merged.
        way: how some of the denoiser is left out at some steps; None: it is not.
        times: timesteps of other steps and schedules, for the ladder to see what time does.
        held_out: nothing is calibrated on what was recorded of so many first prompts.
        proved: so many first prompts prove the bundle; of others the denoiser is not asked what it
            does without them or at other times. None: all.
        goldens: arrays recorded so far, one table a prompt; see `edgeflash.golden`.
        plain: latents of some goldens, drawn without "merging", or without "caching".
        loss_db: how far each of these moves their pictures.
        ahead: calls recorded of components that ran beside another.
        kept: the folder that holds what was recorded last; see `recorded.py`.
    """

    student: Student
    target: Target
    sampler: Sampler
    prompts: Sequence[str]
    size: tuple[int, int]
    timestep: float | None = None
    whole: bool = False
    merge: float = 0.0
    way: Way | None = None
    times: tuple[float, ...] = ()
    held_out: int = 0
    proved: int | None = None
    goldens: list[Tensors] = field(default_factory=list)
    plain: dict[str, list[Array]] = field(default_factory=dict)
    loss_db: dict[str, list[float]] = field(default_factory=dict)
    ahead: dict[str, tuple[Sample, ...]] = field(default_factory=dict)
    kept: Path | None = None

    def seed(self, number: int) -> int:
        """Seed of a golden: they are drawn from different noise."""
        return number

    def capture(self, component: str, keep: Keep = lambda samples: None) -> Captured:
        """Loads a component, runs its part of every prompt, and captures it as a program.

        ``keep`` is given the recorded calls before the program is made.
        """
        network, samples = self.record(component)
        keep(samples)
        return self.captured(network, samples)

    def captured(self, network: Network, samples: tuple[Sample, ...]) -> Captured:
        """A loaded component as a program, with calls that were recorded of it."""
        module = self.target.rewrite(network).module
        program = to_program(module, network.inputs, samples[0])
        name, inputs, outputs = network.component, network.inputs, network.outputs
        return Captured(name, program, inputs, outputs, samples, self._held_out(name, len(samples)))

    def _held_out(self, component: str, calls: int) -> int:
        """How many of a component's first calls are of prompts that nothing is calibrated on."""
        count, denoiser = len(self.prompts), self.student.family.denoiser
        graphs = {denoiser: None, control.NAME: None, cached_name(denoiser): "cached"}
        if self.proved is not None and component in graphs:
            calls += (count - self.proved) * self.sampler.proofs(graphs[component])
        return self.held_out * (calls // count)

    def record(
        self, component: str, see: Callable[[Network], object] = lambda network: None
    ) -> tuple[Network, tuple[Sample, ...]]:
        """Loads a component, shows it to ``see``, and runs its part of every prompt."""
        denoiser = self.student.family.denoiser
        beside = (cached_name(denoiser), control.NAME)
        if component in beside and component not in self.ahead:
            self.record(denoiser)  # both run in one loop
        network = self.load(component)
        see(network)
        if component in self.ahead:
            samples = self.ahead.pop(component)
            if self.target.learns:
                _run_again(network, samples)
            return network, samples
        eager = Eager(network)
        getattr(self, f"_run_{kind_of(component)}")(eager)
        return network, tuple(eager.samples)

    def load(self, component: str) -> Network:
        """A component as the target's ecosystem calls it."""
        denoiser = self.student.family.denoiser
        if self.way and component in (denoiser, cached_name(denoiser)):
            return self.way.cut(self._load(denoiser), self._cells)[component != denoiser]
        return self._load(component)

    def _load(self, component: str) -> Network:
        family = self.student.family
        module = family.load(self.student, component, timestep=self.timestep)
        if component == family.denoiser and self.merge:
            merge_tokens(module, self.merge, self._cells)
        network = Network(component, module, *self.signature(component))
        return self.target.adapt(network, family.latent(self.student))

    def signature(self, component: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What a component takes and gives, before the target adapts it and a way cuts it."""
        inputs, outputs = self.student.family.signature(
            self.student, component, self.size, folded=self.timestep is not None
        )
        return tuple(self.target.takes(spec, whole=self.whole) for spec in inputs), outputs

    @property
    def _cells(self) -> tuple[int, int]:
        height, width = self.sampler.shape[2:]
        return height, width

    def _beside(self, whole: Network) -> Eager | None:
        """The denoiser's cached graph, of the same weights as the whole one."""
        if self.way is None:
            return None
        assert isinstance(whole.module, Leaving)
        plain = replace(whole, module=whole.module.network, outputs=whole.outputs[:1])
        return Eager(self.way.cut(plain, self._cells)[1])

    @property
    def latent(self) -> Latent:
        """What the bundle says of its latents."""
        return self.target.scales(self.student.family.latent(self.student))

    def _run_text_encoder(self, network: Eager) -> None:
        family, name = self.student.family, network.network.component
        folder = self.student.folder / tokenizer_of(name)
        roles = told_of(self._denoiser_inputs)
        texts = [*self.prompts] + [""] * (family.no_prompt(self.student) is None)
        told: list[Tensors] = []
        for ids in family.tokenize(folder, texts)[:, None]:
            answers = network.answers(tokens=ids)
            told.append({"ids": ids} | {k: v for k, v in answers.items() if k in roles})
        self.goldens = self.goldens or [{} for _ in self.prompts]
        for golden, answers in zip(self.goldens, told, strict=False):
            golden |= {told_by(name, what): array for what, array in answers.items()}
            if len(told) > len(self.prompts):
                golden |= {told_by(name, k, empty=True): array for k, array in told[-1].items()}

    def _run_adapter(self, network: Eager) -> None:
        look(self, network)

    @property
    def _denoiser_inputs(self) -> tuple[TensorSpec, ...]:
        family = self.student.family
        return family.signature(self.student, family.denoiser, self.size)[0]

    @property
    def heard(self) -> set[str]:
        """The roles of what the denoiser takes."""
        return {spec.role for spec in self._denoiser_inputs}

    def _run_denoiser(self, network: Eager) -> None:
        every = rows_to_record(self.sampler.schedule)
        cached, seen = self._beside(network.network), seen_beside(self)
        controlnet = controlnet_of(self)
        for number, golden in enumerate(self.goldens):
            both, sampler = self._both(golden), replace(self.sampler, beside=seen[number])
            asked = steered(network, controlnet, self.seed(number), self.size)
            rows = every if self.proved is None or number < self.proved else []
            golden |= sampler.record(asked, *both, self.seed(number), rows, cached)
            golden |= asked.told if isinstance(asked, control.Controlled) else {}
        self._sweep(network, controlnet)
        for each in filter(None, (cached, controlnet)):
            self.ahead[each.network.component] = tuple(each.samples)
        if self.merge:
            graphs = [each.network.module for each in (network, cached) if each is not None]
            with unmerged(*graphs):  # a gated one has blocks of its own
                self._run_plain("merging", self.sampler, network, cached, seen)
        if self.way:
            whole = replace(self.sampler, schedule=without(self.sampler.schedule))
            self._run_plain("caching", whole, network, None, seen)

    def _sweep(self, network: Eager, controlnet: Eager | None) -> None:
        """What time does in some goldens; not among the samples, for the loop has no such call."""
        aside, other = Eager(network.network), controlnet and Eager(controlnet.network)
        count = min(MOST_PLAIN, self.proved or MOST_PLAIN) if self.times else 0
        for number, golden in enumerate(self.goldens[:count]):
            asked = steered(aside, other, self.seed(number), self.size)
            golden |= self.sampler.sweep(asked, golden, self._both(golden)[0], self.times)

    def _run_plain(
        self,
        what: str,
        sampler: Sampler,
        network: Eager,
        cached: Eager | None,
        seen: Sequence[Array | None],
    ) -> None:
        """What the denoiser makes of some goldens without that; not among the samples."""
        aside, controlnet = Eager(network.network), controlnet_of(self)
        other = Eager(cached.network) if cached else None
        self.plain[what] = [
            replace(sampler, beside=seen[number]).loop(
                steered(aside, controlnet, self.seed(number), self.size),
                *self._both(golden),
                self.seed(number),
                cached=other,
            )
            for number, golden in enumerate(self.goldens[:MOST_PLAIN])
        ]

    def _both(self, golden: Tensors) -> tuple[Tensors, Tensors]:
        """What the denoiser hears of a golden: its prompt, and no prompt; with both its maps."""
        family = self.student.family
        both = heard(golden, family.text_encoders, self._denoiser_inputs, self.size)
        maps = control.added(golden) if family.steering == control.ADAPTER else {}
        return both[0] | maps, both[1] | maps

    def _run_vae_decoder(self, network: Eager) -> None:
        space = self.latent
        for golden in self.goldens:
            golden["image"] = network(latent=golden["latent"] / space.scale + space.shift)
        low, high = network.network.outputs[0].range
        for what, latents in self.plain.items():
            self.loss_db[what] = []
            for golden, latent in zip(self.goldens, latents, strict=False):
                image = Eager(network.network)(latent=latent / space.scale + space.shift)
                ours, wanted = (array.clip(low, high) for array in (image, golden["image"]))
                self.loss_db[what].append(psnr_db(ours, wanted, high - low))

    def _run_vae_encoder(self, network: Eager) -> None:
        for golden in self.goldens:
            golden["encoded"] = network(image=golden["image"])


def _run_again(network: Network, samples: Iterable[Sample]) -> None:
    """For what a network notes as it runs: another copy of it ran when these were recorded."""
    with torch.no_grad():
        for sample in samples:
            network.module(*map(torch.from_numpy, sample.inputs.values()))


def as_one_row(array: Array, spec: TensorSpec) -> Array:
    """In the dtype, layout and rank of ``spec``, batch 1; what will be halves is not rounded."""
    if spec.dtype == "float16":
        spec = spec.model_copy(update={"dtype": "float32"})
    array = spec.arranged(array)
    return array[None] if spec.shape and array.ndim == 0 else array
