"""LoRA files, one's own or anybody's, fused into a student's networks as these are loaded.

diffusers reads them, and with peft adds them to the weights: all formats that its pipelines take,
kohya's among them. Called from `networks_sd`, so torch is imported inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflash.errors import EdgeflashError

FILE = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for in a folder
COMPONENTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, or a folder with one in it, and how much of it is added."""

    path: Path
    scale: float = 1.0

    @property
    def file(self) -> Path:
        return self.path / FILE if self.path.is_dir() else self.path


def fuse(network: Any, component: str, lora: Lora) -> None:
    """Adds scale * alpha / r * B A to the weights of a network (arXiv 2106.09685, sec. 4.1).

    Raises:
        EdgeflashError: no LoRA of this family, or one for another base.
    """
    from diffusers import StableDiffusionPipeline as Pipeline
    from diffusers.loaders import lora_base

    state, alphas, metadata = _read(lora)
    if not any(key.startswith(f"{component}.") for key in state):
        return
    _check(state, network, component, lora)
    told = {"network_alphas": alphas, "metadata": metadata}
    if component == "unet":
        Pipeline.load_lora_into_unet(state, unet=network, **told)
        network.fuse_lora(lora.scale)
        network.unload_lora()
    else:
        Pipeline.load_lora_into_text_encoder(state, text_encoder=network, **told)
        lora_base.fuse_text_encoder_lora(network, lora.scale)
        lora_base._remove_text_encoder_monkey_patch(network)


def components_of(lora: Lora) -> set[str]:
    """The components that a LoRA changes, some of `COMPONENTS`.

    Raises:
        EdgeflashError: no LoRA of this family.
    """
    return {key.partition(".")[0] for key in _read(lora)[0]}


def _read(lora: Lora) -> tuple[dict[str, Any], Any, Any]:
    """Weights by diffusers' names, with their alphas (kohya) or peft's config (diffusers)."""
    from diffusers import StableDiffusionPipeline as Pipeline

    try:
        state, alphas, metadata = Pipeline.lora_state_dict(
            str(lora.file), return_lora_metadata=True, local_files_only=True
        )
    except Exception as error:  # of every kind, by what the file is instead
        said = " ".join(str(error).split())[:200]
        raise EdgeflashError(f"{lora.file}: diffusers reads no LoRA from it: {said}") from None
    strange = [key for key in state if key.partition(".")[0] not in COMPONENTS]
    if strange or not state:
        found = strange[0] if strange else "nothing"
        raise EdgeflashError(
            f"{lora.file}: holds {found}; LoRAs of unet and text_encoder alone are fused"
        )
    return state, alphas, metadata


def _check(state: dict[str, Any], network: Any, component: str, lora: Lora) -> None:
    """Refuses layers that the network lacks, which diffusers would pass over, and other shapes."""
    try:
        by_layer = _by_layer(state, component)
    except ValueError as error:
        raise EdgeflashError(f"{lora.file}: {component}: unknown to diffusers: {error}") from None
    for key, value in by_layer.items():
        name, _, side = key.rpartition(".lora_")
        if not hasattr(network, "text_model"):  # transformers has it flat since version 5
            name = name.removeprefix("text_model.")
        try:
            weight = network.get_submodule(name).weight
        except AttributeError:
            raise EdgeflashError(
                f"{lora.file}: for another base: the student has no {component}.{name}"
            ) from None
        axis = {"A.weight": 1, "B.weight": 0}.get(side)
        if axis is not None and value.shape[axis] != weight.shape[axis]:
            raise EdgeflashError(
                f"{lora.file}: for another base: {component}.{key} is {list(value.shape)}, and the "
                f"student's layer {list(weight.shape)}"
            )


def _by_layer(state: dict[str, Any], component: str) -> dict[str, Any]:
    """Weights of one component as ``layer.lora_A.weight``, converted as diffusers' loaders do."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    prefix = f"{component}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    told: dict[str, Any]
    if component == "unet":
        told = convert_unet_state_dict_to_peft(own)
    else:
        told = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    return told
