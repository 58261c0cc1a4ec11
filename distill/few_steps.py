"""The few timesteps that a student is trained at, and the samplers that stop at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from edgeflash.errors import EdgeflashError
from edgeflash.even_steps import MARK

from .consistency import TIMESTEP_SCALING
from .draws import rows
from .process import FLOW, Process, noise_config, noise_like, predicts
from .stage import Batch, Workshop
from .teacher import plain


def source_of(shop: Workshop, by: str, kind: str) -> Path:
    """The folder whose noise a student learns: its teacher's, or, trained on data, its own.

    Raises:
        EdgeflashError: there is nothing to distil; ``by`` is the method's name.
    """
    if kind == "distillation" and not shop.teacher:
        raise EdgeflashError(
            f"{by}: distillation needs a teacher in the recipe; set kind = 'training'"
        )
    return shop.teacher or shop.student


def ladder(process: Process, steps: int, option: str) -> Tensor:
    """Timesteps that divide time evenly, the noisiest first: 999, 749, 499, 249; [steps].

    Of a flow with SD 3's shift of 3 they are 1000, 900, 750 and 500.

    Raises:
        EdgeflashError: they do not divide it; ``option`` says who asked.
    """
    if process.timesteps % steps:
        raise EdgeflashError(
            f"{option}: {steps} do not divide this teacher's {process.timesteps} timesteps"
        )
    return process.at(trailing(process.timesteps, steps)[:-1]).to(process.abar.device)


def trailing(timesteps: int, steps: int) -> Tensor:
    """The levels where a sampler of so many steps stops: int64 [steps + 1], from the last to -1.

    That is diffusers' "trailing" spacing: 999, 666, 332 and the clean sample for three of 1000.
    """
    return torch.linspace(timesteps, 0, steps + 1, dtype=torch.float64).round().long() - 1


def estimate(
    network: Any,
    process: Process,
    batch: Batch,
    times: Tensor,
    shares: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """x [n, c, h, w], which a student makes of x_0 noised, and of noise alone at the last timestep.

    Args:
        network: the student.
        process: the teacher's noise.
        batch: x_0 [n, c, h, w] and its conditioning c.
        times: the student's timesteps.
        shares: how often each of them is drawn, in any unit.
        generator: for all draws.
    """
    x_0 = batch["x_0"]
    drawn = rows(
        lambda n: torch.multinomial(shares, n, replacement=True, generator=generator),
        len(x_0),
        generator,
    )
    s = times[drawn.to(times.device)]
    x_s = process.as_sampled(x_0, noise_like(x_0, generator), s)
    x, _ = plain(network, process, x_s, s, batch["c"])
    return x


def few_step_scheduler(
    teacher: Path,
    steps: int,
    timestep_scaling: float = TIMESTEP_SCALING,
    first: int | None = None,
) -> LCMScheduler | FlowMatchEulerDiscreteScheduler:
    """x_0, or LCM's f, then fresh noise, at ``steps`` even timesteps, with the teacher's noise.

    Of fewer steps it chooses among these. It is multistep consistency sampling (arXiv 2303.01469,
    alg. 1).

    ``first``: how many of the teacher's timesteps they divide; the noise that lies above is cut
    off. None: all.

    Raises:
        EdgeflashError: of a flow, which is cut off nowhere.
    """
    noise = noise_config(teacher)
    if predicts(teacher) == FLOW:
        if first not in (None, noise["num_train_timesteps"]):
            raise EdgeflashError(
                f"{teacher}: a flow ends in noise alone, so a student begins at its last timestep, "
                f"not at {first}: say {noise['num_train_timesteps']}"
            )
        return _even(teacher, steps, stochastic=True)
    betas = LCMScheduler(**noise).betas
    if first and first < len(betas):
        noise["num_train_timesteps"] = first
        noise["trained_betas"] = betas[:first].tolist()
        noise["rescale_betas_zero_snr"] = False  # they are rescaled already, if at all
    return LCMScheduler(
        **noise,
        clip_sample=False,
        original_inference_steps=steps,
        timestep_scaling=timestep_scaling,
    )


def ddim_scheduler(teacher: Path, steps: int) -> Any:
    """The sampler of so many DDIM steps that stops where `trailing` says, with the teacher's betas.

    `DDIMScheduler` counts T // ``steps`` back, which misses its own next timestep where that is no
    whole number. First-order DPM-Solver++ is DDIM (arXiv 2211.01095) without that.
    """
    noise = noise_config(teacher)
    if predicts(teacher) == FLOW:
        return euler_scheduler(**noise)
    scheduler = DDIMScheduler(**noise, clip_sample=False, timestep_spacing="trailing")
    if scheduler.config.num_train_timesteps % steps == 0:
        return scheduler
    return DPMSolverMultistepScheduler(**noise, solver_order=1, timestep_spacing="trailing")


def trajectory_scheduler(
    teacher: Path, steps: int
) -> TCDScheduler | FlowMatchEulerDiscreteScheduler:
    """TCD's strategic stochastic sampling (arXiv 2402.19159, alg. 4) at ``steps`` even timesteps.

    diffusers has none of flows: there it is Euler's steps, which is TCD's with gamma = 0.
    """
    if predicts(teacher) == FLOW:
        return _even(teacher, steps, stochastic=False)
    return TCDScheduler(**noise_config(teacher), clip_sample=False, original_inference_steps=steps)


def euler_scheduler(num_train_timesteps: int, shift: float) -> DPMSolverMultistepScheduler:
    """Euler's even steps along a flow, down to the picture: first-order DPM-Solver++ takes them."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
    )


def _even(teacher: Path, steps: int, *, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """A flow's sampler marked for `edgeflash.even_steps`.

    Raises:
        EdgeflashError: that many steps do not divide the teacher's timesteps.
    """
    noise = noise_config(teacher)
    if noise["num_train_timesteps"] % steps:
        raise EdgeflashError(
            f"{teacher}: {steps} steps do not divide its flow of {noise['num_train_timesteps']} "
            "timesteps: choose a number that does"
        )
    scheduler = FlowMatchEulerDiscreteScheduler(**noise, stochastic_sampling=stochastic)
    scheduler.register_to_config(**{MARK: steps})
    return scheduler
