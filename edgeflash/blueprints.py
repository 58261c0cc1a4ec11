"""Diffusers folders of published or own sizes with random weights: what a student will cost.

Latency, memory and bytes do not depend on what the weights are, so all of it can be known before
anyone trains. What such a folder draws is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflash.disk import read_json
from edgeflash.embedded import models
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.families import tokenizer_of

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
BASE = SD15 | {"layers_per_block": 1}
SMALL = BASE | {"mid_block_type": None}
TINY = SMALL | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (CROSS_DOWN,) * 3,
    "up_block_types": (CROSS_UP,) * 3,
}
SDXS = TINY | {
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SSD = SDXL | {
    "transformer_layers_per_block": (0, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}
KOALA = SDXL | {
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 5),
    "mid_block_type": None,
}
UNETS: dict[str, dict[str, Any]] = {  # BK-SDM: arXiv 2305.15798, fig. 3; SDXS: 2403.16627, sec. 3
    "sd15": SD15,
    "bk-sdm-base": BASE,
    "bk-sdm-small": SMALL,
    "bk-sdm-tiny": TINY,
    "sdxs-512": SDXS,
    "sdxl": SDXL,  # arXiv 2307.01952
    "ssd-1b": SSD,  # 2401.02677
    "koala-700m": KOALA,  # 2312.04005
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_H = {  # as SD 2.x cuts it
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
TEXT_ENCODERS: dict[int, tuple[dict[str, int], ...]] = {  # by width of what they give together
    768: (CLIP_L,),
    1024: (CLIP_H,),
    2048: (CLIP_L, CLIP_G),
}
DECODERS: dict[str, dict[str, Any]] = {
    "kl": {  # of Stable Diffusion
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 512,
    },
    "tiny": {},  # TAESD's
    "lite": {  # half of its width, and no block at full size; runtimes/README.md: how to train it
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "num_encoder_blocks": (0, 1, 4, 4),
        "num_decoder_blocks": (4, 4, 1, 0),
    },
}
UNIT = 8  # px that a latent of each of these is wide
VOCABULARY = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}


@dataclass(frozen=True)
class Blueprint:
    """A UNet's config, and the decoder that goes with it."""

    name: str
    unet: dict[str, Any]
    decoder: str  # of `DECODERS`

    @classmethod
    def of(cls, what: str, decoder: str | None = None) -> Blueprint:
        """The blueprint of a name in `UNETS`, or of a UNet's config file.

        Raises:
            EdgeflashError: no such name or file, or a UNet that wants another text encoder.
        """
        path = Path(what)
        if what not in UNETS and path.suffix != ".json":
            raise unknown("blueprint or folder", what, [*UNETS, *models()])
        unet = UNETS[what] if what in UNETS else _read_unet(path)
        chosen = decoder or ("tiny" if what.startswith("sdxs") else "kl")
        if chosen not in DECODERS:
            raise unknown("decoder", chosen, DECODERS)
        return cls(path.stem if path.suffix == ".json" else what, unet, chosen)

    def networks(self) -> Iterator[tuple[str, Any]]:
        """Components and networks, float32, one after the other, the same weights every time."""
        import torch
        import transformers
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        yield "unet", UNet2DConditionModel(**{"sample_size": 64} | self.unet)
        configs = TEXT_ENCODERS[self.unet["cross_attention_dim"]]
        for (name, kind), config in zip(self._text_encoders.items(), configs, strict=True):
            yield name, _text_encoder(getattr(transformers, kind), config)
        yield "vae", _autoencoder(self.decoder)

    @property
    def _text_encoders(self) -> dict[str, str]:
        """Component -> class."""
        second = {"text_encoder_2": "CLIPTextModelWithProjection"} if _is_xl(self.unet) else {}
        return {"text_encoder": "CLIPTextModel"} | second

    def write(self, folder: Path) -> None:
        """The whole diffusers folder, with the scheduler of LCM."""
        from edgeflash.networks_sd import quiet

        with quiet():
            for component, network in self.networks():
                network.save_pretrained(folder / component)
                del network  # before the next one is made
        self.write_rest(folder)

    def write_configs(self, folder: Path) -> None:
        """The same folder without weights, for what is asked of configs alone."""
        import torch

        with torch.device("meta"):
            networks = dict(self.networks())
        for component, network in networks.items():
            save = getattr(network, "save_config", None) or network.config.save_pretrained
            save(folder / component)
        self.write_rest(folder)

    def write_rest(self, folder: Path) -> None:
        """What has no weights: tokenizer, scheduler and index."""
        scheduler().save_pretrained(folder / "scheduler")
        vae = "AutoencoderKL" if self.decoder == "kl" else "AutoencoderTiny"
        index: dict[str, Any] = {
            "_class_name": f"StableDiffusion{'XL' * _is_xl(self.unet)}Pipeline",
            "scheduler": ["diffusers", "LCMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", vae],
        }
        for name, kind in self._text_encoders.items():
            index[name] = ["transformers", kind]
            index[tokenizer_of(name)] = ["transformers", "CLIPTokenizer"]
            _write_tokenizer(folder / tokenizer_of(name))
        (folder / "model_index.json").write_text(json.dumps(index))


def scheduler() -> Any:
    """LCM's, on the noise of Stable Diffusion."""
    from diffusers import LCMScheduler

    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _is_xl(unet: dict[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _read_unet(path: Path) -> dict[str, Any]:
    config = {k: v for k, v in read_json(path).items() if not k.startswith("_")}
    width, many = config.get("cross_attention_dim"), 2 if _is_xl(config) else 1
    widths = [known for known, encoders in TEXT_ENCODERS.items() if len(encoders) == many]
    if width not in widths:
        known = " or ".join(map(str, widths))
        raise EdgeflashError(
            f"{path}: cross_attention_dim is {width}, where CLIP text encoders give {known}; "
            "to price another one, give a whole diffusers folder"
        )
    _check_built(config, path)
    return config


def _check_built(config: dict[str, Any], path: Path) -> None:
    """Raises what diffusers says of a config that it makes no UNet of."""
    import torch
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            UNet2DConditionModel(**{"sample_size": 64} | config)
    except Exception as error:  # of every kind, as what a file may hold
        said = " ".join(str(error).split())[:200]
        raise EdgeflashError(f"{path}: diffusers makes no UNet of it: {said}") from None


def _text_encoder(kind: Any, sizes: dict[str, int]) -> Any:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(vocab_size=49408, **sizes)
    config.bos_token_id, config.eos_token_id = VOCABULARY.values()
    return kind(config)


def _autoencoder(decoder: str) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    return (AutoencoderKL if decoder == "kl" else AutoencoderTiny)(**DECODERS[decoder])


def _write_tokenizer(folder: Path) -> None:
    """CLIP's rules and special tokens, with letters alone."""
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    tokens = {t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    (folder / "vocab.json").write_text(json.dumps(tokens | VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
