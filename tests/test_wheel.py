"""What `make wheel` builds from, and what its check would catch."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_wheel import WANTED, check_files, strays

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_of_an_older_build_is_built_in() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nwheel:")[2]
    removed = recipe.partition("-m build")[0].split()
    assert "rm" in removed and {"build/wheel", "build/lib", "build/bdist*"} <= set(removed)


def test_a_file_that_the_source_tree_lacks_is_found() -> None:
    compiled = "edgeflash/__pycache__/cli.cpython-311.pyc"
    files = [*WANTED, compiled, "edgeflash-0.1.0.dist-info/RECORD", "../../../bin/edgeflash"]
    check_files(files)
    stale = ["edgeflash/distill/by_nothing.py", "edgeflash/models/gone/config.json"]
    assert strays([*files, *stale]) == stale
    with pytest.raises(AssertionError, match=r"not in the source tree.*by_nothing"):
        check_files([*files, *stale])
