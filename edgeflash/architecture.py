"""UNets by their configs, and what can be taken from one: blocks, transformers, stages, channels.

What is taken goes from the way down and the way up alike, so that their skips still meet. Stages
are counted from the outermost, 1, inwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeflash.blueprints import CROSS_DOWN, CROSS_UP

Config = dict[str, Any]
FROM_THE_TOP = ("up_block_types", "reverse_transformer_layers_per_block")  # innermost stage first
NARROWER = 0.8  # at most so much of a stage's channels is left at a time
SHALLOWER = 0.75  # and so much of its transformer layers


@dataclass(frozen=True)
class Smaller:
    """A config with something removed; ``removed`` says what, in words."""

    removed: str
    config: Config


def spelled(config: Mapping[str, Any]) -> Config:
    """A UNet's config with every default filled in, as JSON has it; without diffusers' notes.

    What may be said once for all stages is said of each.
    """
    import inspect

    from diffusers import UNet2DConditionModel

    told = inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    whole = {name: each.default for name, each in told if name != "self"}
    whole |= {name: value for name, value in config.items() if not name.startswith("_")}
    found = {name: _listed(value) for name, value in whole.items()}
    for name in ("layers_per_block", "transformer_layers_per_block"):
        if isinstance(found[name], int):
            found[name] = [found[name]] * len(found["down_block_types"])
    return found


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def smaller(
    config: Config, *, blocks: bool = True, widths: bool = True, least: Sequence[int] = ()
) -> list[Smaller]:
    """Every way to remove one thing.

    Args:
        config: as `spelled` gives it.
        blocks: whether blocks, transformers and stages may go.
        widths: whether channels may.
        least: channels that each stage keeps, the outermost first; none named: a group.
    """
    found = list(_fewer_blocks(config)) if blocks else []
    return found + (list(_narrower(config, least)) if widths else [])


def _fewer_blocks(config: Config) -> Iterator[Smaller]:
    stages = range(len(config["down_block_types"]))
    for i in stages:
        if (layers := config["layers_per_block"][i]) > 1:
            yield Smaller(
                f"a pair of stage {i + 1}", _with(config, "layers_per_block", i, layers - 1)
            )
    for i in stages:
        yield from _fewer_transformers(config, i)
    if config["mid_block_type"]:
        yield Smaller("the mid block", config | {"mid_block_type": None})
    elif len(stages) > 2 and CROSS_DOWN in config["down_block_types"][:-1]:
        yield Smaller(f"stage {len(stages)}", _without_innermost(config))


def _fewer_transformers(config: Config, i: int) -> Iterator[Smaller]:
    down, up = config["down_block_types"], config["up_block_types"]
    if (down[i], up[-1 - i]) != (CROSS_DOWN, CROSS_UP):
        return
    depth = config["transformer_layers_per_block"][i]
    if isinstance(depth, int) and depth > 1 and not config["reverse_transformer_layers_per_block"]:
        left = max(1, int(depth * SHALLOWER))
        removed = f"transformers of stage {i + 1} to depth {left}"
        yield Smaller(removed, _with(config, "transformer_layers_per_block", i, left))
    if down.count(CROSS_DOWN) > 1:  # one at least hears the prompt
        plain = _with(config, "down_block_types", i, "DownBlock2D")
        removed = f"transformers of stage {i + 1}"
        yield Smaller(removed, _with(plain, "up_block_types", len(up) - 1 - i, "UpBlock2D"))


def _without_innermost(config: Config) -> Config:
    depth = len(config["down_block_types"])
    new = dict(config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == depth:
            new[key] = value[1:] if key in FROM_THE_TOP else value[:-1]
    return new


def _narrower(config: Config, least: Sequence[int]) -> Iterator[Smaller]:
    """Norms want whole groups of channels; heads keep their number, or else their width."""
    name = "num_attention_heads" if config["num_attention_heads"] else "attention_head_dim"
    heads, widths = config[name], config["block_out_channels"]  # the number of heads, either way
    for i, width in enumerate(widths):
        unit = width // heads[i] if isinstance(heads, list) else heads
        step = math.lcm(config["norm_num_groups"] or 1, unit)
        left = int(width * NARROWER) // step * step
        if left < max([step, *least[i : i + 1]]):
            continue
        new = _with(config, "block_out_channels", i, left)
        if isinstance(heads, list):
            new = _with(new, name, i, left // unit)
        if i == 0:  # else the time's embedding would shrink with it, in every block
            new["time_embedding_dim"] = config["time_embedding_dim"] or 4 * width
        yield Smaller(f"channels of stage {i + 1} to {left}", new)


def _with(config: Config, key: str, i: int, value: Any) -> Config:
    """The config with another value of one stage."""
    values = list(config[key])
    values[i] = value
    return config | {key: values}
