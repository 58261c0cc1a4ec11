"""What a figure was measured on: the fingerprint that stands in every report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PACKAGES: dict[str, tuple[str, ...]] = {  # distribution -> runtimes whose figures it can move
    "edgeflash": (),
    "numpy": ("coreml",),  # whose evaluator it is; of others, 0.1 % of a picture's time
    "onnxruntime": ("onnx",),
    "onnxruntime-gpu": ("onnx",),
    "openvino": ("openvino",),
    "coremltools": ("coreml",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt",),
    "executorch": ("executorch",),
    "torch": ("torch", "executorch"),
}


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

    def busier(self, other: Machine) -> bool:
        """Whether one was busy and the other not, or much more so: by a quarter of the cores."""
        loads = self.load_1min, other.load_1min
        if self.busy != other.busy or None in loads:
            return self.busy != other.busy
        return abs((loads[0] or 0) - (loads[1] or 0)) > self.cores / 4

    def moving(self, runtimes: Collection[str]) -> dict[str, object]:
        """What can move the times of some runtimes, beside the load; None: not there."""
        fields = ("cpu", "cores", "gpu", "governor", "os")
        python = ".".join(self.python.split(".")[:2])  # patches of it move nothing
        theirs = [name for name, moved in PACKAGES.items() if set(moved) & set(runtimes)]
        told = {field: getattr(self, field) for field in fields} | {"python": python}
        return told | {name: self.packages.get(name) for name in theirs}


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


def peak_rss_mib() -> float | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    # getrusage would do, but on Linux it also counts the process that started this one
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def forget_peak_rss() -> None:
    """Has `peak_rss_mib` begin anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may still take, swap included; None where the system does not tell.

    The least of what the machine has and what its control groups leave; page cache counts as free.
    ``root``: of the file system that tells.
    """
    told = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo"))
    if "MemAvailable" not in told:
        return None
    return min([_meminfo(told, "MemAvailable", "SwapFree"), *(left for left, _ in _groups(root))])


def installed_bytes(root: Path = Path("/")) -> int | None:
    """The most that this process could ever take: as `available_bytes`, if nothing else ran."""
    told = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo"))
    if "MemTotal" not in told:
        return None
    return min([_meminfo(told, "MemTotal", "SwapTotal"), *(limit for _, limit in _groups(root))])


def _meminfo(told: dict[str, str], *names: str) -> int:
    return sum(int(told.get(name, "0").split()[0]) for name in names) * 1024


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """What each control group above this process has left, and its limit; versions 1 and 2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        names = names if controllers else ("memory.max", "memory.current")
        home = root / "sys/fs/cgroup" / controllers
        # A container may see its own group as the root of them all.
        for group in (home / path.strip("/"), *(home / path.strip("/")).parents):
            limit, used = (_read(str(group / name)) or "" for name in names)
            if limit.isdigit() and used.isdigit():
                cached = dict(pair.split()[:2] for pair in _lines(group / "memory.stat"))
                free = sum(int(cached.get(f"{how}active_file", 0)) for how in ("", "in"))
                yield int(limit) - int(used) + free, int(limit)
            if group == home:
                break


def _lines(path: Path) -> list[str]:
    return (_read(str(path)) or "").splitlines()


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
