"""Players that take turns: what each turn moves, what it costs, and how it may fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_distill import Toy, run_toy
from torch import nn

from edgeflash.distill.loop import _Turn, train
from edgeflash.distill.stage import Player, Stage, average
from edgeflash.distill.telling import Costs
from edgeflash.errors import EdgeflashError
from edgeflash.machine import peak_rss_mib


def test_a_turn_costs_no_gradients_of_other_players_weights(tmp_path: Path) -> None:
    student, critic = nn.Linear(1, 1), nn.Linear(1, 1)
    turns: list[str] = []
    student.weight.register_hook(lambda _: turns.append("student"))
    critic.weight.register_hook(lambda _: turns.append("critic"))
    players = {
        "critic": Player(critic, lambda n, b, g: {"x": n(student(b["x"])).mean()}),
        "student": Player(student, lambda n, b, g: {"x": -critic(n(b["x"])).mean()}, every=2),
    }
    stage = Stage(players, lambda i: {"x": torch.ones(len(i), 1)}, {"student": student})
    toy = Toy(steps=3, batch_size=2)
    train(stage, toy, tmp_path, Accelerator(cpu=True), samples=4, seed=0, label="")
    assert turns == ["critic", "student", "critic", "critic", "student"]
    assert student.weight.requires_grad and critic.weight.requires_grad


def test_an_average_follows_its_network_in_the_turns_of_that_alone(tmp_path: Path) -> None:
    student, critic = nn.Linear(1, 1), nn.Linear(1, 1)
    players = {
        "critic": Player(critic, lambda n, b, g: {"x": n(b["x"]).mean()}),
        "student": Player(student, lambda n, b, g: {"x": n(b["x"]).mean()}, every=2),
    }
    averages, target = {"student": average(student, 0.5)}, average(critic, 0.5)
    batch = lambda i: {"x": torch.ones(len(i), 1)}  # noqa: E731
    stage = Stage(players, batch, {"student": student}, averages, [(target, critic)])
    toy = Toy(steps=5, batch_size=2)
    train(stage, toy, tmp_path, Accelerator(cpu=True), samples=4, seed=0, label="")
    assert (averages["student"].n_averaged, target.n_averaged) == (3, 5)


def test_a_player_of_rare_turns_is_warm_as_soon_as_the_others(tmp_path: Path) -> None:
    toy, accelerator = Toy(steps=20, warmup_steps=10, learning_rate=0.5), Accelerator(cpu=True)
    often, rare = (
        _Turn(Player(nn.Linear(1, 1), lambda n, b, g: {}, every=every), toy, accelerator)
        for every in (1, 5)
    )
    for turn, count in ((often, 10), (rare, 2)):  # turns in ten steps
        for _ in range(count):
            turn.optimizer.step()
            turn.course.scheduler.step()
        assert turn.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_a_gradient_that_is_not_finite_stops_before_it_is_taken(tmp_path: Path) -> None:
    net = nn.Linear(1, 1, bias=False)
    before = net.weight.detach().clone()
    losses = {"student": Player(net, lambda n, b, g: {"root": (0 * n.weight).sqrt().sum()})}
    stage = Stage(losses, lambda i: {"x": torch.zeros(1)}, {"student": net})
    with pytest.raises(EdgeflashError, match=r"gradient of 'student' is nan at step 0; the last"):
        train(stage, Toy(steps=1), tmp_path, Accelerator(cpu=True), samples=9, seed=0, label="x")
    assert torch.equal(net.weight, before) and not (tmp_path / "checkpoint").exists()


def test_the_log_tells_what_the_steps_cost_over_all_resumptions(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="interrupted at step 5"):
        run_toy(tmp_path, stop_at=5)
    progress = tmp_path / "checkpoint/progress.json"
    told = json.loads(progress.read_text())
    assert told["costs"].keys() == {"samples_per_s", "peak_rss_mib"}
    told |= {"seconds": 1000.0, "costs": {"peak_rss_mib": 1e6}}
    progress.write_text(json.dumps(told))
    run_toy(tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples_per_s"] == pytest.approx(8 * 4 / 1000, rel=0.02)
    assert last["peak_rss_mib"] == 1e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone begins anew")
def test_the_peak_of_a_stage_is_not_that_of_the_one_before() -> None:
    torch.ones(2**26)  # 256 MiB, and gone
    before = peak_rss_mib()
    Costs.forget()
    after = Costs({}).told(1, 1.0)["peak_rss_mib"]
    assert before and 0 < after < before - 128
