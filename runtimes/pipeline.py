"""Prompt -> image, over any runtime: tokens, conditioning, the few-step loop, pixels.

The sampler is a table in the manifest, so there is no scheduler mathematics here, and no torch.

>>> pipeline = TextToImage(Bundle.open("bundle"), OnnxRuntime())      # doctest: +SKIP
>>> pipeline.generate(Request("a red star", seed=3)).images.shape     # doctest: +SKIP
(1, 512, 512, 3)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgeflash import noise
from edgeflash.bundle import Bundle
from edgeflash.conditioning import Conditioning
from edgeflash.conditions import masks, on_cells, sized
from edgeflash.control import ADAPTER
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Runtime
from edgeflash.runtimes import pictures
from edgeflash.runtimes.autoencoder import decoded, encoded, finite, looked_at
from edgeflash.runtimes.denoiser import Denoiser
from edgeflash.runtimes.edit import Blend, Edit
from edgeflash.runtimes.feed import Part
from edgeflash.runtimes.honour import refuse
from edgeflash.runtimes.prompts import Prompts
from edgeflash.schedule import Entry, Guidance, Schedule, advance

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Request:
    """What to draw. None leaves a setting to the bundle.

    Attributes:
        prompt: one text, or a tuple of texts, which makes a batch with one image each.
        seed: of the first image, 0 .. 2^64 - 1; image j of the batch has ``seed + j``.
        steps: network calls an image; one of the step counts in the manifest's schedules.
        guidance: scale of the guidance, >= 0; 1 is the unguided network.
        negative: text to steer away from, for bundles whose guidance kind is ``cfg``.
        size: (height, width) in px, for bundles whose networks leave the size free.
        image: start from this picture: uint8 [height, width, 3], of the size above. Networks that
            see a picture take a smaller one too.
        strength: share of the steps to run on ``image``, 0 to 1: how much is painted anew. None:
            0.6, but 1 with a mask or where the network sees the picture: from noise alone.
        mask: paint where it is true, [height, width], and keep the rest of ``image``. Networks for
            inpainting see both; of others latents are blended at every step.
        edit: what is known of the picture, for samplers that noise it anew at every step.
        control: what the bundle's ControlNet or adapter sees, edges or what else it knows: uint8
            [height, width, 3], of the size above.
        control_scale: of what it adds to the denoiser, >= 0; 0 draws as if there were none.
    """

    prompt: str | tuple[str, ...]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    size: tuple[int, int] | None = None
    image: UInt8 | None = None
    strength: float | None = None
    mask: NDArray[np.bool_] | None = None
    edit: Edit | None = None
    control: UInt8 | None = None
    control_scale: float = 1.0

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True, eq=False)
class Result:
    """What came out.

    Attributes:
        images: uint8 [n, height, width, 3].
        latent: after the last step, float32 [n, c, h, w].
        tokens: token ids of the prompts, int64 [n, s].
        cut: per prompt, the end that no text encoder has room for; "" where one read all of it.
    """

    images: UInt8
    latent: Float32
    tokens: NDArray[np.int64]
    cut: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Event:
    """A stage has ended.

    Attributes:
        stage: the component that ran.
        step: network calls done so far, of ``steps``.
        steps: network calls this request takes.
        elapsed_ms: time of this stage alone, loading not counted.
        latent: float32 [n, c, h, w] as it stands; None before the first step.
        result: with the last event.
    """

    stage: str
    step: int
    steps: int
    elapsed_ms: float
    latent: Float32 | None = None
    result: Result | None = None


@dataclass(frozen=True)
class _Plan:
    """A request with the bundle's settings filled in."""

    schedule: Schedule
    entry: Entry | None
    guidance: Guidance
    shape: tuple[int, ...]  # of the latent [n, c, h, w]
    blends: bool = False  # puts what is known of a picture back into the latent

    @property
    def doubled(self) -> bool:
        return self.guidance.doubles


class TextToImage:
    """A bundle on a runtime, ready to draw.

    Components are loaded when first needed and kept. With ``low_memory`` only one is loaded at a
    time, in edits the denoiser and one half of the autoencoder: each is closed when its stage ends.
    Of a denoiser with a cached graph each is closed behind the last step that runs it; a ControlNet
    is open, and timed, with the denoiser, an adapter before it.

    Raises:
        EdgeflashError: the bundle asks for something that is not on offer here.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, *, low_memory: bool = False) -> None:
        refuse(bundle, runtime)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.low_memory = low_memory
        self.denoiser = bundle.denoiser.name
        self.prompts = Prompts(bundle)
        self.tokenizer = self.prompts.tokenizers["text_encoder"]
        self.parts = {c.name: Part(bundle, runtime, c.name) for c in self.manifest.components}

    def load(self) -> None:
        """Loads every component that a request needs which asks for no more than it must."""
        encoder = ("vae_encoder",) * bool(self.manifest.conditions)
        for name in (*self.prompts.tokenizers, *encoder, self.denoiser, "vae_decoder"):
            self.parts[name].open()
        for beside in filter(None, (self.bundle.cached, self.bundle.steering)):
            self.parts[beside.name].open()

    def close(self) -> None:
        """Gives all memory back; a later request loads again."""
        for part in self.parts.values():
            part.close()

    @property
    def device(self) -> str:
        """What the denoiser runs on, in its vendor's words; loads it if need be."""
        return self.parts[self.denoiser].open().device

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(self, request: Request) -> Result:
        """Draws, without telling of the stages in between."""
        for event in self.stream(request):
            if event.result is not None:
                return event.result
        raise AssertionError("the last event has no result")

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Draws, with an event after every stage. Close the generator to cancel between two.

        Raises:
            EdgeflashError: a request that this bundle cannot fulfil, before anything is loaded; or
                a network that returns NaN or infinity.
        """
        plan = self._plan(request)
        rows = plan.schedule.rows(plan.entry)
        steps = len(rows)
        seeds = range(request.seed, request.seed + plan.shape[0])
        fresh = _draw(plan.shape, seeds, 0)

        control = pictures.shown(self.bundle, request.control), request.control_scale
        conditioning = yield from self._heard(request, plan, steps, control)
        latent = seen = None
        if request.image is not None:
            with self._stage("vae_encoder") as (part, clock):
                whole = plan.blends or plan.entry is not None
                image = sized(request.image, self._size(plan.shape))
                latent, seen = looked_at(part, self.manifest, image, request.mask, whole)
                told = clock.ms()
            yield Event("vae_encoder", 0, steps, told)
        blend = self._blend(request, plan, latent, fresh)
        start = None if latent is None else np.broadcast_to(latent, plan.shape)
        x, previous = plan.schedule.begin(fresh, start, plan.entry), None
        denoiser = Denoiser(self.bundle, self.parts, plan.guidance, conditioning, seen, control)
        with self._denoising(denoiser) as clock:
            for i, step in enumerate(rows):
                stage = denoiser.open(step)
                clock.start()
                output = denoiser(step, step.in_scale * x)
                if step.needs_noise:
                    fresh = _draw(plan.shape, seeds, i + 1)
                following = advance(step, x, output, noise=fresh, previous=previous)
                if request.edit and i + 1 < steps:
                    following = self._edited(request.edit, following, plan.schedule, i, fresh)
                if blend:
                    following = blend(following, len(plan.schedule.steps) - steps + i)
                when = f"at step {i + 1} of {steps}"
                x, previous = finite(following, stage, when), (x, output)
                told = clock.ms()
                if self.low_memory:
                    denoiser.close_all_but(rows[i + 1 :])
                yield Event(stage, i + 1, steps, told, x)

        with self._stage("vae_decoder") as (part, clock):
            images = self._decode(part, x, request.edit)
            told = clock.ms()
        ids = np.array([self.tokenizer(prompt).ids for prompt in request.prompts], np.int64)
        result = Result(images, x, ids, tuple(map(self.prompts.unread, request.prompts)))
        yield Event("vae_decoder", steps, steps, told, x, result)

    def _heard(
        self, request: Request, plan: _Plan, steps: int, control: tuple[Float32 | None, float]
    ) -> Generator[Event, None, Conditioning]:
        """Asks text encoders and adapter, once; gives what every call of the denoiser hears."""
        answers, negative = [], request.negative if plan.doubled else None
        for name in self.prompts.tokenizers:
            with self._stage(name) as (part, clock):
                answers.append(self.prompts.read(part, request.prompts, negative))
                told = clock.ms()
            yield Event(name, 0, steps, told)
        conditioning = self.prompts.joined(answers, self._size(plan.shape))
        if ADAPTER not in self.parts:
            return conditioning
        with self._stage(ADAPTER) as (part, clock):
            maps = pictures.mapped(part, *control, plan.shape[0] * (1 + plan.doubled))
            told = clock.ms()
        yield Event(ADAPTER, 0, steps, told)
        return {**conditioning, **maps}

    def preview(self, event: Event) -> UInt8:
        """The pictures [n, height, width, 3] of an event's latent, noisy until the last step.

        Takes one more run of the decoder, which no event counts.
        """
        assert event.latent is not None, "nothing has been denoised yet"
        with self._stage("vae_decoder") as (part, _):
            return self._decode(part, event.latent, None)

    def check(self, request: Request) -> None:
        """Raises what `stream` would say before it loads anything."""
        self._plan(request)

    def _plan(self, request: Request) -> _Plan:
        assert request.prompts, "no prompt"
        schedule, masked = self._schedule(request), request.mask is not None
        pictures.check_picture(self.bundle, request)
        entry, told = None, masked or bool(self.manifest.conditions)
        if request.image is not None:
            strength = (1.0 if told else 0.6) if request.strength is None else request.strength
            entry = None if told and strength == 1 else schedule.entry(strength)
        shape = self._shape(request)
        pictures.check_control(self.bundle, request, self._size(shape))
        if request.edit:
            pictures.check_edit(self.bundle, request, schedule, self._size(shape))
        blends = masked and not self.manifest.conditions
        if blends and len(schedule.entries) < len(schedule.steps):
            raise self._cannot("blend latents", "its schedule does not tell how to noise a picture")
        return _Plan(schedule, entry, self._guidance(request), shape, blends)

    def _size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) in px of pictures whose latents have that shape."""
        unit = self.manifest.latent.downsampling
        return shape[2] * unit, shape[3] * unit

    def _schedule(self, request: Request) -> Schedule:
        tables = self.manifest.schedules
        steps = self.manifest.default_steps if request.steps is None else request.steps
        if steps not in tables:
            have = ", ".join(map(str, sorted(tables)))
            raise self._cannot(f"draw in {steps} steps", f"its schedules are for {have}")
        return tables[steps]

    def _guidance(self, request: Request) -> Guidance:
        own = self.manifest.guidance
        scale = own.scale if request.guidance is None else request.guidance
        if request.negative and own.kind != "cfg":
            raise self._cannot("take a negative prompt", f"its guidance kind is {own.kind!r}")
        if request.negative and scale == 1:
            raise self._cannot("take a negative prompt", "guidance scale 1 asks for none: raise it")
        if own.kind == "none" and scale != 1:
            raise self._cannot(f"take the guidance scale {scale:g}", "its guidance kind is 'none'")
        if not 0 <= scale < float("inf"):
            raise self._cannot(f"take the guidance scale {scale:g}", "scales are 0 or more")
        return Guidance(kind=own.kind, scale=scale, channels=own.channels)

    def _shape(self, request: Request) -> tuple[int, ...]:
        latent, default = self.manifest.latent, self.manifest.image
        height, width = request.size or (default.height, default.width)
        unit = latent.downsampling
        if min(height, width) < unit or height % unit or width % unit:
            raise self._cannot(f"draw {height}x{width} px", f"sides must be multiples of {unit}")
        shape = (len(request.prompts), latent.channels, height // unit, width // unit)
        sample = self.parts[self.denoiser].component.input("sample")
        assert sample is not None
        fixed = zip(sample.shape[2:], shape[2:], strict=True)
        if any(isinstance(a, int) and a != b for a, b in fixed):
            raise self._cannot(
                f"draw {height}x{width} px", f"it was exported for {default.height}x{default.width}"
            )
        conditions = self.manifest.conditions
        if request.image is not None and conditions and not masks(conditions):
            sized(request.image, (height, width))
        elif request.image is not None and request.image.shape != (height, width, 3):
            raise self._cannot(
                f"start from an image {request.image.shape}", f"it takes ({height}, {width}, 3)"
            )
        return shape

    def _cannot(self, what: str, why: str) -> EdgeflashError:
        return pictures.cannot(self.bundle, what, why)

    @contextmanager
    def _stage(self, name: str) -> Iterator[tuple[Part, _Clock]]:
        part = self.parts[name]
        part.open()
        try:
            yield part, _Clock()
        finally:
            if self.low_memory:
                part.close()

    def _blend(
        self, request: Request, plan: _Plan, latent: Float32 | None, fresh: Float32
    ) -> Blend | None:
        if not plan.blends or latent is None or request.mask is None:
            return None
        cells = on_cells(request.mask[None, None], self.manifest.latent.downsampling)
        return Blend(plan.schedule, latent, fresh, cells)

    @contextmanager
    def _denoising(self, denoiser: Denoiser) -> Iterator[_Clock]:
        try:
            yield _Clock()
        finally:
            if self.low_memory:
                denoiser.close_all_but(())

    def _edited(
        self, edit: Edit, x: Float32, schedule: Schedule, i: int, fresh: Float32
    ) -> Float32:
        """x after step i, p x_0 + q noise, with the edit in the picture of x_0."""
        p, q = schedule.entries[i + 1].p, schedule.steps[i].c
        with self._stage("vae_decoder") as (part, _):
            clean = ((x - q * fresh) / p).astype(np.float32, copy=False)
            pixels = edit.project(decoded(part, clean, self.manifest.latent).clip(0, 255))
        with self._stage("vae_encoder") as (part, _):
            return p * encoded(part, pixels, self.manifest.latent) + q * fresh

    def _decode(self, part: Part, x: Float32, edit: Edit | None) -> UInt8:
        """Images uint8 [n, height, width, 3] of latents [n, c, h, w]."""
        pixels = decoded(part, x, self.manifest.latent)
        pixels = np.rint(edit.project(pixels.clip(0, 255)) if edit else pixels)
        return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


class _Clock:
    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._start = time.perf_counter()

    def ms(self) -> float:
        return (time.perf_counter() - self._start) * 1000


def _draw(shape: tuple[int, ...], seeds: range, k: int) -> Float32:
    """Draw ``k`` of each seed -> [n, c, h, w]."""
    return np.concatenate([noise.randn((1, *shape[1:]), seed, k) for seed in seeds])
