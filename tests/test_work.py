"""What a network has to do and to keep is told from its layers alone, and held against memory."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import QUIET
from rich.console import Console
from test_price import skeleton
from tiny_pixart import write_pixart
from tiny_sd3 import write_sd3
from tiny_sdxl import write_sdxl
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from edgeflash import shelf
from edgeflash.blueprints import Blueprint
from edgeflash.errors import EdgeflashError
from edgeflash.export import memory
from edgeflash.export.line import export_student
from edgeflash.export.sensitivity import sensitivity
from edgeflash.roles import Target
from edgeflash.student import Student
from edgeflash.work import _Alive, _taught, alive_bytes, gflops, taught_bytes

PARTS = ("text_encoder", "unet", "vae_decoder")
NUMBERS = {"text_encoder": 123_060_480, "unet": 323_384_964, "vae_decoder": 49_490_199}


class Attention(nn.Module):
    """Of 2 heads, 64 tokens, 8 channels."""

    def forward(self, x: Any) -> Any:
        return scaled_dot_product_attention(2 * x, x, x)


def most(network: nn.Module, x: Any) -> int:
    alive = _Alive(network)
    with torch.no_grad(), alive:
        network(x)
    return alive.most


def test_results_count_while_they_are_held_and_weights_never() -> None:
    with torch.device("meta"):
        convs = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
        x, result = torch.zeros(1, 4, 16, 16), 8 * 256 * 4
        written_over = nn.Sequential(convs[0], nn.SiLU(inplace=True), nn.Flatten(2), nn.Flatten())
        assert most(convs, x) == 2 * result  # what SiLU takes and makes; the last one makes half
        assert most(written_over, x) == result, "neither what is written in place nor a view counts"
        wide = nn.Linear(8, 4096)
        assert most(wide, torch.zeros(1, 8)) == 4096 * 4, "a weight's view is no result"
        # Back: three results, what the last one is handed, and what it hands back to SiLU.
        frozen = convs.requires_grad_(False)
        assert _taught(frozen, [x]) >= 4 * result


def test_attention_takes_the_square_of_tokens_in_graphs_and_not_on_the_way_back() -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 2, 64, 8)
    square = 2 * 64 * 64 * 4
    assert 2 * square <= most(Attention(), x) < 3 * square
    assert _taught(Attention(), [x.clone()]) < square


def test_the_work_of_an_encoder_that_asks_for_its_mask_is_told(tmp_path: Path) -> None:
    write_pixart(tmp_path / "student")
    found = gflops(Student.open(tmp_path / "student"))
    assert list(found) == ["text_encoder", "transformer", "vae_decoder"]
    assert all(work > 0 for work in found.values())


@pytest.mark.parametrize("write", [write_pixart, write_sd3, write_sdxl])
def test_networks_of_every_family_are_looked_at(tmp_path: Path, write: Any) -> None:
    student = Student.open(write(tmp_path / "student"))
    family, size = student.family, student.family.size(student)
    for name in {*family.components(encoder=True)}.difference(family.text_encoders):
        outputs = family.signature(student, name, size)[1]
        made = 4 * sum(math.prod(s for s in out.shape if isinstance(s, int)) for out in outputs)
        assert alive_bytes(student, name, size) >= made, name
    for name in (family.denoiser, "vae_decoder"):
        assert taught_bytes(student, name, size) > alive_bytes(student, name, size) / 2


def pruned(folder: Path, monkeypatch: pytest.MonkeyPatch, have_gib: float) -> Student:
    """BK-SDM-Tiny on a machine of so much memory."""
    monkeypatch.setattr(memory, "numbers_of", lambda student, name: NUMBERS[name])
    monkeypatch.setattr(memory, "available_bytes", lambda: have_gib * 2**30)
    monkeypatch.setattr(memory, "installed_bytes", lambda: 8 * 2**30)
    return skeleton(Blueprint.of("bk-sdm-tiny"), folder)


def test_what_running_takes_is_estimated_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.6 GiB at 512 px, as export/README.md has it; and with its pictures it grows."""
    student, told = pruned(tmp_path, monkeypatch, 4), Console(file=io.StringIO(), width=999)
    target = shelf.make(Target, "onnx", {})
    memory.check_running(student, target, PARTS, (512, 512), told)
    said = told.file.getvalue()  # type: ignore[attr-defined]
    assert "unet would take some 4.6 GiB of memory to run at 512x512 px" in said
    assert "4.0 GiB are free: choose a smaller --size" in said
    with pytest.raises(EdgeflashError, match=r"GiB is all there is: choose a smaller --size"):
        memory.check_running(student, target, PARTS, (1024, 1024), QUIET)
    quarter = alive_bytes(student, "vae_decoder", (256, 256))
    assert alive_bytes(student, "vae_decoder", (512, 512)) == pytest.approx(4 * quarter, rel=0.01)


def test_what_a_plan_takes_is_told_before_it_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = pruned(tmp_path, monkeypatch, 8)
    memory.check_taught(student, PARTS, (256, 256), QUIET)
    with pytest.raises(EdgeflashError, match=r"vae_decoder would take .* to backpropagate through"):
        memory.check_taught(student, PARTS, (768, 768), QUIET)


def test_memory_that_ends_in_a_plan_is_named() -> None:
    def ends(name: str, keep: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    tape: Any = SimpleNamespace(record=ends)
    with pytest.raises(EdgeflashError, match=r"unet: out of memory.* choose a smaller --size"):
        sensitivity(tape, None, ["unet"], ["int8"])  # type: ignore[arg-type]


@pytest.mark.usefixtures("replay")
def test_memory_that_ends_on_the_ladder_is_named(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("edgeflash.export.line.verify", ends)
    student, target = Student.open(one_step_student), shelf.make(Target, "onnx", {})
    with pytest.raises(EdgeflashError, match=r"the ladder: out of memory, most likely"):
        export_student(student, target, tmp_path / "out", console=QUIET)
