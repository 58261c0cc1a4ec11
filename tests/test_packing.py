"""What an interruption, an odd picture, a full disk or changed data leave of packed data."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from edgeflash.distill.data import Store, open_store
from edgeflash.distill.encoded import token_ids
from edgeflash.distill.vocabulary import small_clip_tokenizer
from edgeflash.errors import EdgeflashError
from edgeflash.png import read_picture, write_pngs
from edgeflash.recipe import Data

ALL = np.arange(10)


class Encoder:
    """Thins pictures out, notes which it was asked for, and is interrupted at one of them."""

    def __init__(self, store: Store, *, fail_at: int | None = None) -> None:
        self.store, self.fail_at = store, fail_at
        self.asked: list[int] = []

    def __call__(self, indices: np.ndarray) -> Tensor:
        if self.fail_at in indices:
            raise KeyboardInterrupt
        self.asked += indices.tolist()
        return self.store.pictures(indices)[:, :, 3::16, 3::16]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Ten shapes, encoded four at once."""
    monkeypatch.setattr("edgeflash.distill.data.ROWS", 4)
    return open_store(Data(samples=len(ALL)), 0, tmp_path)


def left(store: Store) -> list[str]:
    packed = ("samples.json", "pictures.npy")
    found = [p for p in store.folder.iterdir() if p.name not in packed and p.suffix != ".seconds"]
    return sorted(p.suffix for p in found)


def test_a_cache_goes_on_where_it_was_interrupted(store: Store) -> None:
    encoder = Encoder(store, fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        store.cached("latents a", encoder)
    assert encoder.asked == list(range(8)) and left(store) == [".new", ".rows"]
    encoder.fail_at = None
    rows = Store(store.folder).cached("latents a", encoder)
    assert encoder.asked == list(range(10)) and left(store) == [".npy"]
    assert torch.equal(rows(ALL), store.cached("latents b", Encoder(store))(ALL))
    again = Encoder(store)
    store.cached("latents a", again)
    assert not again.asked


def test_a_cache_tells_everybody_what_it_took(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over interruptions, and also those who find it there: a clock that a chunk moves by 5 s."""
    now = 0.0

    class Slow(Encoder):
        def __call__(self, indices: np.ndarray) -> Tensor:
            nonlocal now
            now += 5
            return super().__call__(indices)

    monkeypatch.setattr("edgeflash.distill.data.time", SimpleNamespace(monotonic=lambda: now))
    encoder = Slow(store, fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        store.cached("latents a", encoder)
    encoder.fail_at = None
    now = 1000.0
    for again in (store, Store(store.folder), Store(store.folder)):
        again.cached("latents a", encoder)
        assert again.spent == {"latents a": 15.0}  # three chunks


def test_a_draft_that_does_not_fit_is_begun_anew(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.cached("latents a", Encoder(store, fail_at=9))
    draft = next(store.folder.glob("*.new"))
    np.lib.format.open_memmap(draft, "w+", np.float16, (3, 3))
    with pytest.raises(KeyboardInterrupt):
        store.cached("latents a", Encoder(store, fail_at=0))
    assert left(store) == []  # a note that outlived its draft would vouch for empty rows
    encoder = Encoder(store, fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        store.cached("latents a", encoder)
    next(store.folder.glob("*.rows")).unlink()
    encoder.fail_at = None
    rows = store.cached("latents a", encoder)
    assert encoder.asked == [*range(8), *range(10)]
    assert torch.equal(rows(ALL), Encoder(store)(ALL).half().float())


def test_packing_and_encoding_tell_how_far_they_are(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edgeflash.distill.packing.TELL_SECONDS", -1)
    open_store(Data(samples=3), 0, tmp_path)
    store.cached("latents a", Encoder(store))
    told = capsys.readouterr().err
    assert "packing pictures: 2/3, 0 min left\n" in told
    assert "encoding latents: 4/10, 0 min left\n" in told and "encoding latents: 10/10" in told


def captioned(home: Path, count: int = 4) -> Data:
    """A folder of 8-px pictures with captions."""
    home.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(home / f"{i}.png")
        (home / f"{i}.txt").write_text(f"star {i}")
    return Data(kind="folder", path=str(home), samples=9, size_px=8)


def test_a_packing_that_was_cut_off_leaves_no_draft_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = captioned(tmp_path / "in"), tmp_path / "cache"

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeflash.distill.sources.read_picture", press)
        with pytest.raises(KeyboardInterrupt):
            open_store(data, 0, cache)
    assert not list(cache.rglob("pictures*"))
    stale = next(cache.iterdir()) / "pictures.new"  # as a killed process leaves it
    stale.write_bytes(b"half")

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=0 if stale.exists() else 10**9)

    monkeypatch.setattr("shutil.disk_usage", usage)
    packed = open_store(data, 0, cache)
    assert len(packed) == 4 and packed.folder == stale.parent and not stale.exists()


def write_odd(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture on which Pillow raises something that is no OSError."""
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (40, 40)).save(path)
    else:
        text = PngInfo()
        text.add_text("note", "x" * 2**21, zip=True)
        Image.new("RGB", (8, 8)).save(path, pnginfo=text)


@pytest.mark.parametrize("kind", ["bomb", "too much text"])
def test_an_odd_picture_is_skipped(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = captioned(tmp_path / "in")
    write_odd(tmp_path / "in/3.png", kind, monkeypatch)
    assert open_store(data, 0, tmp_path / "cache").captions == ["star 0", "star 1", "star 2"]
    assert "1 of 4 samples skipped, first 3.png: unreadable picture" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bomb", "too much text"])
def test_an_odd_picture_to_start_from_is_one_line(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_odd(tmp_path / "a.png", kind, monkeypatch)
    with pytest.raises(EdgeflashError, match=r"a\.png: no readable picture \(.+\); choose") as told:
        read_picture(tmp_path / "a.png")
    assert "\n" not in str(told.value)


def test_a_full_disk_keeps_the_picture_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_pngs(np.full((1, 8, 8, 3), 7, np.uint8), tmp_path / "a.png")
    before = path.read_bytes()

    def save(_: Image.Image, place: Path) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(EdgeflashError, match=r"a\.png: not written \(No space left on device\)"):
        write_pngs(np.zeros((1, 8, 8, 3), np.uint8), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_changed_data_are_packed_anew(tmp_path: Path) -> None:
    home, cache = tmp_path / "in", tmp_path / "cache"
    data = captioned(home)
    first = open_store(data, 0, cache)
    assert open_store(data, 0, cache).folder == first.folder
    (home / "0.txt").write_text("a longer caption")
    second = open_store(data, 0, cache)
    assert second.captions[0] == "a longer caption" and second.folder != first.folder
    (home / "0.png").unlink()
    assert len(open_store(data, 0, cache)) == 3


def test_changed_shards_are_packed_anew(tmp_path: Path) -> None:
    captioned(tmp_path / "in", 8)
    shard, files = tmp_path / "0.tar", sorted((tmp_path / "in").iterdir())
    data = Data(kind="shards", path=str(tmp_path / "{0..0}.tar"), samples=9, size_px=8)
    for count in (2, 8):  # samples, of two files each
        with tarfile.open(shard, "w") as tar:
            for path in files[: 2 * count]:
                tar.add(path, path.name)
        assert len(open_store(data, 0, tmp_path / "cache")) == count


def test_all_a_person_has_is_used_and_a_limit_where_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgeflash.recipe.SHAPES", 3)
    monkeypatch.setattr("edgeflash.distill.packing.TELL_SECONDS", -1)
    captioned(tmp_path / "in", 8)
    files = sorted((tmp_path / "in").iterdir())
    for i in range(2):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            for path in files[8 * i : 8 * i + 8]:
                tar.add(path, path.name)
    kinds: dict[Any, Path | None] = {"shapes": None, "folder": tmp_path / "in"}
    for kind, path in (kinds | {"shards": tmp_path / "{0..1}.tar"}).items():
        told: dict[str, Any] = {
            "kind": kind,
            "path": path and str(path),
            "size_px": 8 if path else 64,
        }
        assert len(open_store(Data(**told), 0, tmp_path)) == (8 if path else 3)
        assert len(open_store(Data(**told, samples=5), 0, tmp_path)) == 5
    told_so = capsys.readouterr().err
    assert "packing pictures: 8/8, 0 min left\n" in told_so  # the folder
    assert "packing pictures: 7\npacking pictures: 8\n" in told_so  # the second shard


def test_a_shard_with_a_name_twice_and_one_cut_off_are_one_line(tmp_path: Path) -> None:
    captioned(tmp_path / "in", 2)
    whole, files = tmp_path / "0.tar", sorted((tmp_path / "in").iterdir())
    with tarfile.open(whole, "w") as tar:
        for path in (*files[:2], *files[:2]):
            tar.add(path, path.name)
    (tmp_path / "1.tar").write_bytes(whole.read_bytes()[:600])
    for number, why in ((0, r"0\.\w+: duplicate file name"), (1, "[a-z ]+")):
        data = Data(kind="shards", path=str(tmp_path / f"{number}.tar"), size_px=8)
        said = rf"^\[data\] path: \S+{number}\.tar: {why}: mend this shard, or leave it out$"
        with pytest.raises(EdgeflashError, match=said):
            open_store(data, 0, tmp_path / "cache")


def test_what_the_renderer_packed_keeps_its_name(store: Store) -> None:
    told = f"{Data(samples=len(ALL)).model_dump_json()} 0"
    assert store.folder.name == f"data-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def test_captions_that_are_cut_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    fits, long, longer = ("red star " * n for n in (3, 4, 5))  # and a start and an end
    tokenizer = small_clip_tokenizer([fits], 8)
    capsys.readouterr()
    for _ in range(2):
        ids = token_ids(tokenizer, [fits, long, longer, long, ""])
    assert capsys.readouterr().err == "2 of 3 captions are longer than 8 tokens: cut\n"
    assert ids.shape == (5, 8) and torch.equal(ids[1], ids[3]) and torch.equal(ids[0], ids[1])
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 8  # as it is saved
