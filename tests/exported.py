"""Exports of small students, and what was captured on the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgeflash.bundle import Bundle
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Captured, Keep, Tape
from edgeflash.export.journal import LOCK
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.golden import Tensors
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.verify import verify

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Exported:
    """A bundle, and what was captured on the way, to lower it again without tracing it again."""

    bundle: Bundle
    captured: dict[str, Captured]
    goldens: list[Tensors]


def export(
    patch: pytest.MonkeyPatch, student: Path, out: Path, target: Target, **options: Any
) -> Exported:
    """A real export from end to end."""
    captured: dict[str, Captured] = {}
    tapes: list[Tape] = []
    real = Tape.capture

    def capture(tape: Tape, name: str, keep: Keep) -> Captured:
        tapes.append(tape)
        return captured.setdefault(name, real(tape, name, keep))

    patch.setattr(Tape, "capture", capture)
    bundle = export_student(
        Student.open(student), target, out, ExportOptions(**options), console=QUIET
    )
    return Exported(bundle, captured, tapes[-1].goldens)


def figure(bundle: Bundle, rung: str, component: str, metric: str, **floors: float) -> Any:
    found = verify(bundle, floors=floors or None)
    key = (rung, component, metric)
    return next(f for f in found if (f.rung, f.component, f.metric) == key)


def attempt(student: Path, out: Path, target: Target, **options: Any) -> str:
    """An export that fails: what is said, in one line, after which finished stages alone are left.

    These go too, for the next attempt to start afresh.
    """
    before = sorted(out.parent.iterdir())
    run = out.with_name(f"{out.name}.run")
    with pytest.raises(EdgeflashError) as caught:
        export_student(Student.open(student), target, out, ExportOptions(**options), console=QUIET)
    if run.exists():
        left = {path.name.partition("-")[0] for path in run.iterdir() if path.name != LOCK}
        assert left <= {"record", "lower"} and any(run.glob("*.json"))
        shutil.rmtree(run)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
