"""The sampler as data: one row per network call, the same five-line loop in every language.

Few-step samplers are affine in the latent, the raw network output and a fresh noise draw; two-step
solvers also in the call before. So a sampler is a table::

    x, previous = schedule.begin(noise(0)), None
    for i, step in enumerate(schedule.steps):
        output = network(step.in_scale * x, step.t)
        fresh = noise(i + 1) if step.needs_noise else None
        x, previous = advance(step, x, output, noise=fresh, previous=previous), (x, output)

What the network predicts (noise, velocity, image, flow) is folded into the rows. ``lower_schedule``
derives the table from any diffusers scheduler; nothing else here needs torch.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from edgeflash.errors import EdgeflashError
from edgeflash.injected_noise import injected

Array = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]

TOLERANCE = 1e-6  # of the table against its scheduler: largest error / largest value, float64


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Step(_Frozen):
    """One network call and the update after it::

        output[i] = network(in_scale * x[i], t)
        x[i+1] = a x[i] + b output[i] + c noise[i] + d output[i-1] + e x[i-1]

    ``d`` and ``e`` are the memory of two-step solvers. Such a solver remembers the image it
    predicted one call ago, which is itself affine in ``output[i-1]`` and ``x[i-1]``; ``e`` is zero
    where the network predicts the image itself.

    A row may run a second, cheaper graph of the network, which takes what the first one left when
    it ran last (`edgeflash.caching`).
    """

    t: float = Field(description="timestep fed to the network; may be fractional")
    in_scale: float = Field(description="factor on the latent before the network")
    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0
    graph: Literal["cached"] | None = Field(
        None, description="of the network's graphs the one to run; none: the whole network"
    )

    @model_serializer(mode="wrap")
    def _without_the_usual(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Tables without a second graph are written as older readers know them."""
        told: dict[str, Any] = dump(self)
        return {k: v for k, v in told.items() if k != "graph" or v is not None}

    @property
    def needs_noise(self) -> bool:
        return self.c != 0

    @property
    def needs_previous(self) -> bool:
        return self.d != 0 or self.e != 0


class Entry(_Frozen):
    """Image to image, entering at row ``start``: ``x[start] = p latent + q noise``.

    ``first`` stands in for the row at ``start`` where that row would look back at a call that was
    never made.
    """

    start: int = Field(ge=0)
    p: float
    q: float
    first: Step | None = None


class Schedule(_Frozen):
    """A sampler of ``len(steps)`` network calls; the initial latent is ``init * noise``."""

    sampler: str = Field(description="where the table came from, for the record: lcm, tcd, euler")
    prediction: str = Field(description="what the network predicts, for the record: epsilon, ...")
    init: float
    steps: tuple[Step, ...] = Field(min_length=1)
    entries: tuple[Entry, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps[0].needs_previous:
            raise ValueError("the first step looks back at a call that was never made")
        if self.steps[0].graph:
            raise ValueError("the first step takes what no step before it has cached")
        if any(entry.start >= len(self.steps) for entry in self.entries):
            raise ValueError(f"an entry starts after the last of {len(self.steps)} steps")
        return self

    def entry(self, strength: float) -> Entry:
        """Where image to image enters when it repaints ``strength`` (0 to 1) of the schedule.

        Counts as diffusers does: ``int(n * strength)`` of ``n`` steps are run.
        """
        if not self.entries:
            raise EdgeflashError(f"a {self.sampler} schedule without entries has no image-to-image")
        n = len(self.entries)
        run = min(int(n * strength), n)
        if run < 1:
            least = math.ceil(1000 / n) / 1000
            raise EdgeflashError(
                f"strength {strength} of {n} steps leaves none to run: use at least {least}"
            )
        return self.entries[n - run]

    def begin(self, noise: Array, latent: Array | None = None, entry: Entry | None = None) -> Array:
        """The latent before the first step, shaped as ``noise``; from ``latent`` at ``entry``."""
        if entry is None:
            return self.init * noise
        assert latent is not None and latent.shape == noise.shape, (latent, noise.shape)
        return entry.p * latent + entry.q * noise

    def rows(self, entry: Entry | None = None) -> tuple[Step, ...]:
        """The steps to run, all of them or those from ``entry`` on; the first is never cached."""
        if entry is None:
            return self.steps
        first = entry.first or self.steps[entry.start].model_copy(update={"graph": None})
        return (first, *self.steps[entry.start + 1 :])


def advance(
    step: Step,
    x: Array,
    output: Array,
    *,
    noise: Array | None = None,
    previous: tuple[Array, Array] | None = None,
) -> Array:
    """``x[i+1]`` from ``x[i]``, the raw network ``output`` and, where the step asks, more.

    ``noise``: a fresh standard normal draw. ``previous``: ``(x[i-1], output[i-1])``. All arrays
    have the latent's shape; the result keeps the dtype of ``x``.
    """
    following = step.a * x + step.b * output
    if step.needs_noise:
        assert noise is not None, "this step needs noise"
        following = following + step.c * noise
    if step.needs_previous:
        assert previous is not None, "this step needs the call before"
        following = following + step.e * previous[0] + step.d * previous[1]
    return following


class Guidance(_Frozen):
    """How the prompt steers the network output.

    ``none``: one call with the prompt (guidance is distilled in, or not wanted). ``cfg``: two
    calls, joined by :meth:`guide`. ``embedded``: one call that also takes :meth:`embedding`.
    """

    kind: Literal["none", "cfg", "embedded"] = "none"
    scale: float = Field(1.0, ge=0, description="guidance scale; 1 is the unguided network")
    channels: int = Field(0, ge=0, description="width of the scale's embedding, kind embedded")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.channels < 4 if self.kind == "embedded" else self.channels:
            raise ValueError("channels: at least 4 with kind 'embedded', 0 with the others")
        if self.kind == "none" and self.scale != 1:
            raise ValueError(f"kind 'none' has no scale, but scale is {self.scale}")
        return self

    @property
    def doubles(self) -> bool:
        """Whether it takes two calls of the network."""
        return self.kind == "cfg" and self.scale != 1

    def guide(self, unconditional: Array, conditional: Array) -> Array:
        """Classifier-free guidance of two raw outputs (arXiv:2207.12598, with scale = 1 + w)."""
        return unconditional + self.scale * (conditional - unconditional)

    def embedding(self) -> npt.NDArray[np.float32]:
        """The scale as input for a network that was distilled over a range of it: [1, channels].

        Sines, then cosines, of ``1000 w`` with w = scale - 1 (arXiv:2310.04378, section 4.2).
        """
        half = self.channels // 2
        frequency = np.exp(-math.log(10000.0) / (half - 1) * np.arange(half))
        angle = 1000.0 * (self.scale - 1.0) * frequency
        waves = np.concatenate([np.sin(angle), np.cos(angle), np.zeros(self.channels % 2)])
        return waves.astype(np.float32)[None]


def lower_schedule(
    scheduler: Any, steps: int | None, *, eta: float | None = None, **timing: Any
) -> Schedule:
    """The table of a diffusers ``scheduler`` for ``steps`` steps; the scheduler is left as it was.

    ``eta``: share of fresh noise in samplers that have one (DDIM; TCD, whose paper says gamma);
    None leaves the scheduler's own default. ``timing``: what else its ``set_timesteps`` takes, such
    as ``timesteps`` or ``sigmas`` of one's own (``steps`` may then be None) or ``mu``.

    The rows are measured, not looked up: every input of every step gets a unit impulse, and the
    scheduler's own ``step`` answers. The finished table is then run against the scheduler on random
    data. Raises ``EdgeflashError``, with the reason, for a scheduler that is not affine, that looks
    further back than one call, or that refuses these steps.
    """
    probe = _Probe(scheduler)
    probe.set(steps, eta, timing)
    rows = probe.rows(0, probe.n)
    schedule = Schedule(
        sampler=re.sub(r"(?<=[a-z])(?=[A-Z])", "-", probe.name.removesuffix("Scheduler")).lower(),
        prediction=scheduler.config.get("prediction_type", "flow_prediction"),
        init=probe.init,
        steps=rows,
        entries=tuple(probe.entries(rows)),
    )
    for entry in (None, *schedule.entries):
        probe.check(schedule, entry)
    return schedule


class _Probe:
    """A private copy of a diffusers scheduler, stepped in float64 on data of our choosing."""

    def __init__(self, scheduler: Any) -> None:
        self.name = type(scheduler).__name__
        self.scheduler = copy.deepcopy(scheduler)
        for key, value in vars(self.scheduler).items():
            if hasattr(value, "cpu"):
                setattr(self.scheduler, key, value.cpu())
        self._refuse()

    def set(self, steps: int | None, eta: float | None, timing: dict[str, Any]) -> None:
        self.timing = self._timing(steps, timing)
        self.options = self._options(eta)
        self.reset(0)
        self.n = len(self.scheduler.timesteps)
        self.init = float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def _refuse(self) -> None:
        for option in ("clip_sample", "clip_denoised", "thresholding"):
            if self.scheduler.config.get(option):
                raise EdgeflashError(
                    f"{self.name} has {option} on, which is not affine: build it with "
                    f"{option}=False, as latent models do"
                )

    def _timing(self, steps: int | None, given: dict[str, Any]) -> dict[str, Any]:
        unknown = given.keys() - inspect.signature(self.scheduler.set_timesteps).parameters
        if unknown:
            raise EdgeflashError(f"{self.name} takes no {', '.join(sorted(unknown))}: leave it out")
        if self.scheduler.config.get("use_dynamic_shifting") and "mu" not in given:
            raise EdgeflashError(f"{self.name} shifts by image size: give mu, the size's shift")
        own = [len(given[name]) for name in ("timesteps", "sigmas") if name in given]
        if own and steps in (None, own[0]):
            return given
        if own:
            raise EdgeflashError(f"steps is {steps}, but {own[0]} timesteps or sigmas are given")
        if steps is None or steps < 1:
            raise EdgeflashError(f"steps is {steps}: give 1 or more")
        return {"num_inference_steps": steps, **given}

    def _options(self, eta: float | None) -> dict[str, float]:
        if eta is None:
            return {}
        if "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise EdgeflashError(f"{self.name} has no eta: leave it out")
        if not 0 <= eta <= 1:
            raise EdgeflashError(f"eta is {eta}: give 0 (no fresh noise) to 1")
        return {"eta": eta}

    def reset(self, start: int) -> None:
        """Ready for a loop that starts at row ``start``, as image-to-image pipelines do it."""
        with self._told():
            self.scheduler.set_timesteps(**self.timing)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)

    def step(self, i: int, x: Float64, output: Float64, noise: Float64) -> tuple[Float64, Float64]:
        """Row ``i`` on arrays [m]: what the network would see, and the next latent."""
        import torch

        scheduler, t = self.scheduler, self.scheduler.timesteps[i]
        x_, output_, noise_ = (torch.from_numpy(v)[None, None, None] for v in (x, output, noise))
        with self._told(), injected(noise_) as draws:
            seen = getattr(scheduler, "scale_model_input", lambda x, t: x)(x_, t)
            following = scheduler.step(output_, t, x_, return_dict=False, **self.options)[0]
        if len(draws) > 1:
            raise EdgeflashError(f"{self.name} draws noise {len(draws)} times in step {i}")
        return seen.numpy().reshape(-1), following.numpy().reshape(-1)

    def rows(self, start: int, count: int) -> tuple[Step, ...]:
        """``count`` rows of a loop that starts at row ``start``, from unit impulses.

        Element 3i of the probe is 1 in the latent of step i, 3i+1 in its output, 3i+2 in its noise;
        everything else is 0.
        """
        self.reset(start)
        return tuple(self._row(start, i, count) for i in range(count))

    def _row(self, start: int, i: int, count: int) -> Step:
        x, output, noise = impulses = np.zeros((3, 3 * count))
        impulses[range(3), range(3 * i, 3 * i + 3)] = 1.0
        seen, answer = self.step(start + i, x, output, noise)
        self._refuse_row(start + i, answer, own=3 * i)
        a, b, c = answer[3 * i : 3 * i + 3].tolist()
        e, d = answer[3 * i - 3 : 3 * i - 1].tolist() if i else (0.0, 0.0)
        t = float(self.scheduler.timesteps[start + i])
        return Step(t=t, in_scale=float(seen[3 * i]), a=a, b=b, c=c, d=d, e=e)

    def _refuse_row(self, i: int, answer: Float64, own: int) -> None:
        if not np.isfinite(answer).all():
            raise EdgeflashError(
                f"step {i} of {self.name} divides by zero: with rescale_betas_zero_snr the network "
                "must predict v or the image; else take fewer steps, two may share a timestep"
            )
        older = np.append(answer[: max(own - 3, 0)], answer[max(own - 1, 0) : own])
        if np.abs(older).max(initial=0.0) > 1e-9:
            raise EdgeflashError(
                f"step {i} of {self.name} needs more than its own call and the one before: use a "
                "sampler of order 2 or less, such as DPMSolverMultistepScheduler(solver_order=2)"
            )

    def entries(self, rows: tuple[Step, ...]) -> Iterator[Entry]:
        """Where image to image may enter: every row, or every second where calls come in pairs."""
        import torch

        mix = getattr(self.scheduler, "scale_noise", None)
        if not mix and not hasattr(self.scheduler, "add_noise"):
            return
        latent, noise = torch.eye(2, dtype=torch.float64)[:, None, None, None]
        for start in range(0, self.n, self.scheduler.order):
            self.reset(start)
            t = self.scheduler.timesteps[start : start + 1]
            with self._told():
                mixed = mix(latent, t, noise) if mix else self.scheduler.add_noise(latent, noise, t)
            p, q = mixed.reshape(-1).tolist()
            first = self.rows(start, 1)[0] if rows[start].needs_previous else None
            yield Entry(start=start, p=p, q=q, first=first)

    def check(self, schedule: Schedule, entry: Entry | None) -> None:
        """Table and scheduler side by side on random data: all steps, or three from ``entry``."""
        random = np.random.default_rng(0)
        start = entry.start if entry else 0
        self.reset(start)
        theirs: Float64 = random.standard_normal(64)
        ours: Array = theirs
        previous = None
        for i, step in enumerate(schedule.rows(entry)[: 3 if entry else None], start):
            output, noise = random.standard_normal((2, 64))
            seen, following = self.step(i, theirs, output, noise)
            moved = advance(step, ours, output, noise=noise, previous=previous)
            error = max(_relative(step.in_scale * theirs, seen), _relative(moved, following))
            if not error <= TOLERANCE:
                raise EdgeflashError(
                    f"step {i} of {self.name} is not affine in latent, output and noise (relative "
                    f"error {error:.0e} on random data): it has no table"
                )
            theirs, ours, previous = following, moved, (ours, output)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Makes one line of what diffusers says against the settings."""
        try:
            yield
        except Exception as error:
            said = f"{self.name} refuses these settings: {' '.join(str(error).split())}"
            raise EdgeflashError(said) from error


def _relative(ours: Array, theirs: Float64) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
