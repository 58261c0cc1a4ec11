"""ControlNets and T2I-Adapters in torch: made beside a UNet, carried by it, wrapped for export."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeflash.adapter import fitting
from edgeflash.control import ADAPTER, CALLED, PICTURE
from edgeflash.errors import EdgeflashError
from edgeflash.latent_diffusion import of_rows
from edgeflash.networks_sd import fold_timestep

STEM = (16, 32, 96, 256)  # channels at each resolution that the picture passes, arXiv 2302.05543


def beside(unet: Any, downsampling: int) -> Any:
    """A new `ControlNetModel` that gives zeros, its way down the UNet's (arXiv 2302.05543, sec. 3).

    Pruned UNets may lack a middle, for which it then has one residual block.

    Args:
        unet: a `UNet2DConditionModel`.
        downsampling: of the latents, 1 to 8.

    Raises:
        EdgeflashError: a UNet that diffusers makes no ControlNet of.
    """
    from diffusers import ControlNetModel

    known = inspect.signature(ControlNetModel.__init__).parameters
    told = {name: value for name, value in unet.config.items() if name in known}
    told["mid_block_type"] = told["mid_block_type"] or "UNetMidBlock2D"
    stem = STEM[: downsampling.bit_length()]
    try:
        made = ControlNetModel(**told, conditioning_embedding_out_channels=stem)
        there = made.state_dict().keys()
        weights = {name: each for name, each in unet.state_dict().items() if name in there}
        made.load_state_dict(weights, strict=False)
    except (ValueError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise EdgeflashError(f"diffusers makes no ControlNet of this UNet: {said}") from error
    return made


def adapter_beside(unet: Any, downsampling: int) -> Any:
    """A new `T2IAdapter`, random as diffusers makes it, whose maps go where the UNet takes them.

    Args:
        unet: a `UNet2DConditionModel`.
        downsampling: of the latents.

    Raises:
        EdgeflashError: a UNet that diffusers adds no maps to.
    """
    from diffusers import T2IAdapter

    return T2IAdapter(**fitting(unet.config, downsampling))


def added(name: str, maps: Sequence[Tensor]) -> dict[str, Any]:
    """What a ControlNet or an adapter gives, as a UNet takes it; ``name``: which of them."""
    if name == ADAPTER:
        return {"down_intrablock_additional_residuals": [*maps]}  # the UNet empties the list
    *down, mid = maps
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def attach(unet: Any, name: str, steering: Any, unit_px: int) -> None:
    """Has a UNet carry a ControlNet or an adapter, which it asks in every call unet(x, t, c).

    That is a submodule of it, called ``name``, as the component. The picture travels in the last
    rows of c, as `edgeflash.latent_diffusion.as_rows` puts it.

    ``unit_px``: side of a cell of the latent.
    """

    def take(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x, t, c = given
        height, width = (unit_px * side for side in x.shape[-2:])
        c, picture = of_rows(c, 3 * height * width)
        return (x, t, c), named | {PICTURE: picture.view(-1, 3, height, width)}

    def steer(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        picture = named.pop(PICTURE)
        if name == ADAPTER:
            return given, named | added(name, module.adapter(picture))
        told = {k: v for k, v in named.items() if k == "added_cond_kwargs"}
        down, mid = module.controlnet(*given, picture, return_dict=False, **told)
        return given, named | added(name, [*down, mid])

    setattr(unet, name, steering)
    unet.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    unet.register_forward_pre_hook(steer, with_kwargs=True)


def apart(components: dict[str, Any]) -> dict[str, Any]:
    """Components by name, with what UNets carry that steers them taken off.

    Those UNets are not called again.
    """
    found = dict(components)
    for name, network in components.items():
        if isinstance(network, nn.Module) and name not in CALLED:  # one has a part of that name
            found |= taken_off(network)
    return found


def taken_off(unet: nn.Module) -> dict[str, Any]:
    """The ControlNet or the adapter that a UNet carried, by name, if it did."""
    return {name: unet._modules.pop(name) for name in CALLED if name in unet._modules}


class ControlNet(nn.Module):
    """Latent [n, c, h, w], timestep [], conditioning [n, s, d], picture [n, 3, H, W] in [0, 1].

    It gives the residuals [n, ., ., .]. Of SDXL it also takes pooled text and sizes. ``t``: has
    that timestep for good, and takes none.
    """

    t: Tensor

    def __init__(self, network: Any, t: float | None) -> None:
        super().__init__()
        if t is not None:
            fold_timestep(network, t)
            self.register_buffer("t", torch.tensor(t))
        self.network = network
        self._folded = t is not None

    def forward(self, sample: Tensor, *told: Tensor) -> tuple[Tensor, ...]:
        timestep, *rest = (self.t, *told) if self._folded else told
        text, picture, *added = rest
        named = dict(zip(("text_embeds", "time_ids"), added, strict=False))
        down, mid = self.network(
            sample, timestep, text, picture, added_cond_kwargs=named, return_dict=False
        )
        return *down, mid


class Adapter(nn.Module):
    """Picture [n, 3, H, W] in [0, 1] -> what it adds to the UNet on its way down, [n, ., ., .]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(image))


class Controlled(nn.Module):
    """A UNet in its exportable form, that takes what a ControlNet or an adapter gives last.

    ``name``: which of them.
    """

    def __init__(self, wrapped: nn.Module, unet: Any, name: str) -> None:
        super().__init__()
        self.network = wrapped
        self._unet = [unet]  # which is within, and stays a module of that alone
        takes = inspect.signature(wrapped.forward).parameters.values()
        guided = bool(unet.config.get("time_cond_proj_dim"))  # else the last of them is left out
        self._name, self._own = name, sum(each.default is each.empty for each in takes) + guided

    def forward(self, *inputs: Tensor) -> Tensor:
        own, maps = inputs[: self._own], inputs[self._own :]
        told = added(self._name, maps)
        (unet,) = self._unet
        hook = unet.register_forward_pre_hook(
            lambda _, given, named: (given, named | told), with_kwargs=True
        )
        try:
            out: Tensor = self.network(*own)
        finally:
            hook.remove()
        return out
