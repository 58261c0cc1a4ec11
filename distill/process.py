"""The noising process: q(x_t | x_0) and the conversions between what networks predict.

x_t = alpha_t x_0 + sigma_t eps, with alpha_t = sqrt(abar_t) and alpha_t^2 + sigma_t^2 = 1; of a
`Flow` alpha_t + sigma_t = 1. None of this goes through a scheduler, whose state depends on
timesteps set earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from edgeflash.errors import EdgeflashError

from .draws import randn

NOISE = (  # what of a scheduler's config describes the noise, and not the sampler
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


Prediction = Literal["epsilon", "v_prediction", "sample"]
FLOW: Final = "flow"
SIGMA_DATA = 0.5  # in LCM's boundary scalings (arXiv 2310.04378)


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler's config is that of a flow from picture to noise."""
    flows = str(config.get("_class_name")).startswith("FlowMatch")
    return flows or bool(config.get("use_flow_sigmas"))


def predicts(folder: Path) -> str:
    """What the denoiser of a diffusers folder predicts, as its scheduler says."""
    from diffusers import DDPMScheduler

    if is_flow(DDPMScheduler.load_config(str(folder / "scheduler"))):
        return FLOW
    return str(noise_config(folder).get("prediction_type", "epsilon"))


def noise_config(folder: Path) -> dict[str, Any]:
    """What a diffusers folder's scheduler config says of the noise: for another sampler of it.

    Of a flow that is ``num_train_timesteps`` and ``shift``, as `FlowMatchEulerDiscreteScheduler`
    calls them.

    Raises:
        EdgeflashError: a flow whose shift depends on the size of pictures.
    """
    from diffusers import DDPMScheduler

    config = DDPMScheduler.load_config(str(folder / "scheduler"))
    if not is_flow(config):
        return {k: config[k] for k in NOISE if k in config}
    if config.get("use_dynamic_shifting"):
        raise EdgeflashError(
            f"{folder / 'scheduler'}: shifts by the size of pictures (use_dynamic_shifting), and "
            "methods know one shift alone: set that to false, and shift to a number such as 3"
        )
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift}


@dataclass(frozen=True)
class Process:
    """A variance-preserving process with 1000 training timesteps or as many as it has.

    Attributes:
        abar: cumulative product of alphas, float32 [T].
        predicts: what the network's output is: "epsilon", "v_prediction" or "sample".
    """

    abar: Tensor
    predicts: Prediction | Literal["flow"]

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> Process:
        """The process a diffusers folder's scheduler config describes.

        Raises:
            EdgeflashError: a scheduler without a variance-preserving noise schedule, or one that
                ends in pure noise, of which a prediction of epsilon tells nothing; or a prediction
                of something else, such as a flow.
        """
        from diffusers import DDPMScheduler

        config = DDPMScheduler.load_config(str(folder / "scheduler"))
        if is_flow(config):
            noise = noise_config(folder)
            return Flow.until(noise["num_train_timesteps"], device, noise["shift"])
        if "beta_schedule" not in config:
            name = config.get("_class_name")
            raise EdgeflashError(f"{folder / 'scheduler'}: {name} has no variance-preserving noise")
        scheduler = DDPMScheduler(**noise_config(folder))
        predicts = scheduler.config.prediction_type
        if predicts not in (known := get_args(Prediction)):
            raise EdgeflashError(
                f"{folder / 'scheduler'}: prediction_type {predicts!r}, but methods know "
                f"{', '.join(known)} alone: choose another teacher"
            )
        if predicts == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
            raise EdgeflashError(
                f"{folder / 'scheduler'}: its noise ends without signal (rescale_betas_zero_snr), "
                "which goes with v_prediction or sample, but it says epsilon: mend one of the two"
            )
        return cls(scheduler.alphas_cumprod.to(device), predicts)

    @property
    def timesteps(self) -> int:
        return len(self.abar)

    def at(self, k: Tensor) -> Tensor:
        """The timesteps [n] of noise levels k, int64 [n]: 0 is the least noise, -1 none.

        Methods count and draw levels; everything else here, and networks, take timesteps. The two
        are the same but of a `Flow`.
        """
        return k

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t for timesteps [n], as [n, 1, 1, 1]; -1 is the clean sample.

        Timesteps are int64, or floats that may lie between two; so everywhere here.
        """
        alpha = self.angle(t).cos() if t.is_floating_point() else self._abar(t).sqrt()
        return alpha[:, None, None, None]

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t for timesteps [n], as [n, 1, 1, 1]; -1 is the clean sample."""
        sigma = self.angle(t).sin() if t.is_floating_point() else (1 - self._abar(t)).sqrt()
        return sigma[:, None, None, None]

    def norm(self, t: Tensor) -> Tensor:
        """Of x_t, over that of cos(angle) x_0 + sin(angle) eps, [n, 1, 1, 1]: 1 but of a flow."""
        return torch.ones_like(self.sigma(t))

    def ratio(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t for timesteps [n], as [n, 1, 1, 1]: the noise of x / alpha."""
        return self.sigma(t) / self.alpha(t)

    def _abar(self, t: Tensor) -> Tensor:
        return torch.where(t < 0, 1.0, self.abar[t])

    @cached_property
    def angles(self) -> Tensor:
        """atan(sigma / alpha) of the clean sample and of every timestep, [T + 1], ascending."""
        abar = torch.cat([self.abar.new_ones(1), self.abar])
        return torch.atan2((1 - abar).sqrt(), abar.sqrt())

    def angle(self, t: Tensor) -> Tensor:
        """atan(sigma / alpha) of timesteps [n]; between whole ones it goes straight."""
        below = t.floor().long().clamp(-1, self.timesteps - 2)
        start, end = self.angles[below + 1], self.angles[below + 2]
        return start + (t - below) * (end - start)

    def timestep(self, angle: Tensor) -> Tensor:
        """The timesteps, floats [n], that have these angles."""
        places = torch.searchsorted(self.angles, angle.detach(), right=True)
        below = places.clamp(1, self.timesteps) - 1
        start, end = self.angles[below], self.angles[below + 1]
        return below - 1 + (angle - start) / (end - start)

    def scalings(self, t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
        """c_skip and c_out of x and x_0, [n, 1, 1, 1]: f(x, 0) = x whatever the network says."""
        scaled = timestep_scaling * t.float()[:, None, None, None]
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return c_skip, c_out

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), all [n, c, h, w]."""
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    def as_sampled(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, but noise alone at the last timestep, where sampling begins (arXiv 2305.08891)."""
        last = (t == self.timesteps - 1)[:, None, None, None]
        return torch.where(last, eps, self.noised(x_0, eps, t))

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should put out."""
        if self.predicts == "epsilon":
            return eps
        if self.predicts == "sample":
            return x_0
        return self.v(x_0, eps, t)

    def v(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """alpha eps - sigma x_0 (arXiv 2202.00512, app. D): d x_t / d angle, [n, c, h, w]."""
        return self.alpha(t) * eps - self.sigma(t) * x_0

    def x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that an output means, [n, c, h, w]."""
        if self.predicts == "epsilon":
            return (x_t - self.sigma(t) * output) / self.alpha(t)
        if self.predicts == "sample":
            return output
        return self.alpha(t) * x_t - self.sigma(t) * output

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that an output means, [n, c, h, w]."""
        if self.predicts == "epsilon":
            return output
        if self.predicts == "sample":
            return (x_t - self.alpha(t) * output) / self.sigma(t)
        return self.alpha(t) * output + self.sigma(t) * x_t

    def ddim(self, x_0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
        """x_s on the straight line through x_0 and eps: one DDIM step to timestep s."""
        return self.alpha(s) * x_0 + self.sigma(s) * eps


@dataclass(frozen=True)
class Flow(Process):
    """x_t = (1 - sigma) x_0 + sigma eps with sigma = t / T (arXiv 2403.03206, eq. 13).

    Networks predict eps - x_0. Timesteps are those they are given, real numbers: 0, and what is
    below, is the clean sample, and T noise alone. Levels are evenly spaced before they are shifted
    towards noise, as the teacher's own sampler has it. ``abar`` is that of the variance-preserving
    process that has the same noise, sigma / alpha, at every level.

    Attributes:
        shift: of the levels (eq. 23); 1: none.
    """

    shift: float = 1.0

    @classmethod
    def until(cls, timesteps: int, device: torch.device, shift: float = 1.0) -> Flow:
        levels = torch.arange(1, timesteps + 1, device=device)
        sigma = _shifted(levels / timesteps, shift)
        signal = (1 - sigma).square()
        return cls(signal / (signal + sigma.square()), FLOW, shift)

    def at(self, k: Tensor) -> Tensor:
        return self.timesteps * _shifted((k + 1) / self.timesteps, self.shift)

    def scalings(self, t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
        """None are needed: x_0(x, 0) = x - 0 v is x whatever the network says."""
        c_out = torch.ones_like(self.sigma(t))
        return 1 - c_out, c_out

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return (t.clamp(min=0) / self.timesteps)[:, None, None, None]

    def norm(self, t: Tensor) -> Tensor:
        return (self.alpha(t).square() + self.sigma(t).square()).sqrt()

    def timestep(self, angle: Tensor) -> Tensor:
        return self.timesteps * angle.sin() / (angle.sin() + angle.cos())

    def as_sampled(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.noised(x_0, eps, t)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x_0

    def x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - self.sigma(t) * output

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + self.alpha(t) * output


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, where x lives."""
    return randn(x.shape, generator).to(x.device)
