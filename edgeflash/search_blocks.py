"""The blocks that a UNet consists of, without weights: which are alike, and the work of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeflash.errors import EdgeflashError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeflash.architecture import Config
    from edgeflash.student import Student


@dataclass(frozen=True)
class Block:
    """One layer as the UNet calls it. Blocks are equal where they take the same time.

    Attributes:
        built: of what layers, as torch prints it.
        takes: shapes of the tensors it takes, for one picture.
        roles: of these tensors and of what it gives, as in `TensorSpec`; "" within the UNet. What
            stands at its ends a quantized UNet leaves alone, and so must a block.
        joined: whether the first is two put together, as skip connections are.
        module: the layer, on the meta device.
        args: what it was called with there, by position.
        kwargs: and by name.
        gives: what it gave, on the meta device.
    """

    built: str
    takes: tuple[tuple[int, ...], ...]
    roles: tuple[str, ...]
    joined: bool
    module: nn.Module = field(compare=False, repr=False)
    args: tuple[Any, ...] = field(compare=False, repr=False)
    kwargs: dict[str, Any] = field(compare=False, repr=False)
    gives: Any = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """For people: kind and first shape."""
        kind = self.built.partition("(")[0]
        return f"{kind} of {' x '.join(map(str, self.takes[0][1:])) or 'a number'}"


@dataclass(frozen=True)
class Anatomy:
    """What a UNet consists of: every block as often as it is called, and the count of weights."""

    blocks: tuple[Block, ...]
    parameters: int


class Anatomist:
    """Takes UNets of a student apart. A block that it has met before is not run again.

    Args:
        student: whose text encoders and latents the UNets belong to; its weights are not read.
        size: (height, width) of the pictures in px.
    """

    def __init__(self, student: Student, size: tuple[int, int]) -> None:
        self.student = student
        self._inputs = student.family.signature(student, "unet", size)[0]
        self._met: dict[Block, Block] = {}

    @property
    def distinct(self) -> int:
        """How many blocks it has met."""
        return len(self._met)

    def apart(self, config: Config) -> Anatomy:
        """The blocks of a UNet with that config.

        Raises:
            EdgeflashError: diffusers cannot build it, or it cannot take such pictures.
        """
        import torch
        from diffusers import UNet2DConditionModel

        from edgeflash.networks_sd import quiet

        found: list[Block] = []
        with torch.device("meta"), torch.no_grad(), quiet():
            try:
                network: Any = UNet2DConditionModel.from_config(config)
                paths = {module: path for path, module in network.named_modules()}
                timed = _hears_time_alone(network.config)
                for module in list(_layers(network)):
                    vars(module)["forward"] = self._noting(module, paths[module], timed, found)
                given = [_empty(spec.shape, spec.dtype) for spec in self._inputs]
                self.student.family.wrap(network, "unet").eval()(*given)
            except (ValueError, RuntimeError, TypeError) as error:
                said = " ".join(str(error).split())[:200]
                raise EdgeflashError(f"this UNet cannot be built or run: {said}") from None
        return Anatomy(tuple(found), sum(p.numel() for p in network.parameters()))

    def _noting(self, module: nn.Module, path: str, timed: bool, found: list[Block]) -> Any:
        """The layer's forward, that notes its call."""
        whole, built = module.forward, repr(module)
        names = list(inspect.signature(whole).parameters)
        joined = path.startswith("up_blocks.") and ".resnets." in path
        gives = "prediction" if path == "conv_out" else ""

        def forward(*args: Any, **kwargs: Any) -> Any:
            takes = tuple(tuple(t.shape) for t in tensors_in(args, kwargs))
            called = (*zip(names, args, strict=False), *kwargs.items())
            fed = (_role(path, name, timed) for name, t in called if tensors_in((t,), {}))
            block = Block(built, takes, (*fed, gives), joined, module, args, kwargs, None)
            if block not in self._met:
                vars(module).pop("forward", None)
                block = replace(block, gives=whole(*args, **kwargs))
                self._met[block] = block
            found.append(self._met[block])
            return self._met[block].gives

        return forward


def _hears_time_alone(config: Config) -> bool:
    """Whether the embedding that all resnets take is of the timestep, and of nothing else."""
    others = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
    return all(config.get(name) is None for name in others)


def _role(path: str, name: str, timed: bool) -> str:
    """Of what a layer takes under a name; "" where that comes from other layers."""
    if path == "time_embedding" or name == "temb":
        return "timestep" if timed else ""
    if path == "add_embedding" or name == "encoder_hidden_states":
        return "conditioning"
    return "sample" if path == "conv_in" else ""


def _empty(shape: tuple[int | str, ...], dtype: str) -> Tensor:
    import torch

    sides = [1 if isinstance(side, str) else side for side in shape]
    return torch.zeros(sides, dtype=getattr(torch, dtype))


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    """The parts that do the work: stages and lists are looked into, their layers are not."""
    from torch import nn

    for child in network.children():
        if isinstance(child, nn.ModuleList) or hasattr(child, "resnets"):
            yield from _layers(child)
        elif any(isinstance(each, nn.Conv2d | nn.Linear) for each in child.modules()):
            yield child


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call, in order."""
    import torch

    return [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]


@cache
def gflop_of(block: Block) -> float:
    """GFLOP of one call, as torch counts them; see `edgeflash.work.gflops`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        block.module(*block.args, **block.kwargs)
    return float(counter.get_total_flops()) / 1e9
