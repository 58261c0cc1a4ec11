"""What the pages say is there: links, headings, commands and their options."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from edgeflash.cli import app
from edgeflash.embedded import embedded
from edgeflash.student import Student

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (ROOT, *(ROOT / name for name in ("distill", "export", "runtimes", ".github")))
PAGES = [page for room in ROOMS for page in sorted(room.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def commands(page: Path) -> list[list[str]]:
    """Every `edgeflash` command of a page's shell blocks, as words."""
    lines = "\n".join(SHELL.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("edgeflash ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_their_options_exist(page: Path) -> None:
    known = get_command(app).commands
    for _, name, *words in commands(page):
        assert name in known, name
        takes = {option for parameter in known[name].params for option in parameter.opts}
        unknown = {word for word in words if word.startswith("--")} - takes
        assert not unknown, f"{name}: {unknown}"


def test_inline_commands_exist() -> None:
    known = get_command(app).commands
    for page in PAGES:
        told = set(re.findall(r"`edgeflash ([a-z][a-z-]+)", page.read_text()))
        assert told <= {*known}, page


def test_the_readme_and_the_cards_tell_the_same() -> None:
    """The demo's 500 prompts are those of the student's card, row by row."""
    readme = (ROOT / "README.md").read_text()
    card = (embedded("shapes-student") / "README.md").read_text()
    row = r"^\| (?:shipped student, fp32 \| )?([124])" + r" \| ([\d.]+) %" * 3 + r" \| (\d+) \|"
    shown, measured = (re.findall(row, text, re.MULTILINE) for text in (readme, card))
    assert [steps for steps, *_ in measured] == ["1", "2", "4"] and shown == measured
    manifest = Student.open(embedded("shapes-student")).manifest
    assert manifest
    assert f"recipe {manifest.lineage.recipe_sha256[:12]}" in card
    took = re.findall(r"\d h \d+ min", card)
    assert took and set(re.findall(r"\d h \d+ min", readme)) == set(took)
    teacher = (embedded("shapes-teacher") / "README.md").read_text()
    one, two = re.findall(r"([\d.]+) % for one object.*?([\d.]+) %\s+for two", teacher, re.DOTALL)[
        0
    ]
    said = re.findall(r"([\d.]+) % of the embedded .*?([\d.]+) % of\s+those with two", readme)
    assert said == [(one, two)]
