"""The loop, the data and whole recipes, on networks small enough for seconds."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field
from tiny_student import write_student
from torch import nn

from edgeflash.distill.data import open_store
from edgeflash.distill.loop import Order, train
from edgeflash.distill.run import _own_timesteps, _same_recipe, distill
from edgeflash.distill.stage import Batch, Player, Stage, Terms, Workshop, average
from edgeflash.errors import EdgeflashError
from edgeflash.recipe import Data, recipe_of
from edgeflash.roles import Method
from edgeflash.schedule import Guidance
from edgeflash.student import Student, write_manifest


class Toy(Method):
    """Two players pull one number each; the second takes every other turn."""

    ema: float = Field(0.9, ge=0, lt=1, description="decay")

    def begin(self, shop: Workshop) -> Stage:
        torch.manual_seed(0)
        first, second = nn.Linear(2, 1), nn.Linear(2, 1)

        def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            noise = torch.randn(len(batch["x"]), 2, generator=generator)
            return {"square": (network(batch["x"] + noise) - 1).square().mean()}

        return Stage(
            players={"first": Player(first, loss), "second": Player(second, loss, every=2)},
            batch=lambda indices: {
                "x": torch.from_numpy(indices)[:, None].float().repeat(1, 2) / 9
            },
            results={"first": first, "second": second},
            averages={"first": average(first, self.ema)},
            targets=[(average(second, 0.5), second)],
        )


def run_toy(folder: Path, *, stop_at: int | None = None, **options: Any) -> Stage:
    """Trains the toy; with ``stop_at`` a Ctrl-C falls into that step, which still ends."""
    folder.mkdir(exist_ok=True)
    toy = Toy(**{"steps": 8, "batch_size": 4, "learning_rate": 0.1} | options)
    stage = toy.begin(None)  # type: ignore[arg-type]
    plain, count = stage.batch, 0

    def batch(indices: np.ndarray) -> Batch:
        nonlocal count
        count += 1
        if count == stop_at:
            signal.raise_signal(signal.SIGINT)
        return plain(indices)

    stage.batch = batch
    accelerator = Accelerator(cpu=True)
    try:
        train(stage, toy, folder, accelerator, samples=10, seed=3, label="toy")
    finally:
        accelerator._custom_objects.clear()
    return stage


def weights(stage: Stage) -> list[torch.Tensor]:
    networks = [*stage.results.values(), *stage.averages.values(), stage.targets[0][0]]
    return [p.detach().clone() for network in networks for p in network.state_dict().values()]


def test_a_run_that_was_stopped_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    whole = run_toy(tmp_path / "whole")
    with pytest.raises(EdgeflashError, match=r"interrupted at step 5 of 8 .*same command again"):
        run_toy(tmp_path / "cut", stop_at=5)
    assert json.loads((tmp_path / "cut/checkpoint/progress.json").read_text())["step"] == 5
    resumed = run_toy(tmp_path / "cut")
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert steps == [8]


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EdgeflashError, match="interrupted at step 3"):
        run_toy(tmp_path / "a", stop_at=3)

    def save(accelerator: Accelerator, folder: str) -> None:
        Path(folder).mkdir()
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Accelerator, "save_state", save)
    with pytest.raises(EdgeflashError, match=r"disk full at step 5.* same command again"):
        run_toy(tmp_path / "a", stop_at=2)
    assert json.loads((tmp_path / "a/checkpoint/progress.json").read_text())["step"] == 3
    assert not (tmp_path / "a/checkpoint.new").exists()


def test_averages_follow_and_are_what_is_saved(tmp_path: Path) -> None:
    end = run_toy(tmp_path / "a")
    assert end.final()["second"] is end.results["second"]
    now, mean = end.results["first"].weight, end.final()["first"].weight
    start = Toy().begin(None).results["first"].weight  # type: ignore[arg-type]
    assert (mean - now).abs().max() > 0 < (mean - start).abs().max()


def test_players_take_turns(tmp_path: Path) -> None:
    turns: list[str] = []
    nets = {"student": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}

    def loss(name: str) -> Any:
        def of(net: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
            turns.append(name)
            return {"x": net(batch["x"]).mean()}

        return of

    stage = Stage(
        players={
            "critic": Player(nets["critic"], loss("critic")),
            "student": Player(nets["student"], loss("student"), every=2),
        },
        batch=lambda i: {"x": torch.ones(len(i), 1)},
        results=dict(nets),
    )
    toy = Toy(steps=3, batch_size=2)
    train(stage, toy, tmp_path, Accelerator(cpu=True), samples=4, seed=0, label="")
    assert turns == ["critic", "student", "critic", "critic", "student"]


def test_micro_batches_add_up_to_the_large_batch(tmp_path: Path) -> None:
    """The mean over micro-batches is the gradient of the whole batch (same noise, cut in two)."""
    torch.manual_seed(0)
    network = nn.Linear(2, 1, bias=False)
    seen: list[torch.Tensor] = []

    def loss(net: nn.Module, batch: Batch, generator: torch.Generator) -> Terms:
        return {"square": (net(batch["x"]) - 1).square().mean()}

    def gradient(accumulate: int) -> torch.Tensor:
        net = nn.Linear(2, 1, bias=False)
        net.load_state_dict(network.state_dict())
        net.weight.register_hook(lambda g: seen.append(g.clone()))
        stage = Stage(
            players={"p": Player(net, loss)},
            batch=lambda i: {"x": torch.from_numpy(i)[:, None].float().repeat(1, 2)},
            results={"p": net},
        )
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        toy = Toy(steps=1, batch_size=4, accumulate=accumulate, learning_rate=0.1)
        train(stage, toy, folder, Accelerator(cpu=True), samples=4, seed=0, label="")
        total = torch.stack(seen).sum(0)
        seen.clear()
        return total

    assert torch.allclose(gradient(1), gradient(2), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_and_names_itself(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    stage = Stage(
        players={
            "student": Player(net, lambda n, b, g: {"good": n.bias.sum(), "bad": n.bias.sum() / 0})
        },
        batch=lambda i: {"x": torch.zeros(1)},
        results={"student": net},
    )
    with pytest.raises(EdgeflashError, match=r"loss term 'bad' of 'student' is .* at step 0"):
        train(stage, Toy(), tmp_path, Accelerator(cpu=True), samples=9, seed=0, label="x")


def test_every_sample_comes_once_an_epoch() -> None:
    order = Order(10, 4, seed=1)
    drawn = np.concatenate([order.indices(step) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])
    assert list(Order(10, 4, seed=1).indices(3)) == list(drawn[12:16])


def picture_folder(home: Path, count: int = 6, size: int = 24) -> Path:
    home.mkdir()
    for i in range(count):
        pixels = np.full((size, size + 8, 3), 40 * i % 256, np.uint8)
        Image.fromarray(pixels).save(home / f"{i}.png")
        (home / f"{i}.txt").write_text(f"star {i}\n")
    return home


def test_a_folder_of_captioned_pictures(tmp_path: Path) -> None:
    home = picture_folder(tmp_path / "in")
    store = open_store(Data(kind="folder", path=str(home), samples=9, size_px=16), 0, tmp_path)
    assert store.captions == [f"star {i}" for i in range(6)]
    pixels = store.pictures(np.array([0, 5]))
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels[:, 0, 0, 0].tolist() == pytest.approx([-1, 200 / 127.5 - 1], abs=1e-6)


def test_shards_give_what_the_folder_gives(tmp_path: Path) -> None:
    home = picture_folder(tmp_path / "in")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(home.iterdir()):
            tar.add(path, path.name)
    settings = {"samples": 9, "size_px": 16}
    shards = open_store(Data(kind="shards", path=str(tmp_path / "a.tar"), **settings), 0, tmp_path)
    folder = open_store(Data(kind="folder", path=str(home), **settings), 0, tmp_path)
    assert shards.captions == folder.captions
    assert torch.equal(shards.pictures(np.arange(6)), folder.pictures(np.arange(6)))


def test_bad_samples_are_skipped_and_too_many_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = picture_folder(tmp_path / "in")
    (home / "6.png").write_bytes(b"no picture")
    (home / "6.txt").write_text("x")
    data = Data(kind="folder", path=str(home), samples=9, size_px=16)
    assert len(open_store(data, 0, tmp_path)) == 6
    assert "1 of 7 samples skipped, first 6.png: unreadable picture" in capsys.readouterr().err
    (home / "0.txt").write_text("\n")  # as good as none
    with pytest.raises(EdgeflashError, match=r"2 of 7 .*: no readable caption.*more than 1 %"):
        open_store(data, 1, tmp_path)


def test_data_that_the_disk_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(EdgeflashError, match=r"need 1 MiB, and 1 MiB are free; make room"):
        open_store(Data(samples=100), 0, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_captions_that_cannot_be_read(tmp_path: Path) -> None:
    home = picture_folder(tmp_path / "in")
    data = Data(kind="folder", path=str(home), samples=9, size_px=16)
    (home / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "a"}\n')
    with pytest.raises(EdgeflashError, match=r"metadata.jsonl, line 1: no 'text'; a line is"):
        open_store(data, 0, tmp_path)
    (home / "metadata.jsonl").write_text('{"file_name": "0.png"\n')
    with pytest.raises(EdgeflashError, match=r"metadata.jsonl, line 1: Expecting"):
        open_store(data, 0, tmp_path)
    (home / "metadata.jsonl").unlink()
    (home / "0.txt").write_bytes(b"caf\xe9")
    assert len(open_store(data, 0, tmp_path)) == 5


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="is no folder"):
        open_store(Data(kind="folder", path=str(tmp_path / "nowhere")), 0, tmp_path)
    with pytest.raises(EdgeflashError, match=r"no captioned pictures|nowhere"):
        open_store(Data(kind="shards", path=str(tmp_path / "nowhere.tar")), 0, tmp_path)


def small_recipe(tmp_path: Path, **changes: Any) -> Any:
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        write_student(teacher, tiny_decoder=False, widths=(16, 32), scheduler="DDIMScheduler")
        picture_folder(tmp_path / "in", 8, 16)
    common = {"steps": 2, "batch_size": 2}
    stages = [
        {"by": "decoder", "width": 8, "blocks": [1, 1], "adversarial_weight": 0.1, **common},
        {"by": "blocks", "rule": "small", **common},
        {"by": "lcm", "w_min": 1, "w_max": 2, **common},
    ]
    return recipe_of(
        {
            "name": "small",
            "teacher": str(teacher),
            "data": {"kind": "folder", "path": str(tmp_path / "in"), "samples": 8, "size_px": 16},
            "stage": stages,
            "sampling": {"steps": [1, 2], "default_steps": 2},
            **changes,
        },
        "test",
    )


def test_a_whole_recipe_gives_a_student_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    out = distill(small_recipe(tmp_path), tmp_path / "student")
    told = json.loads((out / "edgeflash.json").read_text())
    assert sorted(told["schedules"]) == ["1", "2"] and told["default_steps"] == 2
    stages = told["lineage"]["stages"]
    assert [stage["by"] for stage in stages] == ["decoder", "blocks", "lcm"]
    assert all(stage["samples_per_s"] > 0 < stage["peak_rss_mib"] for stage in stages)
    assert {f"features.{w}_blocks.{i}" for w in ("down", "up") for i in (0, 1)} < stages[1].keys()
    pipeline = StableDiffusionPipeline.from_pretrained(str(out), safety_checker=None)
    names = [type(part).__name__ for part in (pipeline.vae, pipeline.scheduler)]
    assert names == ["AutoencoderTiny", "LCMScheduler"] and pipeline.unet.mid_block is None
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("star", num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()
    assert not list((tmp_path / "student.run").glob("*/checkpoint"))


def test_a_finished_run_is_not_run_again_and_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    distill(small_recipe(tmp_path), tmp_path / "student")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "student.run").rglob("outcome.json")}
    distill(small_recipe(tmp_path), tmp_path / "student")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(EdgeflashError, match=r"another recipe \(changed: seed\)"):
        distill(small_recipe(tmp_path, seed=4), tmp_path / "student")


def test_a_mistake_at_the_start_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(EdgeflashError, match="no such folder"):
        distill(small_recipe(tmp_path, teacher=str(tmp_path / "typo")), tmp_path / "student")
    with pytest.raises(EdgeflashError, match=r"size_px = 15: .* wants a multiple of 2 px"):
        odd = {"kind": "folder", "path": str(tmp_path / "in"), "size_px": 15}
        distill(small_recipe(tmp_path, data=odd), tmp_path / "student")
    with pytest.raises(EdgeflashError, match="method 'lcm' needs a teacher"):
        distill(recipe_of({"name": "x", "stage": [{"by": "lcm"}]}, "x"), tmp_path / "student")
    distill(small_recipe(tmp_path), tmp_path / "student")


def test_a_begun_stage_goes_on_with_another_rate_and_a_done_one_does_not(tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        stages = [stage.options | {"by": stage.by} for stage in recipe.stage]
        stages[1 if "rule" in changes or "steps" in changes else 0] |= changes
        try:
            _same_recipe(small_recipe(tmp_path, stage=stages), tmp_path)
        except EdgeflashError as error:
            return str(error)
        return ""

    recipe = small_recipe(tmp_path)
    _same_recipe(recipe, tmp_path)
    (tmp_path / "1-decoder").mkdir()
    (tmp_path / "1-decoder/outcome.json").write_text("{}")
    (tmp_path / "2-blocks/checkpoint").mkdir(parents=True)
    assert "(changed: decoder.learning_rate)" in refused(learning_rate=0.5)
    assert "(changed: blocks.ema, blocks.rule)" in refused(rule="tiny", ema=0.9)
    assert refused(steps=9) == ""


def test_a_student_tells_how_it_samples_and_carries_nobody_elses_card(tmp_path: Path) -> None:
    teacher = Path(small_recipe(tmp_path).teacher)
    write_manifest(teacher, steps=(3,), guidance=Guidance(kind="cfg", scale=2.0))
    (teacher / "README.md").write_text("the teacher's own")
    (teacher / "big.ckpt").write_text("not named in the index")
    told = teacher / "tokenizer/tokenizer_config.json"  # the index alone names the class
    told.write_text(json.dumps({"model_max_length": 16, "pad_token": "<|endoftext|>"}))
    recipe = small_recipe(tmp_path, sampling=None, floors={"ssim": 0.5})
    blocks = recipe.model_copy(update={"stage": recipe.stage[1:2]})
    pruned = Student.open(distill(blocks, tmp_path / "pruned")).manifest
    assert pruned and list(pruned.schedules) == [3] and pruned.guidance.scale == 2.0
    assert pruned.floors == {"ssim": 0.5}
    assert pruned.lineage.recipe_sha256 == blocks.sha256 and not pruned.lineage.own_timesteps
    few = Student.open(distill(recipe, tmp_path / "few")).manifest
    assert few and list(few.schedules) == [1, 2, 4] and few.guidance.kind == "none"
    assert few.lineage.own_timesteps == "lcm" == _own_timesteps(tmp_path / "few")
    left = {path.name for path in (tmp_path / "few").iterdir()}
    assert not left & {"README.md", "big.ckpt"} and "text_encoder" in left
    assert (tmp_path / "few/tokenizer/vocab.json").is_file()


def test_an_unknown_teacher_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EdgeflashError, match=r"empty: no diffusers folder"):
        distill(small_recipe(tmp_path, teacher=str(tmp_path / "empty")), tmp_path / "s")


def test_a_teacher_from_nothing(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    common = {"steps": 1, "batch_size": 2, "ema": 0.5}
    stages = [
        {"by": "autoencoder", "widths": [8, 8], **common},
        {"by": "reading", "text_width": 16, "text_layers": 1, **common},
        {"by": "denoising", "widths": [16, 16], "attribute_weight": 0.1, "mistakes": 0.5, **common},
    ]
    data = {"kind": "shapes", "samples": 12}
    plain = {"name": "t", "data": data, "stage": stages, "sampling": {"steps": [2]}}
    plain["sampling"] = {"steps": [2], "default_steps": 2, "guidance": "cfg", "guidance_scale": 3}
    out = distill(recipe_of(plain, "test"), tmp_path / "teacher")
    pipeline = StableDiffusionPipeline.from_pretrained(str(out), safety_checker=None)
    assert pipeline.vae.config.scaling_factor != 0.18215
    told = json.loads((out / "edgeflash.json").read_text())
    assert told["guidance"] == {"kind": "cfg", "scale": 3.0, "channels": 0}
    ids = pipeline.tokenizer("a red star", padding="max_length").input_ids
    assert len(ids) == 24 and ids[0] == pipeline.tokenizer.bos_token_id
    assert len(set(ids)) == 5  # start, three words that are one token each, end
    (log,) = (tmp_path / "teacher.run" / "3-denoising" / "metrics.jsonl").read_text().splitlines()
    assert {"witness/witness", "unet/denoising", "unet/attributes"} <= set(json.loads(log))
    assert not (out / "witness").exists()
