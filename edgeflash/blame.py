"""Where a missed rung of the parity ladder leads: to which component, and what it has to reach."""

from __future__ import annotations

from collections.abc import Sequence

from edgeflash.bundle import Figure


def lowest_missed(figures: Sequence[Figure]) -> Figure | None:
    """The figure that failed lowest on the ladder; what fails above it may follow from it."""
    missed = (figure for figure in figures if not figure.passed)
    return min(missed, key=lambda figure: figure.rung, default=None)


def blamed(figures: Sequence[Figure], denoiser: str) -> str:
    """The component to look into; "" where all passed, or none is to blame.

    Latents are what the denoiser made of them. Pictures are the decoder's where latents pass, but
    those of a fused graph, which is held against the components.
    """
    missed = lowest_missed(figures)
    if missed is None or missed.rung == "L0" or missed.metric == "fused_psnr_db":
        return ""
    return {"L3": denoiser, "L4": "vae_decoder"}.get(missed.rung, missed.component)


def floor_db(figures: Sequence[Figure], component: str, denoiser: str) -> float:
    """PSNR in dB that a component's tensors have to reach: as it does, or what it is blamed for."""
    asked = [f for f in figures if f.component == component]
    if blamed(figures, denoiser) == component:
        asked += [f for f in figures if f == lowest_missed(figures)]
    return max((f.floor for f in asked if f.metric == "psnr_db" and f.floor), default=0.0)
