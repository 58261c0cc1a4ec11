"""All components of an export: small ones here and in turn, large ones in processes of their own.

A component's calls are needed by the next one, its files are not: while a large component is being
lowered, the next one may be recorded, where memory suffices for both.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from edgeflash.errors import EdgeflashError
from edgeflash.no_memory import memory_named
from edgeflash.talk import Message

from . import memory, recorded
from .apart import Child, Request
from .capture import Tape
from .hashing import homes_of
from .journal import Outcome, Stage
from .nursery import Nursery
from .progress import Stages
from .stages import Run, lower_stage, make_component, record_stage


def make_all(
    tape: Tape,
    components: Collection[str],
    run: Run,
    apart: Request | None,
    large: Collection[str],
    at_once: int,
    stages: Stages,
    nursery: Nursery | None = None,
) -> list[Outcome]:
    """Every component's files, as far as they are not there yet; winds the tape to its end.

    Args:
        tape: at its beginning.
        components: in the order a prompt passes them.
        run: where the stages lie.
        apart: what children are told; None: there are none.
        large: components for children.
        at_once: so many children, at most.
        stages: where progress is told.
        nursery: where children begin.
    """
    crew, made = _Crew(run, at_once, stages, nursery), list[tuple[Stage, Outcome | None]]()
    after = before = ""
    try:
        for name in components:
            record = record_stage(tape, name, run, before)
            advice = memory.less(tape.student, tape.target, name)
            if apart and name in large and not _is_there(tape, record, name, run):
                told = {"component": name, "after": after, "before": before, "advice": advice}
                calls = crew.recorded(tape, record, apart.model_copy(update=told))
                made.append((lower_stage(tape, name, run, calls), None))
            else:
                with memory_named(name, advice):
                    calls, lowered = make_component(tape, name, run, before, stages.told)
                if name in large:  # networks and programs hold themselves in circles
                    gc.collect()
                made.append((lower_stage(tape, name, run, calls), lowered))
            after, before = name, calls.sha256
        crew.finish()
    finally:
        crew.end()
    return [lowered or _read(stage) for stage, lowered in made]


def unfinished(tape: Tape, components: Sequence[str], run: Run) -> list[str]:
    """Those of which something is left to do; looks at marks alone."""
    left, before = list[str](), ""
    for i, name in enumerate(components):
        record = record_stage(tape, name, run, before)
        calls = record.read() if record.mark.exists() else None
        if calls is None:  # nor can it be told what those behind it would be made from
            return [*left, *components[i:]]
        left += [name] * (lower_stage(tape, name, run, calls).read() is None)
        before = calls.sha256
    return left


def _is_there(tape: Tape, record: Stage, name: str, run: Run) -> bool:
    """Whether nothing is left to do; looks at marks alone."""
    calls = record.read() if record.mark.exists() else None
    return calls is not None and lower_stage(tape, name, run, calls).read() is not None


def _read(stage: Stage) -> Outcome:
    if (found := stage.read()) is None:
        raise _changed_meanwhile(stage)
    return found


def _changed_meanwhile(stage: Stage) -> EdgeflashError:
    """A child ended well, but made a stage from something else than this process knows."""
    return EdgeflashError(
        f"{stage.name}: edgeflash's code or its packages changed meanwhile; "
        "run the same command again"
    )


@dataclass
class _Crew:
    """The children at work."""

    run: Run
    at_once: int
    stages: Stages
    nursery: Nursery | None
    children: list[Child] = field(default_factory=list)

    def recorded(self, tape: Tape, record: Stage, request: Request) -> Outcome:
        """Sets a child to work, and goes on as soon as its calls are written."""
        while len(self.children) >= self.at_once:
            self._wait(self.children[0])
        hashes = self.run.hashes.parts[homes_of(tape.student, request.component)]
        child = Child(request, hashes, self._tell, self.nursery)
        self.children.append(child)
        child.recorded.wait()
        if (calls := record.read()) is None:
            self._wait(child)
            raise _changed_meanwhile(record)
        recorded.take_up(tape, request.component, record.folder)
        return calls

    def finish(self) -> None:
        """Waits for all, and raises what went wrong."""
        while self.children:
            self._wait(self.children[0])

    def end(self) -> None:
        for child in self.children:
            child.end()

    def _wait(self, child: Child) -> None:
        child.result()
        self.children.remove(child)
        child.end()

    def _tell(self, message: Message) -> None:
        """Of a child's listener."""
        if stage := message.get("begin"):
            self.stages.begin(stage)
        else:
            self.stages.end(message["end"], message["seconds"], message["mib"])
