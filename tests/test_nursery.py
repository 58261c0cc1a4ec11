"""Children that begin with what another process has imported."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeflash import shelf
from edgeflash.export import memory, nursery
from edgeflash.export.nursery import Fork, Nursery
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.talk import KILLED

pytestmark = pytest.mark.skipif(not nursery.FORKS, reason="forks nothing here")
CODE = """
import os, sys
from edgeflash.export import nursery

def run():
    word = os.read(0, 9).decode().strip()
    print(word, "wave" in sys.modules, "wave" in sys.argv, os.getppid(), flush=True)
    if word == "fails":
        1 / 0
    if word == "exits":
        sys.exit(3)
    os.read(0, 9)  # until its parent goes

nursery.main(run)
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setattr(nursery, "COMMAND", [sys.executable, "-c", CODE])
    made = Nursery(["not.there", "wave", "wave:not_there"])
    yield made
    made.close()


def said(child: Fork, word: str) -> list[str]:
    child.stdin.write(f"{word}\n")
    child.stdin.flush()
    return child.stdout.readline().split()


def test_children_begin_with_what_is_imported_and_how_they_end_is_told(small: Nursery) -> None:
    with tempfile.TemporaryFile("w+") as complaint:
        children = [small.fork(complaint) for _ in range(5)]
        a, b, c, d, e = (child for child in children if child)
        assert len({child.pid for child in (a, b, c, d, e)}) == 5
        place = str(small._process.pid)
        assert said(e, "e") == ["e", "True", "True", place], "in its own pipes"
        assert said(a, "fails") == ["fails", "True", "True", place] and a.wait() == 1
        complaint.seek(0)
        assert "ZeroDivisionError" in complaint.read()
        assert said(b, "exits")[0] == "exits" and b.wait() == 3
        os.kill(small._process.pid, signal.SIGINT)  # as Ctrl-C does to all
        os.kill(c.pid, signal.SIGINT)
        assert c.wait() == 1
        d.kill()
        assert d.wait() == KILLED
        d.kill()  # it is told at most once
        assert said(e, "x") == [] and e.wait() == 0, "another one's end is not its own"


def test_a_child_ends_with_its_parent_and_a_nursery_too(small: Nursery) -> None:
    with tempfile.TemporaryFile("w+") as complaint:
        child, other = small.fork(complaint), small.fork(complaint)
        assert child and other
        child.stdin.close()
        assert child.wait() == 0
        small._asking.close()
        assert small._process.wait(60) == 0
        assert small.fork(complaint) is None, "then a fresh process is in order"
        other.stdin.close()
        assert other.wait() == KILLED, "nobody has seen how it ended"


@pytest.mark.parametrize(
    ("numbers", "forks", "begins"), [(None, True, False), (0, True, True), (0, False, False)]
)
def test_it_is_for_large_components(
    numbers: int | None, forks: bool, begins: bool, one_step_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(nursery, "FORKS", forks)
    monkeypatch.setattr(nursery, "COMMAND", [sys.executable, "-c", "input()"])
    if numbers is not None:
        monkeypatch.setattr(memory, "APART_NUMBERS", numbers)
    student, target = Student.open(one_step_student), shelf.make(Target, "onnx", {})
    with nursery.begun(student, target) as made:
        assert (made is not None) == begins
        if made:
            words = made._process.args
            assert isinstance(words, list)
            assert {"edgeflash.export.line", "diffusers:UNet2DConditionModel"} <= {*words[3:]}
    assert made is None or made._process.returncode == KILLED
