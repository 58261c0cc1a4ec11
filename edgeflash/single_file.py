"""Opens a single-file checkpoint: diffusers converts it, once, into a folder in the user's cache.

Such a file holds weights alone. Configs and tokenizer of its kind come from the hub, or from the
hub's cache on this machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from edgeflash.disk import fresh_folder, read_json, sha256_of
from edgeflash.errors import EdgeflashError
from edgeflash.families import Family, families
from edgeflash.shelf import require
from edgeflash.student import INDEX, Student
from edgeflash.tokenizer import write_vocabulary
from edgeflash.weights import check_weights

SUFFIXES = (".safetensors", ".ckpt")
NEEDS = ("torch", "diffusers", "transformers", "accelerate")
UNET = "model.diffusion_model."  # what the names of a UNet's tensors begin with
CONFIGS = ["*.json", "*.txt"]  # what of a hub repository is no weights
WHOLE = "take a file with the whole model, or its diffusers folder"


def opened(file: Path) -> Path:
    """The diffusers folder of a single-file checkpoint.

    It lies in `edgeflash/<sha256 of the file>/` below ``XDG_CACHE_HOME`` or `~/.cache`; a file that
    was opened before is not converted again. Weights become float32.

    Raises:
        EdgeflashError: no checkpoint, a damaged one, one of a kind that no family takes, a pickle
            with more than weights in it, configs that are not to be had, or a missing package.
    """
    if file.suffix not in SUFFIXES:
        raise EdgeflashError(f"{file}: neither a folder nor a checkpoint ({' or '.join(SUFFIXES)})")
    check_weights(file)
    console = Console(stderr=True)
    with console.status(f"reading {file.name}"):
        folder = _cache() / sha256_of(file) / file.stem
    if folder.is_dir():
        return folder
    require(f"{file}: a single-file checkpoint", NEEDS)
    with console.status(f"converting {file.name}"):
        _convert(file, folder)
    console.print(_told(file, folder), soft_wrap=True, markup=False, highlight=False)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeflash"


def _told(file: Path, folder: Path) -> str:
    """Names what the file itself does not say: what the network predicts, and at which size."""
    student = Student.unfinished(folder)
    predicts = student.config("scheduler").get("prediction_type", "epsilon")
    height, width = student.family.size(student)
    return f"converted {file}, taken to predict {predicts} at {width}x{height} px, to {folder}"


def _convert(file: Path, folder: Path) -> None:
    from edgeflash.networks_sd import quiet

    with quiet():
        kind, tensors = _kind(file)
        family = _family(file, kind, tensors)
        pipeline = _pipeline(file, family, family.single_files[kind])
        _check_whole(file, pipeline, tensors)
        with fresh_folder(folder) as draft:
            pipeline.save_pretrained(draft)
            write_vocabulary(draft / "tokenizer")


def _kind(file: Path) -> tuple[str, int]:
    """What diffusers calls such a checkpoint, and how many tensors of a UNet it holds."""
    from diffusers.loaders.single_file_utils import (
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    try:
        checkpoint = load_single_file_checkpoint(str(file))  # of a pickle the weights only
        tensors = sum(str(name).startswith(UNET) for name in checkpoint)
        return str(infer_diffusers_model_type(checkpoint)), tensors
    except Exception as error:
        first: BaseException = error
        while first.__context__:
            first = first.__context__
        if more := re.search(r"GLOBAL ([\w.]+)", str(first)):
            raise EdgeflashError(
                f"{file}: a pickle with more than weights in it ({more[1]}), which could run code "
                "and is never loaded: take the model's .safetensors file"
            ) from error
        raise EdgeflashError(
            f"{file}: not readable as a checkpoint ({_said(first)}): copy or download it again"
        ) from error


def _said(error: BaseException) -> str:
    """The first sentence of what a library says."""
    first = re.split(r"\s*\n|\. ", str(error).strip())[0]
    return f"{type(error).__name__}: {first}".rstrip(".: ")


def _family(file: Path, kind: str, tensors: int) -> Family:
    """The family that takes such checkpoints."""
    if not tensors:  # diffusers takes what it does not know for a v1
        raise EdgeflashError(
            f"{file}: no whole Stable Diffusion model (no tensor is called {UNET}*); a LoRA or one "
            "network of a model cannot be opened by itself"
        )
    known = {kind: family for family in families() for kind in family.single_files}
    if kind not in known:
        raise EdgeflashError(
            f"{file}: a checkpoint of kind {kind!r}, which no family here takes (they take: "
            f"{', '.join(known)})"
        )
    return known[kind]


def _pipeline(file: Path, family: Family, repository: str) -> Any:
    """The pipeline as diffusers makes it of the file, with nothing but what the family has."""
    import diffusers

    configs = _configs(file, family, repository)
    index = read_json(configs / INDEX)
    named = {name for name, pair in index.items() if isinstance(pair, list)}
    left = dict.fromkeys(named.difference(family.folders))
    try:
        return getattr(diffusers, family.pipelines[0]).from_single_file(
            str(file), config=str(configs), extract_ema=True, **left
        )
    except Exception as error:
        lacks = isinstance(error, NotImplementedError)  # torch's, of a weight that nobody filled in
        why = "it lacks weights" if lacks else _said(error)
        raise EdgeflashError(
            f"{file}: does not fill the networks of {repository}, which it was taken for ({why}); "
            f"{WHOLE}"
        ) from error


def _configs(file: Path, family: Family, repository: str) -> Path:
    """A folder with configs and tokenizer of a hub repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folder = Path(snapshot_download(repository, allow_patterns=CONFIGS))
        lacking = [name for name in (INDEX, *family.folders) if not (folder / name).exists()]
        why = f"the copy here lacks {', '.join(lacking)}" if lacking else ""
    except Exception as error:
        why = _said(error)
    if why:
        raise EdgeflashError(
            f"{file}: holds weights alone, and the configs and tokenizer of {repository} are "
            f"neither in {HF_HUB_CACHE} nor to be had from the hub ({why}): connect once and run "
            "it again, or copy that repository's folder there from another machine's hub cache"
        )
    return folder


def _check_whole(file: Path, pipeline: Any, tensors: int) -> None:
    """Refuses what diffusers lets pass: weights that are lacking, and others that were left."""
    networks = {k: v for k, v in pipeline.components.items() if hasattr(v, "named_parameters")}
    for name, network in networks.items():
        if lacking := [key for key, value in network.named_parameters() if value.is_meta]:
            raise EdgeflashError(f"{file}: {name} lacks {', '.join(lacking[:3])}; {WHOLE}")
    if tensors != (room := len(pipeline.unet.state_dict())):
        raise EdgeflashError(
            f"{file}: its UNet has {tensors} tensors where the kind it was taken for has {room}; "
            f"{WHOLE}"
        )
