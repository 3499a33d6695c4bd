# SPDX-License-Identifier: Apache-2.0
"""The steps of a secure aggregation survive the wire, and whatever is changed on the way is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedneuro.privacy.contract import (
    Advert,
    HelloReply,
    KeysReply,
    MaskedReply,
    Receipt,
    Reply,
    Request,
    Role,
    SecureStep,
    SharesReply,
    UnmaskReply,
)
from fedneuro.privacy.errors import ContractViolation
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_reply, decode_request, encode_reply, encode_request

STUDY = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
ADVERT = Advert(encryption=b"e" * 32, masking=b"m" * 32, signature=b"s" * 104)
ROSTER = {"a": b"a" * 49, "b": b"b" * 49}
ARRAYS = {"w": np.arange(3, dtype=np.float32)}
VECTOR = np.array([0, 1, 2**64 - 1], np.uint64)
RECEIPT = Receipt(count=3, head="0123456789abcdef")

REQUESTS = [
    Request(kind="keys", study=STUDY, round=1, secure=SecureStep(roster=ROSTER)),
    Request(
        kind="shares", study=STUDY, round=1, secure=SecureStep(roster=ROSTER, adverts={"a": ADVERT, "b": ADVERT})
    ),
    Request(
        kind="masked", study=STUDY, round=2, arrays=ARRAYS, receipt=RECEIPT,
        secure=SecureStep(context="0" * 64, sealed={"b": b"x" * 82}),
    ),
    Request(kind="unmask", study=STUDY, round=2, secure=SecureStep(context="0" * 64, survivors=("a", "b"))),
]  # fmt: skip
REPLIES: list[Reply] = [
    HelloReply(site="a", role=Role.TRAIN, public_size=10, identity=b"a" * 49),
    KeysReply(site="a", round=1, advert=ADVERT),
    SharesReply(site="a", round=1, sealed={"b": b"x" * 82}),
    MaskedReply(
        site="a", round=1, vector=VECTOR, seconds=0.5, epsilon=1.0, noise_multiplier=2.0, attempt=2, receipt=RECEIPT
    ),
    UnmaskReply(site="a", round=1, self_shares={"a": b"s" * 33}, key_shares={"b": b"k" * 33}, advert=ADVERT),
    UnmaskReply(site="a", round=1, self_shares={"a": b"s" * 33, "b": b"s" * 33}, key_shares={}),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.kind)
def test_a_step_survives_the_wire(request_: Request) -> None:
    back = decode_request(encode_request(request_))
    assert (back.kind, back.round, back.secure, back.receipt) == (
        request_.kind, request_.round, request_.secure, request_.receipt,
    )  # fmt: skip
    assert (back.arrays is None) is (request_.arrays is None)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: type(r).__name__)
def test_an_answer_survives_the_wire(reply: Reply) -> None:
    back = decode_reply(encode_reply(reply))
    assert type(back) is type(reply)
    for name in type(reply).__dataclass_fields__:
        np.testing.assert_equal(getattr(back, name), getattr(reply, name))


def test_a_request_is_complete_or_not_made() -> None:
    with pytest.raises(ContractViolation, match="without a secure step"):
        encode_request(Request(kind="keys", study=STUDY, round=1))
    with pytest.raises(ContractViolation, match="without a model"):
        encode_request(Request(kind="masked", study=STUDY, round=1, secure=SecureStep(context="0" * 64)))
    with pytest.raises(ContractViolation, match="with a secure step"):
        encode_request(Request(kind="train", study=STUDY, round=1, arrays=ARRAYS, secure=SecureStep()))


def set_key(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[record][key] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("keys", set_key("request", "roster", ["a", "a"])),
        ("keys", set_key("request", "roster", ["a", "../b"])),
        ("keys", set_key("request", "roster-keys", [b"a" * 49])),
        ("keys", set_key("request", "roster-keys", [b"a" * 49, b"b" * 48])),
        ("keys", set_key("request", "context", "0" * 64)),
        ("shares", set_key("request", "advert-masking", [b"m" * 32, b"m" * 31])),
        ("shares", set_key("request", "advert-signatures", [b"s" * 104, b"s" * 4000])),
        ("shares", set_key("request", "advert-sites", ["a"])),
        ("masked", set_key("request", "context", "0" * 63)),
        ("masked", set_key("request", "sealed", [b"x" * 81])),
        ("unmask", set_key("request", "survivors", [1, 3])),
        ("unmask", set_key("request", "survivors", ["a"] * 2)),
        ("unmask", set_key("request", "sealed", [b"x"])),
    ],
)
def test_a_step_that_was_changed_is_refused(kind: str, change: Callable[[RecordDict], None]) -> None:
    content = encode_request(next(r for r in REQUESTS if r.kind == kind))
    change(content)
    with pytest.raises(ContractViolation):
        decode_request(content)


@pytest.mark.parametrize(
    ("position", "change"),
    [
        (0, set_key("reply", "identity", b"a" * 48)),
        (1, set_key("reply", "encryption", b"e" * 33)),
        (2, set_key("reply", "sealed-sites", ["b", "c"])),
        (3, set_key("reply", "dtypes", ["int64"])),
        (3, set_key("reply", "names", ["weights"])),
        (3, set_key("reply", "epsilon", float("nan"))),
        (4, set_key("reply", "seed-shares", [b"s" * 32])),
        (4, set_key("reply", "secret", b"s" * 32)),
    ],
)
def test_an_answer_that_was_changed_is_refused(position: int, change: Callable[[RecordDict], None]) -> None:
    content = encode_reply(REPLIES[position])
    change(content)
    with pytest.raises(ContractViolation):
        decode_reply(content)
