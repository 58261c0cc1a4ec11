"""Captioned scenes of coloured shapes: the data of the embedded teacher.

A scene holds one or two objects with shape, colour and size, where they stand, and a background.
Its caption names the shapes and colours always and the rest most of the time; position jitter,
rotation, shading and background texture are never named, so the distribution has diversity while
the prompt can be checked exactly. Everything is a pure function of ``(seed, index)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIZE_PX = 64
HELD_OUT_SEED = 1_000_003  # no recipe trains on this stream of scenes
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {  # in the order of hues
    "red": (0.86, 0.12, 0.15),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.88, 0.15),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.14, 0.32, 0.86),
    "purple": (0.58, 0.20, 0.70),
}
SIZES = {"small": (7.0, 8.5), "large": (12.0, 14.0)}  # radius, px
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.56, 0.58),
    "beige": (0.90, 0.82, 0.68),
    "black": (0.09, 0.09, 0.11),
}
PLACES = {
    "center": (32, 32),
    "left": (17, 32),
    "right": (47, 32),
    "top": (32, 17),
    "bottom": (32, 47),
}
ARRANGEMENTS = (*PLACES, "horizontal", "vertical")  # where one object is, or how two lie
RELATIONS = ("left of", "right of", "above", "below")

HEADS = {  # attribute -> its values; the classifier has one head for each
    "arrangement": ARRANGEMENTS,
    "background": tuple(BACKGROUNDS),
    "shape_a": SHAPES,
    "colour_a": tuple(COLOURS),
    "size_a": tuple(SIZES),
    "shape_b": SHAPES,
    "colour_b": tuple(COLOURS),
    "size_b": tuple(SIZES),
}


class Thing(NamedTuple):
    """One object; ``size`` is None in a demand whose caption does not name it."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """What is on the picture. Two things are ordered left to right, or top to bottom."""

    things: tuple[Thing, ...]
    arrangement: str
    background: str

    def labels(self) -> Array:
        """Index of each attribute's value in `HEADS`, int64 [8]; -1 where there is no object b."""
        values = [self.arrangement, self.background, *self.things[0]]
        values += self.things[1] if len(self.things) == 2 else (None,) * 3
        pairs = zip(values, HEADS.values(), strict=True)
        return np.array([-1 if v is None else names.index(v) for v, names in pairs], np.int64)


@dataclass(frozen=True)
class Demand:
    """What a caption asks for; None where it leaves the choice open."""

    things: tuple[Thing, ...]
    place: str | None
    relation: str | None
    background: str | None


@dataclass(frozen=True)
class Caption:
    text: str
    demand: Demand


def scene(seed: int, index: int) -> Scene:
    """The scene number ``index`` of the stream ``seed``; half of them hold two objects."""
    rng = np.random.default_rng((seed, index, 0))
    count = int(rng.integers(1, 3))
    things = tuple(
        Thing(_pick(rng, SHAPES), _pick(rng, COLOURS), _pick(rng, SIZES)) for _ in range(count)
    )
    names = tuple(PLACES) if count == 1 else ("horizontal", "vertical")
    return Scene(things, _pick(rng, names), _pick(rng, BACKGROUNDS))


def caption(what: Scene, seed: int, index: int) -> Caption:
    """One of many phrasings of a scene, and exactly what it demands of a picture."""
    rng = np.random.default_rng((seed, index, 1))
    things = tuple(t if rng.random() < 0.75 else t._replace(size=None) for t in what.things)
    background = what.background if rng.random() < 0.75 else None
    if len(things) == 1:
        place = what.arrangement if rng.random() < 0.75 else None
        demand = Demand(things, place, None, background)
    else:
        if flipped := bool(rng.random() < 0.5):
            things = things[::-1]
        across = what.arrangement == "horizontal"
        names = RELATIONS[:2] if across else RELATIONS[2:]
        relation = names[flipped] if rng.random() < 0.85 else None
        demand = Demand(things, None, relation, background)
    return Caption(_phrase(demand, rng), demand)


def satisfied(demand: Demand, labels: Array) -> dict[str, bool]:
    """Which of the named attributes a picture has.

    Args:
        demand: what the caption names.
        labels: the picture's attributes as in `Scene.labels`, int [8].

    Returns:
        One truth value per named attribute ("count", "shape", "colour", and "size", "place",
        "relation", "background" where they are named). The prompt is met when all are true. Two
        objects whose relation is left open may stand either way round.
    """
    seen = {name: int(v) for name, v in zip(HEADS, labels, strict=True)}
    arrangement = ARRANGEMENTS[seen["arrangement"]]
    count = 1 if arrangement in PLACES else 2
    found = {"count": count == len(demand.things)}
    if demand.place:
        found["place"] = arrangement == demand.place
    if demand.relation:
        across = demand.relation in RELATIONS[:2]
        found["relation"] = arrangement == ("horizontal" if across else "vertical")
    if demand.background:
        found["background"] = HEADS["background"][seen["background"]] == demand.background
    orders = {None: ("ab", "ba"), "right of": ("ba",), "below": ("ba",)}.get(
        demand.relation, ("ab",)
    )
    if len(demand.things) == 1:
        orders = ("a",)  # what is read of a second one means nothing
    ways = [_matches(demand.things, order, seen) for order in orders]
    return found | max(ways, key=lambda way: sum(way.values()))


def render(scenes: list[Scene], seed: int, indices: list[int]) -> Array:
    """Draws scenes, 64 x 64 px.

    Args:
        scenes: n scenes.
        seed, indices: choose jitter, rotation, shading and texture of each scene.

    Returns:
        uint8 [n, 64, 64, 3], RGB.
    """
    rngs = [np.random.default_rng((seed, index, 2)) for index in indices]
    canvas = _backgrounds([s.background for s in scenes], rngs)
    for slot in range(2):
        rows = [i for i, s in enumerate(scenes) if len(s.things) > slot]
        for shape in SHAPES:
            those = [i for i in rows if scenes[i].things[slot].shape == shape]
            if those:
                poses = [_pose(scenes[i], slot, rngs[i]) for i in those]
                colours = [COLOURS[scenes[i].things[slot].colour] for i in those]
                canvas[those] = _draw(canvas[those], shape, np.array(poses), np.array(colours))
    return np.asarray(np.rint(np.clip(canvas, 0, 1) * 255), np.uint8)


def around(what: Scene, slot: int) -> NDArray[np.bool_]:
    """Where object number ``slot`` may lie, whatever its jitter and size: bool [64, 64]."""
    x, y = _grid()
    if what.arrangement in PLACES:
        cx, cy = PLACES[what.arrangement]
        return np.asarray(np.maximum(abs(x - cx), abs(y - cy)) < 19)
    along = x if what.arrangement == "horizontal" else y
    return np.asarray((along < SIZE_PX / 2) == (slot == 0))


def mistaken(what: Scene, seed: int, index: int) -> Scene:
    """The scene with some objects in a neighbouring hue, and some of another shape."""
    rng, hues = np.random.default_rng((seed, index, 3)), tuple(COLOURS)
    things = []
    for thing in what.things:
        if rng.random() < 0.6:
            neighbour = hues.index(thing.colour) + (1 if rng.random() < 0.5 else -1)
            thing = thing._replace(colour=hues[neighbour % len(hues)])
        if rng.random() < 0.35:
            thing = thing._replace(shape=_pick(rng, SHAPES))
        things.append(thing)
    return replace(what, things=tuple(things))


def batch(seed: int, indices: range | list[int]) -> tuple[Array, list[Caption], Array]:
    """Pictures uint8 [n, 64, 64, 3], their captions, and their labels int64 [n, 8]."""
    scenes = [scene(seed, i) for i in indices]
    captions = [caption(s, seed, i) for s, i in zip(scenes, indices, strict=True)]
    labels = np.stack([s.labels() for s in scenes])
    return render(scenes, seed, list(indices)), captions, labels


def _pick(rng: np.random.Generator, names: Any) -> str:
    names = tuple(names)
    return str(names[int(rng.integers(len(names)))])


def _phrase(demand: Demand, rng: np.random.Generator) -> str:
    nouns = [f"a {t.size + ' ' if t.size else ''}{t.colour} {t.shape}" for t in demand.things]
    nouns = [n.replace("a orange", "an orange") for n in nouns]
    if len(nouns) == 1:
        where = {None: "", "center": " in the center", "top": " at the top"} | {
            "left": " on the left",
            "right": " on the right",
            "bottom": " at the bottom",
        }
        body = nouns[0] + where[demand.place]
    else:
        words = {
            None: ("and", "with"),
            "left of": ("left of", "to the left of"),
            "right of": ("right of", "to the right of"),
            "above": ("above", "over"),
            "below": ("below", "under"),
        }[demand.relation]
        body = f"{nouns[0]} {_pick(rng, words)} {nouns[1]}"
    if not demand.background:
        return _pick(rng, (body, f"a picture of {body}"))
    ground = f"{demand.background} background"
    return _pick(rng, (f"{body} on a {ground}", f"{body}, {ground}", f"on a {ground}, {body}"))


def _matches(things: tuple[Thing, ...], order: str, seen: dict[str, int]) -> dict[str, bool]:
    """Shape, colour and size of every thing against the slots it is held to."""
    found: dict[str, bool] = {}
    for thing, slot in zip(things, order[: len(things)], strict=True):
        for field in ("shape", "colour", "size"):
            want = getattr(thing, field)
            if want is not None:
                name = f"{field}_{slot}"
                right = HEADS[name][seen[name]] == want
                found[field] = found.get(field, True) and right
    return found


def _grid() -> tuple[Array, Array]:
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32) + 0.5
    return x, y


def _backgrounds(names: list[str], rngs: list[np.random.Generator]) -> Array:
    """Base colour with a faint gradient and waves, float32 [n, 64, 64, 3]."""
    x, y = _grid()
    base = np.array([BACKGROUNDS[name] for name in names], np.float32)[:, None, None]
    kx, ky, phase, slope_x, slope_y, tint = np.array(
        [rng.uniform(-1, 1, 6) for rng in rngs], np.float32
    ).T[:, :, None, None]  # each [n, 1, 1]
    waves = 0.025 * np.sin(0.3 * (kx * x + ky * y) + np.pi * phase)
    light = waves + 0.05 * (slope_x * (x - 32) + slope_y * (y - 32)) / 32 + 0.02 * tint
    return np.asarray(base + light[..., None])


def _pose(what: Scene, slot: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Centre x and y, radius (px), rotation (rad), light direction (rad), brightness."""
    size = what.things[slot].size
    assert size is not None
    radius = rng.uniform(*SIZES[size])
    if what.arrangement in PLACES:
        x, y = np.array(PLACES[what.arrangement]) + rng.uniform(-3, 3, 2)
    else:
        along, across = 16 + 32 * slot + rng.uniform(-2, 2), 32 + rng.uniform(-9, 9)
        x, y = (along, across) if what.arrangement == "horizontal" else (across, along)
    turn, light = rng.uniform(-0.3, 0.3), rng.uniform(0, 2 * np.pi)
    return float(x), float(y), radius, turn, light, rng.uniform(0.92, 1.04)


def _draw(canvas: Array, shape: str, poses: Array, colours: Array) -> Array:
    """Paints one shape per picture with one pixel of antialiasing; poses as `_pose` gives them."""
    x, y = _grid()
    cx, cy, radius, turn, light, bright = poses.T.astype(np.float32)[:, :, None, None]
    dx, dy = x - cx, y - cy
    px, py = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    coverage = np.clip(0.5 - _distance(shape, px, py, radius), 0, 1)[..., None]
    shade = bright + 0.14 * (np.cos(light) * dx + np.sin(light) * dy) / radius
    paint = colours[:, None, None].astype(np.float32) * shade[..., None]
    return np.asarray(canvas * (1 - coverage) + paint * coverage)


def _distance(shape: str, x: Array, y: Array, r: Array) -> Array:
    """Signed distance to the outline in px, negative inside; [n, 64, 64] for radius [n, 1, 1]."""
    rho = np.hypot(x, y)
    match shape:
        case "circle":
            return np.asarray(rho - 0.95 * r)
        case "ring":
            return np.asarray(np.abs(rho - 0.72 * r) - 0.26 * r)
        case "square":
            return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.82 * r)
        case "cross":
            wide = np.maximum(np.abs(x), np.abs(y)) - r
            return np.asarray(np.maximum(wide, np.minimum(np.abs(x), np.abs(y)) - 0.32 * r))
        case "triangle":
            slanted = np.float32(np.sqrt(3) / 2) * np.abs(x) - 0.5 * y
            return np.asarray(np.maximum(y, slanted) - 0.55 * r)
        case "star":
            return _star(x, y, rho, 1.1 * r)
    raise AssertionError(shape)


def _star(x: Array, y: Array, rho: Array, r: Array) -> Array:
    """Five points of radius r, inner radius 0.45 r, by folding the plane into one half point."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    fx, fy = rho * np.cos(angle), rho * np.sin(angle)
    vx, vy = 0.45 * np.cos(fifth / 2), 0.45 * np.sin(fifth / 2)
    ex, ey = vx - 1, vy
    return np.asarray(((fx - r) * -ey + fy * ex) / -np.hypot(ex, ey))
