"""What a figure was measured on: the fingerprint that stands in every report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PACKAGES = (  # distributions whose version can move a figure
    "edgeflash",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "coremltools",
    "tensorrt",
    "tensorrt-rtx",
    "executorch",
    "torch",
)


class Machine(BaseModel):
    """One machine at one moment. None and 0: not readable here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cpu: str
    cores: int  # logical cores this process may use
    ram_mib: int
    gpu: str | None = None
    os: str
    python: str
    packages: dict[str, str] = {}
    load_1min: float | None = None  # processes that wanted a core, over the minute before
    governor: str | None = None  # of the first core's clock: performance, powersave, …

    @classmethod
    def here(cls) -> Machine:
        return cls(
            cpu=_cpu(),
            cores=usable_cores(),
            ram_mib=_ram_mib(),
            gpu=_gpu(),
            os=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            packages=_packages(),
            load_1min=_load(),
            governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        )

    @property
    def busy(self) -> bool:
        """Whether other work took more than a quarter of the cores just before."""
        return self.load_1min is not None and self.load_1min > self.cores / 4


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _cpu() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    board = _read("/proc/device-tree/model")  # ARM boards name themselves, not their cores
    return board or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores this process may use; 1 where nobody tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_mib() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, ValueError, OSError):
        return 0


def _gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(found.stdout.split("\n")).strip("; ") or None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
