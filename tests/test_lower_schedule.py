"""The sampler as data against the diffusers schedulers it was derived from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from edgeflash import schedule as schedule_module
from edgeflash.errors import EdgeflashError
from edgeflash.schedule import (
    Entry,
    Guidance,
    Schedule,
    advance,
    lower_schedule,
)

# diffusers hands torch tensors to numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 8, 8)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {**SD, "clip_sample": False}
PREDICTIONS = ("epsilon", "v_prediction", "sample")

SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddim": lambda **kw: DDIMScheduler(
        **{**LATENT, "set_alpha_to_one": False, "steps_offset": 1, **kw}
    ),
    "ddim-trailing": lambda **kw: DDIMScheduler(**LATENT, timestep_spacing="trailing", **kw),
    "euler": lambda **kw: EulerDiscreteScheduler(**SD, **kw),
    "euler-leading": lambda **kw: EulerDiscreteScheduler(
        **SD, timestep_spacing="leading", steps_offset=1, **kw
    ),
    "euler-karras": lambda **kw: EulerDiscreteScheduler(**SD, use_karras_sigmas=True, **kw),
    "lcm": lambda **kw: LCMScheduler(**LATENT, original_inference_steps=50, **kw),
    "tcd": lambda **kw: TCDScheduler(**LATENT, **kw),
    "dpm++2m": lambda **kw: DPMSolverMultistepScheduler(**SD, solver_order=2, **kw),
    "dpm++2m-karras": lambda **kw: DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, **kw),
    "dpm++2m-heun-sigma-min": lambda **kw: DPMSolverMultistepScheduler(
        **SD, solver_type="heun", final_sigmas_type="sigma_min", **kw
    ),
    "dpm++2m-sde": lambda **kw: DPMSolverMultistepScheduler(
        **SD, algorithm_type="sde-dpmsolver++", **kw
    ),
}
# Every number of steps for the samplers as they come, two for their variants.
CASES = [
    (name, prediction, steps)
    for name in SAMPLERS
    for prediction in PREDICTIONS
    for steps in ((2, 25) if "-" in name else (1, 2, 4, 8, 25))
]


def network(x: torch.Tensor, t: float) -> torch.Tensor:
    """A stand-in for the network: nonlinear, coupled across channels, aware of time."""
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, dims=1) + t / 1000) + 0.1 * x


def draws(seed: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def diffusers_loop(
    scheduler: Any, steps: int | None, start: int = 0, latent: torch.Tensor | None = None, **kw: Any
) -> np.ndarray:
    """The denoising loop as diffusers pipelines write it, float32."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} if steps else {}), **kw)
    noise = draws(0)()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if latent is None:
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    elif hasattr(scheduler, "scale_noise"):
        x = scheduler.scale_noise(latent, scheduler.timesteps[start : start + 1], noise)
    else:
        x = scheduler.add_noise(latent, noise, scheduler.timesteps[start : start + 1])
    generator = torch.Generator().manual_seed(1)
    takes = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps[start:]:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        output = network(scale(x, t), float(t))
        x = scheduler.step(output, t, x, return_dict=False, **takes)[0]
    return x.numpy()


def table_loop(
    schedule: Schedule, entry: Entry | None = None, latent: torch.Tensor | None = None
) -> np.ndarray:
    """The loop of a runtime: the table, numpy float32, no scheduler."""
    noise = draws(0)().numpy()
    x = schedule.begin(noise, None if latent is None else latent.numpy(), entry)
    fresh, previous = draws(1), None
    for step in schedule.rows(entry):
        output = network(torch.from_numpy(step.in_scale * x), step.t).numpy()
        more = fresh().numpy() if step.needs_noise else None
        x, previous = advance(step, x, output, noise=more, previous=previous), (x, output)
    assert x.dtype == np.float32
    return x


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("name", "prediction", "steps"), CASES)
def test_the_table_gives_the_latents_of_diffusers(name: str, prediction: str, steps: int) -> None:
    scheduler = SAMPLERS[name](prediction_type=prediction)
    schedule = lower_schedule(scheduler, steps)
    assert len(schedule.steps) == steps and schedule.prediction == prediction
    assert relative(table_loop(schedule), diffusers_loop(scheduler, steps)) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_is_exact_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "TOLERANCE", 1e-13)
    assert len(lower_schedule(SAMPLERS[name](), 10).steps) == 10


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_a_plain_euler_walk(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = lower_schedule(scheduler, steps)
    assert relative(table_loop(schedule), diffusers_loop(scheduler, steps)) < 1e-5
    assert schedule.prediction == "flow_prediction" and schedule.init == 1.0
    assert [step.a for step in schedule.steps] == [1.0] * steps
    assert sum(step.b for step in schedule.steps) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_with_its_fresh_noise(prediction: str, steps: int) -> None:
    scheduler = EulerAncestralDiscreteScheduler(**SD, prediction_type=prediction)
    schedule = lower_schedule(scheduler, steps)
    assert relative(table_loop(schedule), diffusers_loop(scheduler, steps)) < 1e-5
    # The scheduler draws at its last step as well, and multiplies the draw by zero.
    assert [step.needs_noise for step in schedule.steps] == [True] * (steps - 1) + [False]


def test_heun_is_two_rows_a_step() -> None:
    scheduler = HeunDiscreteScheduler(**SD)
    schedule = lower_schedule(scheduler, 4)
    assert len(schedule.steps) == 7 and [e.start for e in schedule.entries] == [0, 2, 4, 6]
    assert relative(table_loop(schedule), diffusers_loop(scheduler, 4)) < 1e-5


@pytest.mark.parametrize("name", ["ddim", "euler-leading", "tcd", "dpm++2m", "flow"])
def test_image_to_image_at_every_entry(name: str) -> None:
    scheduler = (SAMPLERS | {"flow": FlowMatchEulerDiscreteScheduler})[name]()
    schedule = lower_schedule(scheduler, 8)
    latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    assert [entry.start for entry in schedule.entries] == list(range(8))
    for entry in schedule.entries:
        theirs = diffusers_loop(scheduler, 8, entry.start, latent)
        assert relative(table_loop(schedule, entry, latent), theirs) < 1e-5, entry


def test_a_two_step_solver_enters_without_memory() -> None:
    schedule = lower_schedule(SAMPLERS["dpm++2m"](), 8)
    assert [step.needs_previous for step in schedule.steps] == [False, *[True] * 6, False]
    for entry in schedule.entries:
        assert not schedule.rows(entry)[0].needs_previous
        assert len(schedule.rows(entry)) == 8 - entry.start
    assert schedule.rows(schedule.entries[3])[1:] == schedule.steps[4:]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_memory_of_the_latent_is_needed_unless_the_image_is_predicted(prediction: str) -> None:
    steps = lower_schedule(SAMPLERS["dpm++2m"](prediction_type=prediction), 8).steps
    assert any(step.d for step in steps)
    assert any(step.e for step in steps) == (prediction != "sample")


def test_ddim_rows_are_equation_12() -> None:
    scheduler = SAMPLERS["ddim-trailing"]()
    steps = lower_schedule(scheduler, 4).steps
    alphas = scheduler.alphas_cumprod.double()
    assert [step.t for step in steps] == [999, 749, 499, 249]
    before = [alphas[749], alphas[499], alphas[249], torch.tensor(1.0).double()]
    for step, alpha_prev in zip(steps, before, strict=True):
        alpha = alphas[int(step.t)]
        # arXiv:2010.02502, eq. 12 with sigma = 0
        a = (alpha_prev / alpha).sqrt()
        b = (1 - alpha_prev).sqrt() - a * (1 - alpha).sqrt()
        assert (step.a, step.b, step.c) == pytest.approx((float(a), float(b), 0), rel=1e-5)


def test_euler_scales_input_and_start() -> None:
    scheduler = SAMPLERS["euler-leading"]()
    schedule = lower_schedule(scheduler, 4)
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas.double().numpy()
    assert schedule.init == pytest.approx(np.sqrt(sigma[0] ** 2 + 1), rel=1e-6)
    in_scale = [step.in_scale for step in schedule.steps]
    assert in_scale == pytest.approx(1 / np.sqrt(sigma[:-1] ** 2 + 1), rel=1e-6)
    assert [(entry.p, entry.q) for entry in schedule.entries] == [(1.0, s) for s in sigma[:-1]]


@pytest.mark.parametrize("name", ["lcm", "tcd", "dpm++2m-sde"])
def test_no_noise_is_drawn_that_is_not_used(name: str) -> None:
    steps = lower_schedule(SAMPLERS[name](), 4).steps
    assert [step.needs_noise for step in steps] == [True, True, True, False]


def test_eta_is_the_share_of_fresh_noise() -> None:
    tcd = SAMPLERS["tcd"]()
    default, gamma, none = (lower_schedule(tcd, 4, eta=eta) for eta in (None, 0.3, 0.0))
    assert default == gamma
    assert not any(step.needs_noise for step in none.steps)
    ddim = lower_schedule(SAMPLERS["ddim"](), 4, eta=1.0)
    assert all(step.needs_noise for step in ddim.steps[:-1])


def test_lcm_takes_its_steps_from_the_grid_it_was_distilled_on() -> None:
    narrow = lower_schedule(LCMScheduler(**LATENT, original_inference_steps=50), 4)
    wide = lower_schedule(LCMScheduler(**LATENT, original_inference_steps=100), 4)
    assert [step.t for step in narrow.steps] == [999, 759, 499, 259]
    assert [step.t for step in wide.steps] == [999, 749, 499, 249]


@pytest.mark.parametrize("name", ["euler", "lcm", "dpm++2m", "tcd"])
def test_timesteps_of_ones_own(name: str) -> None:
    scheduler = SAMPLERS[name]()
    own = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # arXiv:2404.14507, SD1.5
    schedule = lower_schedule(scheduler, None, timesteps=own)
    assert [step.t for step in schedule.steps] == own
    assert relative(table_loop(schedule), diffusers_loop(scheduler, None, timesteps=own)) < 1e-5


def test_a_zero_snr_schedule_works_where_the_network_predicts_v() -> None:
    flags = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**LATENT, **flags, prediction_type="v_prediction")
    schedule = lower_schedule(scheduler, 4)
    assert relative(table_loop(schedule), diffusers_loop(scheduler, 4)) < 1e-5
    with pytest.raises(EdgeflashError, match="must predict v or the image"):
        lower_schedule(DDIMScheduler(**LATENT, **flags), 4)


class Saturating(DDIMScheduler):
    """Not affine, and no config says so."""

    def step(self, output: Any, t: Any, x: Any, **kw: Any) -> Any:
        return (torch.tanh(super().step(output, t, x, **kw)[0]),)


class Shaking(DDIMScheduler):
    """Two draws in one step."""

    def step(self, output: Any, t: Any, x: Any, **kw: Any) -> Any:
        return (super().step(output, t, x, **kw)[0] + torch.randn(x.shape) - torch.randn_like(x),)


class Wordy(DDIMScheduler):
    """Complains in several lines."""

    def set_timesteps(self, *_: Any, **kw: Any) -> None:
        raise ValueError("not these,\n  nor those")


class Offset(DDIMScheduler):
    """Affine, but with a constant that the table has no column for."""

    def step(self, output: Any, t: Any, x: Any, **kw: Any) -> Any:
        return (super().step(output, t, x, **kw)[0] + 0.01,)


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "clip": (lambda: DDIMScheduler(), {}, "clip_sample on.*clip_sample=False"),
    "threshold": (
        lambda: DPMSolverMultistepScheduler(thresholding=True),
        {},
        "thresholding on.*thresholding=False",
    ),
    "hidden clip": (lambda: Saturating(**LATENT), {}, "step 0 of Saturating is not affine"),
    "constant": (lambda: Offset(**LATENT), {}, "step [01] of Offset"),
    "two draws": (lambda: Shaking(**LATENT), {}, "draws noise 2 times in step 0"),
    "third order": (
        lambda: DPMSolverMultistepScheduler(solver_order=3),
        {"steps": 8},
        "step 2 .* needs more than its own call and the one before: .*solver_order=2",
    ),
    "timesteps twice": (
        lambda: DPMSolverMultistepScheduler(**SD),
        {"steps": None, "timesteps": [900, 500, 500, 100]},
        "step 2 of .* take fewer steps, two may share a timestep",
    ),
    "unipc": (lambda: UniPCMultistepScheduler(), {"steps": 8}, "order 2 or less"),
    "pndm": (lambda: PNDMScheduler(skip_prk_steps=True), {}, "order 2 or less"),
    "no steps": (lambda: DDIMScheduler(**LATENT), {"steps": 0}, "steps is 0: give 1 or more"),
    "too many": (
        lambda: LCMScheduler(**LATENT),
        {"steps": 51},
        "LCMScheduler refuses these settings: .*original_steps",
    ),
    "wordy": (lambda: Wordy(**LATENT), {}, "Wordy refuses these settings: not these, nor those"),
    "own steps": (
        lambda: DDIMScheduler(**LATENT),
        {"timesteps": [9, 5, 2, 1]},
        "takes no timesteps",
    ),
    "miscounted": (lambda: LCMScheduler(**LATENT), {"timesteps": [999, 1]}, "but 2 timesteps"),
    "no eta": (lambda: LCMScheduler(**LATENT), {"eta": 0.5}, "LCMScheduler has no eta"),
    "eta": (lambda: TCDScheduler(**LATENT), {"eta": 1.5}, "eta is 1.5: give 0"),
    "shifting": (
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        {},
        "give mu",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_table_can_say_is_refused_in_one_line(case: str) -> None:
    make, arguments, reason = REFUSALS[case]
    with pytest.raises(EdgeflashError, match=reason) as refused:
        lower_schedule(make(), **{"steps": 4, **arguments})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("timing", [{"mu": 0.7}, {"mu": 0.7, "sigmas": [1.0, 0.75, 0.5, 0.25]}])
def test_a_shift_by_image_size_is_given_as_mu(timing: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    steps = None if "sigmas" in timing else 4
    schedule = lower_schedule(scheduler, steps, **timing)
    assert relative(table_loop(schedule), diffusers_loop(scheduler, steps, **timing)) < 1e-5
    # arXiv:2403.03206, eq. 23, with the shift e^mu
    grid = np.array(timing.get("sigmas", np.linspace(1, 0.001, 4)))
    shifted = np.exp(0.7) * grid / (1 + (np.exp(0.7) - 1) * grid)
    assert [step.t for step in schedule.steps] == pytest.approx(1000 * shifted, rel=1e-5)


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = SAMPLERS["dpm++2m"]()
    scheduler.set_timesteps(5)
    before = scheduler.timesteps.clone()
    lower_schedule(scheduler, 3)
    assert torch.equal(scheduler.timesteps, before) and scheduler.step_index is None


def test_a_lowered_schedule_survives_json_and_is_plain_floats() -> None:
    schedule = lower_schedule(SAMPLERS["dpm++2m"](), 8)
    assert Schedule.model_validate_json(schedule.model_dump_json(exclude_defaults=True)) == schedule
    assert {type(value) for step in schedule.steps for value in step.model_dump().values()} == {
        float
    }
    assert {type(value) for entry in schedule.entries for value in (entry.p, entry.q)} == {float}


@pytest.mark.parametrize("channels", [256, 33])
def test_the_embedded_scale_is_that_of_the_lcm_pipeline(channels: int) -> None:
    ours = Guidance(kind="embedded", scale=8.5, channels=channels).embedding()
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([7.5], dtype=torch.float64), channels, torch.float64
    )
    assert ours.shape == (1, channels) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-3)
