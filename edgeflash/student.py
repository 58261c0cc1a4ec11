"""The student: a plain diffusers folder, with what edgeflash adds to it in `edgeflash.json`.

diffusers itself can load the folder; edgeflash reads it without torch and says at once what is
wrong with it, file by file. Without `edgeflash.json` the folder may be anybody's: the sampler is
then lowered from its scheduler.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgeflash import align_your_steps, even_steps, named_timesteps
from edgeflash.bundle import Part
from edgeflash.complaint import wrong_types
from edgeflash.disk import MANIFEST, read_json, sha256_of, write_atomic
from edgeflash.embedded import located, meant, refuse_judge
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.floors import Floors
from edgeflash.lora import Lora
from edgeflash.manifest import parse_manifest, read_manifest
from edgeflash.noise_correction import MARK, corrected
from edgeflash.schedule import Guidance, Schedule, lower_schedule
from edgeflash.weights import Weights, check_weights, find_weights

if TYPE_CHECKING:
    from edgeflash.families import Family

INDEX = "model_index.json"
STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}
FEW_STEP_SAMPLERS = {"LCMScheduler", "TCDScheduler"}
FEW_STEPS, MANY_STEPS = (1, 2, 4), (25,)
INSTEAD = {  # PNDM looks four calls back, and is what most SD folders name
    "PNDMScheduler": "DPMSolverMultistepScheduler"
}
LCM_SCALE = 8.5  # what diffusers' own pipeline defaults to


class StudentLineage(Part):
    """How a student came about."""

    teacher: str | None = None
    recipe_sha256: str | None = None
    stages: tuple[dict[str, Any], ...] = ()  # method, steps, seconds and figures of each
    seconds: float | None = None  # of training, all stages
    tools: dict[str, str] = Field({}, description="package -> version")
    weights_licence: str | None = None
    own_timesteps: str = ""  # the method that fitted the denoiser to few timesteps, if any did


class StudentManifest(Part):
    """`edgeflash.json` of a student folder."""

    format_version: int = 1
    kind: Literal["student"] = "student"
    family: str
    schedules: dict[int, Schedule]  # by number of steps
    default_steps: int
    guidance: Guidance
    prompts: tuple[str, ...] = ()  # examples of what it draws: for capture, calibration, parity
    floors: Floors = Field({}, description="of its exports, as its recipe has them")
    lineage: StudentLineage = StudentLineage()


class Config(dict[str, Any]):
    """A component's config; a key that it lacks is told with the file."""

    def __init__(self, path: Path, told: dict[str, Any]) -> None:
        super().__init__(told)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise EdgeflashError(f"{self._path}: lacks {key!r}: copy or download the folder again")


class Student:
    """An opened and checked diffusers folder.

    Attributes:
        folder: where it lies.
        index: its `model_index.json`.
        family: which components it has and how they play together.
        manifest: its `edgeflash.json`; None when there is none.
        loras: fused into its networks wherever these are loaded.
    """

    def __init__(
        self, folder: Path, index: dict[str, Any], family: Family, manifest: StudentManifest | None
    ) -> None:
        self.folder = folder
        self.index = index
        self.family = family
        self.manifest = manifest
        self.loras: tuple[Lora, ...] = ()

    @classmethod
    def open(cls, folder: Path | str, loras: Sequence[Lora] = ()) -> Student:
        """Opens a folder and checks that its components are all there and fit together.

        ``folder``: or a single-file checkpoint; see `edgeflash.single_file`.

        Raises:
            EdgeflashError: no diffusers folder, an unknown pipeline class, a missing or truncated
                file, components that do not fit together, or a file that does not convert.
        """
        from edgeflash.families import find_family

        folder = located(folder)
        index = _read_index(folder)
        manifest = None
        if (folder / MANIFEST).is_file():
            manifest = parse_manifest(StudentManifest, read_manifest(folder, "student"), folder)
        family = find_family(folder, str(index["_class_name"])).of(index)
        refuse_judge(folder, index)
        student = cls(folder, index, family, manifest)
        student.loras = tuple(loras)
        for name in student.family.folders:
            student._check_component(name)
        with wrong_types(folder):
            student.family.check(student)
            student.family.size(student)
        if loras and student.family.denoiser != "unet":
            told = f"has a {student.family.denoiser}, and LoRAs are fused into UNets alone"
            raise EdgeflashError(f"{folder}: {told}: leave --lora out")
        return student

    @classmethod
    def unfinished(cls, folder: Path) -> Student:
        """A folder that may lack components still, between stages of a recipe: nothing checked."""
        from edgeflash.families import find_family

        index = _read_index(folder)
        family = find_family(folder, str(index["_class_name"])).of(index)
        return cls(folder, index, family, None)

    def config(self, component: str) -> dict[str, Any]:
        """The config of ``unet``, ``transformer``, ``vae``, ``text_encoder`` or ``scheduler``."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.folder / component / name
        return Config(path, read_json(path))

    def class_of(self, component: str) -> tuple[str, str]:
        """(library, class) of a component, as the index names them."""
        pair = self.index.get(component)
        if not isinstance(pair, list) or len(pair) != 2 or None in pair:
            raise EdgeflashError(
                f"{self.folder / INDEX}: names no {component!r}, which a "
                f"{self.index['_class_name']} has"
            )
        return str(pair[0]), str(pair[1])

    def is_network(self, component: str) -> bool:
        """Whether the index names it as something that has weights."""
        pair = self.index.get(component)
        if not isinstance(pair, list):
            return False
        plain = ("tokenizer", "scheduler", "feature_extractor")
        return pair[0] in (*STEMS, "stable_diffusion") and not component.startswith(plain)

    def weights(self, component: str) -> Weights:
        """The weight files of a network; the plain ones before variants.

        Raises:
            EdgeflashError: there are none, or a shard is missing.
        """
        home = self.folder / component
        for stem in STEMS.get(self.class_of(component)[0], ("model",)):
            if found := find_weights(home, stem):
                return found
        stem = STEMS.get(self.class_of(component)[0], ("model",))[0]
        raise EdgeflashError(
            f"{home}: the weights are missing (looked for {stem}.safetensors, its fp16 variant and "
            "shards): copy or download the folder again"
        )

    def step_counts(self) -> tuple[int, ...]:
        """The step counts it was made for, or else those that are usual with its sampler."""
        if self.manifest and self.manifest.schedules:
            return tuple(self.manifest.schedules)
        return FEW_STEPS if self._few_step_sampler() else MANY_STEPS

    def own_timesteps(self) -> str:
        """What tells that it was distilled for timesteps of its own; "" where nothing does."""
        if self.manifest and (method := self.manifest.lineage.own_timesteps):
            return f"by {method}"
        return self._few_step_sampler()

    def schedules(
        self, steps: Sequence[int] | None = None, timesteps: str | None = None
    ) -> dict[int, Schedule]:
        """The sampler as tables, for these step counts, or for those the student was made for.

        Tables that the manifest lacks are lowered from the folder's scheduler, with diffusers.

        ``timesteps``: others than the scheduler's, by name or by number.
        """
        self.check_steps(steps or ())
        if timesteps is not None:
            if named_timesteps.are_numbers(timesteps):
                return named_timesteps.schedules(self, timesteps, steps)
            if timesteps != align_your_steps.NAME:
                raise unknown("--timesteps", timesteps, [align_your_steps.NAME])
            return align_your_steps.schedules(self, steps)
        own = self.manifest.schedules if self.manifest else {}
        wanted = sorted(set(steps or self.step_counts()))
        lacking = [n for n in wanted if n not in own]
        scheduler = self.scheduler() if lacking else None
        config = self.config("scheduler") if lacking else {}
        tables = {n: lower_schedule(scheduler, n, **even_steps.timing(config, n)) for n in lacking}
        if config.get(MARK):
            tables = {n: corrected(table) for n, table in tables.items()}
        return {n: own.get(n) or tables[n] for n in wanted}

    def check_steps(self, steps: Iterable[int]) -> None:
        """Raises where there are more steps than the scheduler has timesteps."""
        most = self.config("scheduler").get("num_train_timesteps") or 1000  # as usual
        if (count := max(steps, default=0)) > most:
            told = f"cannot draw in {count} steps: its scheduler has {most} timesteps"
            raise EdgeflashError(f"{self.folder}: {told}: ask for {most} steps at most")

    def guidance(self, scale: float | None = None) -> Guidance:
        """How the prompt steers: as the manifest says, or as diffusers would do by default.

        ``scale``: another one; 1 makes do with one call a step.
        """
        if scale is not None:
            own = self.guidance()
            if own.kind == "embedded":
                return own.model_copy(update={"scale": scale})
            return Guidance() if scale == 1 else Guidance(kind="cfg", scale=scale)
        if self.manifest:
            return self.manifest.guidance
        if channels := self.config(self.family.denoiser).get("time_cond_proj_dim"):
            return Guidance(kind="embedded", scale=LCM_SCALE, channels=channels)
        if self._few_step_sampler():
            return Guidance()
        return Guidance(kind="cfg", scale=self.family.cfg_scale)

    def lora_scales(self) -> dict[str, float]:
        """sha256 of each fused LoRA file -> its scale."""
        return {sha256_of(lora.file): lora.scale for lora in self.loras}

    @property
    def floors(self) -> dict[str, float]:
        """What its exports have to reach, where nobody asks for something else."""
        return self.manifest.floors if self.manifest else {}

    def default_steps(self, schedules: Iterable[int]) -> int:
        """The step count to run when nobody says: the manifest's, else the largest on offer."""
        on_offer = sorted(schedules)
        if self.manifest and self.manifest.default_steps in on_offer:
            return self.manifest.default_steps
        return on_offer[-1]

    def _few_step_sampler(self) -> str:
        """The name of its sampler, if that is one of students alone; "" where it is not."""
        name = self.class_of("scheduler")[1]
        marked = self.config("scheduler").get(even_steps.MARK)
        return name if marked or name in FEW_STEP_SAMPLERS else ""

    def scheduler(self) -> Any:
        """The diffusers scheduler that stands for its sampler."""
        import diffusers

        name = self.class_of("scheduler")[1]
        name = INSTEAD.get(name, name)
        if not hasattr(diffusers, name):
            raise EdgeflashError(f"{self.folder / INDEX}: diffusers knows no scheduler {name!r}")
        return getattr(diffusers, name).from_config(self.family.scheduler_config(self))

    def _check_component(self, name: str) -> None:
        self.class_of(name)
        home = self.folder / name
        if not home.is_dir():
            spare = " and ".join(self.family.optional if name in self.family.optional else ())
            instead = f", or say [null, null] of {spare} there" if spare else ""
            raise EdgeflashError(
                f"{home}: missing; {INDEX} names it: copy the folder again{instead}"
            )
        if name == "scheduler":
            self.config(name)
        elif self.is_network(name):
            self.config(name)
            for path in self.weights(name).files:
                check_weights(path)


def write_manifest(
    folder: Path,
    *,
    steps: Sequence[int],
    timesteps: Sequence[Sequence[int]] = (),
    default_steps: int | None = None,
    guidance: Guidance | None = None,
    prompts: Sequence[str] = (),
    floors: Floors | None = None,
    lineage: StudentLineage | None = None,
) -> StudentManifest:
    """Writes `edgeflash.json` into a finished diffusers folder, its sampler lowered to tables.

    Args:
        folder: the diffusers folder.
        steps: step counts to write tables for.
        timesteps: in place of the sampler's own in as many steps.
        default_steps: one of them; the largest when None.
        guidance: how it is to be steered; no guidance when None.
        prompts: some 8 examples of what it draws; exports record and calibrate with them.
        floors: of its exports, instead of the defaults.
        lineage: how it came about.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    student = Student.open(folder)
    schedules = student.schedules(steps)
    for grid in timesteps:
        schedules[len(grid)] = named_timesteps.table(student, grid, f"timesteps {[*grid]}")
    manifest = StudentManifest(
        family=student.family.name,
        schedules=schedules,
        default_steps=default_steps or max(schedules),
        guidance=guidance or Guidance(),
        prompts=tuple(prompts),
        floors=floors or {},
        lineage=lineage or StudentLineage(),
    )
    lacking = set() if floors else {"floors"}  # for older versions to read
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1, exclude=lacking) + "\n")
    return manifest


def folder_sha256(folder: Path) -> str:
    """Identity of a folder: the hash of the sorted names and hashes of its files."""
    return sha256_of_all(hashes_in(folder))


def hashes_in(folder: Path, homes: Collection[str] | None = None) -> dict[str, str]:
    """Path below the folder -> sha256 of each of its files, sorted.

    Neither hidden files and folders count, nor the card, which may be written later.

    ``homes``: what to look at, of the files and folders right in it; None: all.
    """
    found = {}
    for home in sorted(os.listdir(folder) if homes is None else homes):
        for path in sorted([folder / home, *(folder / home).rglob("*")]):
            relative = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_file() and not hidden and relative.as_posix() != "README.md":
                found[relative.as_posix()] = sha256_of(path)
    return found


def sha256_of_all(hashes: dict[str, str]) -> str:
    """One hash of what `hashes_in` gives."""
    total = hashlib.sha256()
    for path, sha256 in hashes.items():
        total.update(f"{path}\0{sha256}\n".encode())
    return total.hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise EdgeflashError(f"{folder}: no such folder{meant(folder)}")
    if not (folder / INDEX).is_file():
        raise EdgeflashError(f"{folder}: no diffusers folder ({INDEX} is missing)")
    index = read_json(folder / INDEX)
    if "_class_name" not in index:
        raise EdgeflashError(f"{folder / INDEX}: names no pipeline (_class_name is missing)")
    return index
