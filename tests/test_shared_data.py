"""Several processes pack shards and fill caches: each its own part, and together what one makes."""

from __future__ import annotations

import os
import signal
import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_processes import two
from torch import Tensor, distributed

from edgeflash.distill import sources
from edgeflash.distill.data import Store, open_store
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data

SHARDS = (3, 1, 0, 5, 2, 4)  # pictures of each
SAMPLES = 9  # in the fifth shard they are full, when the bad one is passed over


def write_shards(home: Path, bad: tuple[int, ...]) -> Data:
    """Shards of 8-px pictures, of which some are no pictures."""
    home.mkdir()
    for shard in range(len(SHARDS)):
        with tarfile.open(home / f"{shard}.tar", "w") as tar:
            for number in range(sum(SHARDS[:shard]), sum(SHARDS[: shard + 1])):
                picture = BytesIO()
                Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(picture, "PNG")
                content = {"png": picture.getvalue(), "txt": f"star {number}".encode()}
                content |= {"png": b"no picture"} if number in bad else {}
                for suffix, data in content.items():
                    member = tarfile.TarInfo(f"{number:02}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return Data(kind="shards", path=str(home / "{0..5}.tar"), samples=SAMPLES, size_px=8)


def fill(data: Data, cache: Path, *, dies_at: int | None = None) -> Store:
    """Opens the store and fills a cache; notes which shards and rows this process was asked for."""
    name = os.environ.get("RANK", "0")
    read, asked = (cache.parent / f"{cache.name}-{what}-{name}" for what in ("read", "asked"))
    original = sources.read_picture

    def noted(source: Path | bytes, size_px: int) -> np.ndarray | None:
        picture = original(source, size_px)
        with read.open("a") as note:
            note.write("bad\n" if picture is None else f"{picture[0, 0, 0] // 9}\n")
        return picture

    def encode(indices: np.ndarray) -> Tensor:
        if dies_at in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        with asked.open("a") as note:
            note.writelines(f"{i}\n" for i in indices)
        return store.pictures(indices)[:, :, ::4, ::4] / 3

    sources.read_picture = noted
    try:
        store = open_store(data, 0, cache)
        store.cached("latents a", encode)
    finally:
        sources.read_picture = original
    return store


def fill_as_one_of_two(data: Data, cache: Path, dies_at: int | None = None) -> None:
    distributed.init_process_group("gloo")
    fill(data, cache, dies_at=dies_at)


def noted(cache: Path, what: str) -> list[list[str]]:
    return [
        path.read_text().split() for path in sorted(cache.parent.glob(f"{cache.name}-{what}-*"))
    ]


def files(cache: Path) -> dict[str, bytes]:
    """All but what no two runs have alike: how long they took."""
    found = [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".seconds"]
    return {str(p.relative_to(cache)): p.read_bytes() for p in found}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setattr("edgeflash.distill.data.ROWS", 2)
    return write_shards(tmp_path / "in", bad=(4,))


def test_two_processes_make_what_one_makes_and_none_does_it_twice(
    tmp_path: Path, data: Data
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    store = fill(data, alone)
    assert store.captions == [f"star {i}" for i in range(10) if i != 4]
    reds = ((store.pictures(np.array([8, 0, 3])) + 1) * 127.5)[:, 0, 0, 0]
    assert reds.round().tolist() == [9 * 9, 0, 9 * 3]
    assert two(partial(fill_as_one_of_two, data, shared)) == [0, 0]
    assert files(shared) == files(alone)
    assert any(name.endswith("skipped.txt") for name in files(alone))
    for what in ("read", "asked"):
        first, second = noted(shared, what)
        assert first and second and not {*first} & {*second}
        assert len(first) + len(second) == len({*first, *second})


def test_killed_two_go_on_as_one_with_what_is_missing(tmp_path: Path, data: Data) -> None:
    """One dies in its second chunk; neither shards nor finished chunks are asked for again."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    fill(data, alone)
    codes = two(partial(fill_as_one_of_two, data, cut, dies_at=6))
    assert -signal.SIGKILL in codes and 0 not in codes
    before = [{*rows} for rows in noted(cut, "asked")]
    for path in tmp_path.glob("cut-*"):
        path.unlink()
    fill(data, cut)
    assert not noted(cut, "read")
    ((*again,),) = noted(cut, "asked")
    assert not {*again} & {*before[0], *before[1]}
    assert {*again, *before[0], *before[1]} == {str(i) for i in range(SAMPLES)}
    assert files(cut) == files(alone)


def test_a_packing_that_was_killed_reads_finished_shards_no_more(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    fill(data, alone)

    def press(path: Path, content: str) -> None:
        if path.name == "shard-00003.json":
            raise KeyboardInterrupt
        written(path, content)

    from edgeflash.distill import packing

    written = packing.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_atomic", press)
        with pytest.raises(KeyboardInterrupt):
            fill(data, cut)
    (tmp_path / "cut-read-0").unlink()
    fill(data, cut)
    assert noted(cut, "read") == [["bad", *"56789"]]
    assert files(cut) == files(alone)


def test_bad_samples_are_all_named_and_too_many_stop(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "in", bad=(1, 4))
    with pytest.raises(EdgeflashError, match=r"2 of 11 .*first 01: unread.*skipped\.txt.*than 1 %"):
        open_store(data, 0, tmp_path / "cache")
    (skipped,) = (tmp_path / "cache").rglob("skipped.txt")
    assert skipped.read_text() == "01: unreadable picture\n04: unreadable picture\n"
