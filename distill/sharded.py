"""FSDP2: players' weights, gradients and optimizer states cut up over the processes.

torch's `fully_shard` cuts them, by way of accelerate, where the launcher asks for it. Left to this
file is what the two do not know of: averages, which are cut as the network they follow and moved
where they lie; and the student, which is put together again for whoever measures and saves it.
Networks that learn nothing stay whole in every process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from edgeflash.errors import EdgeflashError

from .stage import Stage

BLOCKS = (  # gathered one at a time
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "AutoencoderTinyBlock",
)

UNGATHERED = (  # in what torch says of weights that are cut up
    "DTensor",
    "data is not allocated",
    "storage of size 0",
)


def heed(accelerator: Accelerator) -> None:
    """Sees to it that FSDP is had where it was asked for, in version 2, and of whole networks.

    accelerate passes over it on CPUs, where torch has it. And its launcher asks transformers to
    load weights in the first process alone, for accelerate to spread: but text encoders are never
    cut up, so that is taken back. (Two processes on a CPU load them whole either way.)

    Raises:
        EdgeflashError: FSDP 1 was asked for.
    """
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers looks there at each load
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    plugin.cpu_ram_efficient_loading = False
    if plugin.fsdp_version != 2:
        raise EdgeflashError("FSDP 1: not taken; launch with --fsdp_version 2 (FSDP_VERSION=2)")
    if accelerator.distributed_type is DistributedType.MULTI_CPU:
        for state in (PartialState(), accelerator.state):  # the second takes after the first
            state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def lay_out(network: Any, accelerator: Accelerator) -> None:
    """Readies a network to be cut up: blocks by themselves, and what is left of it.

    Which blocks is said for each network, as accelerate looks for all it is told of, or for what
    the class of a network names, in every one; by size it takes `ModuleList`, which torch refuses.
    Nor does torch take weights that are channels last.
    """
    network.to(memory_format=torch.contiguous_format)
    plugin, there = accelerator.state.fsdp_plugin, {type(m).__name__ for m in network.modules()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [name for name in BLOCKS if name in there]


def settle(network: nn.Module) -> None:
    """Has a network that was cut up forget its gathered weights after every use.

    Whether a weight learns is taken over when it is gathered, and players take turns; and what
    follows a network shall find it cut up. Backends of CPUs know sums alone, no means.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.set_force_sum_reduction_for_comms(on_cpu)


def follow(average: AveragedModel, network: nn.Module, accelerator: Accelerator) -> None:
    """Cuts an average up as the network that it follows is."""
    lay_out(average.module, accelerator)
    if isinstance(network, FSDPModule):
        fsdp2_prepare_model(accelerator, average.module)
        settle(average.module)
        return
    pairs = zip(list(average.module.named_parameters()), network.parameters(), strict=True)
    for (name, own), theirs in pairs:  # of a part of the player's network
        if isinstance(theirs, DTensor):
            home, _, leaf = name.rpartition(".")
            cut = distribute_tensor(
                own.detach(), theirs.device_mesh, theirs.placements, src_data_rank=None
            )
            setattr(average.module.get_submodule(home), leaf, nn.Parameter(cut, own.requires_grad))


class Whole:
    """An average as checkpoints have it: whole, however it is cut up."""

    def __init__(self, average: AveragedModel, accelerator: Accelerator) -> None:
        self.average, self.main = average, accelerator.is_main_process

    def state_dict(self) -> dict[str, Tensor]:
        """All of it in the main process, nothing in the others."""
        return _whole(self.average, self.main)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, own in self.average.state_dict().items():
            given = state[name].to(own.device)
            if isinstance(own, DTensor):
                given = distribute_tensor(
                    given, own.device_mesh, own.placements, src_data_rank=None
                )
            own.copy_(given)


def moulds(stage: Stage) -> dict[str, Any]:
    """Copies without weights of what the stage will save, made before anything is cut up."""
    return {k: _mould(v) for k, v in stage.final().items() if isinstance(v, nn.Module)}


def put_together(stage: Stage, moulds: dict[str, Any], accelerator: Accelerator) -> None:
    """Gives the main process's stage whole networks to save; all processes call it."""
    main, final = accelerator.is_main_process, stage.final()
    for name, mould in moulds.items():
        state = _whole(final[name], main)
        if main:
            mould.load_state_dict(state, assign=True)
            mould.to(accelerator.device)
            stage.results[name] = mould
            stage.averages.pop(name, None)


def _mould(network: nn.Module) -> nn.Module:
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
        for weight in network.parameters()
    }
    return copy.deepcopy(network, empty)  # takes these for the weights, and copies none


def _whole(network: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Its state, tensor after tensor, so that no device need hold all of it; on the CPU."""
    state = {}
    for name, tensor in network.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = full.detach().cpu()
    return state


@contextmanager
def in_one_line(player: str, accelerator: Accelerator) -> Iterator[None]:
    """Tells of what a loss does that weights cut up do not stand.

    torch gathers them for a network's own call and its backward pass, and frees them after each: a
    derivative of a gradient finds them gone.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if not accelerator.is_fsdp2 or not any(word in told for word in UNGATHERED):
            raise
        raise EdgeflashError(
            f"FSDP: the loss of {player!r} asks for weights outside of a network's own call, or "
            f"for a second derivative, as R1 does ({told.splitlines()[0]}); launch without FSDP, "
            "or leave that term out (r1_weight = 0, adversarial_weight = 0)"
        ) from None
