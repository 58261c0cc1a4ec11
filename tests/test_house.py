"""The rules of the house, held by the code itself."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgeflash.roles import Method, Plugin, Runtime, Target
from edgeflash.shelf import SHELVES, find, names

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("distill", "export", "runtimes")
FILES = [
    path for room in ("edgeflash", *ROOMS, "tests") for path in sorted((ROOT / room).glob("*.py"))
]
KNOW_ALL_ROOMS = {"benchmark.py", "choice.py", "cli.py", "cli_tell.py", "demo.py", "planning.py"}
KNOW_ALL_ROOMS |= {"search_times.py", "price.py", "score.py", "search_value.py"}
KNOW_ALL_ROOMS |= {"planning_report.py"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it but under ``if TYPE_CHECKING``."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def test_the_packages_are_the_four_folders_and_nothing_nested() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert told["package-dir"] == {"edgeflash": "edgeflash"} | {
        f"edgeflash.{room}": room for room in ROOMS
    }
    assert set(told["packages"]) == set(told["package-dir"])
    assert not [p for room in ROOMS for p in (ROOT / room).glob("*/__init__.py")]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other_room(room: str) -> None:
    others = [f"edgeflash.{other}" for other in ROOMS if other != room]
    for path in (ROOT / room).glob("*.py"):
        bad = {m for m in imports(path) if any(m == o or m.startswith(o + ".") for o in others)}
        bad |= {m for m in imports(path) if m.partition(".")[0] in ROOMS}
        assert not bad, f"{path.name} imports {bad}"


def test_the_core_imports_no_room() -> None:
    for path in (ROOT / "edgeflash").glob("*.py"):
        rooms = {m for m in imports(path) for room in ROOMS if m.startswith(f"edgeflash.{room}")}
        assert not rooms or path.name in KNOW_ALL_ROOMS, f"{path.name} imports {rooms}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            body = node.end_lineno - node.body[0].lineno
            assert body <= 60, f"{node.name} has {body} lines"


def test_the_light_half_loads_no_torch() -> None:
    """The core, the command line's help and all runtimes, with torch made unimportable."""
    modules = [f"edgeflash.runtimes.{path.stem}" for path in (ROOT / "runtimes").glob("*.py")]
    modules += ["edgeflash.cli", "edgeflash.bundle", "edgeflash.verify", "edgeflash.report_html"]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None\n"
    code += "\n".join(f"import {module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, env=_quiet())


def test_an_export_is_refused_without_torch() -> None:
    """It begins a nursery before it knows what is missing, which then is told in one line."""
    code = "import sys; sys.modules['torch'] = None\nimport edgeflash.export.nursery"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_neither_torch_nor_a_room() -> None:
    code = "import sys; sys.argv = ['edgeflash', '--help']\nfrom edgeflash.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('LOADED', [m for m in sys.modules if m == 'torch' or "
    code += "m.startswith(('edgeflash.distill', 'edgeflash.export', 'edgeflash.runtimes'))])"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_quiet()
    )
    assert "LOADED []" in told.stdout, told


@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role in SHELVES for name in names(role)]
)
def test_every_plugin_explains_itself(role: type[Plugin], name: str) -> None:
    plugin = find(role, name, check=False)
    assert plugin.__doc__ and plugin.model_config.get("frozen")
    for field, info in plugin.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
        assert not info.is_required(), f"{name}.{field} has no default"
    plugin()


def test_targets_and_runtimes_know_each_other() -> None:
    for name in names(Target):
        target = find(Target, name, check=False)
        assert name in find(Runtime, target.runtime, check=False).opens
    assert {"blocks", "decoder", "lcm"} <= set(names(Method))


def test_nothing_of_one_machine_is_named() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in listed.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ".json"} and path.is_file():
            assert not re.search(r"/(root|home/\w+|tmp/\w+)/", path.read_text()), name


def _quiet() -> dict[str, str]:
    return os.environ | {"COLUMNS": "100", "TERM": "dumb"}
