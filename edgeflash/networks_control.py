"""ControlNets in torch: made beside a UNet, carried by it in training, wrapped for export."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from edgeflash.control import NAME, PICTURE, shapes
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


def attach(unet: Any, controlnet: Any, unit_px: int) -> None:
    """Has a UNet carry a ControlNet, a submodule of it, and ask it in every call unet(x, t, c).

    The picture travels in the last rows of c, as `edgeflash.latent_diffusion.as_rows` puts it.

    ``unit_px``: side of a cell of the latent.
    """

    def take(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x, t, c = given
        height, width = (unit_px * side for side in x.shape[-2:])
        c, picture = of_rows(c, 3 * height * width)
        return (x, t, c), named | {PICTURE: picture.view(-1, 3, height, width)}

    def steer(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        told = {k: v for k, v in named.items() if k == "added_cond_kwargs"}
        down, mid = module.controlnet(*given, named.pop(PICTURE), return_dict=False, **told)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return given, named | added

    setattr(unet, NAME, controlnet)
    unet.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    unet.register_forward_pre_hook(steer, with_kwargs=True)


def apart(components: dict[str, Any]) -> dict[str, Any]:
    """Components by name, with the ControlNets that UNets carry taken off them.

    Those UNets are not called again.
    """
    found = dict(components)
    for network in components.values():
        if isinstance(network, nn.Module) and NAME in network._modules:
            found[NAME] = network._modules.pop(NAME)
    return found


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


class Controlled(nn.Module):
    """A UNet in its exportable form, that takes the residuals of a ControlNet last."""

    def __init__(self, wrapped: nn.Module, unet: Any) -> None:
        super().__init__()
        self.network = wrapped
        self._unet = [unet]  # which is within, and stays a module of that alone
        self._count = len(shapes(unet.config, (1, 1, 1, 1)))

    def forward(self, *inputs: Tensor) -> Tensor:
        own, (*down, mid) = inputs[: -self._count], inputs[-self._count :]
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        (unet,) = self._unet
        hook = unet.register_forward_pre_hook(
            lambda _, given, named: (given, named | added), with_kwargs=True
        )
        try:
            out: Tensor = self.network(*own)
        finally:
            hook.remove()
        return out
