"""ExecuTorch: what a program answers, what is said when one does not load, and a whole export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import QUIET

from edgeflash import shelf
from edgeflash.bundle import Bundle, Component, TensorSpec, describe_file
from edgeflash.errors import EdgeflashError
from edgeflash.export.capture import Captured, Sample
from edgeflash.export.line import export_student
from edgeflash.export.program import to_program
from edgeflash.parity import psnr_db
from edgeflash.roles import Runtime, Target
from edgeflash.student import Student
from edgeflash.verify import refuse_below, verify

INSTALL = "is not installed: pip install 'edgeflash[executorch,export]'"
pytest.importorskip("executorch", reason=f"executorch {INSTALL}")
Lowered = tuple[Path, Component, Sample]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Convolutions, which XNNPACK has, a norm, which it has not, and a number."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sides = ((4, 32), (32, 32), (32, 4))
            self.first, self.middle, self.last = (
                torch.nn.Conv2d(*pair, 3, padding=1) for pair in sides
            )
            self.norm = torch.nn.GroupNorm(2, 32)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = self.middle(torch.nn.functional.silu(self.norm(self.first(x))))
            return self.last(x + t)

    torch.manual_seed(0)
    target = shelf.make(Target, "executorch", {"precision": request.param})
    network = Network().eval()
    free = TensorSpec(name="x", role="sample", shape=("n", 4, 8, 8), dtype="float32")
    number = TensorSpec(name="t", role="timestep", shape=(), dtype="float32")
    inputs = tuple(target.takes(spec, whole=True) for spec in (free, number))
    assert [spec.shape for spec in inputs] == [(1, 4, 8, 8), ()]
    row = np.random.default_rng(0).standard_normal((4, 8, 8), np.float32)
    fed = {"x": row[None], "t": np.array(0.5, np.float32)}  # of stride 0, as recorded tokens are
    with torch.no_grad():
        answer = network(*(torch.tensor(array) for array in fed.values())).numpy()
    sample = Sample(fed, {"y": answer})
    output = TensorSpec(name="y", role="prediction", shape=(1, 4, 8, 8), dtype="float32")
    program = to_program(network, inputs, sample)
    folder = tmp_path_factory.mktemp("executorch")
    (path,) = target.lower(Captured("unet", program, inputs, (output,), (sample,)), folder)
    component = Component(
        name="unet",
        target="executorch",
        precision=request.param,
        files=(describe_file(folder, path.relative_to(folder).as_posix()),),
        inputs=inputs,
        outputs=(output,),
    )
    return folder, component, sample


def opened(folder: Path, component: Component, **options: Any) -> Any:
    return shelf.make(Runtime, "executorch", options).open(folder, component)


def test_a_program_answers_as_torch_does(lowered: Lowered) -> None:
    folder, component, sample = lowered
    session = opened(folder, component, threads=1)
    for array in sample.inputs.values():
        array.flags.writeable = False
    twice = [session(sample.inputs)["y"] for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    found_db, weights = psnr_db(sample.outputs["y"], twice[0]), 4 * 9 * 32 * (4 + 32 + 4)
    if component.precision == "fp32":
        assert found_db > 100 and component.files[0].bytes > weights
    else:
        assert 30 < found_db < 100 and component.files[0].bytes < weights
    session.close()


def test_what_does_not_fit_is_one_line(lowered: Lowered, tmp_path: Path) -> None:
    folder, component, sample = lowered
    wrong = sample.inputs | {"x": np.zeros((2, 4, 8, 8), np.float32)}
    with pytest.raises(EdgeflashError, match=r"^unet: ExecuTorch failed in a run: [^\n]+$"):
        opened(folder, component)(wrong)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/model.pte").write_bytes(b"no program")
    with pytest.raises(EdgeflashError, match=r"model.pte: ExecuTorch does not load it: [^\n]+$"):
        opened(tmp_path, component)


@pytest.mark.slow
def test_an_export_passes_the_ladder(one_step_student: Path, tmp_path: Path) -> None:
    student, target = Student.open(one_step_student), shelf.make(Target, "executorch", {})
    export_student(student, target, tmp_path / "out", console=QUIET)
    bundle = Bundle.open(tmp_path / "out", check="sha256")
    assert bundle.component("unet").input("sample").shape[0] == 1  # type: ignore[union-attr]
    refuse_below(verify(bundle), bundle.folder)
