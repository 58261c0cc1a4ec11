"""The NVIDIA GPU of this machine, asked through cuda-python (`cuda.bindings`), without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeflash.errors import EdgeflashError
from edgeflash.shelf import require

INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver: no driver, or one too old for the library
NO_GPU = "no CUDA driver or GPU here"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its vendor calls it.
        capability: its compute capability, as in "8.9".
        driver: the newest CUDA version that the driver takes, as in "13.0".
    """

    name: str
    capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}, CUDA driver {self.driver}"


def cudart() -> Any:
    """The CUDA runtime API of cuda-python.

    Raises:
        EdgeflashError: cuda-python is not installed.
    """
    require("CUDA", ["cuda"])
    try:
        from cuda.bindings import runtime
    except ImportError as error:  # the name `cuda` is shared with other packages
        raise EdgeflashError(f"CUDA needs cuda-python: pip install cuda-python ({error})") from None
    return runtime


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What a function of `cudart` gives beside its error code.

    Raises:
        EdgeflashError: the code is not success.
    """
    code, *values = function(*arguments)
    if int(code):
        raise EdgeflashError(f"CUDA: {function.__name__} failed with {code.name} ({int(code)})")
    return values[0] if len(values) == 1 else tuple(values)


def find_gpu(index: int = 0) -> Gpu:
    """The GPU of that number.

    Raises:
        EdgeflashError: no cuda-python, no driver, one that is too old, or no such GPU.
    """
    cuda = cudart()
    try:
        driver = call(cuda.cudaDriverGetVersion)
        code, count = cuda.cudaGetDeviceCount()
    except RuntimeError as error:  # cuda-python 12 loads the driver's library here
        raise EdgeflashError(f"{NO_GPU} ({' '.join(str(error).split())})") from None
    version = f"{driver // 1000}.{driver % 1000 // 10}"
    if driver and int(code) == INSUFFICIENT_DRIVER:
        library = call(cuda.cudaRuntimeGetVersion)
        raise EdgeflashError(
            f"the CUDA driver takes CUDA {version}, cuda-python is for {library // 1000}: update "
            f"the driver, or pip install 'cuda-python<{driver // 1000 + 1}'"
        )
    if int(code) or not count:
        raise EdgeflashError(f"{NO_GPU} ({code.name})")
    if index >= count:
        raise EdgeflashError(f"no GPU {index} here: they are numbered 0 to {count - 1}")
    found = call(cuda.cudaGetDeviceProperties, index)
    return Gpu(_text(found.name), f"{found.major}.{found.minor}", version)


def use(index: int) -> None:
    """Makes the GPU of that number the one that this thread's calls are for."""
    call(cudart().cudaSetDevice, index)


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else name
