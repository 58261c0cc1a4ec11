"""A step is that of the large batch, however many micro-batches and processes share it."""

from __future__ import annotations

import ast
import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import forked
from safetensors.torch import load_file
from test_distill import small_recipe

from edgeflash.distill import draws, loop
from edgeflash.distill.draws import Part
from edgeflash.distill.fit import check_parts
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError

CURVE = 1e-4
COSTS = ("seconds", "samples_per_s", "peak_rss_mib")


def test_each_part_draws_its_rows_of_the_whole_batch() -> None:
    def drawn(generator: torch.Generator, samples: int) -> tuple[torch.Tensor, ...]:
        return (
            draws.randn((samples, 3), generator),
            draws.randint(2, 99, samples, generator),
            torch.randint(99, (), generator=generator),  # one for all
            draws.rand(2 * samples, generator).unflatten(0, (2, samples)).T,  # of [x; y]
        )

    whole = drawn(Part(7, 3, 0, 1, 6), 6)
    parts = [drawn(Part(7, 3, i, 3, 2), 2) for i in range(3)]
    for number, wanted in enumerate(whole):
        own = [part[number] for part in parts]
        assert torch.equal(torch.cat(own) if wanted.ndim else own[2], wanted)
    plain = torch.Generator().manual_seed(Part(7, 3, 0, 1, 6).initial_seed())
    assert torch.equal(torch.randn(6, 3, generator=plain), whole[0])
    assert not torch.equal(drawn(Part(7, 4, 0, 1, 6), 6)[0], whole[0])


METHODS = sorted(Path(draws.__file__).parent.glob("by_*.py"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_methods_draw_for_samples_by_rows(path: Path) -> None:
    """With the generator itself they draw one thing for all: shape () or (1,), or in `rows` (n)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and "torch.rand" in (name := ast.unparse(node.func)):
            given = [ast.unparse(argument) for argument in node.args]
            assert given[-1] in ("()", "(1,)", "n"), f"{path.name}: {name}({given})"


def run(home: Path, name: str, options: dict[str, Any], **said: Any) -> None:
    stage = {"by": "dmd", "gan_weight": 0.1, "fake_updates": 2, "ema": 0.5, "learning_rate": 1e-3}
    stage |= {"steps": 5, "batch_size": 4, "warmup_steps": 3} | options
    distill(small_recipe(home, stage=[stage], sampling=None), home / name)


def one_of_two(rank: int, port: int, do: Any) -> None:
    """As torchrun starts it."""
    AcceleratorState._reset_state(True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    do()
    torch.distributed.destroy_process_group()


def two(do: Any) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return forked(*(partial(one_of_two, rank, port, do) for rank in (0, 1)))


def curve(home: Path, name: str) -> list[dict[str, float]]:
    lines = (home / f"{name}.run/1-dmd/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COSTS} for line in lines]


def test_two_processes_and_four_micro_batches_learn_what_one_large_batch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    small_recipe(tmp_path)  # writes teacher and pictures
    run(tmp_path, "whole", {})
    run(tmp_path, "cut", {"accumulate": 4})
    assert two(lambda: run(tmp_path, "shared", {})) == [0, 0]
    whole = curve(tmp_path, "whole")
    assert len(whole) == 5 and {"student/matching", "fake/critic"} <= whole[-1].keys()
    weights = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    for name in ("cut", "shared"):
        for ours, theirs in zip(curve(tmp_path, name), whole, strict=True):
            assert ours == pytest.approx(theirs, abs=CURVE, rel=CURVE)
        found = load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.allclose(found[k], v, atol=1e-3) for k, v in weights.items())
        assert (tmp_path / name / "edgeflash.json").exists()
    left = list((tmp_path / "shared.run").rglob("checkpoint*"))
    assert not left


def test_a_batch_that_the_processes_cannot_share(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, stage=[{"by": "lcm", "batch_size": 12, "accumulate": 4}])
    check_parts(recipe, recipe.methods(), 6)
    with pytest.raises(EdgeflashError, match=r"lcm\.batch_size 12: 8 processes cannot share it"):
        check_parts(recipe, recipe.methods(), 8)
