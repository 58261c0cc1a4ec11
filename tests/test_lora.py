"""LoRA: trained by methods, resumed, saved as diffusers reads it, and fused at export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import say  # noqa: F401 - a fixture
from test_distill import small_recipe
from tiny_student import write_student

from edgeflash.disk import sha256_of
from edgeflash.distill import loop
from edgeflash.distill.folders import copy_folder
from edgeflash.distill.lora import TARGETS, _add
from edgeflash.distill.run import distill
from edgeflash.errors import EdgeflashError
from edgeflash.export import line, pack
from edgeflash.lora import FILE, Lora, fuse
from edgeflash.networks_sd import load_network
from edgeflash.recipe import changed, find_recipe, read_recipe
from edgeflash.student import Student

peft = pytest.importorskip("peft", reason="pip install 'edgeflash[distill]'")

RANK = 3
STAGES: dict[str, dict[str, Any]] = {
    "lcm": {"ema": 0.5, "lora_alpha": 6},
    "flash": {"teacher_steps": 4, "modes": [[0, 1, 0, 0]], "dmd_weights": [0.7]}
    | {"gan_weights": [0.3], "lora_targets": ["to_q", "to_k", "to_v", "to_out.0"]},
    "dmd": {},
    "sdxs": {"solver_steps": 2, "feature_share": 0},
}
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # of the tiny student
READING = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", STAGES)
def test_the_students_unet_is_the_teachers_with_the_lora_fused(tmp_path: Path, name: str) -> None:
    from diffusers import StableDiffusionPipeline

    stage = {"by": name, "steps": 3, "batch_size": 2, "learning_rate": 0.05, "lora_rank": RANK}
    recipe = small_recipe(tmp_path, stage=[stage | STAGES[name]], sampling=None)
    out = distill(recipe, tmp_path / "student")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher", safety_checker=None)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(str(out))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused, found = pipeline.unet.state_dict(), unet_of(out)
    assert found.keys() == fused.keys()
    assert max(float((fused[key] - found[key]).abs().max()) for key in found) < 1e-5
    moved = {key for key in found if not torch.equal(found[key], before[key])}
    layers = {key.removeprefix("unet.").partition(".lora_")[0] for key in load_file(out / FILE)}
    assert moved == {f"{layer}.weight" for layer in layers} and len(moved) > 20


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_lcm_loras_recipe_is_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it ships, but small; with an average, which must follow the LoRA as the target does."""
    small = small_recipe(tmp_path)
    given = {"teacher": small.teacher, "data.path": small.data.path, "data.size_px": 16}
    given |= {"steps": 3, "batch_size": 2, "lora_rank": RANK, "ema": 0.5, "target_ema": 0.3}
    recipe = changed(read_recipe(find_recipe("lcm-lora")), given)
    whole = distill(recipe, tmp_path / "whole")

    step = loop._step

    def killed(*given: Any) -> dict[str, float]:
        if given[-1] == 2:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "cut")
    monkeypatch.setattr(loop, "_step", step)
    assert (tmp_path / "cut.run/1-lcm/checkpoint/progress.json").exists()
    cut = distill(recipe, tmp_path / "cut")
    for file in (FILE, "unet/diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(whole / file), load_file(cut / file)
        assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for stage, kept in ({"vae"}, True), ({"unet", "scheduler"}, False):
        copy_folder(cut, tmp_path / str(kept), leave=stage, link=False)
        assert (tmp_path / str(kept) / FILE).exists() == kept


def test_the_size_is_that_of_lcm_lora() -> None:
    """Published: 67.5 M trained of SD 1.5 (arXiv 2311.05556, tab. 1), and two bytes each."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        unet.add_adapter(peft.LoraConfig(r=64, target_modules=list(TARGETS)))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained == pytest.approx(67.5e6, rel=0.005)


def test_flash_sds_lora_is_the_papers(tmp_path: Path) -> None:
    """On attention alone, and its first factors from N(0, 1 / r^2): the authors' flash_sd.yaml."""
    from diffusers import UNet2DConditionModel

    (method,) = read_recipe(find_recipe("flash-sd")).methods()
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        _add(unet, method, "flash")
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 25_509_888
    small = load_network(Student.open(write_student(tmp_path / "base")), "unet")
    _add(small, method, "flash")
    firsts = [p.flatten() for name, p in small.named_parameters() if "lora_A" in name]
    assert float(torch.cat(firsts).std() * 128) == pytest.approx(1, rel=0.02)


def test_a_stage_without_a_denoiser_and_targets_that_are_not_there(tmp_path: Path) -> None:
    common = {"steps": 1, "batch_size": 2, "lora_rank": RANK}
    for stage, said in (
        (
            {"by": "decoder", "blocks": [1, 1]},
            r"decoder\.lora_rank: method 'decoder' trains no denoiser",
        ),
        ({"by": "lcm", "lora_targets": ["to_qq"]}, r"lcm\.lora_targets: no layer .* in to_qq"),
        ({"by": "lcm", "lora_rank": None, "lora_alpha": 1}, "lora_init go with lora_rank"),
        (
            {"by": "lcm", "lora_rank": None, "lora_init": "gaussian"},
            "lora_init go with lora_rank",
        ),
    ):
        with pytest.raises(EdgeflashError, match=said):
            distill(small_recipe(tmp_path, stage=[common | stage]), tmp_path / "student")


def lora_file(path: Path, base: Path) -> Path:
    """A LoRA of rank 3 for UNet and text encoder, as diffusers writes it, alpha 6."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(5)
    told: dict[str, Any] = {}
    for name, targets in (("unet", TARGETS), ("text_encoder", ("q_proj", "fc1"))):
        network = load_network(Student.open(base), name)
        config = LoraConfig(
            r=RANK, lora_alpha=6, target_modules=list(targets), init_lora_weights=False
        )
        network.add_adapter(config)
        told[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        told[f"{name}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(str(path), **told)
    return path / FILE


def kohya_file(path: Path) -> Path:
    """B A of some layers, alpha 1, in the format of most LoRAs on the web."""
    torch.manual_seed(6)
    state: dict[str, torch.Tensor] = {}
    out = READING.replace("q_proj", "out_proj")  # by which diffusers knows the format
    text = "lora_te_text_model_"
    for start, layer in (("lora_unet_", QUERY), (text, READING), (text, out)):
        name = start + layer.replace(".", "_")
        state |= {f"{name}.lora_down.weight": torch.randn(RANK, 32)}
        state |= {f"{name}.lora_up.weight": torch.randn(32, RANK)}
        state |= {f"{name}.alpha": torch.tensor(1.0)}
    save_file(state, path)
    return path


def test_several_loras_of_others_add_up(tmp_path: Path) -> None:
    """W + 0.5 (6 / 3) B A + 2 (1 / 3) B' A' (arXiv 2106.09685, sec. 4.1), in both networks."""
    base = write_student(tmp_path / "base")
    ours, theirs = lora_file(tmp_path / "lora", base), kohya_file(tmp_path / "kohya.safetensors")
    plain, student = Student.open(base), Student.open(base, (Lora(ours, 0.5), Lora(theirs, 2)))
    state, other = load_file(ours), load_file(theirs)
    layers = {"unet": ("lora_unet_", QUERY), "text_encoder": ("lora_te_text_model_", READING)}
    for component, (start, layer) in layers.items():
        before, after = load_network(plain, component), load_network(student, component)
        assert before.state_dict().keys() == after.state_dict().keys()
        b, a = (state[f"{component}.{layer}.lora_{side}.weight"] for side in "BA")
        name = start + layer.replace(".", "_")
        up, down = (other[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
        wanted = before.get_submodule(layer).weight + 0.5 * 2 * b @ a + 2 / 3 * up @ down
        assert torch.allclose(after.get_submodule(layer).weight, wanted, atol=1e-5)


def test_a_lora_for_another_base_is_refused(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora", write_student(tmp_path / "base"))
    for changes, said in (
        (
            {"widths": (16, 64)},
            r"another base: unet\.\S+lora_A\.weight is \[3, 32, 1, 1\], and",
        ),
        ({"mid_block": False}, r"another base: the student has no unet\.mid_block\."),
    ):
        other = write_student(tmp_path / next(iter(changes)), **changes)
        with pytest.raises(EdgeflashError, match=said):
            load_network(Student.open(other, [Lora(file)]), "unet")
    network = load_network(Student.open(tmp_path / "base"), "unet")
    for name, key in (("xl", "text_encoder_2.x.lora_A.weight"), ("none", "")):
        save_file({key: torch.zeros(1)} if key else {}, tmp_path / name)
        with pytest.raises(EdgeflashError, match=rf"{name}: holds {key or 'nothing'}; LoRAs of"):
            fuse(network, "unet", Lora(tmp_path / name))
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(EdgeflashError, match="torn: diffusers reads no LoRA from it"):
        fuse(network, "unet", Lora(tmp_path / "torn"))


def test_export_fuses_what_the_command_line_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Any,  # noqa: F811
) -> None:
    base = write_student(tmp_path / "base")
    folder = lora_file(tmp_path / "lora", base).parent
    given: list[Student] = []
    monkeypatch.setattr(line, "export_student", lambda student, *_, **__: given.append(student))
    words = ["export", base, "--to", "torch", "--lora"]
    assert say(*words, f"{folder}=0.5").code == 0
    (student,) = given
    assert student.loras == (Lora(folder, 0.5),)
    assert pack.lineage(student, "", ()).loras == {sha256_of(folder / FILE): 0.5}
    fused = student.family.load(student, "unet", timestep=999.0)  # as a component is captured
    assert not torch.equal(
        fused.network.get_submodule(QUERY).weight, unet_of(base)[f"{QUERY}.weight"]
    )
    assert "--lora nowhere: no such file" in say(*words, "nowhere").err
    assert "write it as FILE or FILE=SCALE" in say(*words, f"{folder}=much").err
    assert "is given twice; give it once" in say(*words, folder, "--lora", f"{folder}=0.5").err
