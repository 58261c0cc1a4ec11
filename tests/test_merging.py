"""Token merging: against the paper's words in plain loops, as an ONNX graph, and in an export."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from exported import attempt
from rich.console import Console

from edgeflash import shelf
from edgeflash.bundle import TensorSpec
from edgeflash.errors import EdgeflashError
from edgeflash.export import onnx_graph
from edgeflash.export.capture import Captured, Sample
from edgeflash.export.line import export_student
from edgeflash.export.merging import MergingBlock, merge_tokens, unmerged
from edgeflash.export.program import to_program
from edgeflash.export_options import ExportOptions
from edgeflash.golden import load_tensors
from edgeflash.noise import randn
from edgeflash.parity import psnr_db
from edgeflash.roles import Target
from edgeflash.schedule import Guidance
from edgeflash.student import Student

CELLS, WIDTH = (5, 6), 16  # an odd side: the last row's cells have no lower half


def block() -> BasicTransformerBlock:
    torch.manual_seed(0)
    made = BasicTransformerBlock(WIDTH, 2, WIDTH // 2, cross_attention_dim=12)
    return made.eval().requires_grad_(False)


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = CELLS[0] * CELLS[1]
    x = torch.randn(rows, tokens, WIDTH, generator=random)
    return x, torch.randn(rows, 4, 12, generator=random)


def by_hand(whole: BasicTransformerBlock, x: torch.Tensor, share: float) -> torch.Tensor:
    """Merged self-attention of one picture [s, c], token by token."""
    seen = whole.norm1(x)
    stays = [r * CELLS[1] + c for r in range(0, CELLS[0], 2) for c in range(0, CELLS[1], 2)]
    others = [i for i in range(len(x)) if i not in stays]
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    nearest = {i: max(stays, key=lambda j: float(cosine[i, j])) for i in others}
    ranked = sorted(others, key=lambda i: -float(cosine[i, nearest[i]]))
    gone = ranked[: int(share * len(x))]
    kept = [i for i in range(len(x)) if i not in gone]
    groups = [[i, *(g for g in gone if nearest[g] == i)] for i in kept]
    answer = whole.attn1(torch.stack([seen[group].mean(0) for group in groups])[None])[0]
    return answer[[kept.index(nearest[i] if i in gone else i) for i in range(len(x))]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
def test_it_merges_as_the_paper_says(share: float) -> None:
    whole, (x, text) = block(), inputs()
    merging = MergingBlock(whole, share, CELLS)
    y = x + torch.stack([by_hand(whole, picture, share) for picture in x])
    y = y + whole.attn2(whole.norm2(y), encoder_hidden_states=text)
    expected = y + whole.ff(whole.norm3(y))
    found = merging(x, encoder_hidden_states=text, attention_mask=None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = whole(x, encoder_hidden_states=text)
    assert not torch.allclose(found, plain, atol=1e-3)
    with unmerged(merging):
        torch.testing.assert_close(merging(x, encoder_hidden_states=text), plain)
    torch.testing.assert_close(merging(x, encoder_hidden_states=text), found)


def unet(*down: str, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        **changes,
    ).eval()


def test_it_merges_where_most_tokens_attend_and_at_any_size() -> None:
    network = unet("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    merge_tokens(network, 0.5, (9, 13))  # halved to (5, 7)
    found = {n: m for n, m in network.named_modules() if isinstance(m, MergingBlock)}
    home = ("down_blocks.1.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    assert list(found) == [f"{name}.transformer_blocks.0" for name in home]
    assert {(m.gone, len(m.stays), len(m.others)) for m in found.values()} == {(17, 12, 23)}
    told = network(torch.randn(1, 4, 9, 13), 5, torch.randn(1, 4, 12)).sample
    assert told.shape == (1, 4, 9, 13)


def test_a_unet_without_self_attention_is_refused() -> None:
    bare = unet("DownBlock2D", "DownBlock2D", "DownBlock2D", mid_block_type=None)
    crossing = unet(
        *["DownBlock2D"] * 2, "CrossAttnDownBlock2D", only_cross_attention=True, mid_block_type=None
    )
    for network in (bare, crossing):
        with pytest.raises(EdgeflashError, match="no self-attention: leave it out"):
            merge_tokens(network, 0.5, (8, 8))


def test_onnx_runs_it_on_any_number_of_pictures(tmp_path: Path) -> None:
    merging, (x, text) = MergingBlock(block(), 0.5, CELLS), inputs(rows=1)
    specs = (
        TensorSpec(name="x", role="sample", shape=("n", *x.shape[1:]), dtype="float32"),
        TensorSpec(name="text", role="conditioning", shape=("n", *text.shape[1:]), dtype="float32"),
    )
    out = (specs[0].model_copy(update={"name": "y", "role": "prediction"}),)
    sample = Sample({"x": x.numpy(), "text": text.numpy()}, {})
    program = to_program(merging, specs, sample)
    captured = Captured("unet", program, specs, out, (sample,))
    (path,) = onnx_graph.save(onnx_graph.translate(captured), tmp_path / "model.onnx", 2**20)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        x, text = inputs(rows)
        (found,) = session.run(None, {"x": x.numpy(), "text": text.numpy()})
        np.testing.assert_allclose(found, merging(x, text).numpy(), rtol=0, atol=1e-5)


def test_an_export_proves_the_merged_student_and_tells_the_loss(
    guided_student: Path, tmp_path: Path
) -> None:
    told = Console(file=StringIO(), record=True, width=200)
    bundle = export_student(
        Student.open(guided_student),
        shelf.make(Target, "torch", {}),
        tmp_path / "bundle",
        ExportOptions(steps=(2,), guidance=Guidance(), prompts=("a red star",), merge_tokens=0.5),
        console=told,
    )
    figures = {(f.rung, f.component, f.metric): f.value for f in bundle.manifest.parity}
    assert figures["L3", "pipeline", "psnr_db"] > 80, "it is held against the merged student"
    pipeline = StableDiffusionPipeline.from_pretrained(guided_student, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(randn((1, 4, 8, 8), 0))
    theirs = pipeline(
        "a red star", num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="pt"
    ).images.numpy()
    merged = load_tensors(bundle.folder / "goldens/0.safetensors")["image"].clip(-1, 1) / 2 + 0.5
    apart_db = psnr_db(theirs, merged, peak=1.0)
    assert 30 < apart_db < 100
    merging = bundle.manifest.merging
    assert merging and merging.share == 0.5
    assert merging.image_psnr_db == pytest.approx(apart_db, abs=0.05)
    line = f"merging 50% of the tokens: the pictures are {merging.image_psnr_db:.1f} dB from"
    assert line in told.export_text()


def test_what_cannot_be_merged_is_refused(
    one_step_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = shelf.make(Target, "torch", {})
    said = attempt(one_step_student, tmp_path / "b", target, merge_tokens=0.8)
    assert said == "--merge-tokens 0.8: give a share from 0 to 0.75"
    monkeypatch.setattr(type(target), "picks", False)
    said = attempt(one_step_student, tmp_path / "b", target, merge_tokens=0.5)
    assert said == "--merge-tokens: --to torch cannot lower it so far: leave one of them out"
