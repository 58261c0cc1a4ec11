"""Tells people what there is: plug-ins and their options, folders, and this machine's abilities."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from edgeflash.bundle import Bundle, Caching, Figure
from edgeflash.control import CALLED
from edgeflash.disk import MANIFEST
from edgeflash.embedded import located
from edgeflash.errors import EdgeflashError, unknown
from edgeflash.gpu import find_gpu
from edgeflash.manifest import read_manifest
from edgeflash.roles import Method, Plugin, Runtime, Target
from edgeflash.shelf import EXTRAS, SHELVES, absent, find, imported_as, missing, names, pip_line

if TYPE_CHECKING:
    from edgeflash.distill.judge import Verdict
    from edgeflash.runtimes.lint import Finding, Judgement

ROLES: tuple[type[Plugin], ...] = (Method, Target, Runtime)
VERBS = {Method: "distill by", Target: "export to", Runtime: "run on"}


def the_shelf() -> RenderableType:
    """Every plug-in by role, with its first line and what it still needs here."""
    table = _table("", "name", "what it does", "")
    for role in ROLES:
        for name in names(role):
            plugin = _opened(role, name)
            lacking = missing(plugin)
            said = "?" if plugin is role else _first_line(plugin)
            needs = f"needs {', '.join(lacking)}" if lacking else ""
            table.add_row(VERBS[role], name, escape(said), needs)
        table.add_section()
    return table


def _opened(role: type[Plugin], name: str) -> type[Plugin]:
    """The plug-in, or its role where its file cannot be imported here."""
    return role if missing(role) else find(role, name, check=False)


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
    plugin = find(role, name, check=False)  # told without its packages; methods import torch
    room, prefix = SHELVES[role]
    table = _table("option", "default", "what it means")
    for field, info in plugin.model_fields.items():
        default = "required" if info.is_required() else str(info.get_default())
        table.add_row(field, escape(default), escape(info.description or ""))
    head = f"[bold]{VERBS[role]} {name}[/bold]   {room}/{prefix}{name}.py"
    lacking = missing(plugin)
    lack = f"needs {', '.join(lacking)} to run: {pip_line(lacking)}" if lacking else ""
    return [head, escape(_doc(plugin)), table, *([escape(lack)] if lack else [])]


def tell(folder: Path) -> RenderableType:
    """What a student, bundle or plain diffusers folder, or an embedded model, holds.

    ``folder``: or a single-file checkpoint, which is converted for it.

    Raises:
        EdgeflashError: none of these.
    """
    folder = located(folder)
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
    for component in manifest.lowered:
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
    if seen := ", ".join(f"{each.kind} ({each.channels})" for each in manifest.conditions):
        facts["sees, in channels"] = seen
    if bundle.steering:
        facts[CALLED[bundle.steering.name]] = "sees a picture: edgeflash run --control"
    if manifest.merging:
        told = manifest.merging
        facts["merged tokens"] = f"{told.share:.0%}: {told.image_psnr_db:g} dB from the student"
    if manifest.caching:
        facts["cached"] = told_of(manifest.caching)
    if manifest.unproven:
        facts["unproven"] = manifest.unproven
    if engine := manifest.components[0].engine:
        made = f"{engine.built_with} for {', '.join(engine.built_for)}"
        facts["engines"] = f"{engine.vendor} {made if engine.built_for else 'where it runs'}"
    return Group(_facts(facts), parts, ladder(manifest.parity))


def told_of(caching: Caching) -> str:
    """What a second graph leaves out, and what that costs."""
    how = f"no prompt from step {caching.gate} on"
    if caching.method == "deep-cache":
        how = f"whole every {caching.interval} steps, branch {caching.branch}"
    return f"{caching.method}, {how}: {caching.image_psnr_db:g} dB from the student"


def ladder(figures: tuple[Figure, ...]) -> RenderableType:
    """The parity ladder, a row a figure."""
    table = _table("rung", "component", "metric", "value", "limits", "prompts", "")
    for figure in figures:
        low = "" if figure.floor is None else f">= {figure.floor:g}"
        high = "" if figure.ceiling is None else f"<= {figure.ceiling:g}"
        mark = "" if figure.passed else "[red]below[/red]"
        limits = f"{low} {high}".strip()
        value, prompts = f"{figure.value:.4g}", str(figure.prompts or "")
        table.add_row(figure.rung, figure.component, figure.metric, value, limits, prompts, mark)
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
    """The judge's verdicts, a column for each number of steps."""
    verdicts = found.values()
    table = _table("", *(f"{steps} step{'s' * (steps != 1)}" for steps in found))

    def row(heading: str, shares: Iterable[float]) -> None:
        table.add_row(heading, *(f"{share:.1%}" for share in shares))

    row("prompt accuracy", (v.prompt_accuracy for v in verdicts))
    row("  one object", (v.by_count.get(1, 0.0) for v in verdicts))
    row("  two objects", (v.by_count.get(2, 0.0) for v in verdicts))
    table.add_row("FD", *("-" if v.fd is None else f"{v.fd:.2f}" for v in verdicts))
    for name in dict.fromkeys(name for v in verdicts for name in v.by_attribute):
        row(name, (v.by_attribute[name] for v in verdicts))
    return table


def judgement(judged: Judgement) -> RenderableType:
    """Whether a bundle fits a device, what stands against it, and the memory it takes."""
    device, parts = judged.device, [_memory(judged)]
    rules: dict[tuple[str, str], list[Finding]] = {}
    for finding in judged.findings:
        rules.setdefault((finding.rule, finding.source), []).append(finding)
    for findings in rules.values():
        parts.append(_broken(findings))
    head = f"[bold]{escape(device.name)}: {judged.told}[/bold]   {escape(device.chip)}"
    return Group(head, *parts, *map(escape, judged.left_open), "")


def _broken(findings: list[Finding]) -> RenderableType:
    """What breaks one rule, a row a component."""
    first, table = findings[0], _table("", "", "")
    table.show_header = False
    for finding in findings:
        table.add_row(finding.component, escape(finding.where), escape(finding.found))
    facts = {"limit": first.limit, "source": first.source, "to do": first.advice}
    return Group(f"[bold]{first.verdict}[/bold]: {first.rule}", table, _facts(facts))


def _memory(judged: Judgement) -> RenderableType:
    table = _table("component", "weights MiB", "results MiB", "most are alive at")
    for part in judged.seen:
        weights, results = (f"{n / 2**20:,.1f}" for n in (part.weight_bytes, part.peak.bytes))
        table.add_row(part.component.name, weights, results, escape(str(part.peak)))
    together, alone = (f"{n / 2**20:,.1f} MiB" for n in judged.bytes)
    told = f"estimate: {together} with all loaded, {alone} one at a time"
    for part in (part for part in judged.seen if part.alone):
        told += f"; in their place {part.component.name}, {part.bytes / 2**20:,.1f} MiB"
    return Group(table, told)


def health() -> RenderableType:
    """Which extras are installed, the line that installs the others, and what is usable here."""
    usable = _table("", "usable here", "not usable here")
    for role in ROLES:
        found = {name: missing(_opened(role, name)) for name in names(role)}
        good = ", ".join(name for name, lacking in found.items() if not lacking)
        bad = "; ".join(f"{n} (needs {', '.join(lacks)})" for n, lacks in found.items() if lacks)
        usable.add_row(VERBS[role], good, bad)
    devices = {f"{package} runs on": _asked(package) for package in DEVICES}
    return Group(_extras(), usable, _facts(devices))


def _extras() -> Table:
    table = _table("extra", "state", "to install it")
    for extra, distributions in EXTRAS.items():
        versions = [f"{name} {told}" for name in distributions if (told := _version(name))]
        packages = [imported_as(name) for name in distributions]
        line = f"pip install 'edgeflash[{extra}]'"
        if not absent(packages):  # onnxruntime and onnxruntime-gpu are imported by one name
            line = "" if versions else f"pip uninstall the other {packages[0]}, then {line}"
        table.add_row(extra, ", ".join(versions) or "not here", escape(line))
    return table


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _asked(package: str) -> str:
    """What a package says that it can run on here."""
    if absent([package]):
        return "nothing: not installed"
    try:
        return DEVICES[package](importlib.import_module(package))
    except EdgeflashError as error:
        return f"nothing: {error}"
    except Exception as error:  # a broken install is what people ask a doctor about
        return f"nothing: does not load: {' '.join(str(error).split())}"


def _torch_device(torch: Any) -> str:
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()}), cpu"
    return f"cpu; {'no CUDA device found' if torch.version.cuda else 'built without CUDA'}"


def _nvidia_device(vendor: Any) -> str:
    return str(find_gpu())


DEVICES: dict[str, Callable[[Any], str]] = {
    "onnxruntime": lambda ort: ", ".join(ort.get_available_providers()),
    "openvino": lambda ov: ", ".join(ov.Core().available_devices),
    "tensorrt": _nvidia_device,
    "tensorrt_rtx": _nvidia_device,
    "torch": _torch_device,
}


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
