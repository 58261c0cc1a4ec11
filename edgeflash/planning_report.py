"""What `edgeflash plan` tells of what it tried: rows of a report, its notes, a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeflash.choice import Candidate, job_of
from edgeflash.report import IMAGE_DB, Predicted, Report, System, told

if TYPE_CHECKING:
    from rich.table import Table

    from edgeflash.export.front import Point
    from edgeflash.export.sensitivity import Sensitivity
    from edgeflash.planning import Exported

MIB = 2**20
PREDICTED_DB, PREDICTED_MIB = "predicted image dB", "predicted MiB"
NOTES = (
    "Predicted: to first order, from one way there and back through the student's own steps, the "
    "errors of layers taken to be independent; a mean over all prompts.",
    "image dB: of the exported bundle on its runtime, against the student in torch; the worst "
    "prompt of the parity ladder, L4.",
)


def figures_of(found: Candidate) -> str:
    """In a line, those that it has."""
    pairs = ((found.mib, "MiB"), (found.latency_ms, "ms"), (found.image_db, "dB"))
    return ", ".join(f"{told(value)} {unit}" for value, unit in pairs if value is not None)


def notes_on(
    kept: Exported, found: Sensitivity, done: Sequence[Exported], unproven: str
) -> tuple[str, ...]:
    """Of a report: what was kept, and what of the others has no row.

    ``unproven``: why nothing was run here; "" where it was.
    """
    others = [each.candidate for each in done if each.tried.why or not each.tried.measured]
    lines = [f"{each.name}: {each.why or figures_of(each)}" for each in others]
    lines += [unproven] if unproven else []
    return f"kept: {kept.tried.name}", most_sensitive(found), *NOTES, *lines


def most_sensitive(found: Sensitivity, count: int = 5) -> str:
    """The layers that lose most by the coarsest word they can get."""
    losses = {f"{each.name} ({each.words[-1]}": found.psnr_db(each) for each in found.layers}
    worst = sorted(losses, key=lambda name: losses[name])[:count]
    lines = ", ".join(f"{name}: {losses[name]:.1f} dB)" for name in worst)
    return f"most sensitive, each quantized alone: {lines}"


def systems_of(done: Sequence[Exported]) -> tuple[System, ...]:
    """Those that were measured."""
    return tuple(_system(each) for each in done if each.tried.measured)


def _system(exported: Exported) -> System:
    from edgeflash.runtimes.bench import system_of

    tried, candidate = exported.tried, exported.candidate
    assert tried.bundle is not None
    quickest = min(tried.measured, key=lambda each: sorted(each.runs_ms)[len(each.runs_ms) // 2])
    system = system_of(tried.name, tried.bundle, job_of(tried.bundle), quickest)
    extra: dict[str, float | str] = {}
    if candidate.image_db is not None:
        extra[IMAGE_DB] = round(candidate.image_db, 2)
    if point := exported.point:
        extra |= {PREDICTED_DB: round(point.psnr_db, 2), PREDICTED_MIB: round(point.mib, 2)}
    return system.model_copy(update={"extra": extra})


def predicted(points: Sequence[Point], done: Sequence[Exported]) -> tuple[Predicted, ...]:
    """The front, in bytes of whole bundles; what they hold beside weights the last one told."""
    pairs = [(e.tried.bundle.bytes, e.point.bytes) for e in done if e.tried.bundle and e.point]
    beside = pairs[-1][0] - pairs[-1][1] if pairs else 0.0
    return tuple(
        Predicted(size_mib=round((p.bytes + beside) / MIB, 4), psnr_db=round(p.psnr_db, 3))
        for p in points[1:]
    )


def plans_table(report: Report) -> Table:
    """For the terminal: predicted against real; where nothing was run, the notes."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=escape(report.title), title_justify="left", box=None, pad_edge=False)
    out.add_column("")
    for heading in ("MiB", "ms", IMAGE_DB, PREDICTED_DB):
        out.add_column(heading, justify="right")
    for system in report.systems:
        extra = [system.extra.get(name) for name in (IMAGE_DB, PREDICTED_DB)]
        figures = [told(float(v)) if v is not None else "-" for v in extra]
        out.add_row(
            escape(system.name), told(system.size_mib), told(system.latency_ms_p50), *figures
        )
    if not report.systems:
        out.caption = escape("\n".join(report.notes))
    return out
