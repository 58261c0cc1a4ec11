"""What the benchmark of methods found: one entry a training, and the table of them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from edgeflash.disk import read_json, write_for_people
from edgeflash.machine import Machine
from edgeflash.png import save_png
from edgeflash.sheet import contact_sheet

COUNTS = (1, 2, 4)  # network calls a picture
TEACHER_STEPS = 25
SHOWN = 8  # prompts in the picture
RESULTS, SHEET = "RESULTS.md", "RESULTS.png"


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Drawn(_Figures):
    """How pictures of so many network calls are.

    ``diversity``: mean distance, in the judge's features, of pictures of one caption.
    """

    prompt_accuracy: float
    one_object: float
    two_objects: float
    fd: float
    diversity: float


class Entry(_Figures):
    """One training. What was not trained here has no recipe and no costs.

    ``asked``: all that it went by but its seed. ``cached_seconds``: what its data took before the
    first step, such as a teacher's drawings, even where another method had them made first.
    """

    name: str
    seed: int = 0
    drawn: dict[int, Drawn]  # by network calls a picture
    asked: dict[str, Any]
    recipe_sha256: str | None = None
    steps: int | None = None
    seconds: float | None = None
    cached_seconds: float | None = None
    samples_per_s: float | None = None
    peak_rss_mib: float | None = None
    machine: Machine

    @property
    def label(self) -> str:
        return labelled(self.name, self.seed)


def labelled(name: str, seed: int) -> str:
    """What a training is called: the first one of a method like the method."""
    return f"{name}, seed {seed}" if seed else name


def slug(label: str) -> str:
    return label.replace(",", "").replace(" ", "-")


def result(out: Path, label: str) -> Path:
    return out / "results" / f"{slug(label)}.json"


def results(out: Path) -> list[Path]:
    return sorted((out / "results").glob("*.json"))


def keep(out: Path, entry: Entry) -> None:
    told = entry.model_dump_json(indent=1, exclude_none=True) + "\n"
    write_for_people(result(out, entry.label), told)


def write_results(out: Path, prompts: Sequence[str]) -> list[Entry]:
    """Writes table and picture of all results there are; what was not trained here comes first.

    ``prompts``: of the pictures.
    """
    found = [Entry.model_validate(read_json(path)) for path in results(out)]
    entries = sorted(found, key=lambda e: e.seed)
    groups = [[e for e in entries if e.name == name] for name in {e.name for e in entries}]
    groups.sort(key=lambda g: (g[0].steps is not None, g[0].name != "teacher", -_best(g)))
    rows = [_row(f"{g[0].name}, 25 steps", g, (25,)) for g in groups if 25 in g[0].drawn]
    rows += [_row(g[0].name, g, COUNTS) for g in groups]
    heads = ["| " + " | ".join(COLUMNS + COSTS) + " |"]
    heads += ["|---" + "|--:" * (len(COLUMNS + COSTS) - 1) + "|"]
    below = ["", _machines(entries), "", f"![Pictures of the same prompts by each]({SHEET})"]
    write_for_people(out / RESULTS, "\n".join([HEAD, *heads, *rows, *below]) + "\n")
    shown = {g[0].name: max(count for count in COUNTS if count in g[0].drawn) for g in groups}
    sheet = {
        f"{name}, {count} step{'s' * (count > 1)}": _apart(result(out, name).with_suffix(".png"))
        for name, count in shown.items()
    }
    contact_sheet(sheet, prompts[:SHOWN], out / SHEET)
    return [entry for group in groups for entry in group]


def strip(pictures: Sequence[np.ndarray], path: Path) -> None:
    """Writes square pictures uint8 [h, h, 3], side by side, as a PNG."""
    save_png(Image.fromarray(np.concatenate(pictures, 1)), path)


def _apart(path: Path) -> list[Image.Image]:
    """The pictures of a strip."""
    with Image.open(path) as whole:
        side = whole.height
        return [whole.crop((x, 0, x + side, side)) for x in range(0, whole.width, side)]


def _machines(entries: Sequence[Entry]) -> str:
    """What they were trained on, in a line."""
    told = {f"{e.machine.cores} cores of {e.machine.gpu or e.machine.cpu}" for e in entries}
    torch = {e.machine.packages.get("torch", "") for e in entries}
    return f"Trained on {', '.join(sorted(told))}; torch {', '.join(sorted(torch))}."


def _best(group: Sequence[Entry]) -> float:
    counts = [count for count in COUNTS if count in group[0].drawn]
    return max(median(e.drawn[count].prompt_accuracy for e in group) for count in counts)


def _row(name: str, group: Sequence[Entry], counts: Sequence[int]) -> str:
    """Of one method, all its seeds."""

    def each(field: str, scale: float, digits: int) -> str:
        drawn = [[e.drawn[count] for e in group if count in e.drawn] for count in counts]
        told = [_over_seeds([getattr(d, field) * scale for d in ds], digits) for ds in drawn]
        return " / ".join(told)

    def cost(field: str, scale: float = 1.0, digits: int = 0) -> str:
        found = [getattr(e, field) for e in group]
        return f"{median(found) * scale:,.{digits}f}" if None not in found else "-"

    figures = [each("prompt_accuracy", 100, 1), each("one_object", 100, 0)]
    figures += [each("two_objects", 100, 0), each("fd", 1, 0), each("diversity", 1, 1)]
    costs = [str(len(group)) if group[0].steps else "-"]
    costs += [cost("seconds", 1 / 60, 1), cost("cached_seconds", 1 / 60, 1), cost("steps")]
    costs += [cost("samples_per_s", digits=1), cost("peak_rss_mib")]
    return "| " + " | ".join([name, *figures, *costs]) + " |"


def _over_seeds(values: Sequence[float], digits: int) -> str:
    """The median, and half of what lies between the least and the greatest of several."""
    if not values:
        return "-"
    told = f"{median(values):.{digits}f}"
    half = (max(values) - min(values)) / 2
    return f"{told}±{half:.{digits}f}" if len(values) > 1 else told


HEAD = """# The methods, side by side

`edgeflash benchmark-methods`: each method begins with the same student (pruned by `blocks`, and
distilled to draw as its teacher does; each machine trains its own by the same recipe), and trains
as many steps as fit into the same time, with the options of `benchmark.toml`, of which
`ablations.toml` changes some. The time is that of
training. What the data took before the first step is not taken off it, and stands beside it as
"before": latents and captions encoded, and of `ladd` and `gan` the teacher's own drawings of all
captions. It is told of every method that needs it, though it is made once.

Figures are of 1 / 2 / 4 network calls a picture, where the method's sampler has them: prompt
accuracy over 500 held-out prompts, all of them and those of one and of two objects; FD against
held-out renders; diversity, the mean distance of pictures of one caption in the judge's features.
Of several seeds, which are other renders, order and noise from the same start: the median, ± half
of what lies between the least and the greatest. The decoder is the teacher's own. Of teacher and
start, above, and of methods that keep the teacher's sampler, figures are of as many steps, guided,
which are two calls each: their 2 steps cost what 4 of the others do.
"""
COLUMNS = "method", "accuracy, %", "one object", "two objects", "FD", "diversity"
COSTS = "seeds", "min", "before, min", "steps", "samples/s", "peak RSS, MiB"
