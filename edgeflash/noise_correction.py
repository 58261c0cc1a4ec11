"""Noise correction (arXiv 2405.05224): in the first step x, which is noise, stands in for eps."""

from __future__ import annotations

from edgeflash.schedule import Schedule

MARK = "_noise_correction"  # in a scheduler's config, where diffusers keeps it and looks past it


def corrected(schedule: Schedule) -> Schedule:
    """A DDIM table with ``x[1] = alpha x_0 + sigma x[0]``, whatever eps the network's output means.

    There a network has next to nothing to tell of eps, and x_0 = (x - sigma eps) / alpha magnifies
    what it gets wrong. A table of one step makes no use of eps, and stays as it is.
    """
    if len(schedule.steps) == 1:
        return schedule
    first = schedule.steps[0]
    entry, following = schedule.entries[:2]
    assert first.in_scale == 1 and not first.needs_noise, first
    alpha, sigma = following.p, following.q
    of_x, of_output = _x_0(schedule.prediction, entry.p, entry.q)
    first = first.model_copy(update={"a": alpha * of_x + sigma, "b": alpha * of_output})
    sampler = f"{schedule.sampler}, noise-corrected"
    return schedule.model_copy(update={"sampler": sampler, "steps": (first, *schedule.steps[1:])})


def _x_0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """The factors of x and output in x_0."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "flow_prediction":
        return 1.0, -sigma
    assert prediction in ("v_prediction", "sample"), prediction
    return (alpha, -sigma) if prediction == "v_prediction" else (0.0, 1.0)
