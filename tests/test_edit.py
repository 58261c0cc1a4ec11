"""Zero-shot edits: what they keep, and where in the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_runtimes import altered, assert_close
from tiny_bundle import SCALE, SHIFT, mean_of, tiny
from typer.testing import CliRunner

from edgeflash import noise
from edgeflash.errors import EdgeflashError
from edgeflash.runtimes.edit import LUMINANCE, Edit, colourise, edit_of, enlarge, inpaint
from edgeflash.runtimes.on_onnx import OnnxRuntime
from edgeflash.runtimes.pipeline import Request, TextToImage

P, Q = 0.6, 0.8  # of the second step
STEPS: tuple[dict[str, float], ...] = (
    {"t": 900, "in_scale": 1, "a": 0.7, "b": -0.3, "c": Q},
    {"t": 100, "in_scale": 1, "a": 0.5, "b": -0.5},
)
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (8, 8, 3), np.uint8)
LEFT = np.arange(8) < 4  # painted, every row


def consistency_bundle(folder: Path, **options: Any) -> TextToImage:
    """Two steps that each make a whole picture, the second after fresh noise."""
    entries = [{"start": 0, "p": 0.1, "q": 0.9}, {"start": 1, "p": P, "q": Q}]
    table = {"sampler": "lcm", "prediction": "epsilon", "init": 1.5}
    table |= {"steps": STEPS, "entries": entries}
    bundle = altered(tiny(folder, rows=STEPS, encoder=True), schedules={2: table})
    return TextToImage(bundle, OnnxRuntime(provider="cpu", threads=1), **options)


def edits() -> list[Edit]:
    return [
        inpaint(PICTURE, np.broadcast_to(LEFT, (8, 8))),
        colourise(PICTURE),
        enlarge(PICTURE[:4, :2], (8, 8)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["inpaint", "colourise", "enlarge"])
def test_an_edit_done_twice_changes_nothing_more(which: int) -> None:
    edit = edits()[which]
    x = RANDOM.uniform(0, 255, (2, 3, 8, 8)).astype(np.float32)
    once = edit.project(x)
    assert once.shape == x.shape and np.abs(once - x).max() > 10
    np.testing.assert_allclose(edit.project(once), once, atol=1e-3)


def test_edits_keep_what_is_known_and_no_more() -> None:
    x = RANDOM.uniform(0, 255, (2, 3, 8, 8)).astype(np.float32)
    painted, coloured, enlarged = (edit.project(x) for edit in edits())
    known = PICTURE.transpose(2, 0, 1).astype(np.float32)
    np.testing.assert_array_equal(painted[..., ~LEFT], np.stack([known[..., ~LEFT]] * 2))
    np.testing.assert_array_equal(painted[..., LEFT], x[..., LEFT])

    moved = coloured - x  # along one axis alone, to where luminance is the picture's
    direction = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    axis = LUMINANCE / np.linalg.norm(LUMINANCE)
    np.testing.assert_allclose(np.abs(np.einsum("c,nchw->nhw", axis, direction)), 1, atol=1e-4)
    luminance = np.einsum("c,nchw->nhw", LUMINANCE, coloured)
    np.testing.assert_allclose(luminance[1], np.einsum("c,chw->hw", LUMINANCE, known), atol=1e-3)

    means = enlarged.reshape(2, 3, 4, 2, 2, 4).mean((3, 5))
    np.testing.assert_allclose(means[0], known[:, :4, :2], atol=1e-3)
    detail = (enlarged - x).reshape(2, 3, 4, 2, 2, 4)
    assert np.ptp(detail, axis=(3, 5)).max() < 1e-3


def test_the_picture_of_every_step_is_edited(tmp_path: Path) -> None:
    edit = edits()[0]
    request = Request(("a red star", "blue ring"), seed=3, edit=edit)
    result = consistency_bundle(tmp_path / "b").generate(request)
    frugal = consistency_bundle(tmp_path / "c", low_memory=True).generate(request)
    np.testing.assert_array_equal(frugal.images, result.images)
    for j, prompt in enumerate(request.prompts):
        draw = [noise.randn((4, 4, 4), 3 + j, k).astype(np.float64) for k in (0, 1)]
        x = 1.5 * draw[0]
        x_0 = (0.7 * x - 0.3 * (x / 2 + mean_of(prompt) + 0.9)) / P
        pixels = ((x_0 / SCALE + SHIFT)[:3].repeat(2, 1).repeat(2, 2).clip(-1, 1) + 1) * 127.5
        pixels = edit.project(pixels[None].astype(np.float32))[0] / 127.5 - 1
        cells = pixels.reshape(3, 4, 2, 4, 2).mean((2, 4))[[0, 1, 2, 0]]
        x = P * (cells - SHIFT) * SCALE + Q * draw[1]
        assert_close(result.latent[j], 0.5 * x - 0.5 * (x / 2 + mean_of(prompt) + 0.1))
        np.testing.assert_array_equal(result.images[j][:, ~LEFT], PICTURE[:, ~LEFT])
        assert (result.images[j][:, LEFT] != PICTURE[:, LEFT]).any()


def test_what_cannot_be_edited_is_said(tmp_path: Path) -> None:
    pipeline = consistency_bundle(tmp_path / "b")
    with pytest.raises(EdgeflashError, match=r"cannot edit 8x4 px: it makes \(8, 8\)"):
        pipeline.check(Request("a red star", edit=colourise(PICTURE[:, :4])))
    for options, why in (({"encoder": True}, "made-up, does not noise"), ({}, "no vae_encoder")):
        other = TextToImage(altered(tiny(tmp_path / why[:4], **options)), OnnxRuntime())
        with pytest.raises(EdgeflashError, match=why):
            other.check(Request("a red star", edit=edits()[0]))


@pytest.mark.parametrize(
    ("name", "picture", "mask", "said"),
    [
        ("repaint", PICTURE, None, r"no edit 'repaint' .* did you mean 'inpaint'"),
        ("colourise", None, None, r"give the picture with --image"),
        ("inpaint", PICTURE, None, r"--edit inpaint: give --mask, a picture that is white"),
        ("colourise", PICTURE, PICTURE, r"--edit colourise: leave out --mask"),
        ("inpaint", PICTURE, PICTURE[:4], r"a picture of 4x8 px, but 8x8 px are made"),
        ("enlarge", PICTURE[:3], None, r"8x8 px is no whole multiple of 3x8"),
    ],
)
def test_a_request_for_an_edit_is_checked(name: Any, picture: Any, mask: Any, said: str) -> None:
    with pytest.raises(EdgeflashError, match=said):
        edit_of(name, picture, mask, (8, 8))


def test_no_edit_is_none() -> None:
    assert edit_of(None, PICTURE, PICTURE, (8, 8)) is None


def test_the_command_edits(tmp_path: Path) -> None:
    from PIL import Image

    from edgeflash.cli import app

    consistency_bundle(tmp_path / "b")
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    white = np.broadcast_to(np.where(LEFT, 255, 0)[:, None], (8, 8, 3)).astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "mask.png")
    paths = {"--image": "in.png", "--mask": "mask.png", "--out": "out.png"}
    asked = [word for option, name in paths.items() for word in (option, str(tmp_path / name))]
    asked += ["--prompt", "a red star", "--edit", "inpaint"]
    told = CliRunner().invoke(app, ["run", str(tmp_path / "b"), *asked])
    assert told.exit_code == 0, told.output
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    np.testing.assert_array_equal(drawn[:, ~LEFT], PICTURE[:, ~LEFT])
