"""Align Your Steps (arXiv 2404.14507): timesteps fitted to a model, for samplers of many steps.

Ten of them lose less than the usual spacing does. They were fitted on Stable Diffusion 1.5 and XL,
for their noise alone: a student that was distilled for timesteps of its own has no use for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflash.errors import EdgeflashError
from edgeflash.schedule import Schedule, lower_schedule

if TYPE_CHECKING:
    from edgeflash.student import Student

NAME = "align-your-steps"
STEPS = 10  # that they were fitted for
TIMESTEPS = {  # family -> as published; then the least noise there is, which no step sees
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
NOISE = {  # of these two models, as schedulers' configs tell it
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": None,
}
SAMPLERS = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")  # of those that take any
SPACINGS = [f"use_{name}" for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas")]
SPACINGS += ["use_lu_lambdas"]  # they would space the steps themselves


def grid(family: str, steps: int) -> list[int]:
    """So many whole timesteps, the noisiest first, for a model of that family.

    Between the published ones log sigma is interpolated over the index, as their authors do it.
    Rounding to whole timesteps, which any network takes, moves sigma by at most 3 % of up to 20
    steps and 10 % of up to 50, in the last ones.
    """
    if steps < 1:
        raise EdgeflashError(f"steps is {steps}: give 1 or more")
    log_sigma = np.log(sigmas())
    fitted = log_sigma[list(TIMESTEPS[family])]
    wanted = np.interp(np.linspace(0, STEPS, steps + 1)[:-1], np.arange(STEPS + 1), fitted)
    found = np.interp(wanted, log_sigma, np.arange(len(log_sigma)))
    return [round(t) for t in found.tolist()]


def sigmas() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Noise over signal of these models' training, float64 [1000] by timestep."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    return np.sqrt((1 - abar) / abar)


def schedules(student: Student, steps: Sequence[int] | None = None) -> dict[int, Schedule]:
    """Tables of the student's sampler at these timesteps, by number of steps.

    Raises:
        EdgeflashError: a family or noise that they were not fitted on, or a student that was
            distilled for timesteps of its own.
    """
    family = student.family.name
    if family not in TIMESTEPS:
        have = " and ".join(sorted(TIMESTEPS))
        raise _unfit(student, f"is of the family {family!r}", f"has timesteps of {have} alone")
    if why := student.own_timesteps():
        raise _unfit(student, f"was distilled for timesteps of its own ({why})", "has others")
    scheduler = _scheduler(student)
    for key, fitted in NOISE.items():
        if (found := scheduler.config.get(key) or None) != fitted:
            raise _unfit(student, f"has {key} {found!r}", f"was fitted on {fitted!r}")
    counts = sorted(set(steps or (STEPS,)))
    tables = {n: lower_schedule(scheduler, None, timesteps=grid(family, n)) for n in counts}
    return {n: t.model_copy(update={"sampler": f"{t.sampler}, {NAME}"}) for n, t in tables.items()}


def sampler(own: str) -> str:
    """The scheduler class that is run: ``own``, or where that fits its own timesteps another."""
    return own if own in SAMPLERS else SAMPLERS[0]


def _scheduler(student: Student) -> Any:
    import diffusers

    config = student.family.scheduler_config(student)
    name = sampler(student.class_of("scheduler")[1])
    spaced = {key: False for key in SPACINGS if key in config}
    return getattr(diffusers, name).from_config({**config, **spaced})


def _unfit(student: Student, what: str, why: str) -> EdgeflashError:
    return EdgeflashError(f"{student.folder}: {what}, but {NAME} {why}: leave --timesteps out")
