"""What was recorded comes back as it was, and lies on the disk once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Sample, Tape
from edgeflash.export.recorded import FILE, INDEX, save, take_up

NOTHING: Any = None  # of the student, which is not asked
PASSED = ("text_encoder", "unet", "unet_cached")
TEXT = np.arange(600, dtype=np.float32).reshape(1, 2, 300)
FEATURE = np.random.default_rng(0).random((1, 8, 50, 50), np.float32)
ASIDE = Sample({"z": FEATURE, "a": np.array(500.0, np.float32)}, {"out": FEATURE.view(np.int32)})


def tape() -> Tape:
    return Tape(NOTHING, NOTHING, NOTHING, ("ring",), (8, 8))


def write(run: Path) -> None:
    """As three components pass; the last one ran beside the one before, at many steps."""
    made, folders = tape(), [run / f"record-{name}" for name in PASSED]
    for folder in folders:
        folder.mkdir(parents=True)
    made.goldens = [{"ids": np.array([[1, 2]]), "conditioning": TEXT}]
    save(made, "text_encoder", [Sample({"ids": np.array([[1, 2]])}, {"c": TEXT})], folders[0])
    made.goldens[0] |= {"flat": TEXT.reshape(1, 600), "cache.0.3": FEATURE.copy()}
    made.plain, made.loss_db = {"caching": [TEXT + 1]}, {"caching": [31.5]}
    made.ahead = {"unet_cached": (ASIDE,) * 11}
    save(made, "unet", [Sample({"sample": TEXT + 2, "c": TEXT}, {})], folders[1])
    save(made, "unet_cached", made.ahead.pop("unet_cached"), folders[2])


def same(ours: Any, wanted: Any) -> bool:
    return ours.dtype == wanted.dtype and ours.shape == wanted.shape and (ours == wanted).all()


def test_each_array_is_written_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    sizes = [(tmp_path / f"record-{name}" / FILE).stat().st_size for name in PASSED]
    assert sizes[0] < TEXT.nbytes + 500
    assert sizes[1] < 2 * FEATURE.nbytes + 3 * TEXT.nbytes + 1000, "however many calls took it"
    assert sizes[2] < 100, "all of it was written before"
    made = tape()
    (sample,) = take_up(made, "unet", tmp_path / "record-unet")
    assert [*sample.inputs] == ["sample", "c"] and same(sample.inputs["c"], TEXT)
    (golden,) = made.goldens
    assert same(golden["ids"], np.array([[1, 2]])) and same(golden["flat"], TEXT.reshape(1, 600))
    assert same(golden["conditioning"], TEXT) and same(golden["cache.0.3"], FEATURE)
    assert same(made.plain["caching"][0], TEXT + 1) and made.loss_db == {"caching": [31.5]}
    for own in (made.ahead["unet_cached"], take_up(made, *_last(tmp_path))):
        assert len(own) == 11
        for name, array in (ASIDE.inputs | ASIDE.outputs).items():
            assert same((own[10].inputs | own[10].outputs)[name], array)
        assert [*own[10].inputs] == ["z", "a"], "in their order"
    assert made.ahead == {}


def _last(run: Path) -> tuple[str, Path]:
    return PASSED[-1], run / f"record-{PASSED[-1]}"


def test_a_run_that_goes_on_writes_the_same_bytes(tmp_path: Path) -> None:
    """Else what follows would be taken for stale."""
    write(tmp_path)
    made, again = tape(), tmp_path / "again"
    take_up(made, "unet", tmp_path / "record-unet")
    again.mkdir()
    save(made, "unet_cached", made.ahead.pop("unet_cached"), again)
    for name in (FILE, INDEX):
        assert (again / name).read_bytes() == (tmp_path / "record-unet_cached" / name).read_bytes()


def test_what_is_gone_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "record-unet" / FILE).write_bytes(b"half")
    with pytest.raises(EdgeflashError, match=rf"record-unet_cached: .* delete {tmp_path} and"):
        take_up(tape(), *_last(tmp_path))
