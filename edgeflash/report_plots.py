"""Which plots a report shows: latency, quality against time, stages, size, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from edgeflash.bundle import DENOISERS
from edgeflash.report import IMAGE_DB, Predicted, System, told
from edgeflash.report_svg import COLOURS, Bar, Dot, Line, Part, bars, lines, scatter, shade


def plots(systems: Sequence[System], front: Sequence[Predicted] = ()) -> str:
    """The plots for which there are figures, each in a card of the page's grid."""
    if not systems:
        return ""
    cards = [_front(systems, front), _latency(systems), _quality(systems)]
    cards += [_stages(systems), _sizes(systems)]
    cards += [_memory(systems), _sustained(systems)]
    return f"<section class='plots'>{''.join(cards)}</section>"


def _card(heading: str, hint: str, plot: str) -> str:
    return f"<article><h2>{heading}</h2><p class='hint'>{hint}</p>{plot}</article>"


def _legend(rows: Iterable[Bar]) -> str:
    """The names of the bars' parts, in the shades they have."""
    names = dict.fromkeys(part.name for bar in rows for part in bar.parts)
    return "".join(
        f"<s style='opacity:{shade(j):.2f}'></s>{escape(name)}" for j, name in enumerate(names)
    )


def _front(systems: Sequence[System], front: Sequence[Predicted]) -> str:
    """Plans of quantization: the predicted ones as a line, those that were exported as dots."""
    found = [(s.name, s.size_mib, s.extra.get(IMAGE_DB), i) for i, s in enumerate(systems)]
    dots = [Dot(name, mib, db, i) for name, mib, db, i in found if isinstance(db, float)]
    if not front or not dots:
        return ""
    line = [(point.size_mib, point.psnr_db) for point in front]
    plot = scatter("image PSNR against size", "bundle, MiB", dots, line=line)
    return _card("Quality against size", "image PSNR, dB; line: predicted, dots: exported", plot)


def _latency(systems: Sequence[System]) -> str:
    rows = []
    for i, s in enumerate(systems):
        text = f"{told(s.latency_ms_p50)} ms"
        tip = f"{s.name}: p50 {text}, p90 {told(s.latency_ms_p90)} ms"
        part = Part("median", s.latency_ms_p50, tip)
        rows.append(Bar(s.name, (part,), text, i, s.latency_ms_p90))
    batches = {system.conditions.batch for system in systems}
    of = "an image" if batches == {1} else "a batch"
    return _card("Latency", f"{of}, median; the thin line reaches to p90", bars("latency", rows))


def _quality(systems: Sequence[System]) -> str:
    for field, heading, percent, better in (
        ("prompt_accuracy", "Prompt accuracy", True, "up"),
        ("fd", "FD", False, "down"),
    ):
        dots = [
            Dot(s.name, s.latency_ms_p50, getattr(s, field), i)
            for i, s in enumerate(systems)
            if getattr(s, field) is not None
        ]
        if len(dots) > 1:
            plot = scatter(f"{heading} against latency", "latency, ms", dots, percent=percent)
            return _card("Quality against time", f"{heading}; {better} and left is better", plot)
    return ""


def _stages(systems: Sequence[System]) -> str:
    rows = []
    for i, system in enumerate(systems):
        calls = dict.fromkeys(DENOISERS, system.steps) | system.calls
        calls = {stage: calls.get(stage, 1) for stage in system.stages}
        times_ms = {stage: t.p50_ms * calls[stage] for stage, t in system.stages.items()}
        total = sum(times_ms.values())
        if not total:
            continue
        parts = []
        for stage, ms in times_ms.items():
            many = f" ({calls[stage]} steps)" if calls[stage] > 1 else ""
            parts.append(Part(stage, ms / total, f"{system.name}, {stage}{many}: {told(ms)} ms"))
        text = " / ".join(f"{part.value:.0%}" for part in parts)
        rows.append(Bar(system.name, tuple(parts), text, i))
    if not rows:
        return ""
    return _card("Where the time goes", f"share of{_legend(rows)}", bars("time by stage", rows))


def _sizes(systems: Sequence[System]) -> str:
    rows = []
    for i, system in enumerate(systems):
        sizes = dict(system.sizes_mib)
        sizes["other files" if sizes else "all"] = system.size_mib - sum(sizes.values())
        parts = tuple(
            Part(what, max(mib, 0), f"{system.name}, {what}: {told(mib)} MiB")
            for what, mib in sizes.items()
        )
        rows.append(Bar(system.name, parts, f"{told(system.size_mib)} MiB", i))
    many = any(len(bar.parts) > 1 for bar in rows)
    return _card("Size", f"on disk{_legend(rows) if many else ''}", bars("size on disk", rows))


def _memory(systems: Sequence[System]) -> str:
    rows = []
    for i, s in enumerate(systems):
        if s.peak_rss_mib is not None:
            text = f"{told(s.peak_rss_mib)} MiB"
            rows.append(Bar(s.name, (Part("peak", s.peak_rss_mib, f"{s.name}: {text}"),), text, i))
    if not rows:
        return ""
    return _card("Memory", "peak resident size of the process", bars("peak memory", rows))


def _sustained(systems: Sequence[System]) -> str:
    rows, names = [], []
    for i, system in enumerate(systems):
        if (found := system.sustained) is None:
            continue
        minutes = [0.0, *(second / 60 for second in found.ended_s)]
        points = zip(minutes, [found.p50_ms[0], *found.p50_ms], strict=True)
        rows.append(Line(system.name, tuple(points), i))
        mark = f"<s style='background:var(--c{i % COLOURS})'></s>"
        names.append(f"{mark}{escape(system.name)}, {found.drift:+.1%}")
    if not rows:
        return ""
    hint = f"median of each span, ms; by how much the last is slower:{''.join(names)}"
    return _card("Without a pause", hint, lines("sustained latency", "minutes", rows))
