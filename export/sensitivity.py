"""What quantizing each layer alone does to the picture that the student draws in its own steps.

One pass tells it for all layers at once. A layer that is quantized changes what it makes by a small
d, in every call of it, and the picture by J d, with the Jacobian J of everything after it: later
layers, later steps, the decoder. With random v of N(0, 1), E[(v . J d)^2] = |J d|^2 (Hutchinson's
estimator), and v . J d = (J^T v) . d, where J^T v is what backpropagation of v brings to the layer.
So one way back through decoder, steps and text encoder gives one draw of this for every layer and
every word of a plan. It holds to first order in d: what a whole plan does is seen on its bundle.

One network is in memory at a time, and one call of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeflash.bundle import kind_of
from edgeflash.errors import EdgeflashError
from edgeflash.golden import heard, told_by
from edgeflash.no_memory import memory_named
from edgeflash.noise import randn
from edgeflash.parity import BEST_DB
from edgeflash.schedule import advance

from .capture import Network, Tape, as_one_row
from .fake import Range, change
from .memory import LESS_PX
from .plan import Kind, Quantizing, layer_of

PEAK = 2.0  # of pictures, from -1 to 1
Tell = Callable[[str], object]


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer, and what is known of it.

    Attributes:
        name: in plans.
        kind: in plans.
        weights: how many numbers its weight holds.
        channels: how many output channels.
        words: of plans, that it can get.
        taken: range of what it was given in all recorded calls.
        made: range of what it made.
        products: multiplications of all draws.
        draws: word -> v . J d, a number a draw.
    """

    name: str
    kind: Kind
    weights: int
    channels: int
    words: tuple[str, ...] = ()
    taken: Range = field(default_factory=Range)
    made: Range = field(default_factory=Range)
    products: int = 0
    draws: dict[str, list[float]] = field(default_factory=dict)

    def see(self, given: Tensor, made: Tensor) -> None:
        """Takes in one call."""
        self.taken.see(given)
        self.made.see(made)


@dataclass(frozen=True)
class Sensitivity:
    """What was found.

    Attributes:
        layers: those that at least one word applies to.
        numbers: component -> all numbers it holds, in these layers or not.
        pixels: numbers of a picture, [3, H, W].
    """

    layers: tuple[Layer, ...]
    numbers: Mapping[str, int]
    pixels: int

    def error(self, layer: Layer, word: str) -> float:
        """Mean square error of the picture, of values from -1 to 1, by one layer alone."""
        return float(np.mean(np.square(layer.draws[word]))) / self.pixels

    def psnr_db(self, layer: Layer) -> float:
        """Of the picture, by one layer alone and the coarsest word it can get."""
        return decibels(self.error(layer, layer.words[-1]))


def decibels(error: float) -> float:
    """PSNR of pictures from -1 to 1 with this mean square error."""
    return 10 * math.log10(PEAK**2 / error) if error else BEST_DB


def sensitivity(
    tape: Tape,
    target: Quantizing,
    components: Collection[str],
    words: Collection[str],
    *,
    rounds: int = 2,
    tell: Tell = lambda told: None,
) -> Sensitivity:
    """Runs the tape's prompts there and back.

    Args:
        tape: the student, its sampler and prompts; nothing recorded yet.
        target: tells which words a layer can get.
        components: of the student, in the order a prompt passes them.
        words: of plans, among `edgeflash.export.fake.WORDS`.
        rounds: draws of each prompt.
        tell: called with what is being done.

    Raises:
        EdgeflashError: memory does not suffice, or text encoders that are heard below each other.
    """
    layers: dict[str, dict[str, Layer]] = {}
    numbers: dict[str, int] = {}
    for name in components:
        tell(f"run {name}")

        def see(network: Network, name: str = name) -> None:
            layers[name] = _watched(network, target, words)
            numbers[name] = sum(p.numel() for p in network.module.parameters())

        with memory_named(name, LESS_PX):
            tape.record(name, see)
    back = _Back(tape, rounds)
    for name in reversed([*components]):
        tell(f"back through {name}")
        with memory_named(name, LESS_PX):
            getattr(back, kind_of(name))(_Drawing(tape.load(name), layers[name]))
    found = tuple(each for several in layers.values() for each in several.values() if each.words)
    return Sensitivity(found, numbers, int(tape.goldens[0]["image"].size))


def _layers(network: Network) -> dict[str, nn.Module]:
    """Path in the network -> convolution or linear layer."""
    kinds = (nn.Conv2d, nn.Linear)
    return {path: m for path, m in network.module.named_modules() if isinstance(m, kinds)}


def _watched(network: Network, target: Quantizing, words: Collection[str]) -> dict[str, Layer]:
    """Path -> layer; what a network does from now on is seen."""
    found = {}
    for path, module in _layers(network).items():
        kind: Kind = "linear" if isinstance(module, nn.Linear) else "conv"
        weight: Any = module.weight
        name = f"{network.component}/{layer_of(path)}"
        found[path] = layer = Layer(name, kind, weight.numel(), weight.shape[0])

        def see(_: nn.Module, given: Any, made: Tensor, layer: Layer = layer) -> None:
            can = target.can(layer.kind, given[0].ndim)
            layer.words = tuple(word for word in words if word in can)
            layer.see(given[0], made)

        module.register_forward_hook(see)
    return found


class _Drawing:
    """A network; whenever its calls are backpropagated through, its layers note their draws."""

    def __init__(self, network: Network, layers: Mapping[str, Layer]) -> None:
        self.network = network
        self.layers = layers
        self._anchor = torch.zeros((), requires_grad=True)
        for path, module in _layers(network).items():
            module.register_forward_hook(self._hook(layers[path]))

    def begin(self) -> None:
        """From here on, another draw."""
        for layer in self.layers.values():
            for word in layer.words:
                layer.draws.setdefault(word, []).append(0.0)

    def _hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, given: Any, made: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or not layer.words:
                return None
            layer.products += layer.weights * made.numel() // layer.channels
            if not made.requires_grad:  # it depends on tokens or time alone
                made = made + self._anchor

            def note(gradient: Tensor) -> None:
                with torch.no_grad():
                    for word in layer.words:
                        d = change(module, word, given[0].detach(), layer.taken, layer.made)
                        layer.draws[word][-1] += float((gradient * d).sum())

            made.register_hook(note)  # type: ignore[no-untyped-call]
            return made

        return hook

    def call(self, by_role: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What it makes of what it takes, tensors by role."""
        answer = self.network.module(*(by_role[spec.role] for spec in self.network.inputs))
        return answer if isinstance(answer, tuple) else (answer,)


class _Call(torch.autograd.Function):
    """One call of a denoiser, made anew on the way back: nothing of it is kept until then."""

    @staticmethod
    def forward(context: Any, drawing: _Drawing, roles: Any, *tensors: Tensor) -> Tensor:
        context.drawing, context.roles = drawing, roles
        context.save_for_backward(*tensors)
        return drawing.call(dict(zip(roles, tensors, strict=True)))[0]

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            leaves = [t.detach() for t in context.saved_tensors]
            for leaf in leaves:
                leaf.requires_grad_(leaf.is_floating_point())
            made = context.drawing.call(dict(zip(context.roles, leaves, strict=True)))[0]
            torch.autograd.backward(made, gradients[0])
        return (None, None, *(leaf.grad for leaf in leaves))


@dataclass
class _Back:
    """The way back: draw by draw, what a component hands to the one before it.

    Attributes:
        tape: with all that was recorded.
        rounds: draws a prompt.
        latents: gradients at the final latent, a draw each.
        heard: gradients at what the denoiser hears, with the prompt and without, a draw each.
    """

    tape: Tape
    rounds: int
    latents: list[Tensor] = field(default_factory=list)
    heard: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=list)

    @property
    def told(self) -> list[dict[str, Any]]:
        """The golden of each draw."""
        return [golden for golden in self.tape.goldens for _ in range(self.rounds)]

    def vae_decoder(self, drawing: _Drawing) -> None:
        space, generator = self.tape.latent, torch.Generator().manual_seed(0)
        for told in self.told:
            drawing.begin()
            latent = torch.from_numpy(told["latent"]).requires_grad_()
            image = drawing.call({"latent": latent / space.scale + space.shift})[0]
            image.backward(torch.randn(image.shape, generator=generator))  # type: ignore[no-untyped-call]
            assert latent.grad is not None
            self.latents.append(latent.grad)

    def denoiser(self, drawing: _Drawing) -> None:
        tape = self.tape
        names, inputs = tape.student.family.text_encoders, drawing.network.inputs
        for number, (told, gradient) in enumerate(zip(self.told, self.latents, strict=True)):
            drawing.begin()
            prompt, empty = (
                {k: torch.from_numpy(v).requires_grad_() for k, v in each.items()}
                for each in heard(told, names, inputs, tape.size)
            )
            latent = self._loop(drawing, prompt, empty, number // self.rounds)
            latent.backward(gradient)  # type: ignore[no-untyped-call]
            self.heard.append((_gradients(prompt), _gradients(empty)))

    def _loop(self, drawing: _Drawing, prompt: Any, empty: Any, number: int) -> Tensor:
        """`edgeflash.golden.Sampler.loop` in torch."""
        sampler, seed = self.tape.sampler, self.tape.seed(number)

        def fresh(k: int) -> Any:
            return torch.from_numpy(randn(sampler.shape, seed, k))

        x, previous = sampler.schedule.begin(fresh(0)), None
        for i, step in enumerate(sampler.schedule.steps):
            seen = step.in_scale * x
            guided = self._predict(drawing, seen, step.t, prompt)
            if sampler.guidance.doubles:
                bare = self._predict(drawing, seen, step.t, empty)
                guided = sampler.guidance.guide(bare, guided)
            noise = fresh(i + 1) if step.needs_noise else None
            following = advance(step, x, guided, noise=noise, previous=previous)
            x, previous = following, (x, guided)
        return x  # type: ignore[return-value]

    def _predict(self, drawing: _Drawing, seen: Any, t: float, told: Mapping[str, Tensor]) -> Any:
        given = {"sample": seen, **told}
        plain = {"timestep": np.array(t, np.float32)}
        if self.tape.sampler.guidance.kind == "embedded":
            plain["guidance"] = self.tape.sampler.guidance.embedding()
        for spec in drawing.network.inputs:
            if spec.role in plain:
                given[spec.role] = torch.from_numpy(as_one_row(plain[spec.role], spec).copy())
        roles = tuple(spec.role for spec in drawing.network.inputs)
        return _Call.apply(drawing, roles, *(given[role] for role in roles))  # type: ignore[no-untyped-call]

    def text_encoder(self, drawing: _Drawing) -> None:
        for told, gradients in zip(self.told, self.heard, strict=True):
            drawing.begin()
            for gradient, empty in zip(gradients, (False, True), strict=True):
                self._read(drawing, told, gradient, empty)

    def _read(
        self,
        drawing: _Drawing,
        told: Mapping[str, Any],
        gradient: Mapping[str, Tensor],
        empty: bool,
    ) -> None:
        name = drawing.network.component
        ids = told_by(name, "ids", empty=empty)
        if ids not in told or not gradient:
            return
        made = drawing.call({"tokens": torch.from_numpy(told[ids])})
        ends, seeds = [], []
        for spec, tensor in zip(drawing.network.outputs, made, strict=True):
            if spec.role in gradient and tensor.requires_grad:
                ends.append(tensor)
                seeds.append(self._share(told, name, spec.role, gradient[spec.role]))
        if not ends:
            raise EdgeflashError(
                f"{name}: no plan is searched for text encoders that are heard below each other: "
                "give a plan of your own"
            )
        torch.autograd.backward(ends, seeds)

    def _share(self, told: Mapping[str, Any], name: str, role: str, gradient: Tensor) -> Tensor:
        """Of a gradient at what several text encoders tell side by side, the part of one."""
        names = [n for n in self.tape.student.family.text_encoders if told_by(n, role) in told]
        widths = [told[told_by(each, role)].shape[-1] for each in names]
        found: Tensor = torch.split(gradient, widths, dim=-1)[names.index(name)]
        return found


def _gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: leaf.grad for role, leaf in leaves.items() if leaf.grad is not None}
