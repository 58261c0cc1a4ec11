"""A report as one page to look at: pictures, plots, figures. No network, no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edgeflash.disk import write_for_people
from edgeflash.errors import EdgeflashError
from edgeflash.report import FIGURES, Report, System, shown_figures, told
from edgeflash.report_plots import plots
from edgeflash.report_svg import COLOURS


@dataclass(frozen=True)
class Cell:
    """One picture of the grid: a PNG, as file or bytes, and a few words below it."""

    png: Path | bytes
    caption: str = ""


@dataclass(frozen=True)
class Grid:
    """Pictures side by side: rows are prompts, columns are systems.

    Attributes:
        prompts: one a row.
        columns: heading -> one cell a prompt.
    """

    prompts: tuple[str, ...]
    columns: Mapping[str, Sequence[Cell]]


def write_html(report: Report, path: Path, grid: Grid | None = None) -> None:
    """Writes the page, whole or not at all; pictures go into it.

    Args:
        report: the figures.
        path: the page; the pictures that the report names are looked for beside it.
        grid: pictures to show instead of those.

    Raises:
        EdgeflashError: a picture is missing.
    """
    grid = grid or _own_grid(report, path.parent)
    parts = [
        _head(report),
        _tiles(report),
        _pictures(grid),
        plots(report.systems, report.front),
        _table(report),
    ]
    body = "\n".join(part for part in [*parts, _small_print(report)] if part)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    write_for_people(path, page)


def _own_grid(report: Report, folder: Path) -> Grid:
    drawn = {
        system.name: [Cell(folder / picture) for picture in system.images]
        for system in report.systems
        if system.images
    }
    return Grid(report.prompts, drawn)


def _head(report: Report) -> str:
    machine = report.machine
    where = [machine.cpu, f"{machine.cores} cores", *([machine.gpu] if machine.gpu else [])]
    line = " · ".join([*where, report.created.replace("T", " ").replace("+00:00", " UTC")])
    return f"<header><h1>{escape(report.title)}</h1><p>{escape(line)}</p></header>"


def _tiles(report: Report) -> str:
    """The headline figures, where there is one system; several speak through the plots."""
    if len(report.systems) != 1:
        return ""
    system = report.systems[0]
    tiles = []
    for field, heading, unit in shown_figures(report.systems):
        if field not in TILES:
            continue
        value = told(getattr(system, field), unit)
        tiles.append(
            f"<div><b>{value}<i>{escape(unit)}</i></b><span>{escape(heading)}</span></div>"
        )
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _pictures(grid: Grid) -> str:
    if not grid.columns:
        return ""
    if len(grid.columns) == 1:
        (column,) = grid.columns.values()
        cells = [Cell(c.png, p) for c, p in zip(column, grid.prompts, strict=True)]
        row = "".join(_figure(cell, cell.caption) for cell in cells)
        return f"<section><h2>Pictures</h2><div class='row'>{row}</div></section>"
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in grid.columns)
    rows = []
    for prompt, *cells in zip(grid.prompts, *grid.columns.values(), strict=True):
        row = "".join(f"<td>{_figure(cell, prompt)}</td>" for cell in cells)
        rows.append(f"<tr><th scope='row'>{escape(prompt)}</th>{row}</tr>")
    return (
        "<section><h2>Pictures</h2><p class='hint'>The same prompt and seed in every row.</p>"
        f"<div class='scroll'><table class='pictures'><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _figure(cell: Cell, prompt: str) -> str:
    data = cell.png if isinstance(cell.png, bytes) else _read(cell.png)
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    width = int.from_bytes(data[16:20], "big")  # PNG: the header chunk begins with the width
    kind = ' class="pixels"' if width <= 128 else ""
    caption = f"<figcaption>{escape(cell.caption)}</figcaption>" if cell.caption else ""
    return f'<figure><img{kind} src="{source}" alt="{escape(prompt)}">{caption}</figure>'


def _read(png: Path) -> bytes:
    try:
        return png.read_bytes()
    except FileNotFoundError:
        raise EdgeflashError(f"{png}: the report names this picture, but it is gone") from None


def _table(report: Report) -> str:
    shown = shown_figures(report.systems)
    extra = list(dict.fromkeys(key for system in report.systems for key in system.extra))
    units = [f"{heading}<i>{escape(unit)}</i>" for _, heading, unit in shown]
    heads = ["system", "steps", *units, *map(escape, extra)]
    rows = []
    for i, system in enumerate(report.systems):
        cells = [str(system.steps)]
        cells += [told(getattr(system, field), unit) for field, _, unit in shown]
        cells += [_plain(system.extra.get(key)) for key in extra]
        name = f"<th scope='row'><s class='c{i % COLOURS}'></s>{escape(system.name)}</th>"
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th scope='col'>{text}</th>" for text in heads)
    return (
        "<section><h2>Figures</h2><div class='scroll'><table class='figures'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _plain(value: float | str | None) -> str:
    return "-" if value is None else escape(value if isinstance(value, str) else f"{value:,.4g}")


def _small_print(report: Report) -> str:
    machine = report.machine.model_dump(exclude={"packages"}, exclude_none=True)
    machine |= report.machine.packages
    columns = [_list("Machine", machine.items())]
    groups: dict[str, list[System]] = {}
    for system in report.systems:
        groups.setdefault(system.conditions.model_dump_json(), []).append(system)
    for systems in groups.values():
        conditions = systems[0].conditions
        items = conditions.model_dump(exclude={"options"}) | conditions.options
        names = ": " + ", ".join(system.name for system in systems) if len(groups) > 1 else ""
        columns.append(_list(f"Conditions{names}", items.items()))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    return f"<footer><div class='lists'>{''.join(columns)}</div><ul>{notes}</ul>{command}</footer>"


def _list(heading: str, items: Iterable[tuple[str, object]]) -> str:
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in items
    )
    return f"<div><h2>{escape(heading)}</h2><dl>{rows}</dl></div>"


TILES = {name for name, *_ in FIGURES} - {"latency_ms_p90", "cold_load_ms", "warm_load_ms"}

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d1e20; --soft: #686b70;
  --line: #e4e4e1; --c0: #3b6fb6; --c1: #d1702a; --c2: #2f8f6b; --c3: #a8508f; --c4: #8a7a1f;
  --c5: #6a6f78; --c6: #2d8fa5; --c7: #b8434a; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1c1d20; --ink: #e9e9e7;
  --soft: #9b9ea4; --line: #303237; --c0: #79a6e3; --c1: #ee9a5b; --c2: #67c39d; --c3: #d68cc0;
  --c4: #cdbb55; --c5: #a2a7b0; --c6: #62bfd3; --c7: #e8858a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 48px 24px 64px; }
header { margin-bottom: 36px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; font-weight: 650; margin: 0 0 6px;
  text-wrap: balance; }
h2 { font-size: 15px; font-weight: 650; margin: 0; }
header p, .hint { color: var(--soft); margin: 0; }
.hint { font-size: 13px; margin-bottom: 16px; }
section { margin-bottom: 40px; }
i { font-style: normal; font-weight: 400; color: var(--soft); margin-left: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tiles div, article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles div { padding: 16px 18px; }
.tiles b { display: block; font-size: 25px; line-height: 1.25; font-weight: 600;
  letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.tiles b i { font-size: 14px; }
.tiles span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 16px; align-items: start; }
article { padding: 20px 22px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; }
svg .value { font-variant-numeric: tabular-nums; fill: var(--soft); }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--line); fill: none; } svg .whisker { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 2; }
.c0 { fill: var(--c0); background: var(--c0); } .c1 { fill: var(--c1); background: var(--c1); }
.c2 { fill: var(--c2); background: var(--c2); } .c3 { fill: var(--c3); background: var(--c3); }
.c4 { fill: var(--c4); background: var(--c4); } .c5 { fill: var(--c5); background: var(--c5); }
.c6 { fill: var(--c6); background: var(--c6); } .c7 { fill: var(--c7); background: var(--c7); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.figures { width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; margin-top: 12px; }
.figures th, .figures td { padding: 9px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.figures th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
.figures thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; }
.figures s { display: inline-block; width: 9px; height: 9px; border-radius: 3px;
  margin-right: 9px; }
.row { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px; }
.row figure { width: min-content; }
.hint s { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 12px;
  background: var(--ink); }
.pictures { margin-left: -6px; } /* a right one would make it wider than what it scrolls in */
.pictures th { font-weight: 500; font-size: 13px; text-align: left; vertical-align: bottom;
  padding: 0 6px 8px; }
.pictures tbody th { width: 190px; min-width: 130px; vertical-align: middle; color: var(--soft);
  font-weight: 400; padding: 6px 14px 6px 6px; }
.pictures td { padding: 6px; }
figure { margin: 0; }
img { display: block; max-width: 208px; border-radius: 6px; }
.pictures img { width: 100%; min-width: 96px; }
img.pixels { width: 128px; image-rendering: pixelated; }
figcaption { font-size: 12px; color: var(--soft); margin-top: 4px; }
footer { border-top: 1px solid var(--line); padding-top: 28px; font-size: 13px;
  color: var(--soft); }
footer h2 { font-size: 13px; color: var(--ink); margin-bottom: 8px; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 28px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
footer ul { padding-left: 18px; margin: 24px 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; color: var(--ink); }
"""
