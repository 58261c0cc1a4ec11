"""Components in torch as Apple's Core ML packages of Stable Diffusion take and give them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgeflash.bundle import EACH_STEP, Latent, TensorSpec

from .capture import Network

NAMES = {  # role -> what Apple's packages call it; others keep their names, which are Apple's
    "conditioning": "last_hidden_state",
    "pooled": "pooled_outputs",
    "prediction": "noise_pred",
    "image": "image",
    "latent": "latent",
}
SCALE = 0.18215  # of latents in Apple's runtime, whatever the model says; there is no shift
LOG_VARIANCE = (-30.0, 20.0)  # limits, as in diffusers' DiagonalGaussianDistribution


def adapted(network: Network, latent: Latent) -> Network:
    """A component with Apple's names, layouts and factor.

    Args:
        network: as the family describes it, but for its inputs, which say how many rows it takes.
        latent: how the student scales its latents.
    """
    rows = network.inputs[0].shape[0]
    outputs = tuple(
        spec.model_copy(
            update={"name": NAMES.get(spec.role, spec.name), "shape": (rows, *spec.shape[1:])}
        )
        for spec in network.outputs
    )
    module: nn.Module
    if network.component == "text_encoder":
        module = TextEncoder(network.module)
    elif network.component in EACH_STEP:
        module = Unet(network.module, network.inputs)
    elif network.component == "vae_decoder":
        module = Decoder(network.module, latent)
    else:
        module = Encoder(network.module, latent)
        moments = (rows, 2 * latent.channels, *outputs[0].shape[2:])
        outputs = (outputs[0].model_copy(update={"shape": moments}),)
    return Network(network.component, module, network.inputs, outputs)


class TextEncoder(nn.Module):
    """Takes token ids as floats: Swift has nothing else to offer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Any:
        return self.network(input_ids.long())


class Unet(nn.Module):
    """A UNet or a ControlNet, which takes the conditioning as [n, d, 1, s]."""

    def __init__(self, network: nn.Module, inputs: tuple[TensorSpec, ...]) -> None:
        super().__init__()
        self.network = network
        self.conditioning = [spec.role for spec in inputs].index("conditioning")

    def forward(self, *inputs: Tensor) -> Any:
        given = list(inputs)
        given[self.conditioning] = given[self.conditioning].squeeze(2).transpose(1, 2)
        return self.network(*given)


class Decoder(nn.Module):
    """Takes latents divided by Apple's factor instead of the student's."""

    def __init__(self, network: nn.Module, latent: Latent) -> None:
        super().__init__()
        self.network = network
        self.factor = SCALE / latent.scale
        self.shift = latent.shift

    def forward(self, z: Tensor) -> Any:
        z = z if self.factor == 1 else z * self.factor
        return self.network(z if self.shift == 0 else z + self.shift)


class Encoder(nn.Module):
    """Gives mean and log variance [1, 2c, h, w], which Apple's factor makes latents of."""

    def __init__(self, network: nn.Module, latent: Latent) -> None:
        super().__init__()
        self.network = network
        self.channels = latent.channels
        self.factor = latent.scale / SCALE
        self.shift = latent.shift

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.network(x)
        mean = (encoded[:, : self.channels] - self.shift) * self.factor
        log_variance = encoded[:, self.channels :].clamp(*LOG_VARIANCE)
        if not log_variance.shape[1]:  # a tiny encoder, which is sure of its latent
            return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE[0])], 1)
        return torch.cat([mean, log_variance + 2 * math.log(self.factor)], 1)
