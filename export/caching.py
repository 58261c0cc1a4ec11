"""Two graphs of one denoiser: the whole one leaves what a cheaper one takes at later steps.

What is left out, and when, says a `Way` (`ways.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgeflash.bundle import Caching, TensorSpec
from edgeflash.caching import ROLE, cached_name
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import Schedule

if TYPE_CHECKING:
    from .capture import Network


class Way(Protocol):
    """A way to do without some of a denoiser at some steps."""

    @property
    def flag(self) -> str:
        """How it was asked for."""

    @property
    def cuts(self) -> str:
        """All that the two graphs depend on: when each of them runs says the schedule."""

    @property
    def gated(self) -> bool:
        """Whether the cached graph hears no prompt."""

    def reuses(self, row: int) -> bool:
        """Whether a row of a schedule runs the cached graph."""

    def check(self, unet: Any) -> None:
        """Raises what `cut` would say of a UNet, which may be without weights."""

    def cut(self, network: Network, cells: tuple[int, int]) -> tuple[Network, Network]:
        """The whole graph and the cached one, sharing all weights.

        Args:
            network: the denoiser, as its family describes it.
            cells: (height, width) of the latent.
        """

    def told(self, image_psnr_db: float) -> Caching:
        """For the manifest."""


def rows_of(way: Way, schedule: Schedule) -> Schedule:
    """The schedule with the graph of each row in it; a short one may have nothing to take over."""
    steps = tuple(
        step.model_copy(update={"graph": "cached"}) if way.reuses(i) else step
        for i, step in enumerate(schedule.steps)
    )
    return schedule.model_copy(update={"steps": steps})


def check_rows(way: Way, schedule: Schedule) -> None:
    """Raises where no row of a schedule would run the cached graph."""
    count = len(schedule.steps)
    if not any(way.reuses(i) for i in range(count)):
        raise EdgeflashError(
            f"{way.flag}: in {count} step{'s' * (count != 1)} there is nothing to take over from "
            "one to the next: ask for more --steps, or leave it out"
        )


def without(schedule: Schedule) -> Schedule:
    """The schedule as it was before `rows_of`."""
    steps = tuple(step.model_copy(update={"graph": None}) for step in schedule.steps)
    return schedule.model_copy(update={"steps": steps})


def under(
    module: nn.Module, unet: nn.Module, cuts: Mapping[str, nn.Module | None]
) -> dict[str, nn.Module | None]:
    """Paths within a UNet as those within what wraps it."""
    home = next(name for name, each in module.named_modules() if each is unet)
    return {f"{home}.{path}" if home else path: each for path, each in cuts.items()}


def replaced(module: nn.Module, changes: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module that shares all with another but what is at these paths; none takes it out.

    What is left keeps its name.
    """
    found = copy.copy(module)
    found._modules = dict(module._modules)  # else a change would be one of the original
    below: dict[str, dict[str, nn.Module | None]] = {}
    for path, each in changes.items():
        name, dot, rest = path.partition(".")
        if dot:
            below.setdefault(name, {})[rest] = each
        elif each is None and isinstance(module, nn.ModuleList):
            del found._modules[name]
        else:
            setattr(found, name, each)
    for name, some in below.items():
        child = module._modules[name]
        assert child is not None, name
        found._modules[name] = replaced(child, some)
    return found


def graphs(
    network: Network,
    taps: list[Tap],
    specs: tuple[TensorSpec, ...],
    module: nn.Module,
    layers: list[Given],
    deaf: tuple[str, ...],
) -> tuple[Network, Network]:
    """The whole graph of a denoiser, and the cached one.

    Args:
        network: the denoiser.
        taps: where the whole one is read.
        specs: of what is read there.
        module: the denoiser without what makes that.
        layers: what stands in for it, in the same order.
        deaf: roles of inputs that nothing is left in it to hear.
    """
    absent = {
        i: tuple(1 if isinstance(side, str) else side for side in spec.shape)
        for i, spec in enumerate(network.inputs)
        if spec.role in deaf
    }
    whole = replace(
        network, module=Leaving(network.module, taps), outputs=(*network.outputs, *specs)
    )
    return whole, replace(
        network,
        component=cached_name(network.component),
        module=Taking(module, layers, absent),
        inputs=(*(spec for spec in network.inputs if spec.role not in deaf), *specs),
    )


def left(number: int, network: Network, shape: tuple[int, ...], layout: str) -> TensorSpec:
    """Of what a denoiser leaves: [n, *shape]."""
    rows = network.inputs[0].shape[0]
    return TensorSpec(
        name=f"cache_{number}",
        role=f"{ROLE}{number}",
        shape=(rows, *shape),
        dtype="float32",
        layout=layout,
    )


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a network is read: what a layer gives, or the first ``width`` channels it is given."""

    layer: nn.Module
    width: int | None = None


class Given(nn.Module):
    """Gives what was put there for this call, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.put: list[Tensor] = []

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.put[0]


class Leaving(nn.Module):
    """A network that also gives what is read on the way.

    Args:
        network: what it gives comes first.
        taps: where it is read, in the order in which that follows.
    """

    def __init__(self, network: nn.Module, taps: list[Tap]) -> None:
        super().__init__()
        self.network = network
        self._taps = taps

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._watched() as seen:
            out = self.network(*inputs)
        return (out, *(seen[k] for k in range(len(self._taps))))

    @contextmanager
    def _watched(self) -> Iterator[dict[int, Tensor]]:
        seen: dict[int, Tensor] = {}
        hooks = [self._hook(tap, k, seen) for k, tap in enumerate(self._taps)]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, tap: Tap, k: int, seen: dict[int, Tensor]) -> Any:
        def before(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[k] = given[0][:, : tap.width]

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[k] = output

        if tap.width is None:
            return tap.layer.register_forward_hook(after)
        return tap.layer.register_forward_pre_hook(before)


def before_list(module: nn.Module) -> int | None:
    """After how many arguments a module takes all others as one list; None where it does not."""
    kinds = [each.kind for each in inspect.signature(module.forward).parameters.values()]
    listed = inspect.Parameter.VAR_POSITIONAL
    return kinds.index(listed) if listed in kinds else None


class Taking(nn.Module):
    """A network whose last inputs are what stands in for its layers, in their order.

    ``absent``: by position, the shapes of inputs that it does not hear, and does not get.
    """

    def __init__(
        self, network: nn.Module, layers: list[Given], absent: Mapping[int, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.network = network
        self._layers, self._absent = layers, dict(absent)

    def forward(self, *inputs: Tensor) -> Tensor:
        own, taken = list(inputs[: -len(self._layers)]), inputs[-len(self._layers) :]
        for position, shape in self._absent.items():
            own.insert(position, torch.zeros(shape))
        for layer, array in zip(self._layers, taken, strict=True):
            layer.put.append(array)
        try:
            out: Tensor = self.network(*own)
        finally:
            for layer in self._layers:
                layer.put.clear()
        return out
