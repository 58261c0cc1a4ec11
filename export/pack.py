"""What a bundle holds beside its networks: tokenizer, goldens, hashes, manifest."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from edgeflash.bundle import File, Golden, Lineage, Manifest, describe_file
from edgeflash.disk import MANIFEST
from edgeflash.golden import Sampler, Tensors, noise_sha256, save_tensors
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.tokenizer import write_vocabulary

from . import plan
from .capture import Tape
from .journal import Outcome, copy, link, move

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
GOLDENS = 3  # prompts that ship as goldens
BIG_BYTES, BIG_CALLS = 256 * 2**20, 8  # larger denoisers take seconds a call: in all loops
GOLDENS_BYTES, GOLDENS_SHARE = 16 * 2**20, 0.02  # they may take that much, or of the networks
THUMBNAIL_PX = 64
WEIGHTS = "_data"  # how files of large weights beside a graph end
CODE = ("edgeflash", "edgeflash.export", "edgeflash.runtimes")  # what shapes and proves a bundle
BESIDE = ("numpy", "onnx_ir")  # of no target's `needs`, but they write some of its bytes


def gather(
    folders: Sequence[Path], lowered: Sequence[Outcome], out: Path, *, lasting: bool
) -> None:
    """Gives the components' files their place in a bundle; plans that they left are joined.

    ``lasting``: the stages are of this bundle alone, which takes their large weights; where others
    go on with them, it gets copies.
    """
    for folder, outcome in zip(folders, lowered, strict=True):
        for file in outcome.files:
            give = link
            if file.path.endswith(WEIGHTS):  # onnx refuses such a file with two names
                give = move if lasting else copy
            if file.path != plan.FILE:
                give(folder / file.path, out / file.path)
    plan.join([folder / plan.FILE for folder in folders], out / plan.FILE)


@contextmanager
def lent(folders: Sequence[Path], lowered: Sequence[Outcome], out: Path) -> Iterator[None]:
    """Brings back what a bundle was given of its stages where it is not finished after all."""
    try:
        yield
    except BaseException:
        for folder, outcome in zip(folders, lowered, strict=True):
            for file in outcome.files:
                if file.path.endswith(WEIGHTS) and (out / file.path).exists():
                    move(out / file.path, folder / file.path)
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a CLIP tokenizer, and adds what older readers need."""
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    write_vocabulary(target)


def climbs_all(student: Student, sampler: Sampler) -> bool:
    """Whether a picture is drawn so quickly that an export records and proves every prompt.

    A call's time goes with the denoiser's weights: all of SDXS-512 took 156 s on eight prompts.
    """
    small = _bytes(student) <= BIG_BYTES
    return small and _bytes(student) * _calls(sampler) <= BIG_BYTES * BIG_CALLS


def most_goldens(student: Student, sampler: Sampler) -> int:
    """How many prompts are to ship as goldens: the ladder draws each again, wherever it is run."""
    if _bytes(student) <= BIG_BYTES:
        return GOLDENS
    return min(GOLDENS, max(1, BIG_CALLS // _calls(sampler)))


def _bytes(student: Student) -> int:
    """Of the denoiser's weights, as the student holds them."""
    files = student.weights(student.family.denoiser).files
    return sum(path.stat().st_size for path in files)


def _calls(sampler: Sampler) -> int:
    """Of the denoiser, for one picture."""
    return len(sampler.schedule.steps) * (1 + sampler.guidance.doubles)


def write_goldens(tape: Tape, count: int, folder: Path, networks_bytes: int) -> tuple[Golden, ...]:
    """Writes the first recorded prompts to `goldens/` below the bundle's folder.

    Args:
        tape: what was recorded.
        count: how many at the most; fewer where they would be much beside the networks.
        folder: the bundle.
        networks_bytes: of the networks in it.
    """
    (folder / "goldens").mkdir()
    sizes = [sum(array.nbytes for array in golden.values()) for golden in tape.goldens[:count]]
    most = max(GOLDENS_BYTES, GOLDENS_SHARE * networks_bytes)
    fitting = sum(total <= most for total in accumulate(sizes))
    return tuple(_write_golden(tape, number, folder) for number in range(max(1, fitting)))


def _write_golden(tape: Tape, number: int, folder: Path) -> Golden:
    golden, told = golden_of(tape, number)
    save_tensors(folder / golden.tensors, told)
    thumbnail(told).save(folder / golden.thumbnail)
    return golden


def golden_of(tape: Tape, number: int) -> tuple[Golden, Tensors]:
    """A recorded prompt as a golden, whether or not it ships as one."""
    told, stem = tape.goldens[number], f"goldens/{number}"
    seed, latent = tape.seed(number), told["latent"]
    golden = Golden(
        prompt=tape.prompts[number],
        seed=seed,
        steps=len(tape.sampler.schedule.steps),
        token_ids=tuple(told["ids"][0].tolist()),
        noise_sha256=noise_sha256(tape.sampler.shape, seed),
        latent_mean=float(latent.mean()),
        latent_std=float(latent.std()),
        tensors=f"{stem}.safetensors",
        thumbnail=f"{stem}.png",
    )
    return golden, told


def thumbnail(told: Tensors) -> Picture.Image:
    """The golden's image, 64 px along its longer side."""
    pixels = np.rint((told["image"][0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    picture = Picture.fromarray(pixels.transpose(1, 2, 0))
    scale = THUMBNAIL_PX / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Picture.Resampling.LANCZOS)


def other_files(folder: Path, known: Iterable[File]) -> tuple[File, ...]:
    """Every file of a bundle that is not ``known`` and not its manifest."""
    skipped = {file.path for file in known} | {MANIFEST}
    return tuple(describe_file(folder, path) for path in _paths(folder) if path not in skipped)


def _paths(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def lineage(student: Student, student_sha256: str, packages: Iterable[str]) -> Lineage:
    """Where a bundle comes from, and what made it."""
    told = student.manifest.lineage if student.manifest else None
    return Lineage(
        teacher=told.teacher if told else None,
        recipe_sha256=told.recipe_sha256 if told else None,
        student_sha256=student_sha256,
        loras=student.lora_scales(),
        tools=tools(packages),
        weights_licence=told.weights_licence if told else None,
    )


def tools(packages: Iterable[str]) -> dict[str, str]:
    """Versions of edgeflash and of these packages."""
    brought_by = _distributions()  # onnxruntime: perhaps by -gpu
    names = {"edgeflash": "edgeflash"} | {p: brought_by.get(p, [p])[0] for p in packages}
    return {package: importlib.metadata.version(name) for package, name in names.items()}


def made_by(student: Student, target: Target) -> dict[str, str]:
    """All whose change makes a finished stage stale: packages, and edgeflash's own code.

    The code by its hash, for its version stays while it is worked on. More than the manifest tells:
    a bundle's bytes are the same whatever comment was changed.
    """
    beside = [*BESIDE] + ["peft"] * bool(student.loras)  # which fuses them
    beside += [getattr(target, "vendor", "")]  # of the package that builds its engines
    here = [package for package in beside if package in _distributions()]
    return tools((*target.needs, *here)) | {"code": code_sha256()}


@functools.cache
def code_sha256() -> str:
    """Of the files of edgeflash that make and prove bundles; of this process, as it began."""
    found = hashlib.sha256()
    for package in CODE:
        spec = importlib.util.find_spec(package)  # of a room that may not be imported here, too
        assert spec is not None and spec.submodule_search_locations, package
        for path in sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.py")):
            told = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{package}/{path.name} {told}\n".encode())
    return found.hexdigest()


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Package -> what it was installed with; half a second where many are."""
    return importlib.metadata.packages_distributions()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `edgeflash.json`."""
    text = manifest.model_dump_json(indent=1, exclude_none=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
