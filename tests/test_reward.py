"""Reward feedback: whose states the network is trained on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill import small_recipe

from edgeflash.distill import by_reward
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError

DATA = {"kind": "shapes", "samples": 8}


def test_half_of_a_batch_is_where_the_network_itself_gets_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[list[int]] = []
    asked: list[Any] = []
    real = by_reward.ddim

    def spied(ask: Any, process: Any, x: torch.Tensor, times: Any) -> torch.Tensor:
        assert len(x) == 2 and all((t == t[0]).all() for t in times)
        paths.append([int(t[0]) for t in times])
        asked.append(real(ask, process, x, times))
        return asked[-1]

    seen: list[list[int]] = []
    doubt = by_reward.Witness.doubt

    def witnessed(*given: Any) -> torch.Tensor:
        seen.append(given[-1].tolist())
        return doubt(*given)

    monkeypatch.setattr(by_reward, "ddim", spied)
    monkeypatch.setattr(by_reward.Witness, "doubt", witnessed)
    stage = {"by": "reward", "steps": 8, "batch_size": 4, "solver_steps": 4}
    out = distill(small_recipe(tmp_path, stage=[stage], data=DATA, sampling=None), tmp_path / "s")
    assert all(path == [999, 749, 499, 249][: len(path)] for path in paths)
    assert {len(path) for path in paths} >= {1, 3}
    assert [t[2:] for t in seen] == [[path[-1]] * 2 for path in paths]
    assert not any(x.requires_grad for x in asked)
    told = json.loads((tmp_path / "s.run/1-reward/metrics.jsonl").read_text().splitlines()[-1])
    assert {"witness/witness", "unet/denoising", "unet/attributes"} <= set(told)
    assert (out / "unet").exists() and not (out / "witness").exists()


def test_a_few_step_student_is_refused(tmp_path: Path) -> None:
    stages = [{"by": by, "steps": 1, "batch_size": 2} for by in ("lcm", "reward")]
    recipe = small_recipe(tmp_path, stage=stages, data=DATA, sampling=None)
    with pytest.raises(EdgeflashError, match="this student's are LCMScheduler's"):
        distill(recipe, tmp_path / "s")
