"""Diffusers folders on their way from stage to stage: copied in part, and halved at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgeflash.errors import EdgeflashError
from edgeflash.lora import FILE
from edgeflash.student import INDEX, Student
from edgeflash.weights import Weights


def copy_folder(source: Path, target: Path, *, leave: Collection[str] = (), link: bool) -> None:
    """Copies the index and the components it names, but not what is in ``leave``.

    A LoRA that was trained goes with the denoiser that it is fused into.
    Of several variants of a network's weights one is copied, under the plain name, which is what
    diffusers looks for. ``link``: as hard links where the disk can, for folders that nobody writes
    into afterwards: that would change the source as well.
    """
    student = Student.unfinished(source)
    named = {INDEX} | {k for k, v in student.index.items() if isinstance(v, list)}
    if student.family.denoiser not in leave:
        named.add(FILE)
    there = [k for k in named.difference(leave) if (source / k).is_dir()]
    networks = {k: student.weights(k) for k in there if student.is_network(k)}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or relative.parts[0] not in named.difference(leave):
            continue
        name = _kept_as(path.name, networks.get(relative.parts[0]))
        if name is None:
            continue
        goal = target / relative.with_name(name)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if link and path.suffix != ".json":  # later stages rewrite those
            try:
                os.link(path.resolve(), goal)
                continue
            except OSError:
                pass
        shutil.copyfile(path, goal)


def _kept_as(name: str, weights: Weights | None) -> str | None:
    """The name that a file beside the chosen ``weights`` is copied under; None: it is left."""
    if weights is None:
        return name
    chosen = {path.name for path in weights.files}
    tail = f".{weights.variant}" if weights.variant else ""
    sharded = any("-of-" in path for path in chosen)
    if ".index." in name:
        return name.replace(tail, "") if sharded and name.endswith(f".index{tail}.json") else None
    if not name.endswith((".safetensors", ".bin")):
        return name
    if name not in chosen:
        return None
    return name if sharded else name.replace(tail, "")  # the index names the shards as they are


def halve(folder: Path) -> None:
    """Rewrites every safetensors file below ``folder`` with its floats as float16.

    Raises:
        EdgeflashError: a weight beyond float16's range.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            told = opened.metadata()  # of a LoRA: its alpha
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.half()
                if not tensors[name].isfinite().all():
                    raise EdgeflashError(f"{path}: {name} overflows float16; set weights = 'fp32'")
        save_file(tensors, path, metadata=told or {"format": "pt"})
