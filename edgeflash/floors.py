"""Floors: the least that passes, of each figure of the parity ladder.

A floor's name is a metric, and may go on from a rung, a precision or both: ``psnr_db``,
``L4.psnr_db``, ``int8.psnr_db``, ``int8.L4.psnr_db``. Of several that fit a figure the closest
counts, a precision being closer than a rung.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FiniteFloat

from edgeflash.errors import EdgeflashError, did_you_mean

PALETTES = tuple(f"lut{bits}" for bits in (8, 6, 4, 3, 2, 1))
PRECISIONS = (  # finest first
    *("fp32", "fp16", "bf16", "int8-weights", "int8", "int8-dynamic", "fp8", "w8a8", *PALETTES),
    "int4-weights",
)
FLOORS: dict[str, dict[str, float]] = {  # by precision, where nobody sets others
    "fp32": {"psnr_db": 80.0, "delta_ratio": 0.9, "timestep_ratio": 0.9},
    "fp16": {"psnr_db": 45.0, "delta_ratio": 0.9, "timestep_ratio": 0.9},
    "bf16": {"psnr_db": 30.0, "delta_ratio": 0.9, "timestep_ratio": 0.9},
    "int8": {"psnr_db": 25.0, "L4.psnr_db": 20.0, "delta_ratio": 0.9, "timestep_ratio": 0.9},
    "fp8": {"psnr_db": 25.0, "L4.psnr_db": 20.0, "delta_ratio": 0.9, "timestep_ratio": 0.9},
    # A step is 1/15 of what a block of 32 normal weights spans, 4 sigma: an error of 22 dB below
    # the weights, 34 below the range of what one layer gives; 16 layers in a row leave 22.
    "int4-weights": {
        "psnr_db": 22.0,
        "L4.psnr_db": 18.0,
        "delta_ratio": 0.9,
        "timestep_ratio": 0.9,
    },
}
FLOORS |= {name: FLOORS["int8"] for name in ("int8-weights", "int8-dynamic", "w8a8", *PALETTES)}
PIXELS_DB = 45.0  # of 8-bit pictures; one level apart everywhere is 48 dB
for _table in FLOORS.values():
    _table["fused_psnr_db"] = min(_table["psnr_db"], PIXELS_DB)
RATIOS = ("delta_ratio", "timestep_ratio")  # may be as far above 1 as below
METRICS = {  # that a floor can be set for
    "L1": ("psnr_db", "cosine"),
    "L2": RATIOS,
    "L3": ("psnr_db", "cosine"),
    "L4": ("psnr_db", "ssim", "fused_psnr_db"),
}


def check_floors(floors: Mapping[str, float]) -> None:
    """Raises where a floor's name is no metric, with or without precision and rung before it."""
    names = {name for metrics in METRICS.values() for name in metrics}
    names |= {f"{rung}.{name}" for rung, metrics in METRICS.items() for name in metrics}
    of_one = {f"{precision}.{name}" for precision in PRECISIONS for name in names}
    for name in floors:
        if name not in names | of_one:
            raise EdgeflashError(
                f"no floor {name!r} (have: {', '.join(sorted(names))}; each also of one precision, "
                f"as in int8.psnr_db){did_you_mean(name, sorted(names | of_one))}"
            )


def floor_of(floors: Mapping[str, float], precision: str, rung: str, metric: str) -> float | None:
    """What a table asks of a figure; None: nothing."""
    heads = (f"{precision}.{rung}.", f"{precision}.", f"{rung}.", "")
    return next((floors[head + metric] for head in heads if head + metric in floors), None)


def _flat(table: Any) -> Any:
    """Tables in tables as one: TOML reads ``L4.psnr_db = 30`` and ``[floors.int8]`` as such."""
    return dict(_named(table)) if isinstance(table, dict) else table


def _named(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        inner = _named(value) if isinstance(value, dict) else [("", value)]
        yield from ((f"{name}.{rest}" if rest else name, found) for rest, found in inner)


def _known(floors: dict[str, float]) -> dict[str, float]:
    try:
        check_floors(floors)
    except EdgeflashError as error:  # pydantic tells where it stands
        raise ValueError(error) from None
    return floors


Floors = Annotated[dict[str, FiniteFloat], BeforeValidator(_flat), AfterValidator(_known)]
