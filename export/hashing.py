"""The hashes of a student's files: beside the work, each component's as soon as it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from edgeflash import control
from edgeflash.caching import whole_name
from edgeflash.families import tokenizer_of
from edgeflash.student import Student, hashes_in

Homes = tuple[str, ...]  # folders of a student that one component is in, its tokenizer's included
Found = dict[str, str]  # path below the student -> sha256


def home_of(student: Student, component: str) -> str:
    """The folder of a component's weights: a cached graph has its denoiser's."""
    component = whole_name(component)
    return component if component in student.index else "vae"


def homes_of(student: Student, component: str) -> Homes:
    """All folders that a component is made from, and what is recorded of it."""
    tokenizers = (tokenizer_of(component),) * (component in student.family.text_encoders)
    steered = component == student.family.denoiser and student.family.steering == control.NAME
    return (home_of(student, component), *tokenizers, *(control.NAME,) * steered)


@dataclass(frozen=True)
class Hashes:
    """Of what lies in the folders of each component, being computed; under () of all else."""

    parts: Mapping[Homes, Future[Found]]

    def of(self, homes: Homes) -> Found:
        """Waits for those of one component alone.

        Raises:
            OSError: a file could not be read.
        """
        return self.parts[homes].result()

    def all(self) -> Found:
        """Waits for the whole folder; sorted as `hashes_in` has them."""
        found = [pair for part in self.parts.values() for pair in part.result().items()]
        return dict(sorted(found, key=lambda pair: pair[0].split("/")))


def begin(folder: Path, components: Iterable[Homes], pool: Executor) -> Hashes:
    """Hashes a student's files, by components in the order in which they are made."""
    groups = list(dict.fromkeys(components))
    parts = {homes: pool.submit(hashes_in, folder, homes) for homes in groups}
    known = {home for homes in groups for home in homes}
    rest = [name for name in os.listdir(folder) if name not in known]
    return Hashes(parts | {(): pool.submit(hashes_in, folder, rest)})
