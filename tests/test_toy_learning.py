"""Methods that learn on densities of the plane, by small networks: a minute each, so all are slow.

What a loss is at its optimum the closed forms tell; here it is told that a network gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian import NOTHING, M, S, network, posterior, process, seeded, variance
from gaussian import exact as exact_map
from torch import Tensor, nn

from edgeflash.distill import by_add, by_consistency, by_dmd, by_imagine
from edgeflash.distill.consistency import consistency
from edgeflash.distill.few_steps import ladder, trailing
from edgeflash.distill.process import Process
from edgeflash.distill.stage import Terms, average
from edgeflash.distill.teacher import plain

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Modes:
    """Equal Gaussians in the plane."""

    centres: Tensor  # [k, 2]
    s: float

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """[n, 2, 1, 1]."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return (self.centres[which] + self.s * noise)[:, :, None, None]

    def teacher(self, it: Process) -> Any:
        """The perfect one."""
        centres = self.centres[None, :, :, None, None]

        def sees(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            alpha, spread = it.alpha(t)[:, None], variance(it, t, self.s)[:, None]
            gaps = x[:, None] - alpha * centres
            shares = (-gaps.square().sum(2, keepdim=True) / (2 * spread)).softmax(1)
            x_0 = (shares * (centres + alpha * self.s**2 / spread * gaps)).sum(1)
            return x_0, (shares * it.sigma(t)[:, None] * gaps / spread).sum(1)

        return network(it, sees)

    def told(self, x: Tensor) -> tuple[float, float, int]:
        """Shares within 2 and 4 deviations of a mode, and modes with a quarter of their due."""
        gaps = (x.flatten(1)[:, None] - self.centres).norm(dim=-1)
        near = gaps.min(1).values <= 4 * self.s
        counts = gaps.argmin(1)[near].bincount(minlength=len(self.centres))
        within = float((gaps.min(1).values <= 2 * self.s).float().mean())
        there = int((counts >= len(x) / len(self.centres) / 4).sum())
        return within, float(near.float().mean()), there


ANGLES = torch.arange(8) * pi / 4
RING = Modes(2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.2)
GRID = Modes(torch.cartesian_prod(*[torch.arange(-2.0, 3.0)] * 2), 0.05)


class Plane(nn.Module):
    """Points [n, d, 1, 1] at timesteps -> as many; it hears the time in waves."""

    def __init__(self, wide: int = 128, size: int = 2, out: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(size + 8, wide), nn.SiLU()]
        layers += [nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, out or size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
        angles = t.float()[:, None] / 1000 * pi / 2 * torch.tensor([1.0, 2.0, 4.0, 8.0])
        told = torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)
        return SimpleNamespace(sample=self.layers(told)[:, :, None, None])


@dataclass
class Turn:
    network: nn.Module
    loss: Callable[[Any, dict[str, Tensor], torch.Generator], Terms]
    rate: float
    every: int = 1
    betas: tuple[float, float] = (0.9, 0.999)


def learn(turns: list[Turn], steps: int, points: Callable[[torch.Generator], Tensor]) -> None:
    """The training loop in small, every number from the generator of its step."""
    optimizers = [torch.optim.Adam(t.network.parameters(), t.rate, t.betas) for t in turns]
    for step, generator in _generators(steps):
        x_0 = points(generator)
        c = torch.zeros(len(x_0), 1, 1)
        batch = {"x_0": x_0, "c": c, "pictures": x_0, "step": torch.tensor(step)}
        for turn, optimizer in zip(turns, optimizers, strict=True):
            if step % turn.every == 0:
                loss = torch.stack([*turn.loss(turn.network, batch, generator).values()]).sum()
                inputs = [*turn.network.parameters()]
                for weight, slope in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
                    weight.grad = slope
                optimizer.step()


def _generators(steps: int) -> Iterator[tuple[int, torch.Generator]]:
    for step in range(steps):
        yield step, seeded(step)


@torch.no_grad()
def one_step(it: Process, student: Any, count: int = 8192) -> Tensor:
    """What a student makes of noise alone."""
    z = torch.randn(count, 2, 1, 1, generator=seeded(1_000_000))
    x, _ = plain(student, it, z, torch.full((count,), 999), torch.zeros(count, 1, 1))
    return x


def test_consistency_distillation_learns_the_exact_map() -> None:
    """From noise alone, in one dimension: after 6000 steps it is off by less than 0.03."""
    torch.manual_seed(0)
    it, student = process(), Plane(64, size=1)
    target = average(student, 0.95)
    options = by_consistency.Consistency(scales=40, target_ema=0.95)
    lesson = by_consistency.Lesson(options, posterior(it), target, it, NOTHING)

    def loss(network: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Terms:
        terms = lesson.loss(network, batch, generator)
        if int(batch["step"]):
            target.update_parameters(student)
        return terms

    def points(generator: torch.Generator) -> Tensor:
        return M + S * torch.randn(1024, 1, 1, 1, generator=generator)

    x, t = torch.randn(4096, 1, 1, 1, generator=seeded(7)), torch.full((4096,), 999)
    learn([Turn(student, loss, 2e-3)], 6000, points)
    with torch.no_grad():
        gap = consistency(student, it, x, t, x) - consistency(exact_map(it), it, x, t, x)
    assert float(gap.square().mean()) < 1e-3


def test_a_fake_score_fits_what_the_student_makes() -> None:
    """Within 5 % of the exact x_0 of N(m_g, s_g^2), of which it sees noised samples alone."""
    torch.manual_seed(0)
    it, fake = process(), Plane(size=1)

    def student(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=M + 1 + 0.3 * x)

    options = by_dmd.DMD(denoising_steps=1)
    game = by_dmd.Duel(options, posterior(it), fake, student, it, NOTHING)

    def points(generator: torch.Generator) -> Tensor:
        return torch.zeros(1024, 1, 1, 1)

    learn([Turn(fake, game.fake_loss, 2e-3)], 2000, points)
    t = torch.arange(20, 980, 40).repeat_interleave(200)
    x_t = it.noised(M + 1 + 0.3 * torch.randn(len(t), 1, 1, 1), torch.randn(len(t), 1, 1, 1), t)
    with torch.no_grad():
        found, wanted = (net(x_t, t, NOTHING).sample for net in (fake, posterior(it, M + 1, 0.3)))
    assert float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.05


def add(**options: Any) -> tuple[float, float, int]:
    torch.manual_seed(0)
    it = process("v_prediction")
    chosen = by_add.ADD(student_steps=1, guidance=1, condition="none", **options)
    student, critic = Plane(), Plane(out=1)

    def sees(pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        return [pictures + 0], pictures.flatten(1)

    def heads(maps: list[Tensor], told: Any) -> list[Tensor]:
        (points,) = maps
        return [critic(points, torch.zeros(len(points)), points).sample.flatten(1)]

    game = by_add.Duel(
        chosen, RING.teacher(it), student, heads, sees, lambda z: z, it,  # type: ignore[arg-type]
        ladder(it, 1, ""), NOTHING, NOTHING,
    )  # fmt: skip

    def critic_loss(_: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Terms:
        return game.critic_loss(heads, batch, generator)  # type: ignore[arg-type]

    turns = [Turn(critic, critic_loss, 1e-3, betas=(0.0, 0.99))] * bool(chosen.adversarial_weight)
    turns += [Turn(student, game.student_loss, 2e-4, betas=(0.0, 0.99))]
    learn(turns, 3000, lambda generator: RING.points(512, generator))
    return RING.told(one_step(it, student))


def test_a_critic_keeps_add_from_its_mean() -> None:
    """Distillation alone ends in the middle of the ring (there FID 315.6 for 20.6)."""
    alone, both = add(adversarial_weight=0), add(r1_weight=0.1)
    assert alone[0] < 0.01 and alone[2] == 0
    assert both[2] == 8 and both[0] > 0.3


def imagine(start: Any, *, backward: bool) -> float:
    """Share within 4 deviations after three steps of the student's own."""
    it, student = process("v_prediction"), Plane(32)
    student.load_state_dict(start.state_dict())
    options = by_imagine.Imagine(guidance=1, gan_weight=0, backward=backward)
    lesson = by_imagine.Lesson(options, GRID.teacher(it), student, None, it, NOTHING)
    turns = [Turn(student, lesson.student_loss, 1e-3)]
    learn(turns, 1500, lambda generator: GRID.points(512, generator))
    times = [stop.expand(8192) for stop in trailing(1000, 3)]
    x = lesson.rollout(
        torch.randn(8192, 2, 1, 1, generator=seeded(3)), times, torch.zeros(8192, 1, 1)
    )
    return GRID.told(x)[1]


def denoiser(seed: int) -> Plane:
    """A small student that has learnt to denoise the grid: where it begins."""
    torch.manual_seed(seed)
    it, start = process("v_prediction"), Plane(32)
    teacher = GRID.teacher(it)

    def loss(network: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Terms:
        x_0, eps = batch["x_0"], torch.randn(batch["x_0"].shape, generator=generator)
        t = torch.randint(1000, (len(x_0),), generator=generator)
        x_t = it.noised(x_0, eps, t)
        gap = network(x_t, t, NOTHING).sample - teacher(x_t, t, NOTHING).sample
        return {"denoising": gap.square().mean()}

    learn([Turn(start, loss, 2e-3)], 1500, lambda generator: GRID.points(512, generator))
    return start


def test_starts_of_ones_own_teach_more_than_noised_data() -> None:
    """Backward distillation (arXiv 2405.05224, sec. 4.1), of students too small for the grid."""
    starts = [denoiser(seed) for seed in range(3)]
    own, data = (sum(imagine(s, backward=backward) for s in starts) for backward in (True, False))
    assert own > data
