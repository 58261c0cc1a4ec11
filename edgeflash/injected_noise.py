"""Noise of our choosing in the place of torch's own, for schedulers that draw some in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def injected(noise: Any) -> Iterator[list[None]]:
    """Every ``torch.randn`` inside gives ``noise``, and float64 tensors are not cast to float32.

    Yields a list that grows by one with each draw. Works through torch's own function modes, so it
    holds whichever helper a scheduler imports to draw noise.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    draws: list[None] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (torch.randn, torch.randn_like):
                draws.append(None)
                return noise
            to_float32 = any(value is torch.float32 for value in (*args, *kwargs.values()))
            if func is torch.Tensor.to and to_float32 and args[0].dtype == torch.float64:
                return args[0]
            return func(*args, **kwargs)

    with Mode():
        yield draws
