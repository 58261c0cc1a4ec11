"""The training loop. It knows no method: players take turns, averages follow, checkpoints fall.

Every random number comes from a generator seeded by (seed, step) and every batch from a permutation
seeded by (seed, epoch), so there is no random state to save, and a run that was killed and resumed
is bit-identical on a CPU to one that was not. Nor does it matter into how many micro-batches a step
is cut, or how many processes share them (`draws`): rounding apart, it is the step of a large batch.
What looks at a batch as a whole still sees its part: `heads`' batch norm, the critics' spectral
norm, and "half of a batch" of ``own_steps``.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeflash.disk import is_disk_full, write_atomic
from edgeflash.errors import EdgeflashError
from edgeflash.roles import Method

from .draws import Part
from .stage import Player, Stage, Terms

CHECKPOINT_SECONDS = 300
LOG_STEPS = 20


@dataclass(frozen=True)
class Outcome:
    """How a stage went: optimizer steps done, seconds spent training, last logged loss terms."""

    steps: int
    seconds: float
    terms: dict[str, float]
    finished: dict[str, float]


class _Turn:
    """A player with the optimizer and learning-rate course the options ask for."""

    def __init__(self, player: Player, options: Method, accelerator: Accelerator) -> None:
        self.rate = player.learning_rate or options.learning_rate
        self.weight_decay = options.weight_decay
        self.weights = [p for p in player.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, betas=player.betas, weight_decay=self.weight_decay
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
    turns = {name: _Turn(player, options, accelerator) for name, player in stage.players.items()}
    for average in (*stage.averages.values(), *(average for average, _ in stage.targets)):
        accelerator.register_for_checkpointing(average.to(accelerator.device))
    state, main = _restore(accelerator, folder), accelerator.is_main_process
    for turn in turns.values():
        turn.steer()
    clock = _Clock(state["seconds"])
    order = Order(samples, options.batch_size, seed)
    terms: dict[str, float] = state["terms"]
    step = int(state["step"])
    with ExitStack() as stack:
        log = stack.enter_context(_metrics(folder, step)) if main else _silent
        advance = stack.enter_context(_progress(label, options, step)) if main else _silent
        stopped = stack.enter_context(_ctrl_c_waits())
        stack.callback(accelerator.free_memory)
        while step < options.steps:
            if _anywhere(clock.over(options.minutes) or stopped(), accelerator):
                break
            terms |= _step(stage, turns, options, accelerator, order.indices(step), seed, step)
            step += 1
            advance(step, terms, clock)
            if step % LOG_STEPS == 0 or step == options.steps:
                log(step, terms, clock.seconds)
            if _anywhere(main and clock.due(CHECKPOINT_SECONDS), accelerator):
                _save(accelerator, folder, step, clock.seconds, terms)
        _save(accelerator, folder, step, clock.seconds, terms)
        if _anywhere(stopped(), accelerator):
            raise EdgeflashError(
                f"interrupted at step {step} of {options.steps} of {label}; "
                "run the same command again to go on from there"
            )
        finished = stage.finish(stage.final())
    return Outcome(step, clock.seconds, terms, finished)


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
            with nullcontext() if last else accelerator.no_sync(turn.network):
                terms = _loss(turn, batch, generator, options, accelerator)
                accelerator.backward(torch.stack(list(terms.values())).sum() / len(batches))
            for term, value in terms.items():  # after the backward pass, which need not wait for it
                _check_finite(value, f"loss term {term!r}", name, step)
            for term, value in terms.items():
                key = term if len(turns) == 1 else f"{name}/{term}"
                told[key] = told.get(key, 0.0) + value.item() / len(batches)
        norm = accelerator.clip_grad_norm_(turn.network.parameters(), options.clip_norm)
        _check_finite(norm, "gradient", name, step)  # else a checkpoint would hold what it leads to
        turn.optimizer.step()
        turn.course.scheduler.step()  # accelerate's own takes a step for each process
        turn.optimizer.zero_grad()
        moved.update(turn.weights)
    for turn in turns.values():
        turn.learns(True)
    followed = [(average, stage.results[name]) for name, average in stage.averages.items()]
    for average, network in (*followed, *stage.targets):
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


class _Clock:
    """Training time, summed over resumptions, and the time since the last checkpoint."""

    def __init__(self, before_seconds: float) -> None:
        self._start = time.monotonic() - before_seconds
        self._checkpoint = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def over(self, minutes: float | None) -> bool:
        return minutes is not None and self.seconds >= minutes * 60

    def due(self, seconds: float) -> bool:
        if time.monotonic() - self._checkpoint < seconds:
            return False
        self._checkpoint = time.monotonic()
        return True


def _save(
    accelerator: Accelerator, folder: Path, step: int, seconds: float, terms: dict[str, float]
) -> None:
    """Writes `checkpoint/` through a temporary folder, so that a kill leaves the older one."""
    draft, final, old = (folder / f"checkpoint{tail}" for tail in (".new", "", ".old"))
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(draft))
        progress = {"step": step, "seconds": seconds, "terms": terms}
        accelerator.wait_for_everyone()
        if main:
            (draft / "progress.json").write_text(json.dumps(progress))
    except Exception as error:
        full = is_disk_full(error, folder)
        shutil.rmtree(draft, ignore_errors=True)
        if not full:
            raise
        raise EdgeflashError(
            f"{final}: disk full at step {step}; free some space and run the same command again: "
            "it goes on from the checkpoint before"
        ) from None
    if main:
        if final.exists():  # else the older one is all there is
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        draft.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _restore(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Loads the last whole checkpoint; step 0 when there is none."""
    for name in ("checkpoint", "checkpoint.old"):
        if (folder / name / "progress.json").is_file():
            accelerator.load_state(str(folder / name))
            return dict(json.loads((folder / name / "progress.json").read_text()))
    return {"step": 0, "seconds": 0.0, "terms": {}}


@contextmanager
def _metrics(folder: Path, start: int) -> Iterator[Callable[[int, dict[str, float], float], None]]:
    """Writes `metrics.jsonl` and TensorBoard events; lines after the checkpoint are cut off."""
    from torch.utils.tensorboard import SummaryWriter

    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    write_atomic(path, "".join(line + "\n" for line in kept))
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
    with path.open("a") as stream:

        def log(step: int, terms: dict[str, float], seconds: float) -> None:
            stream.write(json.dumps({"step": step, "seconds": round(seconds, 2), **terms}) + "\n")
            stream.flush()
            for name, value in terms.items():
                board.add_scalar(name, value, step)

        yield log
    board.close()


@contextmanager
def _progress(
    label: str, options: Method, start: int
) -> Iterator[Callable[[int, dict[str, float], _Clock], None]]:
    """A bar on a terminal; where there is none, a line every half minute."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    told_at = time.monotonic()
    with Progress(
        *columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(label, total=options.steps, completed=start, told="")

        def advance(step: int, terms: dict[str, float], clock: _Clock) -> None:
            nonlocal told_at
            told = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
            bar.update(task, completed=step, told=told)
            if bar.disable and time.monotonic() - told_at > 30:
                told_at = time.monotonic()
                left = clock.seconds / step * (options.steps - step)
                if options.minutes is not None:
                    left = max(0.0, min(left, options.minutes * 60 - clock.seconds))
                line = f"{label}: step {step}/{options.steps}, {left / 60:.0f} min left, {told}"
                print(line, file=sys.stderr, flush=True)

        yield advance
