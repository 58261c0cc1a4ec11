"""Devices that are not here: what a student would take there, by what others published."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from edgeflash.bundle import Part
from edgeflash.errors import unknown

DEVICES = Path(__file__).with_name("devices.toml")


class Published(Part):
    """One published figure: a call of a network at 512 px."""

    component: str
    network: str
    gflop: float
    ms: float


class Device(Part):
    """A device by its published figures; estimates scale them with the work.

    Networks that move more bytes for their work than those, as tiny decoders do, take longer than
    estimated; so does a device that is warm.
    """

    name: str
    chip: str
    precision: str
    source: str
    published: tuple[Published, ...]

    @classmethod
    def of(cls, name: str) -> Device:
        """One of `devices.toml`.

        Raises:
            EdgeflashError: none of that name.
        """
        known = tomllib.loads(DEVICES.read_text(encoding="utf-8"))
        if name not in known:
            raise unknown("device", name, known)
        return cls.model_validate({"name": name} | known[name])

    def estimate_ms(self, component: str, gflop: float) -> float:
        """Time of one call, at the rate of the component's published figure, or of the UNet's."""
        rates = {p.component: p.gflop / p.ms for p in reversed(self.published)}
        return gflop / rates.get(component, rates["unet"])

    def image_ms(self, work: Mapping[str, float], steps: int) -> float:
        """Time of an image; ``work``: GFLOP of a call, or of the calls of a step, by component."""
        calls = {"unet": steps}
        return sum(self.estimate_ms(name, w) * calls.get(name, 1) for name, w in work.items())

    def errors(self) -> dict[str, float]:
        """Of estimates, as shares: of figures that they do not rest on.

        Those are networks published beside the first of a component, and the decoder if it were
        estimated by the UNet's rate.
        """
        first = {p.component: p for p in reversed(self.published)}
        found = {
            p.network: self.estimate_ms(p.component, p.gflop) / p.ms - 1
            for p in self.published
            if p is not first[p.component]
        }
        unet, decoder = first["unet"], first["vae_decoder"]
        by_unet = decoder.gflop * unet.ms / unet.gflop
        return found | {f"{decoder.network} by the UNet's rate": by_unet / decoder.ms - 1}

    def told(self) -> str:
        """What an estimate rests on and how far off it may be, in a line."""
        errors = ", ".join(f"{name} {share:+.0%}" for name, share in self.errors().items())
        return f"{self.name}: {self.chip}, {self.precision}; {self.source}; error there: {errors}"
