"""`edgeflash search`: students under a budget of time, by what removing each block gains and costs.

Times of UNets are sums over their blocks, each measured, or estimated, once (`search_times.py`);
`search_walk.py` has the walk. What is proposed is exported and run as a whole, where it can be.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgeflash import control
from edgeflash.architecture import spelled
from edgeflash.blueprints import Blueprint
from edgeflash.disk import check_writable, write_for_people
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.price import check_asked, price
from edgeflash.report import System, told
from edgeflash.roles import Target
from edgeflash.search_blocks import Anatomist
from edgeflash.search_times import Estimated, MeasuredTimes
from edgeflash.search_value import Teacher, parameters_kept
from edgeflash.search_walk import Proposal, Walker, Wish
from edgeflash.shelf import make
from edgeflash.student import Student

if TYPE_CHECKING:
    from rich.console import Group

FILE, FOUND = "student.json", "search.json"
KINDS = {  # walks; the best of their ends is kept
    "blocks": {"widths": False},
    "channels": {"blocks": False},
    "both": {},
}
ATTEMPTS = 3  # whole students that are exported and run, until one is within the budget
SHARE = "share of parameters kept, a stand-in: what blocks do for pictures was not measured"
LOSS = "minus the loss of the UNet's output before any training, |T - S|^2 / |T|^2"


@dataclass(frozen=True)
class Check:
    """A proposal that was exported and run as a whole: the figures of that."""

    proposal: Proposal
    system: System

    @property
    def step_ms(self) -> float:
        return self.system.stages["unet"].p50_ms

    @property
    def image_ms(self) -> float:
        return self.system.latency_ms_p50


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        teacher: its name.
        wish: what was asked for.
        by: how times were come by.
        value: what was taken for value.
        parts_ms: text encoders and decoder, predicted.
        proposals: the teacher first.
        checks: whole students that were run.
        blocks: distinct ones that were met.
        busy: whether the machine had other work before the search.
    """

    teacher: str
    wish: Wish
    by: str
    value: str
    parts_ms: dict[str, float]
    proposals: tuple[Proposal, ...]
    checks: tuple[Check, ...]
    blocks: int
    busy: bool

    @property
    def kept(self) -> Proposal:
        """The one that was run last, or else is worth most."""
        if self.checks:
            return self.checks[-1].proposal
        return max(self.proposals[1:], key=lambda each: each.value)

    @property
    def where(self) -> str:
        """Runtime and precision, or device."""
        on = self.wish.on
        return f"{on.on} {on.precision}" if on else self.wish.estimating.name


def search(
    teacher: Student | Blueprint,
    wish: Wish,
    out: Path,
    *,
    runs: int = 5,
    command: str | None = None,
    console: Console,
) -> Found:
    """Writes the architecture that is worth most within the budget, and what was found.

    Args:
        teacher: what to remove from; a folder's weights then tell what blocks are worth.
        wish: the budget, and where.
        out: folder of `student.json`, `search.json` and, where it was run, its report.
        runs: counted runs of a whole student.
        command: that makes this again, for the record.
        console: where progress is told.

    Raises:
        EdgeflashError: nothing gets within the budget, or options do not fit the teacher.
    """
    check_writable(out)
    if wish.on:
        make(Target, wish.on.on, {"precision": wish.on.precision})  # says what is wrong with it
    check_asked(teacher, (wish.steps,) if wish.on else (), wish.size)
    machine = Machine.here()  # before the work, so that the load is that of others
    with tempfile.TemporaryDirectory(prefix="edgeflash-search-") as scratch:
        one = _Search.begin(teacher, wish, Path(scratch), console)
        one.propose()
        while wish.on and len(one.checks) < ATTEMPTS:
            whole = one.whole(Path(scratch) / f"student-{len(one.checks) + 1}")
            console.print(f"exporting and running {one.kept.name} as a whole", highlight=False)
            report = price(
                whole,
                [wish.on],
                out,
                steps=(wish.steps,),
                size=wish.size,
                runs=runs,
                command=command,
                console=console,
            )
            one.checks.append(Check(one.kept, report.systems[0]))
            if one.checks[-1].image_ms <= wish.budget_ms or len(one.checks) == ATTEMPTS:
                break
            if not one.correct():
                break
    found = Found(
        teacher=teacher.folder.resolve().name if isinstance(teacher, Student) else teacher.name,
        wish=wish,
        by=one.walker.times.told,
        value=LOSS if one.trained else SHARE,
        parts_ms=one.parts_ms,
        proposals=(one.start, *one.proposals),
        checks=tuple(one.checks),
        blocks=one.walker.anatomist.distinct,
        busy=machine.busy,
    )
    write_found(found, out, command)
    return found


@dataclass
class _Search:
    """What every step of a search needs."""

    teacher: Student | Blueprint
    walker: Walker
    start: Proposal
    parts_ms: dict[str, float]
    trained: Teacher | None
    proposals: list[Proposal] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def begin(
        cls, teacher: Student | Blueprint, wish: Wish, scratch: Path, console: Console
    ) -> _Search:
        opened = _opened(teacher, scratch / "teacher")
        size = wish.size or opened.family.size(opened)
        anatomist = Anatomist(opened, size)
        config = spelled(opened.config("unet"))
        anatomy = anatomist.apart(config)
        times = MeasuredTimes(wish.on, console) if wish.on else Estimated(wish.estimating)
        others = [name for name in opened.family.components() if name != "unet"]
        parts_ms = {name: times.part_ms(opened, name, size) for name in others}
        if (beside := sum(parts_ms.values())) >= wish.budget_ms:
            raise EdgeflashError(
                f"--budget-ms {wish.budget_ms:g}: text encoder and decoder alone take "
                f"{told(beside)} ms ({times.told}): allow more, or choose a smaller --decoder"
            )
        trained = None
        if isinstance(teacher, Student):
            with console.status("drawing with the teacher"):
                trained = Teacher(opened, size)
        value = trained or parameters_kept(anatomy)
        calls = 2 if opened.guidance().kind == "cfg" else 1
        walker = Walker(anatomist, times, value, calls, wish, beside, console)
        start = walker.valued(walker.look("teacher", config, ()))
        return cls(teacher, walker, start, parts_ms, trained)

    @property
    def kept(self) -> Proposal:
        return max(self.proposals, key=lambda each: each.value)

    def propose(self) -> None:
        """The end of every walk that gets within the budget.

        Raises:
            EdgeflashError: none does, or none needs to.
        """
        budget, start = self.walker.wish.budget_ms, self.start
        if start.image_ms <= budget:
            raise EdgeflashError(
                f"--budget-ms {budget:g}: the teacher itself takes {told(start.image_ms)} ms "
                f"({self.walker.times.told}): nothing needs to go"
            )
        self.proposals = self._ends()
        if not self.proposals:
            raise EdgeflashError(
                f"--budget-ms {budget:g}: no student of this teacher is as quick, with all removed "
                "that can be: allow more, or begin with a smaller --teacher"
            )

    def _ends(self) -> list[Proposal]:
        ends = [self.walker.walk(self.start, name, **kinds) for name, kinds in KINDS.items()]
        return [each for each in ends if each]

    def whole(self, folder: Path) -> Student | Blueprint:
        """The kept proposal as a student that can be exported."""
        if self.trained:
            self.trained.write(self.kept.config, folder)
            return Student.open(folder)
        assert isinstance(self.teacher, Blueprint)
        return replace(self.teacher, name=FILE, unet=self.kept.config)

    def correct(self) -> bool:
        """Walks on to the budget by what the last whole student took; False where none gets there.

        The times of blocks were measured at another time than that student.
        """
        last, walker = self.checks[-1], self.walker
        walker.console.print(f"it takes {told(last.image_ms)} ms: on to less", highlight=False)
        walker.scale *= last.step_ms / last.proposal.step_ms
        walker.beside_ms = last.image_ms - walker.wish.steps * last.step_ms
        before, self.start = self.start, walker.look("teacher", self.start.config, ())
        self.start = walker.valued(self.start)
        if found := self._ends():
            self.proposals = found
        else:
            self.start = before
        return bool(found)


def _opened(teacher: Student | Blueprint, folder: Path) -> Student:
    """To read configs from.

    Raises:
        EdgeflashError: it has no UNet.
    """
    if isinstance(teacher, Blueprint):
        teacher.write_configs(folder)
        return Student.unfinished(folder)
    if teacher.family.denoiser != "unet":
        raise EdgeflashError(
            f"{teacher.folder}: has a {teacher.family.denoiser}; blocks of UNets alone are searched"
        )
    if steering := teacher.family.steering:
        raise EdgeflashError(
            f"{teacher.folder}: no UNets that a {control.CALLED[steering]} steers are searched so "
            "far: name a folder without one"
        )
    return teacher


def write_found(found: Found, out: Path, command: str | None) -> None:
    """The UNet's config, as `edgeflash price` and the method `blocks` read it, and all figures."""
    config = {"_class_name": "UNet2DConditionModel"} | found.kept.config
    write_for_people(out / FILE, json.dumps(config, indent=1))
    plain = {
        "command": command,
        "teacher": found.teacher,
        "budget_ms": found.wish.budget_ms,
        "steps": found.wish.steps,
        "where": found.where,
        "times": found.by,
        "value": found.value,
        "distinct_blocks": found.blocks,
        "parts_ms": found.parts_ms,
        "machine_busy": found.busy,
        "proposals": [_plain(each) for each in found.proposals],
        "kept": found.kept.name,
        "whole": [
            {
                "predicted": _plain(check.proposal),
                "measured_step_ms": check.step_ms,
                "measured_image_ms": check.image_ms,
            }
            for check in found.checks
        ],
    }
    write_for_people(out / FOUND, json.dumps(plain, indent=1))


def _plain(proposal: Proposal) -> dict[str, Any]:
    told = {name: value for name, value in vars(proposal).items() if name != "anatomy"}
    parameters = proposal.anatomy.parameters
    return told | {"parameters": parameters, "call_gflop": proposal.call_gflop}


def found_tables(found: Found) -> Group:
    """For the terminal: what is proposed, what went, and predicted against measured."""
    from rich.console import Group

    went = [f"{p.name}: without {', '.join(p.removed)}" for p in found.proposals[1:]]
    lines = [*went, f"kept: {found.kept.name}; by value, the {found.value}"]
    parts = [_table(found), *lines]
    if found.checks:
        parts.append(_checks_table(found))
        if found.checks[-1].image_ms > found.wish.budget_ms:
            parts.append("over the budget: measured as a whole it takes longer than its blocks did")
        if found.busy:
            parts.append(
                "the machine was busy with other work: times are longer than of an idle one"
            )
    else:
        parts += ["estimates, not measured", found.wish.estimating.told()]
    return Group(*parts)


def _table(found: Found) -> Any:
    from rich.table import Table

    title = f"students of {found.teacher} within {told(found.wish.budget_ms)} ms"
    steps = f"{found.wish.steps} step{'s' * (found.wish.steps != 1)}"
    how = f"{found.where}, {steps}; {found.blocks} distinct blocks, {found.by}"
    out = Table(title=f"{title}\n{how}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    lost = "output lost" if found.value == LOSS else "kept"
    for heading in ("", "M parameters", lost, "GFLOP", "step ms", "image ms"):
        out.add_column(heading, justify="right" if heading else "left")
    for each in found.proposals:
        value = -each.value if found.value == LOSS else each.value
        out.add_row(
            each.name,
            told(each.anatomy.parameters / 1e6),
            f"{value:.1%}",
            *map(told, (each.call_gflop, each.step_ms, each.image_ms)),
        )
    return out


def _checks_table(found: Found) -> Any:
    from rich.table import Table

    title = "exported and run as a whole"
    out = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("", "predicted ms", "measured ms", "ratio"):
        out.add_column(heading, justify="right" if heading else "left")
    for check in found.checks:
        rows = {"step": (check.proposal.step_ms, check.step_ms)}
        rows["image"] = (check.proposal.image_ms, check.image_ms)
        for name, (predicted, measured) in rows.items():
            ratio = f"{measured / predicted:.2f}"
            out.add_row(f"{check.proposal.name}, {name}", told(predicted), told(measured), ratio)
    return out
