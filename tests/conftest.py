"""Students and bundles that many tests share: written once a run, never changed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_student import write_student


@pytest.fixture(scope="session")
def one_step_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny decoder, no mid block, three stages, LCM sampler, made for one step."""
    from edgeflash.student import write_manifest

    folder = tmp_path_factory.mktemp("students") / "one-step"
    write_student(folder, mid_block=False, widths=(8, 16))
    write_manifest(folder, steps=(1,), prompts=("a red star", "blue ring", "a star", "red ring"))
    return folder


@pytest.fixture(scope="session")
def guided_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`AutoencoderKL`, mid block, DDIM, no `edgeflash.json`: anybody's Stable Diffusion folder."""
    folder = tmp_path_factory.mktemp("students") / "guided"
    return write_student(folder, tiny_decoder=False, scheduler="DDIMScheduler")
