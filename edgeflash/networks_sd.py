"""The networks of the SD family in torch, wrapped to take and give exactly what gets exported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeflash.conditioning import SIZES
from edgeflash.errors import EdgeflashError
from edgeflash.lora import fuse
from edgeflash.student import Student


def load_network(student: Student, component: str) -> Any:
    """One component as diffusers or transformers loads it: float32, CPU, from local files only.

    The student's LoRAs are fused into it.

    Raises:
        EdgeflashError: the weights do not fit the config, or a LoRA not the network.
    """
    library, name = student.class_of(component)
    where = student.folder / component
    try:
        with quiet():
            network, told = getattr(importlib.import_module(library), name).from_pretrained(
                where,
                variant=student.weights(component).variant,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise EdgeflashError(f"{where}: does not load as {name}: {said}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, told[problem])):
            raise EdgeflashError(
                f"{where}: {problem.replace('_', ' ')} in the weights: {keys[0]} and "
                f"{len(keys) - 1} more; config and weights do not belong together"
            )
    with quiet():
        for lora in student.loras:
            fuse(network, component, lora)
    return network


def without_weights(student: Student, component: str) -> Any:
    """A component as its config says, with random weights, or none on the meta device."""
    folder = "vae" if component.startswith("vae") else component
    library, name = student.class_of(folder)
    built = getattr(importlib.import_module(library), name)
    config = student.config(folder)
    if library == "diffusers":
        return built.from_config(dict(config))
    return built(built.config_class.from_dict(dict(config)))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' progress bars and remarks off the terminal."""
    import diffusers.utils.logging as d
    import transformers.utils.logging as t

    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in (d, t)]
    for library, _, _ in before:
        library.set_verbosity_error(), library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def fold_timestep(network: Any, t: float) -> None:
    """Makes the time embedding of a UNet or a ControlNet the constant it is at time ``t``.

    The layers that computed it, here and in every residual block, are let go. With a w-embedding
    only the sinusoids become constant, because the rest also depends on the guidance scale; with
    pooled text the embedding, because the blocks' projections also see the prompt.
    """
    constants: dict[str, nn.Module] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            constants[name] = Constant(output.detach().clone())

        return hook

    ends = ["time_embedding", "time_emb_proj"]
    if network.config.addition_embed_type:
        ends = ["time_embedding"]
    if network.config.get("time_cond_proj_dim"):
        ends = ["time_proj"]
    named = [(n, m) for n, m in network.named_modules() if n.rpartition(".")[2] in ends]
    hooks = [
        module.register_forward_hook(keep(name)) for name, module in named if module is not None
    ]
    with torch.no_grad():
        _small_call(network, t)
    for hook in hooks:
        hook.remove()
    for name, constant in constants.items():
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, constant)


def _small_call(network: Any, t: float) -> None:
    """Runs the network on a small latent, 2x2 at its deepest: norms want more than a cell."""
    side = 2 ** len(network.config.block_out_channels)
    context = network.config.cross_attention_dim
    width = context if isinstance(context, int) else context[0]
    sample = torch.zeros(1, network.config.in_channels, side, side)
    channels = network.config.get("time_cond_proj_dim")
    guidance = torch.zeros(1, channels) if channels else None
    more: dict[str, Any] = {}
    if stem := network.config.get("conditioning_embedding_out_channels"):  # of a ControlNet
        px = side * 2 ** (len(stem) - 1)
        more["controlnet_cond"] = torch.zeros(1, network.config.conditioning_channels, px, px)
    added = None
    if network.config.addition_embed_type == "text_time":
        sizes = torch.zeros(1, SIZES)
        seen = network.add_embedding.linear_1.in_features
        pooled = torch.zeros(1, seen - SIZES * network.config.addition_time_embed_dim)
        added = {"text_embeds": pooled, "time_ids": sizes}
    text = torch.zeros(1, 1, width)
    named = {"timestep_cond": guidance, "added_cond_kwargs": added, **more}
    network(sample, torch.tensor(t), text, **named)


class Constant(nn.Module):
    """Gives the same tensor whatever it is asked."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_: Any) -> Tensor:
        return self.value


class TextEncoder(nn.Module):
    """Token ids int64 [n, s] -> hidden states [n, s, d], state at the end token [n, d]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(input_ids)
        return out.last_hidden_state, out.pooler_output


class Unet(nn.Module):
    """Latent [n, c, h, w], timestep [], conditioning [n, s, d] -> prediction [n, c, h, w].

    Networks distilled over a range of guidance also take the w-embedding [n, e].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.network(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return out


class FoldedUnet(nn.Module):
    """`Unet` at one timestep for good."""

    def __init__(self, network: Any, t: float) -> None:
        super().__init__()
        fold_timestep(network, t)
        self.network = network
        self.register_buffer("t", torch.tensor(t))

    def forward(
        self, sample: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.network(
            sample, self.t, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return out


class VaeDecoder(nn.Module):
    """Unscaled latent [n, c, h, w] -> image [n, 3, H, W] in [-1, 1]; the encoder is let go."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        del network.encoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.network.decode(latent_sample, return_dict=False)[0]
        return out


class VaeEncoder(nn.Module):
    """Image [n, 3, H, W] in [-1, 1] -> mean and log variance [n, 2c, h, w].

    The tiny encoder gives the latent itself [n, c, h, w].
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        del network.decoder

    def forward(self, sample: Tensor) -> Tensor:
        encoded = self.network.encode(sample)
        out: Tensor = (
            encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
        )
        return out


def wrap(network: Any, component: str, timestep: float | None) -> nn.Module:
    """The exportable form of a network; ``timestep``: fold this one into the UNet."""
    if component == "unet":
        return Unet(network) if timestep is None else FoldedUnet(network, timestep)
    wrappers = {"text_encoder": TextEncoder, "vae_decoder": VaeDecoder, "vae_encoder": VaeEncoder}
    return wrappers[component](network)
