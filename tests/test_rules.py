"""UNets of published students and what they have of their teachers."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from test_methods import SMALL
from torch import nn

from edgeflash.blueprints import CROSS_DOWN, CROSS_UP
from edgeflash.distill.by_blocks import feature_pairs, prune, pruned_config
from edgeflash.errors import EdgeflashError


def fresh(teacher: UNet2DConditionModel, rule: Any) -> set[str]:
    """Names of the tensors that a pruned UNet has not from its teacher."""
    for parameter in teacher.parameters():
        nn.init.constant_(parameter, 0.123)
    student, _ = prune(teacher, rule)
    return {name for name, p in student.named_parameters() if not (p == 0.123).all()}


def test_sdxs_0_9_hears_the_prompt_where_its_teacher_saw_itself() -> None:
    homes = ("down_blocks.0.attentions.0", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1")
    wanted = {f"{h}.transformer_blocks.0.attn1.to_{k}.weight" for h in homes for k in "kv"}
    teacher = UNet2DConditionModel.from_config(SMALL)
    assert fresh(teacher, "sdxs-0.9") == wanted
    config = pruned_config(dict(teacher.config), "sdxs-0.9")
    assert config["only_cross_attention"] == [True, False, False]


def test_vega_is_an_sdxl_of_few_transformers() -> None:
    three = SMALL | {"block_out_channels": [8, 16, 24], "transformer_layers_per_block": [1, 2, 5]}
    three |= {"down_block_types": [CROSS_DOWN] * 3, "up_block_types": [CROSS_UP] * 3}
    teacher = UNet2DConditionModel.from_config(three)
    assert not fresh(teacher, "vega")
    student, _ = prune(teacher, "vega")
    assert len(student.mid_block.resnets) == 1 and not student.mid_block.attentions
    depths = [len(b.attentions[0].transformer_blocks) for b in student.down_blocks]
    assert depths == [1, 1, 2] and len(feature_pairs(teacher, student)) == 6
    with pytest.raises(EdgeflashError, match="rule 'vega' leaves 4 stages"):
        pruned_config(SMALL, "vega")
