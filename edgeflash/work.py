"""What a network has to do, told from its layers: no weights are read, and nothing is computed.

It runs on torch's meta device, where results have shapes and no numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from edgeflash.networks_sd import quiet, without_weights

if TYPE_CHECKING:
    from edgeflash.student import Student


def gflops(
    student: Student, size: tuple[int, int] | None = None, components: Sequence[str] = ()
) -> dict[str, float]:
    """GFLOP of one call of each component, for one picture.

    Args:
        student: whose configs say how the networks are built.
        size: (height, width) in px; None: what the UNet was made for.
        components: which; none named: all.
    """
    found, pixels = {}, size or student.family.size(student)
    for component in components or student.family.components():
        network, given = _hollow(student, component, pixels)
        # Of fake tensors T5 does not ask whether all of its mask is true.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [fake.from_tensor(tensor) for tensor in given]
        with torch.no_grad(), fake, FlopCounterMode(display=False) as counter:
            network(*fakes)
        found[component] = counter.get_total_flops() / 1e9
    return found


def alive_bytes(student: Student, component: str, size: tuple[int, int]) -> int:
    """The most that results of one call take at a time, of operators that run one by one.

    As exported graphs have it: attention writes every query's weight of every key, [heads, n, n].
    """
    network, given = _hollow(student, component, size)
    alive = _Alive(network)
    with torch.no_grad(), alive:
        network(*given)
    return alive.most


def taught_bytes(student: Student, component: str, size: tuple[int, int]) -> int:
    """The same of a call that is backpropagated through, to its inputs, in torch on a CPU.

    What convolutions and linear layers take stays until the end, as `export/sensitivity.py` wants
    it; attention keeps what it takes and makes alone (FlashAttention, arXiv 2205.14135).
    """
    network, given = _hollow(student, component, size)
    return _taught(network.requires_grad_(False), given)


def _taught(network: Any, given: Sequence[Any]) -> int:
    kept: list[Any] = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda _, given, made: kept.append(given))
    for tensor in given:
        tensor.requires_grad_(tensor.is_floating_point())
    alive = _Alive(network)
    with _Flash(), alive:
        made = network(*given)
        first = made[0] if isinstance(made, tuple) else made
        first.backward(torch.empty_like(first))
    return alive.most


def _hollow(student: Student, component: str, size: tuple[int, int]) -> tuple[Any, Sequence[Any]]:
    """A component on the meta device, and what it takes for one picture."""
    inputs, _ = student.family.signature(student, component, size)
    with torch.device("meta"), quiet():
        network = student.family.wrap(without_weights(student, component), component).eval()
        given = [
            torch.zeros(
                [1 if isinstance(side, str) else side for side in spec.shape],
                dtype=getattr(torch, spec.dtype),
            )
            for spec in inputs
        ]
    return network, given


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of results from when they are made until nothing holds them any more."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = (*network.parameters(), *network.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in held}
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or what was written in place
            return
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class _Flash(TorchFunctionMode):
    """Attention without the weights between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            tensors = (given[name] for name in ("query", "key", "value"))
            return _Attention.apply(*tensors)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Its shapes alone: what it keeps for the way back, and what comes back."""

    @staticmethod
    def forward(context: Any, query: Any, key: Any, value: Any) -> Any:
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, made)
        return made

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])
