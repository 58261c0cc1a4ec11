"""What frozen networks make of the data: latents, token ids and conditioning, encoded once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderTiny
from torch import Tensor

from edgeflash.bundle import Condition
from edgeflash.families import tokenizer_of
from edgeflash.latent_diffusion import as_rows
from edgeflash.schedule import Schedule, advance
from edgeflash.student import Student, folder_sha256
from edgeflash.tokenizer import read_tokenizer

from .process import Process, noise_config
from .rollout import denoised
from .seen import edges_of, seen_of
from .stage import Batch, Workshop
from .teacher import asked

Rows = Callable[[np.ndarray], Tensor]


def at_once(size_px: int) -> int:
    """Pictures that an autoencoder is given at once: what fits in a GiB or two."""
    return max(1, 2**18 // size_px**2)


def token_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """int64 [n, max_tokens], padded and cut; how many captions are cut is told on stderr."""
    distinct = list(dict.fromkeys(captions))
    # The padded call comes last: its settings stay in a tokenizer, and are saved with it.
    lengths = [len(ids) for ids in tokenizer(distinct, verbose=False).input_ids]
    told = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
    most = told.input_ids.shape[1]
    cut = sum(length > most for length in lengths)
    _tell_cut(cut, len(distinct) - ("" in distinct), most)  # "" stands for no caption
    row = {caption: i for i, caption in enumerate(distinct)}
    ids: Tensor = told.input_ids[[row[c] for c in captions]]
    return ids


@cache
def _tell_cut(cut: int, count: int, most: int) -> None:
    """Tells a line once, though every stage reads the captions anew."""
    if cut:
        line = f"{cut:,} of {count:,} captions are longer than {most} tokens: cut"
        print(line, file=sys.stderr)


def cached_latents(shop: Workshop) -> Rows:
    """Scaled latents of the store's pictures, [n, c, h, w] float32, encoded once.

    The posterior's mean is kept: its standard deviation is a hundredth of the latents'.
    """
    return _cached_latents(shop, "latents", shop.store.pictures)


def mistaken_latents(shop: Workshop) -> Rows:
    """Scaled latents of the shapes scenes as `shapes.mistaken` has them, [n, c, h, w] float32."""
    return _cached_latents(shop, "mistakes", shop.store.mistaken)


def _cached_latents(shop: Workshop, name: str, pictures: Rows) -> Rows:
    folder = (shop.teacher or shop.student) / "vae"
    encoder = cache(lambda: _encoder(shop.load(folder.parent, "vae")))  # if there is any to encode

    @torch.no_grad()
    def encode(indices: np.ndarray) -> Tensor:
        parts = np.array_split(indices, -(-len(indices) // at_once(shop.store.size_px)))
        return torch.cat([encoder()(pictures(part).to(shop.device)) for part in parts])

    return shop.store.cached(f"{name} {_weights_key(folder)}", encode)


def _encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures -> scaled latents, by an autoencoder of either class."""
    if isinstance(vae, AutoencoderTiny):
        return lambda x: vae.encode(x).latents * vae.config.scaling_factor
    shift = vae.config.get("shift_factor") or 0.0
    return lambda x: (vae.encode(x).latent_dist.mean - shift) * vae.config.scaling_factor


def unscaled(z: Tensor, vae: Any) -> Tensor:
    """Scaled latents [n, c, h, w] as an autoencoder decodes them."""
    unmoved: Tensor = z / vae.config.scaling_factor
    return unmoved + (vae.config.get("shift_factor") or 0.0)


def cached_conditioning(
    shop: Workshop, conditions: Sequence[Condition] | None = None, *, steered: bool | None = None
) -> tuple[Rows, Tensor]:
    """Conditioning [n, s, d] of the store's captions, and that of no caption [1, s, d].

    The text encoders are the student's, which are the teacher's unless a stage replaced them. What
    c [n, s, d] consists of is the family's affair, which its networks know of. Where denoisers see
    more than x_t, c has it in further rows behind, and that of no caption has none; so where a
    ControlNet or an adapter steers them, for its edges.

    ``conditions``, ``steered``: what they see, and whether so; None: as the student's does.
    """
    encoded = _text_encoders(shop)
    captions = cache(lambda: encoded(shop.store.captions))  # if there are any to encode
    rows = shop.store.cached(f"conditioning {_text_key(shop)}", lambda i: captions()(i))
    nothing = encoded([""])(np.array([0])).float()
    student, wide = Student.unfinished(shop.student), nothing.shape[-1]
    if conditions is None:
        conditions = student.family.conditions(student)
    if steered is None:
        steered = bool(student.family.steering)
    parts = [_seen(shop, conditions)] * bool(conditions)
    parts += [lambda i: edges_of(shop.store.pictures(i))] * steered
    if not parts:
        return rows, nothing

    def behind(indices: np.ndarray) -> Tensor:
        told = [as_rows(part(indices).flatten(1), wide) for part in parts]
        return torch.cat([rows(indices), *told], 1)

    return behind, nothing


def _seen(shop: Workshop, conditions: Sequence[Condition]) -> Rows:
    """What denoisers see of the store's pictures beside x_t, [n, k, h, w]."""
    student, store = Student.unfinished(shop.teacher or shop.student), shop.store
    latent = student.family.latent(student)

    def cached(kind: str, pictures: Rows) -> Rows:
        return _cached_latents(shop, kind, pictures)

    return seen_of(conditions, store.pictures, store.size_px, latent, cached)


def conditioning_of(shop: Workshop, text: str) -> Tensor:
    """Conditioning [1, s, d] of one text."""
    return _text_encoders(shop)([text])(np.array([0])).float()


def _text_encoders(shop: Workshop) -> Callable[[list[str]], Rows]:
    """Texts -> indices of some of them -> conditioning [n, s, d]."""
    student = Student.unfinished(shop.student)
    names = student.family.text_encoders
    encoders = [shop.load(shop.student, name) for name in names]
    zeros = student.family.no_prompt(student) == "zeros"

    def encoded(texts: list[str]) -> Rows:
        ids = [_ids(student, name, texts) for name in names]
        empty = torch.tensor([zeros and not text for text in texts])

        @torch.no_grad()
        def encode(indices: np.ndarray) -> Tensor:
            some = [each[indices].to(shop.device) for each in ids]
            c = student.family.encode_prompt(encoders, some)
            return c.masked_fill(empty[indices].to(c.device)[:, None, None], 0)

        return encode

    return encoded


def _ids(student: Student, text_encoder: str, texts: list[str]) -> Tensor:
    """Token ids int64 [n, s] of a text encoder."""
    spec = student.family.tokenizer(student, text_encoder)
    if spec.kind != "clip":  # how long they are, and of which letters, is their family's affair
        tokenize = read_tokenizer(student.folder, spec)
        read = {text: tokenize(text) for text in dict.fromkeys(texts)}
        cut = sum(bool(tokens.cut) for tokens in read.values())
        _tell_cut(cut, len(read) - ("" in read), spec.max_length)
        return torch.tensor([read[text].ids for text in texts])
    name = tokenizer_of(text_encoder)
    kind = getattr(transformers, student.class_of(name)[1])
    return token_ids(kind.from_pretrained(str(student.folder / name)), texts)


def _text_key(shop: Workshop) -> str:
    """Identifies the student's text encoders, what they are given, and what is made of it."""
    student = Student.unfinished(shop.student)
    family, names = student.family, student.family.text_encoders
    told = [family.name, family.no_prompt(student)]
    told += [_weights_key(shop.student / name) for name in names]
    told += [folder_sha256(shop.student / tokenizer_of(name)) for name in names]
    return " ".join(map(str, told))


def latent_shape(shop: Workshop) -> tuple[int, int, int]:
    """Of one of the store's pictures as a latent of the teacher's."""
    assert shop.teacher
    teacher = Student.unfinished(shop.teacher)
    latent = teacher.family.latent(teacher)
    side = shop.store.size_px // latent.downsampling
    return latent.channels, side, side


def noise_of(rows: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Noise [n, *shape] that belongs to the store's rows: that of row i has seed i."""
    seeds = [torch.Generator().manual_seed(int(row)) for row in rows]
    return torch.stack([torch.randn(shape, generator=seed) for seed in seeds])


def sampled_latents(
    shop: Workshop,
    unet: Any,
    process: Process,
    texts: tuple[Rows, Tensor],
    *,
    guidance: float,
    steps: int,
) -> Rows:
    """Latents [n, c, h, w] float32 that the guided teacher makes of the store's captions, once.

    The noise of row i is `noise_of` it: the same row is made again, in whatever batch.

    Args:
        shop: where teacher and captions are.
        unet: the teacher's.
        process: the teacher's noise.
        texts: conditioning of the captions, and of no caption, by `cached_conditioning`.
        guidance: CFG's scale.
        steps: DDIM steps, of two calls each.
    """
    assert shop.teacher
    (conditioning, nothing), shape = texts, latent_shape(shop)
    last = process.timesteps - 1  # noise alone

    def sample(rows: np.ndarray) -> Tensor:
        eps = noise_of(rows, shape).to(shop.device)
        k = torch.full((len(rows),), last, device=shop.device)
        ask = asked(unet, process, conditioning(rows).to(shop.device), nothing, guidance)
        with shop.autocast():
            return denoised(ask, process, eps, k, steps)

    def make(indices: np.ndarray) -> Tensor:
        parts = np.array_split(indices, -(-len(indices) // at_once(shop.store.size_px)))
        return torch.cat([sample(part) for part in parts])

    weights = [*_denoiser_keys(shop.teacher), _text_key(shop)]
    told = [guidance, steps, shape[-1], noise_config(shop.teacher), *weights]
    told += ["bf16"] * shop.half
    return shop.store.cached(f"samples {json.dumps(told)}", make)


def drawn_latents(shop: Workshop, most: int) -> Rows:
    """Latents [n, c, h, w] float32 that the student so far draws of the store's captions, once.

    By its own sampler, without guidance, row after row in 1 to ``most`` steps and from the noise of
    its own seed.
    """
    unet = shop.load(shop.student, shop.denoiser)
    student = Student.unfinished(shop.student)
    tables = student.schedules(range(1, most + 1))
    conditioning, _ = cached_conditioning(shop)
    shape = latent_shape(shop)

    @torch.no_grad()
    def draw(rows: np.ndarray, table: Schedule) -> Any:
        seeds = [torch.Generator().manual_seed(int(row)) for row in rows]

        def noise() -> Any:  # numpy's arithmetic is what `advance` speaks of; torch's is the same
            return torch.stack([torch.randn(shape, generator=g) for g in seeds]).to(shop.device)

        x = table.init * noise()
        c, previous = conditioning(rows).to(shop.device), None
        for step in table.steps:
            output = unet(step.in_scale * x, step.t, c).sample
            fresh = noise() if step.needs_noise else None
            x, previous = advance(step, x, output, noise=fresh, previous=previous), (x, output)
        return x

    def make(indices: np.ndarray) -> Tensor:
        drawn = torch.empty(len(indices), *shape)
        for steps, table in tables.items():
            (mine,) = np.nonzero(indices % most == steps - 1)
            parts = -(-len(mine) // at_once(shop.store.size_px))
            for part in np.array_split(mine, parts) if parts else ():
                drawn[part] = draw(indices[part], table).cpu()
        return drawn

    weights = [*_denoiser_keys(shop.student), _text_key(shop)]
    told = [[table.model_dump_json() for table in tables.values()], *weights]
    return shop.store.cached(f"drawings {json.dumps(told)}", make)


def cached_samples(
    shop: Workshop, conditions: Sequence[Condition] | None = None, *, steered: bool | None = None
) -> tuple[Callable[[np.ndarray], Batch], Tensor]:
    """Batches of the store's latents and their conditioning, and that of no caption [1, s, d].

    A batch has ``x_0`` [n, c, h, w], ``c`` [n, s, d] and, of the shapes scenes, ``labels`` of
    `shapes.HEADS`, int64 [n, heads]. ``conditions``, ``steered`` as of `cached_conditioning`.
    """
    latents = cached_latents(shop)
    conditioning, nothing = cached_conditioning(shop, conditions, steered=steered)
    labels = shop.store.labels

    def batch(indices: np.ndarray) -> Batch:
        known = {} if labels is None else {"labels": torch.from_numpy(labels[indices])}
        return {"x_0": latents(indices), "c": conditioning(indices)} | known

    return batch, nothing


def _denoiser_keys(folder: Path) -> list[str]:
    """Identify a folder's denoiser, and what steers it, if anything does."""
    family = Student.unfinished(folder).family
    return [_weights_key(folder / name) for name in (family.denoiser, family.steering) if name]


def _weights_key(folder: Path) -> str:
    """Identifies a component by its config and the size and time of its weights."""
    weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return json.dumps([(folder / "config.json").read_text(), told])
