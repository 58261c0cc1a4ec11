"""Manifests that lie, and what a process does whose parent is gone."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import tiny

from edgeflash.bundle import Bundle
from edgeflash.disk import MANIFEST
from edgeflash.embedded import embedded
from edgeflash.errors import EdgeflashError
from edgeflash.student import Student

Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["components"].clear(), "components"),
        (
            lambda m: m["components"][0]["files"][0].update(path="/etc/passwd"),
            "leads out of the bundle",
        ),
        (
            lambda m: m["components"][0]["files"][0].update(path="a/../../b"),
            "leads out of the bundle",
        ),
        (lambda m: m["components"][0]["files"][0].update(path="C:\\b"), "leads out of the bundle"),
        (lambda m: m["latent"].update(channels=7), "channels: 7, but the decoder takes"),
        (lambda m: m.update(format_version="two"), "format_version 'two' is none"),
        (lambda m: m.update(format_version=0), "format_version 0 is none"),
        (lambda m: m.pop("format_version"), "format_version None is none"),
        (lambda m: m["latent"].update(downsampling=0), r"latent\.downsampling = 0: must be"),
        (lambda m: m["latent"].update(scale=0), r"latent\.scale = 0"),
        (lambda m: m["tokenizer"].update(max_length=-1), r"tokenizer\.max_length = -1"),
        (lambda m: m["components"][0].update(files=[]), "has no files"),
        (lambda m: m["components"][0]["inputs"][0].update(shape=[]), "shape: has no rows"),
        (
            lambda m: m["components"][0]["files"][0].update(byte=3),
            r"no key in .* \[components\.0\.files\.0\]: 'byte' .*did you mean 'bytes'",
        ),
        (
            lambda m: m["components"][0]["inputs"][0].update(shape=[[]]),
            r"inputs\.0\.shape\.0 = \[\]: must be a whole number or text",
        ),
        (
            lambda m: m["schedules"].update(few=m["schedules"]["3"]),
            r"json: schedules\.few: this key must be a whole number",
        ),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: Change, told: str) -> None:
    folder = tiny(tmp_path / "bundle")
    Bundle.open(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EdgeflashError, match=told):
        Bundle.open(folder)


def test_a_measurement_ends_with_who_asked_for_it() -> None:
    code = (
        "import sys, subprocess as sp\n"
        "silent = sp.Popen(['sleep', '40'], stdout=sp.PIPE).stdout  # else it ends with its input\n"
        "p = sp.Popen([sys.executable, '-m', 'edgeflash.runtimes.measure'], stdin=silent)\n"
        "print(p.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert parent.stdout
    child = Path("/proc") / parent.stdout.readline().strip()
    if not child.parent.is_dir():
        pytest.skip("no /proc here")
    time.sleep(3)
    assert child.exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while child.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert not child.exists()


def test_a_size_beyond_all_memory_is_refused_before_the_work() -> None:
    from edgeflash.export import memory

    student = Student.open(embedded("shapes-student"))
    memory.check_size(student, (512, 512))
    with pytest.raises(EdgeflashError, match=r"1048576x1048576 px .*choose a smaller --size"):
        memory.check_size(student, (2**20, 2**20))


def test_ctrl_c_before_the_command_line_is_there() -> None:
    """While it is imported: one line and exit code 2, as ever."""
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'edgeflash.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from edgeflash.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "edgeflash: interrupted before it began\n")
