"""The folder `Resources` as Apple's Swift package `StableDiffusion` reads it, and what it lacks.

One step works there with an epsilon-prediction student whose one timestep is 999, `--scheduler
dpmpp` with linspace spacing, `--step-count 1` and `--guidance-scale 0`: that scheduler's first step
gives the prediction of the clean latent.

A ControlNet lies in a folder of its own, and is chosen by `--controlnet ControlNet`. Swift asks it
for two rows, and adds what it gives as it is, with no scale. Two rows are those of a guidance scale
of 1 or more, where 1 draws as without guidance: below it latents come in one row, on which nothing
fits, since the picture still comes in two.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeflash.errors import EdgeflashError
from edgeflash.student import Student

FOLDER = "Resources"
CONTROLNETS = "controlnet"  # folder in that
PICTURE = "controlnet_cond"
COMPILE = "xcrun coremlcompiler compile"
NOISE = {  # of Swift's samplers, which take no other from the command line
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def write_resources(student: Student, out: Path) -> str:
    """Writes it below a bundle that holds packages and tokenizer.

    Returns:
        What keeps Apple's package from using it, in one line; "" for nothing.

    Raises:
        EdgeflashError: Xcode's compiler refuses a package.
    """
    folder, controlnet = out / FOLDER, out / "ControlNet.mlpackage"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(out / "tokenizer" / name, folder / name)
    told = list(lacks(out))
    spec = student.family.tokenizer(student)
    if spec.pad_id != spec.end_id:
        told.append("Swift pads prompts with <|endoftext|>, which this tokenizer does not")
    for found in sorted({s.prediction for s in student.schedules().values()} - {"epsilon"}):
        told.append(f"Swift's samplers take epsilon, and this student predicts {found}")
    told += other_noise(student)
    if _has_compiler():
        for package in sorted(out.glob("*.mlpackage")):
            _compile(package, folder / CONTROLNETS if package == controlnet else folder)
    else:
        home = f"{FOLDER}/{CONTROLNETS}"
        apart = f"; mkdir -p {home}; mv {FOLDER}/{controlnet.stem}.mlmodelc {home}"
        told.append(
            f"compile it with Xcode, in the bundle: "
            f"for p in *.mlpackage; do {COMPILE} $p {FOLDER}; done{apart * controlnet.is_dir()}"
        )
    return f"{FOLDER}: {'; '.join(told)}" if told else ""


def other_noise(student: Student) -> Iterator[str]:
    """Where the student was made for other noise than Swift's samplers count with."""
    config = student.scheduler().config
    other = {k: config[k] for k, theirs in NOISE.items() if config.get(k, theirs) != theirs}
    if other:
        told = ", ".join(f"{key} {value}" for key, value in other.items())
        theirs = ", ".join(str(NOISE[key]) for key in other)
        yield f"Swift's samplers draw wrong here: this student has {told}, they {theirs}"


def _has_compiler() -> bool:
    """Whether Xcode is there; its command line tools, which have xcrun too, do not do."""
    if not shutil.which("xcrun"):
        return False
    tool = COMPILE.split()[1]
    return subprocess.run(["xcrun", "--find", tool], capture_output=True).returncode == 0


def _compile(package: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    ran = subprocess.run([*COMPILE.split(), package, folder], capture_output=True, text=True)
    if ran.returncode or not (folder / f"{package.stem}.mlmodelc").is_dir():
        said = " ".join((ran.stderr or ran.stdout).split())[:300]
        raise EdgeflashError(f"{package.name}: coremlcompiler does not compile it: {said}")


def lacks(out: Path) -> Iterator[str]:
    """What Apple's package looks for in vain in the packages of a bundle."""
    models = {path.stem: description(path) for path in sorted(out.glob("*.mlpackage"))}
    name = "ControlledUnet" if "ControlNet" in models else "Unet"
    chunks = [models[chunk] for chunk in (f"{name}Chunk1", f"{name}Chunk2") if chunk in models]
    first, last = (chunks[0], chunks[-1]) if chunks else (models[name], models[name])
    taken = first["takes"] | last["takes"]
    if "timestep" not in taken:
        yield "it feeds a timestep: export with --keep-timestep"
    if "timestep_cond" in taken:
        yield "it cannot feed timestep_cond, the embedded guidance"
    if len(last["gives"]) != 1:
        yield "it takes a UNet's only output"
    conditioning = taken.get("encoder_hidden_states", ())
    if len(conditioning) != 4 or conditioning[2] != 1:
        yield "it feeds encoder_hidden_states as [1, d, 1, s]"
    if "last_hidden_state" not in models["TextEncoder"]["gives"]:
        yield "it reads last_hidden_state from the text encoder"
    encoder = models.get("VAEEncoder")
    if encoder and next(iter(encoder["gives"].values()))[1] != 8:
        yield "it takes mean and log variance of 4 channels each from the encoder"
    if controlnet := models.get("ControlNet"):
        yield from _lacks_of_control(controlnet, taken)


def _lacks_of_control(controlnet: dict[str, Any], taken: dict[str, Any]) -> Iterator[str]:
    """The same of a ControlNet, beside a UNet that takes ``taken``."""
    rows = {told.get("sample", (0,))[0] for told in (controlnet["takes"], taken)}
    if rows != {2}:
        yield (
            "it asks ControlNets for two rows: export with --set rows=2, and draw with a guidance "
            "scale of 1 or more"
        )
    if set(controlnet["takes"]) - {"timestep"} != {"sample", "encoder_hidden_states", PICTURE}:
        yield f"it feeds a ControlNet sample, encoder_hidden_states and {PICTURE}"
    if any(taken.get(name) != shape for name, shape in controlnet["gives"].items()):
        yield "it hands what a ControlNet gives to the UNet by name"


def description(package: Path) -> dict[str, dict[str, Any]]:
    """Names and shapes of what a package takes and gives."""
    from coremltools.models.utils import load_spec

    told = load_spec(str(package)).description
    if told.functions:
        told = next(f for f in told.functions if f.name == told.defaultFunctionName)
    return {
        which: {port.name: tuple(port.type.multiArrayType.shape) for port in ports}
        for which, ports in (("takes", told.input), ("gives", told.output))
    }
