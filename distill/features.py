"""What networks see inside: their blocks' outputs, and feature networks for critics of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from edgeflash.errors import EdgeflashError

from .judge import Judge

# Pictures [n, 3, h, w] in [-1, 1] -> feature maps [n, w, ...], one a layer, and one embedding
# [n, e] of the whole picture.
Sees = Callable[[Tensor], tuple[list[Tensor], Tensor]]


class Taps:
    """Keeps what modules put out in the latest forward pass; ``which`` of several tensors."""

    def __init__(self, modules: Sequence[nn.Module], which: int = 0) -> None:
        self.which = which
        self._latest: dict[int, Tensor] = {}
        for place, module in enumerate(modules):
            module.register_forward_hook(self._hook(place))

    def _hook(self, place: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            while not isinstance(output, Tensor):  # blocks return tuples, transformers a dataclass
                output = output[self.which]
            self._latest[place] = output

        return keep

    @property
    def outputs(self) -> list[Tensor]:
        """In the order of the modules."""
        return [self._latest[place] for place in sorted(self._latest)]


def encoder_features(vae: Any) -> Sees:
    """The blocks of an `AutoencoderKL`'s encoder; the embedding is the innermost one's mean."""
    encoder = vae.encoder  # the rest of it may go
    taps = Taps([*encoder.down_blocks, encoder.mid_block])

    def sees(pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        encoder(pictures)
        return taps.outputs, taps.outputs[-1].mean((2, 3))

    return sees


def judge_features(judge: Judge) -> Sees:
    """The convolutions of the shapes' judge; the embedding is what its verdicts are read from."""
    taps = Taps(list(judge.body))

    def sees(pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        _, embedding = judge(pictures)
        return taps.outputs, embedding

    return sees


LAYERS = 5  # of a vision transformer: what goes in, and after every quarter of its blocks


def vision_features(name: str, device: torch.device) -> Sees:
    """Tokens of a vision transformer at five depths; the embedding is that of its class token.

    Pictures are resized to the side that it was trained at.

    Args:
        name: folder or hub id of a transformers model with a class token, such as DINOv2.
        device: where it shall live.

    Raises:
        EdgeflashError: no such model, or none that takes pictures as patches.
    """
    network, side, mean, std = _vision_transformer(name, device)
    patches = (side // network.config.patch_size) ** 2
    depths = [network.config.num_hidden_layers * i // (LAYERS - 1) for i in range(LAYERS)]

    def sees(pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        x = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True)
        told = network(pixel_values=((x + 1) / 2 - mean) / std, output_hidden_states=True)
        maps = [told.hidden_states[depth][:, -patches:].mT for depth in depths]
        return maps, told.last_hidden_state[:, 0]

    return sees


def _vision_transformer(name: str, device: torch.device) -> tuple[Any, int, Tensor, Tensor]:
    """The network, the side of its pictures in pixels, and their mean and deviation [3, 1, 1]."""
    reads = transformers.ImageProcessingMixin.get_image_processor_dict
    try:
        network = transformers.AutoModel.from_pretrained(name).requires_grad_(False).eval()
        told, _ = reads(name)
        mean, std = (torch.tensor(told[key], device=device) for key in ("image_mean", "image_std"))
        side, _ = network.config.image_size, network.config.patch_size
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise EdgeflashError(
            f"{name!r} is no vision transformer that transformers can open, with its "
            f"preprocessor_config.json beside it, such as facebook/dinov2-small ({why})"
        ) from None
    return network.float().to(device), side, mean[:, None, None], std[:, None, None]
