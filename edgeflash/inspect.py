"""Tells people what there is: plug-ins and their options, folders, and this machine's abilities."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from edgeflash.bundle import MANIFEST, Bundle, Figure, read_manifest
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.roles import Method, Plugin, Runtime, Target
from edgeflash.shelf import SHELVES, find, missing, names

if TYPE_CHECKING:
    from edgeflash.distill.judge import Verdict

ROLES: tuple[type[Plugin], ...] = (Method, Target, Runtime)
VERBS = {Method: "distill by", Target: "export to", Runtime: "run on"}
EXTRA_OF = {  # extra -> the package that shows it is there
    "distill": "accelerate",
    "export": "onnxscript",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "coreml": "coremltools",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}


def the_shelf() -> RenderableType:
    """Every plug-in by role, with its first line and what it still needs here."""
    table = _table("", "name", "what it does", "")
    for role in ROLES:
        for name in names(role):
            plugin = None if missing(role) else find(role, name, check=False)
            lacking = missing(plugin or role)
            said = _first_line(plugin) if plugin else "?"
            needs = f"needs {', '.join(lacking)}" if lacking else ""
            table.add_row(VERBS[role], name, escape(said), needs)
        table.add_section()
    return table


def one_plugin(name: str) -> RenderableType:
    """A plug-in's documentation and its options.

    Raises:
        EdgeflashError: no plug-in of that name.
    """
    roles = [role for role in ROLES if name in names(role)]
    if not roles:
        raise unknown("plug-in", name, {n for role in ROLES for n in names(role)})
    return Group(*(part for role in roles for part in _plugin(role, name)))


def _plugin(role: type[Plugin], name: str) -> list[RenderableType]:
    plugin = find(role, name)
    room, prefix = SHELVES[role]
    table = _table("option", "default", "what it means")
    for field, info in plugin.model_fields.items():
        default = "required" if info.is_required() else str(info.get_default())
        table.add_row(field, escape(default), escape(info.description or ""))
    head = f"[bold]{VERBS[role]} {name}[/bold]   {room}/{prefix}{name}.py"
    return [head, escape(_doc(plugin)), table]


def tell(folder: Path) -> RenderableType:
    """What a student, bundle or plain diffusers folder holds.

    Raises:
        EdgeflashError: none of these.
    """
    if (folder / MANIFEST).is_file():
        kind = _kind(folder)
        return _bundle(folder) if kind == "bundle" else _student(folder)
    if (folder / "model_index.json").is_file():
        return _student(folder)
    raise EdgeflashError(f"{folder}: neither a bundle nor a diffusers folder")


def _kind(folder: Path) -> str:
    import json

    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind"))
    except (ValueError, AttributeError):
        read_manifest(folder, "bundle")  # says what is wrong with it
        raise


def _bundle(folder: Path) -> RenderableType:
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    parts = _table("component", "target", "precision", "MiB", "takes -> gives")
    for component in manifest.components:
        mib = sum(file.bytes for file in component.files) / 2**20
        takes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in component.inputs)
        gives = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in component.outputs)
        parts.add_row(
            component.name,
            component.target,
            component.precision,
            f"{mib:.1f}",
            escape(f"{takes} -> {gives}"),
        )
    facts = {
        "bundle": f"{manifest.name} ({manifest.family}), {bundle.bytes / 2**20:.1f} MiB",
        "image": f"{manifest.image.height} x {manifest.image.width} px",
        "steps": ", ".join(map(str, sorted(manifest.schedules))),
        "guidance": f"{manifest.guidance.kind} {manifest.guidance.scale:g}",
        "weights licence": manifest.lineage.weights_licence or "not told",
    }
    return Group(_facts(facts), parts, ladder(manifest.parity))


def ladder(figures: tuple[Figure, ...]) -> RenderableType:
    """The parity ladder, a row a figure."""
    table = _table("rung", "component", "metric", "value", "limits", "")
    for figure in figures:
        low = "" if figure.floor is None else f">= {figure.floor:g}"
        high = "" if figure.ceiling is None else f"<= {figure.ceiling:g}"
        mark = "" if figure.passed else "[red]below[/red]"
        limits = f"{low} {high}".strip()
        value = f"{figure.value:.4g}"
        table.add_row(figure.rung, figure.component, figure.metric, value, limits, mark)
    return table


def _student(folder: Path) -> RenderableType:
    from edgeflash.student import Student

    student = Student.open(folder)
    parts = _table("component", "class", "MiB")
    total = 0.0
    for name, pair in student.index.items():
        if isinstance(pair, list) and len(pair) == 2 and pair[1]:
            files = [p for p in (folder / name).rglob("*") if p.is_file()]
            mib = sum(path.stat().st_size for path in files) / 2**20
            total += mib
            parts.add_row(name, str(pair[1]), f"{mib:.2f}")
    facts: dict[str, Any] = {"folder": f"{student.index['_class_name']}, {total:.1f} MiB"}
    if manifest := student.manifest:
        lineage = manifest.lineage
        stages = [f"{stage['by']} {stage['steps']} steps" for stage in lineage.stages]
        facts |= {
            "student": f"family {manifest.family}, recipe {(lineage.recipe_sha256 or '?')[:12]}",
            "steps": ", ".join(map(str, sorted(manifest.schedules))),
            "guidance": f"{manifest.guidance.kind} {manifest.guidance.scale:g}",
            "trained": f"{', '.join(stages)}; {(lineage.seconds or 0) / 60:.0f} min",
            "weights licence": lineage.weights_licence or "not told",
        }
    return Group(_facts(facts), parts)


def verdicts(found: dict[int, Verdict]) -> RenderableType:
    """The judge's verdicts by number of steps."""
    names = list(dict.fromkeys(name for v in found.values() for name in v.by_attribute))
    table = _table("steps", "prompt accuracy", "one object", "two objects", "FD", *names)
    for steps, verdict in found.items():
        shares = [verdict.prompt_accuracy, *(verdict.by_count.get(n, 0.0) for n in (1, 2))]
        cells = [f"{share:.1%}" for share in shares]
        cells.append("-" if verdict.fd is None else f"{verdict.fd:.2f}")
        cells += [f"{verdict.by_attribute[name]:.1%}" for name in names]
        table.add_row(str(steps), *cells)
    return table


def health() -> RenderableType:
    """Which extras are installed, at which version, and the line that installs the others."""
    table = _table("extra", "state", "to install it")
    for extra, package in EXTRA_OF.items():
        there = importlib.util.find_spec(package) is not None
        state = f"{package} {_version(package)}" if there else "not here"
        table.add_row(extra, state, "" if there else f"pip install 'edgeflash[{extra}]'")
    usable = _table("", "usable here", "not usable here")
    for role in ROLES:
        found = {n: missing(role) or missing(find(role, n, check=False)) for n in names(role)}
        good = ", ".join(name for name, lacking in found.items() if not lacking)
        bad = "; ".join(f"{n} (needs {', '.join(lacks)})" for n, lacks in found.items() if lacks)
        usable.add_row(VERBS[role], good, bad)
    return Group(table, usable)


def _version(package: str) -> str:
    for name in (package.replace("_", "-"), f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(version not told)"


def _doc(plugin: type[Plugin]) -> str:
    import inspect

    return inspect.cleandoc(plugin.__doc__ or "")


def _first_line(plugin: type[Plugin]) -> str:
    """The first line of the file, which says what it does, rather than of the class."""
    import sys

    said = (sys.modules[plugin.__module__].__doc__ or "").strip()
    return said.partition("\n")[0]


def _facts(facts: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(f"[dim]{name}[/dim]", escape(str(fact)))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
