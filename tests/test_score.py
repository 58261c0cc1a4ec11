"""The benchmark of what is painted into pictures, enlarged, or drawn along edges."""

from __future__ import annotations

import numpy as np
import pytest
from test_inpainting import MASK, PICTURE
from test_inpainting import inpainter as inpainter  # fixtures
from test_inpainting import painter as painter

from edgeflash import shapes
from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.score import draw, given_of
from edgeflash.verify import runtime_for


def test_judged_prompts_come_with_pictures_of_their_own(painter: Bundle) -> None:
    given = [{"image": np.roll(PICTURE, i, 0), "mask": MASK} for i in range(3)]
    runtime = runtime_for(painter)
    drawn = draw(
        painter,
        runtime,
        ("a red star", "a blue ring", "a red star"),
        steps=3,
        given=given.__getitem__,
    )
    with TextToImage(painter, runtime) as pipeline:
        for i, prompt in enumerate(("a red star", "a blue ring", "a red star")):
            alone = pipeline.generate(Request(prompt, seed=i, **given[i])).images[0]
            assert np.abs(drawn[i].astype(int) - alone).max() <= 1


def test_bundles_are_judged_at_what_they_were_made_for(painter: Bundle) -> None:
    given = given_of(painter, None)
    assert given
    scene, request = shapes.scene(shapes.HELD_OUT_SEED, 4), given(4)
    assert (request["image"] == shapes.render([scene], shapes.HELD_OUT_SEED, [4])[0]).all()
    assert (request["mask"] == shapes.around(scene, 0)).all()
    for task, said in (("text", "not for 'text'"), ("inpant", "did you mean 'inpaint'")):
        with pytest.raises(EdgeflashError, match=said):
            given_of(painter, task)
    plain = painter.manifest.model_copy(update={"conditions": ()})
    assert given_of(Bundle(painter.folder, plain), None) is None
    with pytest.raises(EdgeflashError, match="not for 'edges'"):
        given_of(Bundle(painter.folder, plain), "edges")
    smaller = given_of(Bundle(painter.folder, plain), "enlarge")
    assert smaller and smaller(4)["edit"].size == (64, 64)
