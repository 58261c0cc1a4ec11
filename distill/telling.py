"""What a training tells while it runs: the progress line, the log, and what the steps cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeflash.disk import write_atomic
from edgeflash.machine import forget_peak_rss, peak_rss_mib
from edgeflash.roles import Method


class Clock:
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


class Costs:
    """Samples a second and peak memory of a stage, over all its resumptions.

    Memory is the main process's: resident, and of its device where that has memory of its own.
    """

    def __init__(self, before: dict[str, float]) -> None:
        self._before = before

    @staticmethod
    def forget() -> None:
        """Begins anew with the peaks, so that those of a stage are not the one's before it."""
        forget_peak_rss()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def told(self, samples: int, seconds: float) -> dict[str, float]:
        """Figures so far, by name: samples/s, MiB."""
        peaks = {"peak_rss_mib": peak_rss_mib() or 0.0}
        if torch.cuda.is_available():
            peaks["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        peaks = {k: round(max(v, self._before.get(k, 0.0)), 1) for k, v in peaks.items() if v}
        return {"samples_per_s": round(samples / max(seconds, 1e-9), 3)} | peaks


def summed(figures: dict[str, float]) -> dict[str, float]:
    """Figures for a line of text: those of the same name before a dot, a block each, as one."""
    whole: dict[str, float] = {}
    for name, value in figures.items():
        whole[name.partition(".")[0]] = whole.get(name.partition(".")[0], 0.0) + value
    return whole


Log = Callable[[int, float, dict[str, float]], None]  # step, seconds, figures


@contextmanager
def metrics(folder: Path, start: int) -> Iterator[Log]:
    """Writes `metrics.jsonl` and TensorBoard events; lines after the checkpoint are cut off."""
    from torch.utils.tensorboard import SummaryWriter

    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    write_atomic(path, "".join(line + "\n" for line in kept))
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
    with path.open("a") as stream:

        def log(step: int, seconds: float, figures: dict[str, float]) -> None:
            stream.write(json.dumps({"step": step, "seconds": round(seconds, 2)} | figures) + "\n")
            stream.flush()
            for name, value in figures.items():
                board.add_scalar(name, value, step)

        yield log
    board.close()


@contextmanager
def progress(
    label: str, options: Method, start: int
) -> Iterator[Callable[[int, dict[str, float], Clock], None]]:
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

        def advance(step: int, terms: dict[str, float], clock: Clock) -> None:
            nonlocal told_at
            told = "  ".join(f"{name} {value:.4f}" for name, value in summed(terms).items())
            bar.update(task, completed=step, told=told)
            if bar.disable and time.monotonic() - told_at > 30:
                told_at = time.monotonic()
                left = clock.seconds / step * (options.steps - step)
                if options.minutes is not None:
                    left = max(0.0, min(left, options.minutes * 60 - clock.seconds))
                line = f"{label}: step {step}/{options.steps}, {left / 60:.0f} min left, {told}"
                print(line, file=sys.stderr, flush=True)

        yield advance
