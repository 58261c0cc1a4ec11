"""ONNX graphs that round as they are typed, for runtimes that do not.

ONNX Runtime has few sums in float16 on the CPU, and none in bfloat16: it runs operators in float32,
and drops the roundings between them. What overflows on a device passes there. In the graph that is
made here all sums run in float32 as well, but behind each stands a cast to the type that the file
gives its result, and one back. Weights stay as they are, and in the files where they are.

Files are read and written in protobuf's wire format (protobuf.dev/programming-guides/encoding), by
the field numbers of onnx.proto3: where bundles run there is no `onnx`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

FLOAT, NARROW = 1, (10, 16)  # types of tensors; float16 and bfloat16
GRAPH = 7  # of a model
NODE, WEIGHT, GIVEN, MADE, TOLD = 1, 5, 11, 12, 13  # of a graph; the last: types on the way
TAKES, GIVES, KIND, ATTRIBUTE = 1, 2, 4, 5  # of a node
VARINT, BYTES, FIXED = 0, 2, {1: 8, 5: 4}  # wire types; bytes of fixed ones
MOVES = {  # they give numbers that they are given, which need no rounding
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Max", "Min", "Neg", "Relu", "Reshape"),
    *("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
}
FOLDER = "session.model_external_initializers_file_folder_path"  # where ONNX Runtime finds weights
SUM, WIDE = ":sum", ":wide"  # behind a name: before it is rounded, and after, in float32

Fields = Iterator[tuple[int, Any, Any]]


def rounded(model: bytes) -> bytes:
    """The bytes of an ONNX model that rounds every result to the type it has in this one.

    The types of inputs and outputs stay, and so does the model where none is float16 or bfloat16.

    Raises:
        ValueError: it does not read as an ONNX model.
    """
    try:
        fields = _fields(memoryview(model))
        return b"".join(_message(GRAPH, _graph(v)) if n == GRAPH else raw for n, v, raw in fields)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("no ONNX model") from error


def _graph(graph: Any) -> bytes:
    fields = list(_fields(graph))
    narrow = dict(_narrow(fields))
    ends = {_name(_found(value, 1)) for number, value, _ in fields if number == MADE}
    given = [_named(value, number) for number, value, _ in fields if number in (WEIGHT, GIVEN)]
    parts = [_cast(name, name + WIDE, FLOAT) for name in dict.fromkeys(given) if name in narrow]
    for number, value, raw in fields:
        parts += _node(value, narrow, ends) if number == NODE else [raw]
    return b"".join(parts)


def _narrow(fields: Iterable[tuple[int, Any, Any]]) -> Iterator[tuple[str, int]]:
    """Names and types of the tensors of 16 bits."""
    for number, value, _ in fields:
        if number == WEIGHT:
            found = [(_named(value, number), _found(value, 2))]
        elif number in (GIVEN, MADE, TOLD):
            tensor = _found(_found(value, 2) or b"", 1) or b""
            found = [(_named(value, number), _found(tensor, 1))]
        elif number == NODE:  # a constant's may be told nowhere else
            held = [_found(_found(v, 5) or b"", 2) for n, v, _ in _fields(value) if n == ATTRIBUTE]
            found = [(_name(_found(value, GIVES)), kind) for kind in held]
        else:
            continue
        yield from ((name, kind) for name, kind in found if kind in NARROW)


def _node(node: Any, narrow: dict[str, int], ends: set[str]) -> list[bytes]:
    """A node in float32, and the casts behind it."""
    parts, casts, fields = list[Any](), list[bytes](), list(_fields(node))
    kind = _name(_found(node, KIND))
    for number, value, raw in fields:
        name = _name(value) if number in (TAKES, GIVES) else ""
        if number == ATTRIBUTE:
            parts.append(_message(ATTRIBUTE, _widened(value)))
        elif name not in narrow:
            parts.append(raw)
        elif number == TAKES or (kind in MOVES and name not in ends):
            parts.append(_message(number, (name + WIDE).encode()))
        elif kind in ("Constant", "ConstantOfShape"):
            parts.append(raw)
            casts.append(_cast(name, name + WIDE, FLOAT))
        else:
            parts.append(_message(number, (name + SUM).encode()))
            casts += [_cast(name + SUM, name, narrow[name]), _cast(name, name + WIDE, FLOAT)]
    return [_message(NODE, b"".join(parts)), *casts]


def _widened(attribute: Any) -> bytes:
    """An attribute; the type that a cast is to have, if it is narrow, as float32."""
    number = _found(attribute, 3)
    if _name(_found(attribute, 1)) == "to" and number in NARROW:
        return b"".join(_told(3, FLOAT) if n == 3 else raw for n, _, raw in _fields(attribute))
    return bytes(attribute)


def _cast(name: str, to: str, kind: int) -> bytes:
    attribute = _message(1, b"to") + _told(3, kind) + _told(20, 2)  # 20: its type; 2: an integer
    told = [(TAKES, name.encode()), (GIVES, to.encode()), (3, to.encode()), (KIND, b"Cast")]
    told.append((ATTRIBUTE, attribute))
    return _message(NODE, b"".join(_message(number, value) for number, value in told))


def _named(value: Any, number: int) -> str:
    """The name of a weight, or of another tensor that a graph tells of."""
    return _name(_found(value, 8 if number == WEIGHT else 1))


def _found(message: Any, number: int) -> Any:
    """The first value of a field; None where it is not there."""
    return next((value for n, value, _ in _fields(memoryview(message)) if n == number), None)


def _name(value: Any) -> str:
    return "" if value is None else str(value, "utf-8")


# --- the wire format ------------------------------------------------------------------------------


def _fields(message: Any) -> Fields:
    """Number, value and bytes of every field of a message; lengths of values are looked at alone.

    Raises:
        IndexError: it ends too early.
        KeyError: another wire type.
    """
    at, end = 0, len(message)
    while at < end:
        start = at
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
        else:
            size = FIXED.get(wire)
            if wire == BYTES:
                size, at = _varint(message, at)
            if size is None:
                raise KeyError(wire)
            value, at = message[at : at + size], at + size
            if at > end:
                raise IndexError(at)
        yield number, value, message[start:at]


def _varint(message: Any, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _told(field: int, value: int) -> bytes:
    return _number(field << 3 | VARINT) + _number(value)


def _message(field: int, value: bytes) -> bytes:
    return _number(field << 3 | BYTES) + _number(len(value)) + value
