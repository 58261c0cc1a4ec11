"""Tensors in the memory of a GPU, and the stream that fills, uses and reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgeflash.gpu import call, cudart
from edgeflash.roles import Array


class DeviceMemory:
    """One block for each tensor, and one stream, until `free`.

    An array that comes again and cannot have changed (it is read-only) is not copied again: the
    conditioning crosses the bus once an image, not once a step.

    Attributes:
        stream: handle of the stream, on which all here is in order.
        address: of each tensor's block.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Takes ``sizes`` in bytes by name.

        Raises:
            EdgeflashError: there is not that much memory left on the GPU.
        """
        self._cuda = cudart()
        self._held: dict[str, Array] = {}
        self.address: dict[str, int] = {}
        self._stream = call(self._cuda.cudaStreamCreate)
        self.stream = int(self._stream)
        try:
            for name, size in sizes.items():
                self.address[name] = int(call(self._cuda.cudaMalloc, size))
        except BaseException:
            self.free()
            raise

    def upload(self, name: str, array: Array) -> None:
        """Begins to copy an array, C-contiguous, to the GPU; it must live until `wait`."""
        if self._held.get(name) is array:
            return
        self._held.pop(name, None)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        place, source = self.address[name], array.ctypes.data
        call(self._cuda.cudaMemcpyAsync, place, source, array.nbytes, kind, self._stream)
        if not array.flags.writeable:
            self._held[name] = array

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """Begins to copy a tensor back; the array holds it after `wait`."""
        array = np.empty(shape, dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        place, source = array.ctypes.data, self.address[name]
        call(self._cuda.cudaMemcpyAsync, place, source, array.nbytes, kind, self._stream)
        return array

    def wait(self) -> None:
        """Until all that was begun is done."""
        call(self._cuda.cudaStreamSynchronize, self._stream)

    def free(self) -> None:
        """Gives the memory back."""
        for place in self.address.values():
            call(self._cuda.cudaFree, place)
        self.address.clear()
        self._held.clear()
        call(self._cuda.cudaStreamDestroy, self._stream)


class CudaGraph:
    """What ``enqueue`` puts on a stream, captured to be launched as one."""

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self._cuda = cudart()
        self._stream = stream
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture, stream, mode)
        try:
            enqueue()
        except BaseException:
            code, graph = self._cuda.cudaStreamEndCapture(stream)
            if not int(code):
                call(self._cuda.cudaGraphDestroy, graph)
            raise
        graph = call(self._cuda.cudaStreamEndCapture, stream)
        try:
            self._ready = call(self._cuda.cudaGraphInstantiate, graph, 0)
        finally:
            call(self._cuda.cudaGraphDestroy, graph)

    def launch(self) -> None:
        call(self._cuda.cudaGraphLaunch, self._ready, self._stream)

    def free(self) -> None:
        call(self._cuda.cudaGraphExecDestroy, self._ready)
