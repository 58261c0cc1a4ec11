"""The embedded data: deterministic, diverse, and checked exactly against its captions."""

import numpy as np
import pytest

from edgeflash import shapes
from edgeflash.shapes import Demand, Scene, Thing


def labels(*things: Thing, arrangement: str, background: str = "white") -> np.ndarray:
    return Scene(things, arrangement, background).labels()


RED_STAR = Thing("star", "red", "small")
BLUE_RING = Thing("ring", "blue", "large")


def test_every_caption_is_satisfied_by_its_own_scene_and_not_by_others() -> None:
    _, captions, known = shapes.batch(3, range(400))
    own = [shapes.satisfied(c.demand, row) for c, row in zip(captions, known, strict=True)]
    other = [shapes.satisfied(c.demand, row) for c, row in zip(captions, known[::-1], strict=True)]
    assert all(all(found.values()) for found in own)
    assert np.mean([all(found.values()) for found in other]) < 0.02


def test_any_part_of_the_stream_is_the_same_whoever_asks() -> None:
    whole, captions, known = shapes.batch(5, range(12))
    part, part_captions, part_known = shapes.batch(5, [7, 8])
    assert np.array_equal(whole[7:9], part) and np.array_equal(known[7:9], part_known)
    assert captions[7:9] == part_captions
    assert not np.array_equal(whole, shapes.batch(6, range(12))[0])


@pytest.mark.parametrize(
    ("relation", "first", "met"),
    [
        ("left of", RED_STAR, True),
        ("right of", RED_STAR, False),
        ("right of", BLUE_RING, True),
        ("left of", BLUE_RING, False),
        ("above", RED_STAR, False),
    ],
)
def test_relations_hold_the_first_object_to_its_side(
    relation: str, first: Thing, met: bool
) -> None:
    second = BLUE_RING if first is RED_STAR else RED_STAR
    picture = labels(RED_STAR, BLUE_RING, arrangement="horizontal")
    demand = Demand((first, second), None, relation, None)
    assert all(shapes.satisfied(demand, picture).values()) is met


def test_without_a_relation_either_order_will_do_but_not_a_mixture() -> None:
    picture = labels(RED_STAR, BLUE_RING, arrangement="vertical")
    swapped = Demand((BLUE_RING, RED_STAR), None, None, None)
    mixed = Demand((Thing("ring", "red", None), Thing("star", "blue", None)), None, None, None)
    assert all(shapes.satisfied(swapped, picture).values())
    assert not all(shapes.satisfied(mixed, picture).values())


def test_one_object_is_read_from_the_first_slot_alone() -> None:
    """A judge puts something into the slots of a second object even where there is none."""
    demand, read = Demand((RED_STAR,), None, None, None), labels(BLUE_RING, arrangement="top")
    read[5:] = labels(BLUE_RING, RED_STAR, arrangement="vertical")[5:]
    assert shapes.satisfied(demand, read) == {
        "count": True,
        "shape": False,
        "colour": False,
        "size": False,
    }


def test_what_is_not_named_is_not_asked() -> None:
    demand = Demand((Thing("star", "red", None),), None, None, None)
    found = shapes.satisfied(demand, labels(RED_STAR, arrangement="top", background="black"))
    assert found == {"count": True, "shape": True, "colour": True}
    two = labels(RED_STAR, BLUE_RING, arrangement="vertical")
    assert shapes.satisfied(demand, two)["count"] is False


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("place", shapes.PLACES)
def test_the_object_is_drawn_where_and_as_large_as_named(shape: str, place: str) -> None:
    for size, (least, most) in shapes.SIZES.items():
        scene = Scene((Thing(shape, "red", size),), place, "black")
        red = shapes.render([scene], 1, [0])[0][..., 0] > 100
        y, x = np.argwhere(red).mean(0)
        there = np.array(shapes.PLACES[place])
        assert (
            np.hypot(*(np.array([x, y]) - there)) < 8
        )  # 3 px of jitter, and a triangle's centroid
        reach = np.ptp(np.argwhere(red), axis=0).max() / 2
        assert 0.7 * least <= reach <= 1.2 * most


def test_a_mask_covers_one_object_and_none_of_the_other() -> None:
    """What changes when only that object is another lies in it, but for an edge of half a pixel."""
    for index in range(60):
        scene = shapes.scene(7, index)
        before = shapes.render([scene], 7, [index])[0].astype(int)
        for slot, thing in enumerate(scene.things):
            things = list(scene.things)
            hue = "red" if thing.colour == "blue" else "blue"
            things[slot] = thing._replace(colour=hue)
            other = Scene(tuple(things), scene.arrangement, scene.background)
            changed = (shapes.render([other], 7, [index])[0] != before).any(-1)
            mask = shapes.around(scene, slot)
            assert changed.sum() > 50 and (changed & ~mask).sum() <= 3
            assert mask.mean() <= 0.5
