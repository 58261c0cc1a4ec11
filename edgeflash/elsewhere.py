"""Times of candidates from the device they are for: what `edgeflash bench` or `price` wrote there.

`edgeflash export --precision auto --report FILE` exports and proves here, and looks times up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.comparison import compare
from edgeflash.errors import EdgeflashError
from edgeflash.machine import Machine
from edgeflash.report import PRECISION, Report, System, read_report
from edgeflash.roles import NO_DEVICE, Runtime

NEAR = 0.02  # sizes of one network in one precision differ by less, whatever its weights are


@dataclass(frozen=True)
class Entry:
    """One system of a report."""

    path: Path
    report: Report
    system: System

    @property
    def precision(self) -> str:
        return str(self.system.extra.get(PRECISION, ""))

    def alone(self) -> Report:
        return self.report.model_copy(update={"systems": (self.system,)})


@dataclass(frozen=True)
class Elsewhere:
    """Everything that was measured of one target's bundles, a picture at a time."""

    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, paths: Sequence[Path], to: str) -> Elsewhere:
        """Of report files, or the folders that hold them.

        Raises:
            EdgeflashError: one is no report, or none measured a target's bundle on a device.
        """
        reports = [(path, read_report(path)) for path in paths]
        every = [Entry(path, report, s) for path, report in reports for s in report.systems]
        found = tuple(entry for entry in every if entry.precision and _on_a_device(entry, to))
        if not found:
            names = ", ".join(map(str, paths))
            raise EdgeflashError(
                f"--report {names}: no --to {to} was measured there on a device: run edgeflash "
                "bench on bundles of it there"
            )
        return cls(found)

    def __contains__(self, precision: str) -> bool:
        return any(entry.precision == precision for entry in self.entries)

    @property
    def machine(self) -> Machine:
        return self.entries[0].report.machine

    @property
    def runtime(self) -> str:
        return self.entries[0].system.conditions.runtime

    @property
    def options(self) -> dict[str, Any]:
        """Of the runtime, as far as they are not the usual ones."""
        usual = shelf.make(Runtime, self.runtime, {}, check=False).model_dump()
        given = self.entries[0].system.conditions.options
        return {name: value for name, value in given.items() if value != usual.get(name)}

    def latency_ms(self, precision: str, bundle: Bundle) -> float:
        """The median there, of a picture in the bundle's default steps.

        Raises:
            EdgeflashError: not measured in these steps, or under conditions other than the first
                system's, or it is another network.
        """
        entry = self._entry(precision, bundle)
        first = self._entry(self.entries[0].precision, bundle)
        if differences := compare(first.alone(), entry.alone()).differences:
            raise EdgeflashError(
                f"--report {entry.path}: {precision} was not measured as {first.precision} was "
                f"({'; '.join(differences)}): measure all of them alike"
            )
        _check_same(entry, bundle)
        return entry.system.latency_ms_p50

    def _entry(self, precision: str, bundle: Bundle) -> Entry:
        steps = bundle.manifest.default_steps
        those = [entry for entry in self.entries if entry.precision == precision]
        found = [entry for entry in those if entry.system.steps == steps]
        if len(found) != 1:
            known = ", ".join(str(entry.system.steps) for entry in those)
            raise EdgeflashError(
                f"--report {those[0].path}: {precision} has {len(found)} figures of {steps} steps "
                f"(there are: {known}): give one, by edgeflash bench --steps {steps}"
            )
        return found[0]


def _on_a_device(entry: Entry, to: str) -> bool:
    asked = entry.system.conditions
    if asked.runtime not in shelf.names(Runtime) or asked.device == NO_DEVICE:
        return False
    return to in shelf.find(Runtime, asked.runtime, check=False).opens


def _check_same(entry: Entry, bundle: Bundle) -> None:
    """By what is asked for a picture, and the size of the denoiser."""
    manifest, there = bundle.manifest, entry.system.conditions
    name = bundle.denoiser.name
    mib = sum(file.bytes for file in bundle.denoiser.files) / 2**20
    told = entry.system.sizes_mib.get(name, 0.0)
    pairs = {
        "height": (there.height, manifest.image.height),
        "width": (there.width, manifest.image.width),
        "batch": (there.batch, 1),
        "guidance": (there.guidance_scale, manifest.guidance.scale),
    }
    wrong = [f"{what} {one}, here {other}" for what, (one, other) in pairs.items() if one != other]
    if abs(told - mib) > NEAR * mib:
        wrong.append(f"{name} of {told:.2f} MiB, here {mib:.2f}")
    if wrong:
        raise EdgeflashError(
            f"--report {entry.path}: {entry.system.name} is something else ({'; '.join(wrong)}): "
            "measure what is exported here"
        )
