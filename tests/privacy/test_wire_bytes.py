# SPDX-License-Identifier: Apache-2.0
"""Records as bytes: what goes in comes out, and what is not a frame is refused."""

import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedneuro.privacy.errors import ContractViolation
from fedneuro.privacy.wire_bytes import MAX_SQUEEZED, is_squeezed, read_frame, squeeze, unsqueeze, write_frame

SCALARS = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.booleans(), st.text(), st.binary())
LISTS = st.one_of(*(st.lists(kind, max_size=4) for kind in (st.integers(0, 9), st.text(max_size=5), st.binary())))
VALUES = st.dictionaries(st.text(min_size=1, max_size=8), st.one_of(SCALARS, LISTS), max_size=6)


def arrays(data: bytes) -> ArrayRecord:
    return ArrayRecord({"state": Array("uint8", (len(data),), "fedneuro.state", data)})


@given(values=VALUES, data=st.binary(max_size=100))
def test_what_goes_in_comes_out(values: dict[str, Any], data: bytes) -> None:
    content = RecordDict({"request": ConfigRecord(values), "arrays": arrays(data)})
    assert unsqueeze(squeeze(content)) == content
    pipe = io.BytesIO()
    write_frame(pipe, {"ok": True}, content)
    write_frame(pipe, {"ok": False})
    pipe.seek(0)
    assert read_frame(pipe) == ({"ok": True}, content)
    assert read_frame(pipe) == ({"ok": False}, None)
    with pytest.raises(EOFError):
        read_frame(pipe)


def test_large_arrays_travel_in_flowers_own_parts() -> None:
    content = RecordDict({"arrays": arrays(bytes(MAX_SQUEEZED + 1))})
    assert squeeze(content) is content
    assert not is_squeezed(content) and unsqueeze(content) is content


def frame(head: object, body: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<IQ", len(text), len(body)) + text + body


GOOD = {"records": {"r": {"values": {"a": 1}}}}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"x" * 11,
        struct.pack("<IQ", 2**31, 0),  # a head of 2 GB
        struct.pack("<IQ", 2, 2**60) + b"{}",  # a body that no memory holds
        frame([1]),
        frame({}),
        frame(GOOD | {"more": 1}),
        frame(GOOD) + b"x",
        frame(GOOD, b"x"),
        frame({"records": {"r": {"values": {"a": None}}}}),
        frame({"records": {"r": {"values": {"a": {"b": "%"}}}}}),
        frame({"records": {"r": {"arrays": [["a", "uint8", [3], "t", 3]]}}}, b"xx"),
        frame({"records": {"r": {}}}),
        b"\x10\x27\x00\x00" + bytes(8) + b"[" * 10000,  # nested beyond the stack
        5,
        "text",
        bytes(4 * MAX_SQUEEZED + 1),
    ],
)
def test_what_is_no_frame_is_refused(value: Any) -> None:
    with pytest.raises(ContractViolation):
        unsqueeze(RecordDict({"frame": ConfigRecord({"frame": value})}))


def test_a_frame_beside_other_things_is_no_frame() -> None:
    good = frame(GOOD)
    with pytest.raises(ContractViolation):
        unsqueeze(RecordDict({"frame": ConfigRecord({"frame": good, "more": 1})}))
    with pytest.raises(ContractViolation):
        unsqueeze(RecordDict({"frame": ArrayRecord({"frame": Array(np.zeros(1))})}))
    assert not is_squeezed(RecordDict({"frame": ConfigRecord({"frame": good}), "x": ConfigRecord()}))
