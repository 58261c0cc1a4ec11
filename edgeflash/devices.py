"""Devices that are not here: what a student would take there, by what others published."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from edgeflash.bundle import EACH_STEP, Part
from edgeflash.complaint import complaint
from edgeflash.errors import EdgeflashError, unknown

DEVICES = Path(__file__).with_name("devices.toml")
Verdict = Literal["fits", "tight", "unsupported", "will be killed"]  # from good to bad


class Published(Part):
    """One published figure: a call of a network at 512 px."""

    component: str
    network: str
    gflop: float
    ms: float


class Limit(Part):
    """What bundles must keep to on some devices; `edgeflash.runtimes.lint` has its rule."""

    name: str
    rule: str
    most: int = 0  # bytes or, for rank, dimensions
    multiple: int = 1  # bytes
    takes: tuple[str, ...] = ()  # names of what there is
    targets: tuple[str, ...] = ()  # whose bundles it is about; none: all
    broken: Verdict
    source: str
    advice: str = ""


class Device(Part):
    """A device by its published figures and limits; estimates scale the figures with the work.

    Networks that move more bytes for their work than those, as tiny decoders do, take longer than
    estimated; so does a device that is warm.
    """

    name: str
    chip: str
    runs: tuple[str, ...]  # targets
    limits: tuple[Limit, ...]
    precision: str = ""  # of the figures, as the source
    source: str = ""
    published: tuple[Published, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = {}  # of targets, by name: what suits it

    @classmethod
    def of(cls, name: str) -> Device:
        """One of `devices.toml`.

        Raises:
            EdgeflashError: none of that name.
        """
        known = tomllib.loads(DEVICES.read_text(encoding="utf-8"))
        if name not in known["device"]:
            raise unknown("device", name, known["device"])
        told = known["device"][name]
        limits = [{"name": limit} | known["limit"][limit] for limit in told["limits"]]
        try:
            return cls.model_validate({"name": name} | told | {"limits": limits})
        except ValidationError as error:
            raise complaint(error, cls, f"{DEVICES}: [device.{name}]") from None

    @classmethod
    def timed(cls, name: str) -> Device:
        """The same, to estimate times on.

        Raises:
            EdgeflashError: none of that name, or nothing is published that estimates could rest on.
        """
        device = cls.of(name)
        if not device.published:
            raise EdgeflashError(
                f"device {name}: no times of it are known to estimate from; edgeflash lint tells "
                "whether a bundle fits it"
            )
        return device

    def suited(self, target: str) -> dict[str, Any]:
        """The options of the target that suit the device.

        Raises:
            EdgeflashError: the target's bundles do not run there.
        """
        if target not in self.runs:
            known = " or ".join(f"--to {name}" for name in self.runs)
            raise EdgeflashError(f"device {self.name}: does not run {target}: {known}")
        return dict(self.options.get(target, {}))

    def estimate_ms(self, component: str, gflop: float) -> float:
        """Time of one call, at the rate of the component's published figure, or of the UNet's."""
        rates = {p.component: p.gflop / p.ms for p in reversed(self.published)}
        return gflop / rates.get(component, rates["unet"])

    def image_ms(self, work: Mapping[str, float], steps: int) -> float:
        """Time of an image; ``work``: GFLOP of a call, or of the calls of a step, by component."""
        calls = {name: steps if name in EACH_STEP else 1 for name in work}
        return sum(self.estimate_ms(name, w) * calls[name] for name, w in work.items())

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
