"""Constants of a Core ML program: those within its text, and those in its weight files.

A weight file is a run of blobs, all little-endian: a header of 64 bytes, then for each blob 64
bytes that tell of it (sentinel u32, type u32, length in bytes u64, where its data begins u64), and
its data. Numbers of fewer than 8 bits are packed from the least significant bit on.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflash.errors import EdgeflashError

Array = NDArray[Any]

SENTINEL = 0xDEADBEEF
BITS = {"INT4": 4, "UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6}  # packed ones
DTYPES = {
    "BOOL": "?",
    "FLOAT16": "<f2",
    "FLOAT32": "<f4",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
} | {kind: "i1" if kind == "INT4" else "u1" for kind in BITS}
STORED = {  # type -> how a blob calls it
    "FLOAT16": 1,
    "FLOAT32": 2,
    "UINT8": 3,
    "INT8": 4,
    "INT16": 6,
    "UINT16": 7,
    "INT4": 8,
    "UINT1": 9,
    "UINT2": 10,
    "UINT4": 11,
    "UINT3": 12,
    "UINT6": 13,
    "INT32": 14,
    "UINT32": 15,
}


class Weights:
    """The weight files of one package, mapped as they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Array] = {}

    def read(self, name: str, start: int, kind: str, shape: tuple[int, ...]) -> Array:
        """The constant that a blob holds.

        Args:
            name: of the file.
            start: where the blob begins, bytes.
            kind: MIL's name of its type.
            shape: of the constant.

        Raises:
            EdgeflashError: another type, another length, or no blob there at all.
        """
        file, where = self._file(name), f"{self.folder / name}: at {start}"
        told = file[start : start + 24].tobytes()
        if len(told) < 24 or struct.unpack_from("<I", told)[0] != SENTINEL:
            raise EdgeflashError(f"{where}: no weights begin here; export it again")
        stored, length, begin = struct.unpack_from("<IQQ", told, 4)
        if stored != STORED[kind]:
            raise EdgeflashError(f"{where}: type {stored}, where {kind} is expected; export again")
        data = file[begin : begin + length]
        if len(data) != length or length < _bytes(kind, shape):
            raise EdgeflashError(f"{where}: {len(data)} bytes are too few for {kind} {shape}")
        return decoded(data, kind, shape)

    def _file(self, name: str) -> Array:
        if name not in self._files:
            try:
                self._files[name] = np.memmap(self.folder / name, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise EdgeflashError(f"{self.folder / name}: not readable: {error}") from None
        return self._files[name]


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    numbers = int(np.prod(shape))
    return -(-numbers * BITS.get(kind, 8 * np.dtype(DTYPES[kind]).itemsize) // 8)


def decoded(data: Array, kind: str, shape: tuple[int, ...]) -> Array:
    """Bytes uint8 [k] as an array of that type."""
    if kind not in BITS:
        return data[: _bytes(kind, shape)].view(DTYPES[kind]).reshape(shape)
    numbers = unpacked(data, BITS[kind], int(np.prod(shape))).reshape(shape)
    if kind == "INT4":
        return ((numbers ^ 8).astype(np.int8) - 8).astype(np.int8)
    return numbers


def unpacked(data: Array, bits: int, count: int) -> Array:
    """The first ``count`` numbers of that many bits, uint8 [count], from bytes uint8 [k]."""
    if bits == 8:
        return data[:count]
    needed = data[: -(-bits * count // 8)]
    each = np.unpackbits(needed, bitorder="little")[: bits * count].reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]


def constant(value: Any, weights: Weights) -> Any:
    """A MIL `Value`: an array, a number of rank 0 as array too, or a str."""
    told = value.type.tensorType
    kind = kind_of(value.type)
    shape = tuple(side.constant.size for side in told.dimensions)
    if value.WhichOneof("value") == "blobFileValue":
        blob = value.blobFileValue
        return weights.read(blob.fileName.rpartition("/")[2], blob.offset, kind, shape)
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    held = getattr(tensor, field).values
    if kind == "STRING":
        return str(held[0])
    if field == "bytes":
        return decoded(np.frombuffer(held, np.uint8), kind, shape)
    return np.array(held, DTYPES[kind]).reshape(shape)


def kind_of(value_type: Any) -> str:
    """MIL's name of a tensor's type, as in FLOAT16."""
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(value_type.tensorType.dataType))
