"""Figures with the conditions they were taken under: JSON, a table for the terminal.

The page to look at is written by `report_html.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeflash.complaint import complaint
from edgeflash.disk import write_for_people
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

REPORT = "report.json"
FORMAT_VERSION = 1
PRECISION = "precision"  # among extra: what the denoiser was lowered to
IMAGE_DB = "image dB"  # among extra: PSNR of the picture, against the student in torch


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Percentiles(_Figures):
    p50_ms: float
    p90_ms: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Self:
        p50, p90 = np.percentile(np.asarray(samples_ms, np.float64), (50, 90))
        return cls(p50_ms=round(float(p50), 4), p90_ms=round(float(p90), 4))


class Sustained(_Figures):
    """Latency while drawing without a pause, as devices slow down when they get warm.

    Spans of equally many images, in order: when each ended, since the first began, and its median.
    ``drift``: by how much the last span is slower than the first, as a share.
    """

    ended_s: tuple[float, ...] = Field(min_length=1)
    p50_ms: tuple[float, ...] = Field(min_length=1)
    drift: float

    @classmethod
    def of(cls, runs_ms: Sequence[float], spans: int = 20) -> Self:
        parts = np.array_split(np.asarray(runs_ms, np.float64), min(spans, len(runs_ms)))
        ended = np.cumsum([part.sum() for part in parts]) / 1000
        medians = [round(float(np.median(part)), 4) for part in parts]
        return cls(
            ended_s=tuple(np.round(ended, 3).tolist()),
            p50_ms=tuple(medians),
            drift=round(medians[-1] / medians[0] - 1, 4),
        )


class Conditions(_Figures):
    """What must be the same before two figures may be ranked, beside the machine and the steps."""

    runtime: str
    device: str = "cpu"
    options: dict[str, Any] = {}  # of the runtime, every default filled in
    height: int
    width: int
    batch: int = 1
    seed: int = 0
    guidance_scale: float = 1.0
    low_memory: bool = False
    warmup_runs: int = 0
    runs: int = 1
    minutes: float = 0.0  # of drawing without a pause, after the runs


class System(_Figures):
    """One way to make the pictures, and what it costs. None: not measured.

    ``latency_ms_*`` is from prompt to pixels for the whole batch, everything loaded. In ``stages``,
    ``unet`` or ``transformer`` and ``unet_cached`` are one step and the others are the whole stage;
    ``calls`` are those of an image, where there is more than one. ``manifest_sha256`` is that of
    the bundle's `edgeflash.json`, which has those of its files. ``images`` are PNG files, relative
    to the report, one for each of the report's prompts. ``extra`` takes figures of one's own.
    """

    name: str
    steps: int
    prompt_accuracy: float | None = Field(None, ge=0, le=1)
    fd: float | None = Field(None, ge=0)
    latency_ms_p50: float
    latency_ms_p90: float
    images_per_s: float | None = None
    cold_load_ms: float | None = None
    warm_load_ms: float | None = None
    first_image_ms: float | None = None
    size_mib: float
    sizes_mib: dict[str, float] = {}  # by component
    peak_rss_mib: float | None = None
    stages: dict[str, Percentiles] = {}
    calls: dict[str, int] = {}
    sustained: Sustained | None = None
    manifest_sha256: str | None = None
    conditions: Conditions
    images: tuple[str, ...] = ()
    extra: dict[str, float | str] = {}


class Predicted(_Figures):
    """A plan of quantization that was not exported: size of the bundle, PSNR of the picture."""

    size_mib: float
    psnr_db: float


class Report(_Figures):
    """Systems measured on one machine. ``front``: predicted plans, of falling size."""

    format_version: int = FORMAT_VERSION
    kind: Literal["report"] = "report"
    title: str
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: str | None = None  # that makes this report again
    machine: Machine
    prompts: tuple[str, ...] = ()
    systems: tuple[System, ...]
    front: tuple[Predicted, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_for_people(path, self.model_dump_json(indent=2) + "\n")


def schema() -> str:
    """The JSON schema of report files, as `report.schema.json` beside this file has it."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Report.model_json_schema()
    return json.dumps(found, indent=1) + "\n"


def read_report(path: Path) -> Report:
    """A report file, or the `report.json` of a folder.

    Raises:
        EdgeflashError: not there, not a report, or of a newer edgeflash.
    """
    path = path / REPORT if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise EdgeflashError(f"{path}: no such report; edgeflash bench writes one") from None
    except OSError as error:
        raise EdgeflashError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise EdgeflashError(f"{path}: no report, not even JSON ({error})") from None
    kind = data.get("kind", "nothing that says so") if isinstance(data, dict) else "a list"
    version = data.get("format_version", 1) if isinstance(data, dict) else 1
    if kind == "report" and version not in range(1, FORMAT_VERSION + 1):
        raise EdgeflashError(
            f"{path}: format {version!r} is not what this edgeflash reads ({FORMAT_VERSION}): "
            "pip install -U edgeflash"
        )
    if kind != "report":
        raise EdgeflashError(f"{path}: no report but {kind}; edgeflash bench writes one")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        raise complaint(error, Report, str(path)) from None


# How figures are told: (field, heading, unit)
FIGURES = (
    ("prompt_accuracy", "prompt accuracy", "%"),
    ("fd", "FD", ""),
    ("latency_ms_p50", "latency p50", "ms"),
    ("latency_ms_p90", "latency p90", "ms"),
    ("images_per_s", "images/s", ""),
    ("first_image_ms", "first image", "ms"),
    ("cold_load_ms", "cold load", "ms"),
    ("warm_load_ms", "warm load", "ms"),
    ("size_mib", "size", "MiB"),
    ("peak_rss_mib", "peak RSS", "MiB"),
)


def told(value: float | None, unit: str = "") -> str:
    """A figure to three digits, as people read it; "-" where there is none.

    >>> told(0.914, "%"), told(1234.56, "ms"), told(0.0421), told(None)
    ('91.4', '1,235', '0.0421', '-')
    """
    if value is None:
        return "-"
    value = value * 100 if unit == "%" else value
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def shown_figures(systems: Sequence[System]) -> list[tuple[str, str, str]]:
    """The figures that at least one of the systems has."""
    return [row for row in FIGURES if any(getattr(s, row[0]) is not None for s in systems)]


@dataclass(frozen=True)
class SystemsTable:
    """The systems for the terminal, one row each; where it is narrow, their names stand above."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.measure import Measurement
        from rich.text import Text

        names = [system.name for system in self.report.systems]
        table = self._table("system", names)
        free = options.update(max_width=10 * options.max_width)
        if Measurement.get(console, free, table).maximum > options.max_width:
            numbers = [str(number) for number in range(1, len(names) + 1)]
            yield Text("".join(f"{a:>2}  {b}\n" for a, b in zip(numbers, names, strict=True)))
            table = self._table("", numbers)
            for column in table.columns:  # rich cuts words rather than let wider columns break
                words = " ".join([str(column.header), *map(str, column.cells)]).split()
                column.width = max(map(len, words))
        yield table
        for system in self.report.systems:
            if (found := system.sustained) is not None:
                first, last = told(found.p50_ms[0]), told(found.p50_ms[-1])
                minutes = f"{system.name}, {found.ended_s[-1] / 60:.2g} min without a pause"
                yield Text(f"{minutes}: {first} ms at first, {last} at last ({found.drift:+.1%})")

    def _table(self, heading: str, names: Sequence[str]) -> Table:
        from rich.table import Table
        from rich.text import Text

        shown = shown_figures(self.report.systems)
        title = Text(self.report.title)
        out = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        out.add_column(heading)
        out.add_column("steps", justify="right")
        for _, figure, unit in shown:
            out.add_column(Text(f"{figure} [{unit}]" if unit else figure), justify="right")
        for name, system in zip(names, self.report.systems, strict=True):
            values = [told(getattr(system, field), unit) for field, _, unit in shown]
            out.add_row(Text(name), str(system.steps), *values)
        return out


if __name__ == "__main__":
    Path(__file__).with_name("report.schema.json").write_text(schema(), encoding="utf-8")
