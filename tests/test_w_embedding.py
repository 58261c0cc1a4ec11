"""LCM students that are told their guidance, and LCM without a teacher, against closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gaussian import NOTHING, M, S, batch, posterior, process, seeded, variance
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_distill import small_recipe
from test_scm import unet
from tiny_student import WIDTH, write_student
from torch import Tensor

from edgeflash import shelf
from edgeflash.bundle import Bundle
from edgeflash.distill import fit
from edgeflash.distill.by_lcm import LCM, Lesson
from edgeflash.distill.run import distill
from edgeflash.distill.stage import Workshop
from edgeflash.distill.w_embedding import insist, listen, waves
from edgeflash.errors import EdgeflashError
from edgeflash.export.line import export_student
from edgeflash.export_options import ExportOptions
from edgeflash.recipe import recipe_of
from edgeflash.roles import Target
from edgeflash.runtimes.pipeline import Request, TextToImage
from edgeflash.schedule import Guidance
from edgeflash.student import Student
from edgeflash.verify import runtime_for

EMPTY = NOTHING + 5  # the caption whose pictures are elsewhere
M_EMPTY = 0.2
WIDE = 8  # waves of the small students
INPUT = "time_embedding.cond_proj.weight"


@pytest.mark.parametrize("width", [256, 33])
def test_training_tells_w_as_bundles_do(width: int) -> None:
    w = torch.tensor([0.0, 2.0, 7.5, 14.99])
    told = waves(w, width)
    wanted = [
        Guidance(kind="embedded", scale=1 + each, channels=width).embedding()[0]
        for each in w.tolist()
    ]
    assert told.shape == (4, width)
    np.testing.assert_allclose(told.numpy(), np.stack(wanted), rtol=0, atol=2e-3)


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def guided_teacher(it: Any) -> Any:
    """Knows N(m, s^2), and N(m_e, s^2) of the empty caption: guided, N(m + w (m - m_e), s^2)."""

    def network(x: Tensor, t: Tensor, c: Tensor) -> Any:
        centre = wide(torch.where(c.flatten() == 5, M_EMPTY, M))
        return posterior(it, centre)(x, t, c)  # type: ignore[arg-type]

    return network


class Exact:
    """Where the guided teacher's ODE ends, of the w that the waves tell, or of one of its own."""

    def __init__(self, it: Any, w: float | None = None) -> None:
        self.it, self.w, self.heard = it, w, []

    def __call__(self, x: Tensor, t: Tensor, c: Tensor, timestep_cond: Tensor) -> Any:
        slowest = timestep_cond[:, timestep_cond.shape[1] // 2 - 1]  # the sine of w / 10
        w = 10 * slowest.asin()
        self.heard.append(w)
        if self.w is not None:
            w = torch.full_like(w, self.w)
        m, it = wide(M + w * (M - M_EMPTY)), self.it
        return SimpleNamespace(sample=m + S * (x - it.alpha(t) * m) / variance(it, t).sqrt())


def told_loss(student: Any, **options: Any) -> float:
    it = process()
    lcm = LCM(w_embedding=WIDE, huber_c=1e-6, **options)
    lesson = Lesson(lcm, guided_teacher(it), student, it, EMPTY, lcm.ways(), None)
    return float(lesson.loss(student, batch(400), seeded())["consistency"])


@torch.no_grad()
def test_a_student_that_hears_w_goes_where_the_teacher_of_that_guidance_goes() -> None:
    """It has no loss but the solver's error; one that keeps to the middle of the range has."""
    hears = Exact(process())
    assert told_loss(hears) < 0.005
    assert told_loss(Exact(process(), w=9.0)) > 5 * told_loss(Exact(process()))
    target, own = hears.heard[:2]
    assert torch.equal(target, own) and 3 <= float(own.min()) < 4 < 14 < float(own.max()) <= 15


@torch.no_grad()
def test_own_samples_are_drawn_with_the_w_that_their_samples_have() -> None:
    hears = Exact(process())
    told_loss(hears, own_steps=4, ddim_steps=20)
    *before, _, last = hears.heard
    assert before and all(torch.equal(each, last[200:]) for each in before)


def test_at_one_w_a_fresh_input_changes_nothing() -> None:
    """Bit for bit: of the target, of the loss and of every gradient but the input's own."""
    it, teacher, hearing, plain = process("epsilon"), unet(), unet(), unet()
    listen(hearing, WIDE)
    given = {
        "x_0": torch.randn(4, 4, 8, 8, generator=seeded(1)),
        "c": torch.randn(4, 5, WIDTH, generator=seeded(2)),
    }
    nothing = torch.zeros(1, 5, WIDTH)
    losses = []
    for student, told in ((hearing, WIDE), (plain, None)):
        lcm = LCM(w_embedding=told, w_min=7.5, w_max=7.5)
        lesson = Lesson(lcm, teacher, student, it, nothing, [], None)
        losses.append(lesson.loss(student, given, seeded())["consistency"])
        losses[-1].backward()
    assert torch.equal(*losses)
    fresh = hearing.time_embedding.cond_proj.weight
    assert fresh.grad is not None and fresh.grad.any()
    found = dict(hearing.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, found[name]) and torch.equal(weight.grad, found[name].grad)


@torch.no_grad()
@pytest.mark.parametrize("predicts", ["sample", "epsilon", "v_prediction"])
def test_without_a_teacher_x_s_is_the_same_picture_with_the_same_noise(predicts: str) -> None:
    """alpha_s x_0 + sigma_s eps, with the eps that x_t = alpha_t x_0 + sigma_t eps tells."""
    it, lcm, seen = process(predicts), LCM(kind="fine-tuning", ddim_steps=20), []

    def student(x: Tensor, t: Tensor, c: Tensor) -> Any:
        seen.append((x, t))
        return SimpleNamespace(sample=0 * x)

    given = batch(400)
    Lesson(lcm, None, student, it, NOTHING, [], None).loss(student, given, seeded())
    (x_s, s), (x_t, t) = seen
    assert set((t - s).tolist()) <= {50, 49} and int(s.min()) == 0
    eps = (x_t - it.alpha(t) * given["x_0"]) / it.sigma(t)
    assert torch.allclose(x_s, it.alpha(s) * given["x_0"] + it.sigma(s) * eps, atol=1e-5)
    assert float(eps.std()) == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_pictures_that_are_all_the_same_have_no_loss_without_a_teacher() -> None:
    """Then f = x_0 wherever one stands; of N(m, s^2) nothing is that sure."""
    it, lcm = process(), LCM(kind="fine-tuning", huber_c=1e-6)
    point = {"x_0": torch.full((400, 1, 2, 2), M), "c": torch.zeros(400, 1, 1)}

    def loss(student: Any, given: dict[str, Tensor]) -> float:
        lesson = Lesson(lcm, None, student, it, NOTHING, [], None)
        return float(lesson.loss(student, given, seeded())["consistency"])

    sure = posterior(it, s=0)
    assert loss(sure, point) < 1e-3 < loss(posterior(it), batch(400)) / 5


@pytest.fixture(scope="module")
def told_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LCM that hears w, distilled, and then fine-tuned in a run that knows no teacher.

    What two steps and two teach its input is hardly seen, and told louder here.
    """
    home = tmp_path_factory.mktemp("told")
    stage = {"by": "lcm", "steps": 2, "batch_size": 2, "w_embedding": WIDE, "ema": 0}
    stage |= {"learning_rate": 0.01, "w_min": 1, "w_max": 4}
    first = distill(small_recipe(home, stage=[stage], sampling=None), home / "first")
    alone = {"teacher": None, "base": str(first), "sampling": None}
    tuned = {**stage, "kind": "fine-tuning", "own_steps": 0}
    out = distill(small_recipe(home, stage=[tuned], **alone), home / "second")
    file = out / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    assert weights[INPUT].shape == (16, WIDE) and weights[INPUT].all()
    save_file(weights | {INPUT: 50 * weights[INPUT]}, file, {"format": "pt"})
    return out


def test_the_folder_says_that_its_student_is_told(told_student: Path) -> None:
    """The usual scale, 8.5, where it was told that; here the nearest one."""
    told = json.loads((told_student / "edgeflash.json").read_text())
    assert told["guidance"] == {"kind": "embedded", "scale": 5.0, "channels": WIDE}
    assert list(told["schedules"]) == ["1", "2", "4"]
    config = json.loads((told_student / "unet/config.json").read_text())
    assert config["time_cond_proj_dim"] == WIDE
    first = Student.open(told_student.with_name("first"))
    assert first.guidance() == Student.open(told_student).guidance()


@pytest.mark.parametrize("target", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_from_training_to_pictures_of_two_scales(
    told_student: Path, tmp_path: Path, target: str
) -> None:
    """As diffusers draws them with the same folder and noise."""
    from diffusers import StableDiffusionPipeline

    from edgeflash.noise import randn

    made = shelf.make(Target, target, {})
    student, quiet = Student.open(told_student), Console(quiet=True)
    few = ExportOptions(steps=(1,), prompts=("a red star",))
    bundle: Bundle = export_student(student, made, tmp_path / "bundle", few, console=quiet)
    pipeline = StableDiffusionPipeline.from_pretrained(told_student, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    with TextToImage(bundle, runtime_for(bundle)) as drawing:
        for scale in (2.0, 5.0):
            asked = Request("a red star", seed=3, steps=1, guidance=scale)
            pictures.append(drawing.generate(asked).images[0].astype(int))
            theirs = pipeline(
                "a red star",
                num_inference_steps=1,
                guidance_scale=scale,
                latents=torch.from_numpy(randn((1, 4, 8, 8), 3)),
                output_type="np",
            ).images[0]
            assert np.abs(pictures[-1] - 255 * theirs).max() <= 2
    assert np.abs(pictures[0] - pictures[1]).max() > 4


@pytest.mark.parametrize(
    ("stages", "said", "complaint"),
    [
        ([{"by": "lcm"}], {"guidance": "embedded"}, "no stage tells the student its guidance"),
        ([{"by": "lcm", "w_embedding": 8}], {}, r"'none', but the student is told .* 'embedded'"),
        (
            [{"by": "lcm", "w_embedding": 8, "w_max": 9}, {"by": "decoder"}],
            {"guidance": "embedded", "guidance_scale": 11},
            r"guidance_scale: 11, but w_min and w_max tell .* from 4 to 10",
        ),
    ],
)
def test_a_recipe_samples_as_its_student_is_told(
    stages: list[dict[str, Any]], said: dict[str, Any], complaint: str
) -> None:
    def recipe(**sampling: Any) -> Any:
        return recipe_of({"name": "x", "stage": stages, "sampling": sampling}, "x")

    with pytest.raises(EdgeflashError, match=complaint):
        fit.check_guidance(recipe(**said), None)
    told = "w_embedding" in stages[0]
    right = {"guidance": "embedded", "guidance_scale": 10} if told else {"guidance": "none"}
    fit.check_guidance(recipe(**right), None)


def test_a_unet_that_hears_w_is_asked_with_it_or_not_at_all() -> None:
    network = unet()
    given = torch.randn(2, 4, 8, 8), torch.tensor([9, 9]), torch.randn(2, 5, WIDTH)
    insist(network, Path("student"))
    network(*given)
    listen(network, WIDE)
    network.register_to_config(time_cond_proj_dim=WIDE)
    insist(network, Path("student"))
    network(*given, timestep_cond=torch.zeros(2, WIDE))
    with pytest.raises(
        EdgeflashError, match=r"^student: its UNet is told the guidance .* lcm alone"
    ):
        network(*given)


@pytest.mark.parametrize(
    ("options", "hears", "said"),
    [
        ({}, 8, r"^lcm\.w_embedding: the student's UNet is told w by 8 waves .*: set 8$"),
        ({"w_embedding": 256}, 8, "is told w by 8 waves"),
        ({"w_embedding": 256, "lora_rank": 4}, None, "needs an input that LoRA does not train"),
    ],
)
def test_inputs_that_do_not_fit_the_student_are_refused(
    tmp_path: Path, options: dict[str, Any], hears: int | None, said: str
) -> None:
    base = write_student(tmp_path / "base", tiny_decoder=False, guidance_channels=hears)
    store: Any = None
    with pytest.raises(EdgeflashError, match=said):
        LCM(**options).listening(Workshop(None, base, store, tmp_path, torch.device("cpu")))


def test_no_other_method_goes_on_with_a_student_that_hears_w(tmp_path: Path) -> None:
    """Before any work is done, and whether a stage or the base is what made it so."""
    told: dict[str, Any] = {"by": "lcm", "w_embedding": 8}
    base = str(write_student(tmp_path / "base", tiny_decoder=False, guidance_channels=8))
    for stages, start in (([told, {"by": "dmd"}], {}), ([{"by": "lcm"}], {"base": base})):
        recipe = small_recipe(tmp_path, stage=stages, sampling=None, **start)
        with pytest.raises(EdgeflashError, match=rf"method '{stages[-1]['by']}': the denoiser is"):
            distill(recipe, tmp_path / "student")
    folders = [Path(base)]
    fit.check_kind(small_recipe(tmp_path, stage=[told, {"by": "decoder"}]), folders)


def test_ways_of_ones_own_need_a_teacher() -> None:
    with pytest.raises(ValueError, match="own_steps needs a teacher"):
        LCM(kind="fine-tuning", own_steps=2)
