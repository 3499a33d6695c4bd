# SPDX-License-Identifier: Apache-2.0
"""Records as bytes: on the pipe between the runner and the process that trains, and as one record on the network.

A frame is twelve bytes (length of the head, length of the body), a head in JSON and a body of raw bytes. The head holds
plain values of the caller and, in order, every record: a ConfigRecord as its values, an ArrayRecord as dtype, shape,
type and length of each array, whose bytes follow one another in the body. Nothing is unpickled; what was read is
then decoded by :mod:`.wire`, as strictly as what came over the network.

Flower moves each record, array and part of an array as an object of its own, each with an HTTP request on every hop;
the SuperLink serves them one after another, and in a round of small messages there is nothing else to wait for. So a
message of up to a megabyte travels as *one* record that holds such a frame (:func:`squeeze`): half of the requests.
"""

import base64
import io
import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from .errors import ContractViolation

if TYPE_CHECKING:
    from flwr.app import RecordDict

__all__ = ["MAX_SQUEEZED", "is_squeezed", "read_frame", "squeeze", "unsqueeze", "write_frame"]

MAX_SQUEEZED: Final = 1024**2
"""Bytes of arrays up to which a message travels as one record; Flower divides larger ones, and sends parts again."""
_FRAME: Final = "frame"

_LENGTHS: Final = struct.Struct("<IQ")
_MAX_HEAD: Final = 64 * 1024**2
_MAX_BODY: Final = 5 * 1024**3


def write_frame(stream: BinaryIO, head: Mapping[str, Any], content: "RecordDict | None" = None) -> None:
    """Write one frame.

    Args:
        stream: unbuffered or buffered; flushed afterwards.
        head: JSON values.
        content: records, or none.

    Raises:
        OSError: the other side is gone.
    """
    records, parts = _pack(content)
    values = dict(head) if records is None else {**head, "records": records}
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    stream.write(_LENGTHS.pack(len(text), sum(map(len, parts))) + text)
    for part in parts:
        stream.write(part)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], "RecordDict | None"]:
    """Read one frame: its head without ``records``, and the records.

    Raises:
        EOFError: the other side closed, also in the middle of a frame.
        ContractViolation: it is not a frame.
    """
    head_size, body_size = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if head_size > _MAX_HEAD or body_size > _MAX_BODY:
        raise ContractViolation(f"a frame of {head_size} and {body_size} bytes; it is no frame")
    text, body = _exactly(stream, head_size), _exactly(stream, body_size)
    try:
        head = json.loads(text)
        records = head.pop("records", None)
        return head, None if records is None else _unpack(records, body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContractViolation(f"a frame cannot be read: {error}") from error


def squeeze(content: "RecordDict") -> "RecordDict":
    """``content`` as one record, or as it is where its arrays have more than :data:`MAX_SQUEEZED` bytes."""
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    arrays = [array for record in content.values() if isinstance(record, ArrayRecord) for array in record.values()]
    if sum(len(array.data) for array in arrays) > MAX_SQUEEZED:
        return content
    frame = io.BytesIO()
    write_frame(frame, {}, content)
    return RecordDict({_FRAME: ConfigRecord({_FRAME: frame.getvalue()})})


def is_squeezed(content: "RecordDict") -> bool:
    """Whether ``content`` claims to be the work of :func:`squeeze`."""
    return list(content) == [_FRAME]


def unsqueeze(content: "RecordDict") -> "RecordDict":
    """What :func:`squeeze` was given.

    Raises:
        ContractViolation: the record is not one frame, exactly, or is too large for one.
    """
    from flwr.app import ConfigRecord

    if not is_squeezed(content):
        return content
    record = content[_FRAME]
    value = record.get(_FRAME) if type(record) is ConfigRecord and len(record) == 1 else None
    if type(value) is not bytes or len(value) > 4 * MAX_SQUEEZED:
        raise ContractViolation("record frame of the message does not hold one frame")
    stream = io.BytesIO(value)
    try:
        head, records = read_frame(stream)
    except EOFError as error:
        raise ContractViolation("record frame of the message ends too soon") from error
    if head or records is None or stream.read(1):
        raise ContractViolation("record frame of the message holds more than records")
    return records


def _exactly(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise EOFError("the pipe was closed")
    return found


def _pack(content: "RecordDict | None") -> tuple[dict[str, Any] | None, list[bytes]]:
    if content is None:
        return None, []
    from flwr.app import ArrayRecord

    records: dict[str, Any] = {}
    parts: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records[name] = {"arrays": [[k, a.dtype, list(a.shape), a.stype, len(a.data)] for k, a in record.items()]}
            parts += [array.data for array in record.values()]
        else:
            records[name] = {"values": {key: _to_json(value) for key, value in record.items()}}
    return records, parts


def _to_json(value: Any) -> Any:
    """Bytes as ``{"b": base64}``, also in a list; everything else is JSON already."""
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode("ascii")}
    return [_to_json(item) for item in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["b"], validate=True)
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def _unpack(records: Mapping[str, Any], body: bytes) -> "RecordDict":
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    content = RecordDict()
    offset = 0
    for name, record in records.items():
        if "arrays" not in record:
            content[name] = ConfigRecord({key: _from_json(value) for key, value in record["values"].items()})
            continue
        arrays = {}
        for key, dtype, shape, kind, size in record["arrays"]:
            if type(size) is not int or not 0 <= size <= len(body) - offset:
                raise ValueError("an array has another length than the body")  # one by one, before any is copied
            arrays[key] = Array(dtype, tuple(shape), kind, body[offset : offset + size])
            offset += size
        content[name] = ArrayRecord(arrays)
    if offset != len(body):
        raise ValueError("the body has another length than its head says")
    return content
