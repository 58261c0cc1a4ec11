"""What an export is at: for how long, and for how long still, by what earlier exports took here.

How long a stage will take is known only from the last time that a user made one like it: it is
scaled with the work, and told as "about". The first time there is no estimate, and none is made up.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from edgeflash.disk import write_atomic

LINE_SECONDS = 30  # between lines of a stage, where there is no terminal
WORTH_SECONDS = 2.0  # shorter stages are not remembered
ALIKE = 4.0  # times as much work, or as little: beyond, one stage tells nothing of another
DRAWING = ("capture", "record", "verify")  # stages that run the student's loop


def rates_file() -> Path:
    """In the user's cache: how long stages took on this machine."""
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(f"{own}/edgeflash/export-times.json").expanduser()


@dataclass
class Rates:
    """Seconds and work of stages, the last of each name.

    Attributes:
        to: name of the target: others take other times.
        numbers: of each component's weights.
        drawn: pixels of all pictures that are recorded, times their steps.
        file: where they are kept.
    """

    to: str
    numbers: Mapping[str, int]
    drawn: float
    file: Path = field(default_factory=rates_file)
    _new: dict[str, tuple[float, float]] = field(default_factory=dict)

    def expected(self, stage: str) -> float | None:
        """Seconds that a stage will take; None where none like it was made here."""
        seconds, work = self._read().get(self._key(stage), (0.0, 0.0))
        ratio = self._work(stage) / work if work else 0.0
        return seconds * ratio if 1 / ALIKE <= ratio <= ALIKE else None

    def note(self, stage: str, seconds: float) -> None:
        if seconds >= WORTH_SECONDS:
            self._new[self._key(stage)] = (round(seconds, 2), self._work(stage))

    def save(self) -> None:
        """Adds what was noted; a cache that cannot be written is not worth an error."""
        if self._new:
            with suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.file, json.dumps(self._read() | self._new, indent=1))

    def _read(self) -> dict[str, tuple[float, float]]:
        try:
            found = json.loads(self.file.read_text())
            return {str(key): (float(s), float(work)) for key, (s, work) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _key(self, stage: str) -> str:
        return f"{self.to}: {stage}"

    def _work(self, stage: str) -> float:
        kind, _, rest = stage.partition(" ")
        numbers = self.numbers.get(rest.partition(" ")[0], sum(self.numbers.values()))
        return float(numbers) * (self.drawn if kind in DRAWING else 1)


@dataclass
class Running:
    """A stage at work."""

    stage: str
    start: float
    expected: float | None
    told: float  # when a line of it was last written
    task: Any = None  # of the bar on a terminal

    def line(self, now: float) -> str:
        gone = now - self.start
        return f"{self.stage}: {_words(gone)} so far{_left(gone, self.expected, ', ')}"


def _left(gone: float, expected: float | None, before: str = "") -> str:
    """What is left of a stage by an earlier one; "" where there was none."""
    if expected is None:
        return ""
    if gone > expected:
        return f"{before}longer than the last time"
    return f"{before}about {_words(expected - gone)} left"


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Stages:
    """Tells what stages do: bars on a terminal, else a line every half minute, and one at the end.

    Stages may begin and end in any thread, and at the same time.
    """

    def __init__(self, console: Console, rates: Rates) -> None:
        self.console, self.rates = console, rates
        self._running: dict[str, Running] = {}
        self._lock = threading.RLock()
        self._bars: Progress | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """For the whole export: its end, whatever it is, ends all bars and lines."""
        stop = threading.Event()
        if not self.console.is_terminal:
            threading.Thread(target=self._tick, args=(stop,), daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            with self._lock:
                self._running.clear()
                self._show_no_bars()
            self.rates.save()

    @contextmanager
    def told(self, stage: str) -> Iterator[None]:
        """Of a stage in this thread."""
        start = time.monotonic()
        self.begin(stage)
        try:
            yield
        except BaseException:
            self._drop(stage)
            raise
        self.end(stage, time.monotonic() - start)

    def begin(self, stage: str) -> None:
        now = time.monotonic()
        running = Running(stage, now, self.rates.expected(stage), now)
        with self._lock:
            self._running[stage] = running
            if self.console.is_terminal:
                if self._bars is None:
                    self._bars = _bars(self.console)
                    self._bars.start()
                running.task = self._bars.add_task(stage, total=None, expected=running.expected)

    def end(self, stage: str, seconds: float, mib: float | None = None) -> None:
        """``mib``: what memory the process that it ran in had taken by then."""
        self._drop(stage)
        self.rates.note(stage, seconds)
        peak = f"  {mib / 1024:6.2f} GiB" if mib else ""
        self.console.print(f"{stage:<36} {seconds:7.1f} s{peak}", highlight=False)

    def lines(self, now: float) -> list[str]:
        """Of stages of which nothing was said for a while; ``now`` as `time.monotonic` has it."""
        with self._lock:
            due = [each for each in self._running.values() if now - each.told >= LINE_SECONDS]
            for each in due:
                each.told = now
            return [each.line(now) for each in due]

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(1):
            for line in self.lines(time.monotonic()):
                self.console.print(line, highlight=False)

    def _drop(self, stage: str) -> None:
        with self._lock:
            running = self._running.pop(stage, None)
            if running and self._bars:
                self._bars.remove_task(running.task)
            if not self._running:
                self._show_no_bars()

    def _show_no_bars(self) -> None:
        if self._bars:
            self._bars.stop()
        self._bars = None


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), _Bar(), TimeElapsedColumn(), _Left())
    return Progress(*columns, console=console, transient=True)


class _Bar(BarColumn):
    """Time gone of time expected; without that it moves to and fro."""

    def render(self, task: Task) -> ProgressBar:
        expected = task.fields["expected"]
        if expected is None:
            return super().render(task)
        gone = min(task.elapsed or 0.0, expected)
        return ProgressBar(total=expected, completed=gone, width=self.bar_width)


class _Left(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return Text(_left(task.elapsed or 0.0, task.fields["expected"]))
