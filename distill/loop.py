"""The training loop. It knows no method: players take turns, averages follow, checkpoints fall.

Every random number comes from a generator seeded by (seed, step) and every batch from a permutation
seeded by (seed, epoch), so there is no random state to save, and a run that was killed and resumed
is bit-identical on a CPU to one that was not. Nor does it matter into how many micro-batches a step
is cut, or how many processes share them (`draws`): rounding apart, it is the step of a large batch.
What looks at a batch as a whole still sees its part: `heads`' batch norm, the critics' spectral
norm, and "half of a batch" of ``own_steps``.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from . import checkpoints, sharded
from .draws import Part
from .stage import Player, Stage, Terms
from .telling import Clock, Costs, metrics, progress

CHECKPOINT_SECONDS = 300
LOG_STEPS = 20


@dataclass(frozen=True)
class Outcome:
    """How a stage went.

    Attributes:
        steps: optimizer steps done.
        seconds: spent training.
        terms: last logged loss terms.
        costs: samples/s and peak memory in MiB, as the log's last line has them.
        finished: what the stage measured of its networks at the end.
    """

    steps: int
    seconds: float
    terms: dict[str, float]
    costs: dict[str, float]
    finished: dict[str, float]


class _Turn:
    """A player with the optimizer and learning-rate course the options ask for."""

    def __init__(self, player: Player, options: Method, accelerator: Accelerator) -> None:
        self.rate = player.learning_rate or options.learning_rate
        self.weight_decay = options.weight_decay
        if accelerator.is_fsdp2:
            sharded.lay_out(player.network, accelerator)
        optimizer = torch.optim.AdamW(
            [p for p in player.network.parameters() if p.requires_grad],
            lr=self.rate,
            betas=player.betas,
            weight_decay=self.weight_decay,
        )
        course = get_scheduler(
            "constant_with_warmup" if options.decay == "constant" else options.decay,
            optimizer,
            num_warmup_steps=math.ceil(options.warmup_steps / player.every),
            num_training_steps=math.ceil(options.steps / player.every),
        )
        self.player = player
        self.network, self.optimizer, self.course = accelerator.prepare(
            player.network, optimizer, course
        )
        if accelerator.is_fsdp2:
            sharded.settle(self.network)
        self.weights = [p for p in self.network.parameters() if p.requires_grad]

    def learns(self, now: bool) -> None:
        for weight in self.weights:
            weight.requires_grad_(now)

    def steer(self) -> None:
        """Goes by the options again: a checkpoint brings the rates back that it was saved with."""
        course = self.course.scheduler
        course.base_lrs = [self.rate]
        self.optimizer.param_groups[0].update(
            lr=self.rate * course.lr_lambdas[0](course.last_epoch),
            initial_lr=self.rate,
            weight_decay=self.weight_decay,
        )


def train(
    stage: Stage,
    options: Method,
    folder: Path,
    accelerator: Accelerator,
    *,
    samples: int,
    seed: int,
    label: str,
) -> Outcome:
    """Trains one stage to its end, from its last checkpoint if there is one.

    Args:
        stage: players, batches and averages.
        options: steps, rates and the like.
        folder: holds `checkpoint/` and `metrics.jsonl`.
        samples: how many samples the store has; an epoch's permutation is over them.
        seed: decides every draw.
        label: what the progress line calls the stage.

    Raises:
        EdgeflashError: interrupted (a checkpoint was written), or a loss that is not finite.
    """
    moulds = sharded.moulds(stage) if accelerator.is_fsdp2 else {}
    turns = {name: _Turn(player, options, accelerator) for name, player in stage.players.items()}
    _keep_averages(stage, accelerator)
    state, main = checkpoints.restore(accelerator, folder), accelerator.is_main_process
    for turn in turns.values():
        turn.steer()
    clock, costs = Clock(state["seconds"]), Costs(state.get("costs", {}))
    order = Order(samples, options.batch_size, seed)
    terms: dict[str, float] = state["terms"]
    step = int(state["step"])

    def spent() -> dict[str, float]:
        return costs.told(step * options.batch_size, clock.seconds)

    def save() -> None:
        told = {"step": step, "seconds": clock.seconds, "terms": terms, "costs": spent()}
        checkpoints.save(accelerator, folder, told)

    with ExitStack() as stack:
        log = stack.enter_context(metrics(folder, step)) if main else _silent
        advance = stack.enter_context(progress(label, options, step)) if main else _silent
        stopped = stack.enter_context(_ctrl_c_waits())
        stack.callback(accelerator.free_memory)
        while step < options.steps:
            if _anywhere(clock.over(options.minutes) or stopped(), accelerator):
                break
            terms |= _step(stage, turns, options, accelerator, order.indices(step), seed, step)
            step += 1
            advance(step, terms, clock)
            if step % LOG_STEPS == 0 or step == options.steps:
                log(step, clock.seconds, spent() | terms)
            if _anywhere(main and clock.due(CHECKPOINT_SECONDS), accelerator):
                save()
        save()
        if _anywhere(stopped(), accelerator):
            raise EdgeflashError(
                f"interrupted at step {step} of {options.steps} of {label}; "
                "run the same command again to go on from there"
            )
        if accelerator.is_fsdp2:
            sharded.put_together(stage, moulds, accelerator)
        finished = stage.finish(stage.final()) if main else {}  # the main one saves
    return Outcome(step, clock.seconds, terms, spent(), finished)


def _keep_averages(stage: Stage, accelerator: Accelerator) -> None:
    """Has checkpoints hold them too."""
    for average, network in _followed(stage):
        average.to(accelerator.device)
        if accelerator.is_fsdp2:
            sharded.follow(average, network, accelerator)
        kept = sharded.Whole(average, accelerator) if accelerator.is_fsdp2 else average
        accelerator.register_for_checkpointing(kept)


def _followed(stage: Stage) -> list[tuple[AveragedModel, torch.nn.Module]]:
    """Every average with the network that it follows."""
    own = [(average, stage.results[name]) for name, average in stage.averages.items()]
    return own + stage.targets


def _silent(*_: Any) -> None:
    """What processes but the main one tell."""


def _anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in any process: their clocks differ, but all must turn off together."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)))


@contextmanager
def _ctrl_c_waits() -> Iterator[Callable[[], bool]]:
    """Lets the step end that a Ctrl-C falls into; the second Ctrl-C is a hard one."""
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # no signal arrives here
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _step(
    stage: Stage,
    turns: dict[str, _Turn],
    options: Method,
    accelerator: Accelerator,
    indices: np.ndarray,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One step of every player whose turn it is; returns the mean of each of their loss terms.

    Of its parts, as many as ``accumulate`` says or more where processes are, each process has some.
    """
    told: dict[str, float] = {}
    moved: set[torch.nn.Parameter] = set()
    at = {"step": torch.tensor(step)}
    count = parts(options, accelerator.num_processes)
    cut = np.split(indices, count)
    own = range(accelerator.process_index, count, accelerator.num_processes)
    batches = [stage.batch(cut[i]) | at for i in own]
    generators = [Part(seed, step, i, count, len(cut[i])) for i in own]
    for name, turn in turns.items():
        if step % turn.player.every:
            continue
        for other in turns.values():  # a loss that goes through them moves none of their weights
            other.learns(False)
        turn.learns(True)
        for batch, generator in zip(batches, generators, strict=True):
            last = batch is batches[-1]
            sync = nullcontext() if last else accelerator.no_sync(turn.network)
            with sync, sharded.in_one_line(name, accelerator):
                terms = _loss(turn, batch, generator, options, accelerator)
                accelerator.backward(torch.stack(list(terms.values())).sum() / len(batches))
            for term, value in terms.items():  # after the backward pass, which need not wait for it
                _check_finite(value, f"loss term {term!r}", name, step)
            for term, value in terms.items():
                key = term if len(turns) == 1 else f"{name}/{term}"
                told[key] = told.get(key, 0.0) + value.item() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(turn.weights, options.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        _check_finite(norm, "gradient", name, step)  # else a checkpoint would hold what it leads to
        turn.optimizer.step()
        turn.course.scheduler.step()  # accelerate's own takes a step for each process
        turn.optimizer.zero_grad()
        moved.update(turn.weights)
    for turn in turns.values():
        turn.learns(True)
    for average, network in _followed(stage):
        if not moved.isdisjoint(network.parameters()):  # decays are a turn's, not a step's
            average.update_parameters(network)
    return _over_processes(told, accelerator)


def parts(options: Method, processes: int) -> int:
    """Into how many equal micro-batches a step is cut, each process taking as many."""
    return math.lcm(options.accumulate, processes)


def _over_processes(terms: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return terms
    own = torch.tensor(list(terms.values()), device=accelerator.device)
    return dict(zip(terms, accelerator.reduce(own, "mean").tolist(), strict=True))


def _loss(
    turn: _Turn,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
    options: Method,
    accelerator: Accelerator,
) -> Terms:
    moved = {key: value.to(accelerator.device) for key, value in batch.items()}
    with torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=options.precision == "bf16"
    ):
        return turn.player.loss(turn.network, moved, generator)


def _check_finite(value: torch.Tensor, what: str, player: str, step: int) -> None:
    if not torch.isfinite(value):
        raise EdgeflashError(
            f"{what} of {player!r} is {value.item()} at step {step}; the last checkpoint is kept: "
            "lower learning_rate, or set precision = 'fp32'"
        )


class Order:
    """Which samples each step sees: a fresh permutation an epoch, a function of (seed, step)."""

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_size]; every sample once an epoch, across step boundaries."""
        first = step * self.batch_size
        return np.array([self._at(i) for i in range(first, first + self.batch_size)])

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.samples)
        return int(self._permutation[place])
