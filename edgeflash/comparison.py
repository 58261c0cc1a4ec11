"""Two reports side by side: figure by figure, and ranked where their conditions were the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgeflash.bundle import Part
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.report import FIGURES, Conditions, Report, System, told

if TYPE_CHECKING:
    from rich.table import Table

MORE_IS_BETTER = {"prompt_accuracy", "images_per_s"}
FEW_SAMPLES = {"first_image_ms", "cold_load_ms", "warm_load_ms"}  # one, or three: no spread to tell


class Row(Part):
    """One figure of two systems. ``better`` is None where they are not ranked, or equal."""

    system: str
    figure: str
    unit: str
    a: float
    b: float
    ratio: float | None  # b / a
    better: Literal["a", "b"] | None


class Comparison(Part):
    """Two reports, side by side.

    ``differences``: conditions that were not the same; with any, nothing is ranked. ``remarks``:
    what else was not, and moves no time.
    """

    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def compare(a: Report, b: Report) -> Comparison:
    """System by system, paired by name, or whatever their names if each report has just one.

    Conditions are what `Conditions` and `Machine.moving` hold, the steps, and how busy the machine
    was.

    Raises:
        EdgeflashError: no system is in both.
    """
    pairs = _pairs(a, b)
    runtimes = {system.conditions.runtime for pair in pairs for system in pair}
    differences = _machine_differences(a.machine, b.machine, runtimes)
    for first, second in pairs:
        differences += _differences(first, second)
    distinct = tuple(dict.fromkeys(differences))
    rows = [row for pair in pairs for row in _rows(*pair, ranked=not distinct)]
    return Comparison(rows=tuple(rows), differences=distinct, remarks=_remarks(a, b, pairs))


def _pairs(a: Report, b: Report) -> list[tuple[System, System]]:
    if len(a.systems) == len(b.systems) == 1:
        return [(a.systems[0], b.systems[0])]
    named = {system.name: system for system in b.systems}
    pairs = [(system, named[system.name]) for system in a.systems if system.name in named]
    if not pairs:
        lists = [", ".join(s.name for s in report.systems) or "none" for report in (a, b)]
        raise EdgeflashError(f"no system is in both reports (a has: {lists[0]}; b has: {lists[1]})")
    return pairs


def _remarks(a: Report, b: Report, pairs: list[tuple[System, System]]) -> tuple[str, ...]:
    found = ["prompts differ"] if a.prompts != b.prompts else []
    for letter, report, paired in zip("ab", (a, b), zip(*pairs, strict=True), strict=True):
        if alone := [system.name for system in report.systems if system not in paired]:
            found.append(f"only in {letter}: {', '.join(alone)}")
    return tuple(found)


def _machine_differences(a: Machine, b: Machine, runtimes: set[str]) -> list[str]:
    other = b.moving(runtimes)
    pairs = [(name, value, other[name]) for name, value in a.moving(runtimes).items()]
    if a.busier(b):
        pairs.append(("load", a.load_1min, b.load_1min))
    return [f"machine {name}: {one} against {two}" for name, one, two in pairs if one != two]


def _differences(a: System, b: System) -> list[str]:
    found = [f"steps: {a.steps} against {b.steps}"] if a.steps != b.steps else []
    for field in Conditions.model_fields:
        one, other = getattr(a.conditions, field), getattr(b.conditions, field)
        if one != other:
            found.append(f"{field}: {one} against {other}")
    return found


def _rows(a: System, b: System, *, ranked: bool) -> list[Row]:
    rows = []
    for field, heading, unit in FIGURES:
        one, other = getattr(a, field), getattr(b, field)
        if one is None or other is None:
            continue
        less: Literal["a", "b"] = "b" if other < one else "a"
        more: Literal["a", "b"] = "a" if less == "b" else "b"
        better = more if field in MORE_IS_BETTER else less
        rows.append(
            Row(
                system=a.name if a.name == b.name else f"{a.name} / {b.name}",
                figure=heading,
                unit=unit,
                a=one,
                b=other,
                ratio=other / one if one else None,
                better=better if ranked and not _same(field, a, b) else None,
            )
        )
    return rows


def _same(field: str, a: System, b: System) -> bool:
    """Whether two figures are equal, for times as far as their own spread can tell."""
    if field == "images_per_s":  # one over the median
        field = "latency_ms_p50"
    one, other = getattr(a, field), getattr(b, field)
    spread = 0.01 * max(abs(one), abs(other))
    if field in ("latency_ms_p50", "latency_ms_p90"):
        if min(a.conditions.runs, b.conditions.runs) < 3:
            return True
        spread = max(spread, *(s.latency_ms_p90 - s.latency_ms_p50 for s in (a, b)))
    return field in FEW_SAMPLES or bool(abs(one - other) <= spread)


def comparison_table(comparison: Comparison, a: str = "", b: str = "") -> Table:
    """The comparison for the terminal; the caption says why nothing is ranked, if so.

    ``a`` and ``b``: what to call the two reports, beside these letters.
    """
    from rich.markup import escape
    from rich.table import Table

    lines = list(comparison.remarks)
    if comparison.differences:
        lines.append("not ranked, conditions differ: " + "; ".join(comparison.differences))
    caption = escape("\n".join(lines)) or None
    out = Table(caption=caption, caption_justify="left", box=None, pad_edge=False)
    for heading in ("system", "figure"):
        out.add_column(heading)
    for heading in (escape(f"a {a}".strip()), escape(f"b {b}".strip()), "b / a", "better"):
        out.add_column(heading, justify="right")
    for row in comparison.rows:
        one, other = told(row.a, row.unit), told(row.b, row.unit)
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        figure = escape(f"{row.figure} [{row.unit}]") if row.unit else row.figure
        out.add_row(escape(row.system), figure, one, other, ratio, row.better or "")
    return out
