"""The page of a report: its plots, its pictures, and that it stands alone."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import png, report_of, system

from edgeflash import report_svg
from edgeflash.errors import EdgeflashError
from edgeflash.report import Percentiles, Report
from edgeflash.report_html import Cell, Grid, write_html
from edgeflash.report_svg import Bar, Dot, Line, Part, bars, lines, scatter
from edgeflash.sheet import GAP, HEADER, MARGIN, SIDE, contact_sheet


class Page(HTMLParser):
    """Checks that tags are balanced; collects attributes, texts and plots."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, self.open
        plots = re.findall(r"<svg.*?</svg>", self.source, re.S)
        self.plots = {p.get("aria-label"): p for p in map(ElementTree.fromstring, plots)}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def pictures(self) -> list[bytes]:
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        return [
            base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources
        ]


def several() -> Report:
    stages = {name: Percentiles(p50_ms=5, p90_ms=6) for name in ("text_encoder", "unet")}
    fast = {"latency_ms_p50": 6.0, "latency_ms_p90": 7.0, "prompt_accuracy": 0.4, "fd": 12.0}
    slow = {"prompt_accuracy": 0.9, "fd": 3.0, "peak_rss_mib": 300.0, "stages": stages}
    return report_of(
        system("slow", **slow, sizes_mib={"unet": 9.0}),
        system("fast", steps=1, **fast),
        prompts=("a red star", "a <b>blue</b> ring"),
        command="make demo",
        notes=("said once",),
    )


def test_the_page_stands_alone(tmp_path: Path) -> None:
    cells = {name: [Cell(png(i), "5 of 5"), Cell(png(i + 9))] for i, name in enumerate("ab")}
    write_html(several(), tmp_path / "report.html", Grid(("p", "q"), cells))
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert all(not key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.pictures == [png(0), png(1), png(9), png(10)]  # row by row: prompt, then system
    assert (
        page.texts.count("5 of 5") == 2 and "said once" in page.texts and "make demo" in page.texts
    )
    assert [t for t in page.texts if t in "abpq"] == ["a", "b", "p", "q"]
    assert "prefers-color-scheme: dark" in page.source


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    bad = "\"'><script>alert('1')</script>&\""
    path = tmp_path / "report.html"
    hostile = system(bad, images=("0.png",), extra={bad: bad})
    (tmp_path / "0.png").write_bytes(png())
    many = report_of(
        hostile, system(bad + "2"), title=bad, prompts=(bad,), notes=(bad,), command=bad
    )
    write_html(many, path)
    page = Page(path)
    assert "script" not in {tag for tag, _ in page.tags} and "script" in page.source
    assert sum(text == bad for text in page.texts) >= 6


def test_the_page_finds_the_report_s_own_pictures(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(png(7, side=256))
    one = report_of(system(images=("images/0.png",)), prompts=("a red star",))
    write_html(one, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.pictures == [png(7, side=256)] and "pixels" not in page.open
    assert 'class="pixels"' not in page.source  # only small pictures are enlarged with hard edges
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(EdgeflashError, match=r"0\.png: the report names this picture, but it is"):
        write_html(one, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_plots_show_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(report_of(system()), path)
    assert set(Page(path).plots) == {"latency", "size on disk"}
    write_html(several(), path)
    quality = "Prompt accuracy against latency"
    every = {"latency", "size on disk", "peak memory", "time by stage", quality}
    assert set(Page(path).plots) == every
    no_accuracy = [s.model_copy(update={"prompt_accuracy": None}) for s in several().systems]
    write_html(report_of(*no_accuracy), path)
    assert "FD against latency" in Page(path).plots


def test_the_steps_of_the_denoiser_are_added_up(tmp_path: Path) -> None:
    write_html(several(), tmp_path / "report.html")
    plot = Page(tmp_path / "report.html").plots["time by stage"]
    (x, first), (next_x, second) = [
        (float(rect.get("x", 0)), float(rect.get("width", 0))) for rect in plot.iter("rect")
    ]
    assert second / first == pytest.approx(4, rel=0.02)  # 4 steps of 5 ms after 5 ms
    assert x == 0 and first < next_x < first + 2


def test_bars_are_in_proportion() -> None:
    rows = [Bar(str(v), (Part("all", v, ""),), "text", 0, whisker=w) for v, w in ((10, 20), (5, 5))]
    plot = ElementTree.fromstring(bars("plot", rows))
    first, second = [float(rect.get("width", 0)) for rect in plot.iter("rect")]
    assert first / second == pytest.approx(2, rel=0.01) and first < report_svg.WIDTH / 2
    (whisker,) = [p for p in plot.iter("path") if p.get("class") == "whisker"]
    (end,) = re.findall(r"H([\d.]+)", whisker.get("d", ""))
    assert float(end) == pytest.approx(2 * first, abs=0.2)


def test_points_lie_where_their_figures_say() -> None:
    dots = [Dot("a", 10, 0.0, 0), Dot("b", 100, 1.0, 1), Dot("c", 1000, 0.5, 2)]
    plot = ElementTree.fromstring(scatter("plot", "ms", dots, percent=True))
    x, y = ([float(c.get(key, 0)) for c in plot.iter("circle")] for key in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # logarithmic
    assert y[0] - y[2] == pytest.approx(y[2] - y[1], abs=0.2) and y[1] < y[0]


def test_lines_run_where_their_figures_say() -> None:
    rows = [Line("a", ((0, 100), (1, 100), (2, 200)), 0)]
    plot = ElementTree.fromstring(lines("plot", "minutes", rows))
    (line,) = [p for p in plot.iter("path") if p.get("class") == "line"]
    x, y = zip(*re.findall(r"([\d.]+) ([\d.]+)", line.get("d", "")), strict=True)
    across, up = [[float(value) for value in values] for values in (x, y)]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    floor = report_svg.Frame([0, 1], [0, 1], 240).floor
    assert up[0] == up[1] and floor - up[2] == pytest.approx(2 * (floor - up[0]), abs=0.2)


def test_names_of_near_points_do_not_cover_each_other() -> None:
    dots = [Dot(f"shipped student, {i}", 12 + i // 2, 0.35 + 0.003 * i, i) for i in range(8)]
    plot = ElementTree.fromstring(scatter("plot", "ms", dots, percent=True))
    labels = [t for t in plot.iter("text") if t.get("class") == "label"]
    places = [(float(t.get("x", 0)), float(t.get("y", 0))) for t in labels]
    width = report_svg.LETTER * len("shipped student, 0")
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= report_svg.WIDTH - width
        for other_x, other_y in places[:i]:
            assert abs(x - other_x) >= width or abs(y - other_y) >= 12
    leaders = [p for p in plot.iter("path") if p.get("class") == "whisker"]
    assert leaders  # eight names of this length do not all stand beside their points


@pytest.mark.parametrize("largest", [0.0, 0.3, 1.0, 7.9, 21, 99.9, 1234])
def test_the_axis_holds_the_largest_figure(largest: float) -> None:
    ticks = report_svg._ticks([largest, largest / 3])
    assert ticks[0] == 0 and ticks[-1] >= largest and 2 <= len(ticks) <= 8


def test_a_contact_sheet_has_a_row_a_system_and_a_column_a_prompt(tmp_path: Path) -> None:
    colours = {"teacher": [(255, 0, 0), (0, 255, 0)], "student": [(0, 0, 255), (9, 9, 9)]}
    rows = {
        name: [Image.new("RGB", (192, 192), colour) for colour in pair]
        for name, pair in colours.items()
    }
    contact_sheet(rows, ["a red star", "a green ring"], tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    pitch, left, top = SIDE + GAP, MARGIN + SIDE // 2, HEADER + SIDE // 2
    for row, pair in enumerate(colours.values()):
        centres = [(left + pitch * column, top + pitch * row) for column in range(2)]
        assert [sheet.getpixel(centre) for centre in centres] == pair
