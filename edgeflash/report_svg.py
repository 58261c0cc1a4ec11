"""The plots of a report, as inline SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 520  # of every plot, in px of its own coordinate system
LETTER = 6.8  # px, of a letter on average
COLOURS = 8  # the style sheet has .c0 to .c7


@dataclass(frozen=True)
class Part:
    """A stretch of a bar; ``tip`` shows under the pointer."""

    name: str
    value: float
    tip: str


@dataclass(frozen=True)
class Bar:
    """One bar: its parts end to end, a text at its end, a whisker beyond it, up to p90 say."""

    label: str
    parts: tuple[Part, ...]
    text: str
    colour: int
    whisker: float | None = None

    @property
    def value(self) -> float:
        return sum(part.value for part in self.parts)


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot."""

    label: str
    x: float
    y: float
    colour: int


@dataclass(frozen=True)
class Line:
    """A line through points of ascending x."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int


def bars(heading: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from zero, one below the other, each with its label above it."""
    pitch, thick = 46, 14  # px: from bar to bar, of a bar
    room = 10 + LETTER * max(len(bar.text) for bar in rows)  # for the text at its end
    longest = max([bar.value for bar in rows] + [bar.whisker or 0 for bar in rows]) or 1
    px = (WIDTH - room) / longest
    body = []
    for i, bar in enumerate(rows):
        y = i * pitch + 22
        body.append(f'<text class="label" x="0" y="{y - 7}">{escape(bar.label)}</text>')
        body += _parts(bar, y, thick, px)
        end = bar.value * px
        if bar.whisker is not None and bar.whisker > bar.value:
            tip, middle = bar.whisker * px, y + thick / 2
            body.append(
                f'<path class="whisker" d="M{end:.1f} {middle}H{tip:.1f}'
                f'M{tip:.1f} {middle - 4}v8"/>'
            )
            end = tip
        body.append(
            f'<text class="value" x="{end + 7:.1f}" y="{y + 11.5}">{escape(bar.text)}</text>'
        )
    return _svg(heading, len(rows) * pitch, body)


def _parts(bar: Bar, y: float, thick: float, px: float) -> list[str]:
    drawn, x = [], 0.0
    for j, part in enumerate(bar.parts):
        width = max(part.value * px - (1 if j < len(bar.parts) - 1 else 0), 0.75)
        drawn.append(
            f'<rect class="c{bar.colour % COLOURS}" x="{x:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{thick}" rx="2" fill-opacity="{shade(j):.2f}">'
            f"<title>{escape(part.tip)}</title></rect>"
        )
        x += part.value * px
    return drawn


def shade(j: int) -> float:
    """Opacity of the j-th part of a bar.

    >>> [round(shade(j), 2) for j in range(3)]
    [1.0, 0.55, 0.3]
    """
    return float(0.55**j)


def scatter(
    heading: str,
    x_label: str,
    dots: Sequence[Dot],
    *,
    percent: bool = False,
    line: Sequence[tuple[float, float]] = (),
) -> str:
    """Points over a logarithmic x axis, named where they stand.

    ``percent``: y runs from 0 to 100 %; else from 0 to a little above the largest. ``line``: drawn
    beneath them.
    """
    points = [*((dot.x, dot.y) for dot in dots), *line]
    y_ticks = [0, 0.25, 0.5, 0.75, 1] if percent else _ticks([y for _, y in points])
    frame = Frame(_log_ticks([x for x, _ in points]), y_ticks, 320, logarithmic=True)
    body = frame.drawn(x_label, percent=percent)
    if line:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (frame.at(*point) for point in line))
        body.append(f'<path class="whisker" d="M{path}"/>')
    body += _named([(dot, *frame.at(dot.x, dot.y)) for dot in dots], frame.floor)
    return _svg(heading, frame.height, body)


def lines(heading: str, x_label: str, rows: Sequence[Line]) -> str:
    """Lines from x = 0 on, over y from 0 to a little above the largest."""
    points = [point for row in rows for point in row.points]
    frame = Frame(_ticks([x for x, _ in points]), _ticks([y for _, y in points]), 240)
    body = frame.drawn(x_label)
    for row in rows:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (frame.at(*point) for point in row.points))
        body.append(
            f'<path class="line" style="stroke:var(--c{row.colour % COLOURS})" d="M{path}">'
            f"<title>{escape(row.label)}</title></path>"
        )
    return _svg(heading, frame.height, body)


@dataclass(frozen=True)
class Frame:
    """Axes: the ticks of both, from end to end, and the height of it all in px."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    height: float
    logarithmic: bool = False  # x

    left, right, top, bottom = 44, 16, 14, 46  # px around the axes

    @property
    def floor(self) -> float:
        """The lowest y of the plot, in px."""
        return self.height - self.bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in px."""
        scaled = math.log if self.logarithmic else float
        low, high = scaled(self.x_ticks[0]), scaled(self.x_ticks[-1])
        across = (scaled(x) - low) / (high - low) * (WIDTH - self.left - self.right)
        return self.left + across, self.floor - y / self.y_ticks[-1] * (self.floor - self.top)

    def drawn(self, x_label: str, *, percent: bool = False) -> list[str]:
        """Grid, ticks and the name of x."""
        body = []
        for y in self.y_ticks:
            _, py = self.at(self.x_ticks[0], y)
            body.append(f'<path class="grid" d="M{self.left} {py:.1f}H{WIDTH - self.right}"/>')
            told = f"{y * 100:.0f} %" if percent else f"{y:g}"
            place = f'x="{self.left - 7}" y="{py + 4:.1f}"'
            body.append(f'<text class="tick end" {place}>{told}</text>')
        for x in self.x_ticks:
            px, _ = self.at(x, 0)
            body.append(f'<path class="grid" d="M{px:.1f} {self.top}V{self.floor}"/>')
            place = f'x="{px:.1f}" y="{self.floor + 17}"'
            body.append(f'<text class="tick mid" {place}>{x:g}</text>')
        place = f'x="{WIDTH / 2}" y="{self.height - 8}"'
        body.append(f'<text class="tick mid" {place}>{escape(x_label)}</text>')
        return body


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _named(points: list[tuple[Dot, float, float]], floor: float) -> list[str]:
    """The points and their names, each name where it covers no point and no other name.

    A name that finds no room beside its point stands apart, on a leader. ``floor``: lowest y.
    """
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    drawn = []
    for dot, x, y in points:
        places = _places(x, y, LETTER * len(dot.label))
        boxes = [b for b in places if min(b) >= 0 and b[2] <= WIDTH and b[3] <= floor]
        box = next((b for b in boxes if not _hits(b, taken)), boxes[0])
        taken.append(box)
        left, top, right, bottom = box
        if not top - 12 < y < bottom + 12:
            foot, end = min(max(x, left), right), top if top > y else bottom
            drawn.append(f'<path class="whisker" d="M{x:.1f} {y:.1f}L{foot:.1f} {end:.1f}"/>')
        colour = f"c{dot.colour % COLOURS}"
        drawn.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
        at = f'x="{left:.1f}" y="{bottom - 3:.1f}"'
        drawn.append(f'<text class="label" {at}>{escape(dot.label)}</text>')
    return drawn


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Where the name of a point may stand: beside it, then ever further above and below."""
    for away in range(0, 240, 15):
        for line in (y - away, y + away):
            for left in (x + 10, x - 10 - width, x - width / 2):
                yield left, line - 7, left + width, line + 7


def _hits(box: Box, others: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    return any(left < r and a < right and top < b and t < bottom for a, t, r, b in others)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1-2-5 ticks that enclose all values, at least two.

    >>> _log_ticks([3.0, 40.0])
    [2.0, 5.0, 10.0, 20.0, 50.0]
    """
    steps = [m * 10.0**e for e in range(-4, 8) for m in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= min(values) or i == 0)
    last = min(i for i, step in enumerate(steps) if step >= max(values) or i == len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _ticks(values: Sequence[float]) -> list[float]:
    """Even ticks from 0 on that enclose all values, which are not negative."""
    largest = max(values) or 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    step = next(unit * m for m in (0.2, 0.5, 1, 2) if largest <= 5.5 * unit * m)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def _svg(heading: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(heading)}">'
        + "".join(body)
        + "</svg>"
    )
