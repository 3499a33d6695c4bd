# SPDX-License-Identifier: Apache-2.0
"""Contract objects survive the wire bit for bit, and whatever is changed on the way is refused."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedneuro.privacy.contract import (
    Estimate,
    EvaluateReply,
    HelloReply,
    Kind,
    Receipt,
    Refusal,
    Reply,
    Request,
    Role,
    TrainReply,
)
from fedneuro.privacy.errors import ContractViolation, Reason
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_reply, decode_request, encode_reply, encode_request, pack

STUDY = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
ARRAYS: dict[str, NDArray[Any]] = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.count": np.array(3, np.int64),
}

RECEIPT = Receipt(count=3, head="0123456789abcdef")

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=40)
dtypes = st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
arrays_strategy = st.dictionaries(
    names, hnp.arrays(dtypes, shapes, elements=None, fill=st.nothing()), min_size=1, max_size=5
)
sites = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
optional = st.none() | finite
rounds = st.integers(1, 10_000)

replies = st.one_of(
    st.builds(
        HelloReply,
        site=sites,
        role=st.sampled_from(Role),
        public_size=st.integers(1, 10**6),
        versions=st.dictionaries(names, names, max_size=4),
        has_validation=st.booleans(),
    ),
    st.builds(
        TrainReply,
        site=sites,
        round=rounds,
        arrays=arrays_strategy,
        steps=st.integers(0, 10**6),
        seconds=finite,
        loss=optional,
        epsilon=optional,
        noise_multiplier=optional,
        attempt=st.none() | st.integers(1, 100),
        receipt=st.none()
        | st.builds(Receipt, count=st.integers(1, 10**9), head=st.from_regex(r"[0-9a-f]{16}", fullmatch=True)),
    ),
    st.builds(
        EvaluateReply,
        site=sites,
        round=st.integers(0, 100),
        seconds=finite,
        metrics=st.dictionaries(
            st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True),
            st.builds(Estimate, mean=finite, low=finite, high=finite, n=st.integers(1, 10**6)),
            max_size=4,
        ),
    ),
    st.builds(
        Refusal,
        site=sites,
        kind=st.sampled_from(["hello", "train", "evaluate"]),
        round=st.integers(0, 100),
        reason=st.sampled_from(Reason),
    ),
)


def travel(content: RecordDict) -> RecordDict:
    """The records as they come out of Flower's own serialisation, chunk by chunk."""
    objects = get_all_nested_objects(content)
    inflated = inflate_object_from_contents(content.object_id, {key: o.deflate() for key, o in objects.items()})
    assert isinstance(inflated, RecordDict)
    return inflated


def same_arrays(left: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]]) -> bool:
    """Equal names, order, dtypes, shapes and bits; NaN equals the same NaN."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(left.values(), right.values(), strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(replies)
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    back = decode_reply(travel(encode_reply(reply)))
    assert type(back) is type(reply)
    for name in type(reply).__dataclass_fields__:
        mine, theirs = getattr(reply, name), getattr(back, name)
        assert same_arrays(mine, theirs) if name == "arrays" else mine == theirs


@settings(max_examples=40, deadline=None)
@given(arrays_strategy, st.booleans(), rounds, st.sampled_from(["train", "evaluate"]))
def test_a_request_survives_the_wire(arrays: dict[str, NDArray[Any]], final: bool, number: int, kind: Kind) -> None:
    request = Request(kind=kind, study=STUDY, round=number, arrays=arrays, final=final and kind == "evaluate")
    back = decode_request(travel(encode_request(request, pack(arrays))))
    assert back.arrays is not None
    assert same_arrays(arrays, back.arrays)
    assert (back.kind, back.round, back.final, back.study) == (kind, number, request.final, STUDY)


def test_a_hello_carries_no_model() -> None:
    back = decode_request(travel(encode_request(Request(kind="hello", study=STUDY))))
    assert back.arrays is None
    with pytest.raises(ContractViolation, match="with a model"):
        encode_request(Request(kind="hello", study=STUDY, arrays=ARRAYS))


def test_a_receipt_is_shown_with_train_only() -> None:
    assert decode_request(request_content()).receipt == RECEIPT
    with pytest.raises(ContractViolation, match="receipt does not suit"):
        encode_request(Request(kind="evaluate", study=STUDY, round=1, arrays=ARRAYS, receipt=RECEIPT))
    with pytest.raises(ContractViolation, match="sixteen"):
        Receipt(count=1, head="short")


def test_nan_and_infinity_in_arrays_keep_their_bits() -> None:
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).view(np.float32)
    back = decode_request(travel(encode_request(Request(kind="train", study=STUDY, round=1, arrays={"w": odd}))))
    assert back.arrays is not None
    assert back.arrays["w"].tobytes() == odd.tobytes()


def test_a_scalar_that_is_not_finite_neither_leaves_nor_enters() -> None:
    reply = TrainReply(site="A", round=1, arrays=ARRAYS, steps=1, seconds=1.0, loss=math.nan)
    with pytest.raises(ContractViolation) as error:
        encode_reply(reply)
    assert error.value.reason is Reason.NON_FINITE
    content: Any = encode_reply(TrainReply(site="A", round=1, arrays=ARRAYS, steps=1, seconds=1.0, loss=0.5))
    content["reply"]["loss"] = math.inf
    with pytest.raises(ContractViolation) as error:
        decode_reply(content)
    assert error.value.reason is Reason.NON_FINITE


def request_content() -> RecordDict:
    return travel(encode_request(Request(kind="train", study=STUDY, round=1, arrays=ARRAYS, receipt=RECEIPT)))


def train_content() -> RecordDict:
    reply = TrainReply(
        site="A", round=1, arrays=ARRAYS, steps=2, seconds=1.0, loss=0.1, epsilon=1.0, noise_multiplier=2.0,
        attempt=2, receipt=RECEIPT,
    )  # fmt: skip
    return travel(encode_reply(reply))


def evaluate_content() -> RecordDict:
    estimate = Estimate(mean=0.5, low=0.4, high=0.6, n=3)
    return travel(encode_reply(EvaluateReply(site="A", round=1, metrics={"dice": estimate}, seconds=1.0)))


def hello_content() -> RecordDict:
    return travel(encode_reply(HelloReply(site="A", role=Role.TRAIN, public_size=10, versions={"torch": "2"})))


def refusal_content() -> RecordDict:
    return travel(encode_reply(Refusal(site="A", kind="train", round=1, reason=Reason.DATA_INVALID)))


CONTENTS: dict[str, tuple[Callable[[], Any], Callable[[RecordDict], Any]]] = {
    "request": (request_content, decode_request),
    "train": (train_content, decode_reply),
    "evaluate": (evaluate_content, decode_reply),
    "hello": (hello_content, decode_reply),
    "refusal": (refusal_content, decode_reply),
}
OPTIONAL = {"loss", "epsilon", "noise-multiplier", "attempt", "receipt"}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_key_is_needed_typed_and_the_only_one(name: str) -> None:
    make, decode = CONTENTS[name]
    decode(make())  # as it stands it is accepted
    for record in list(make()):
        content = make()
        del content[record]
        with pytest.raises(ContractViolation):
            decode(content)
        if not isinstance(make()[record], ConfigRecord):
            continue
        for key in list(make()[record]):
            if key not in OPTIONAL:
                content = make()
                del content[record][key]
                with pytest.raises(ContractViolation):
                    decode(content)
            content = make()
            content[record][key] = b"another type" if not isinstance(content[record][key], bytes) else "text"
            with pytest.raises(ContractViolation):
                decode(content)
        content = make()
        content[record]["extra"] = 1
        with pytest.raises(ContractViolation):
            decode(content)
    for extra in (ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord({"x": Array(np.zeros(1))})):
        content = make()
        content["extra"] = extra
        with pytest.raises(ContractViolation):
            decode(content)


@pytest.mark.parametrize(
    ("name", "record", "key", "value"),
    [
        ("request", "request", "contract", 2),
        ("request", "request", "contract", True),
        ("request", "request", "kind", "delete"),
        ("request", "request", "kind", "hello"),
        ("request", "request", "round", -1),
        ("request", "request", "round", 0),
        ("request", "request", "round", True),
        ("request", "request", "final", True),
        ("request", "request", "study", STUDY.canonical + b" "),
        ("request", "request", "study", b"x" * 300_000),
        ("request", "request", "study-hash", "0" * 64),
        ("request", "request", "digest", "0" * 64),
        ("request", "request", "digest", "short"),
        ("request", "request", "names", ["b.weight", "b.weight"]),
        ("request", "request", "names", ["a.count", "b.weight"]),
        ("request", "request", "names", ["b.weight"]),
        ("request", "request", "names", ["b.weight", "x" * 600]),
        ("request", "request", "names", []),
        ("request", "request", "dtypes", ["float32", "float64"]),
        ("request", "request", "dtypes", ["float32", "object"]),
        ("request", "request", "dtypes", ["int32", "int64"]),
        ("request", "request", "shapes", ["3,2", ""]),
        ("request", "request", "shapes", ["2,3", "2"]),
        ("request", "request", "shapes", ["-2,-3", ""]),
        ("request", "request", "shapes", ["2,3,", ""]),
        ("request", "request", "shapes", ["999999999999,999999999999", ""]),
        ("request", "request", "shapes", ["1,1,1,1,1,1,1,2,3", ""]),
        ("request", "request", "receipt", "3"),
        ("request", "request", "receipt", "0:0123456789abcdef"),
        ("request", "request", "receipt", "3:0123456789ABCDEF"),
        ("train", "reply", "receipt", "-3:0123456789abcdef"),
        ("train", "reply", "receipt", f"{'9' * 16}:0123456789abcdef"),
        ("train", "reply", "attempt", -1),
        ("train", "reply", "type", "hello"),
        ("train", "reply", "type", "refusal"),
        ("train", "reply", "site", "../A"),
        ("train", "reply", "steps", -1),
        ("train", "reply", "steps", 2.0),
        ("train", "reply", "seconds", math.nan),
        ("train", "reply", "epsilon", math.inf),
        ("evaluate", "reply", "metrics", ["dice", "dice"]),
        ("evaluate", "reply", "metrics", ["dice\n"]),
        ("evaluate", "reply", "metrics", []),
        ("evaluate", "reply", "metrics", ["d" * 600]),
        ("evaluate", "reply", "metrics", [f"m{i}" for i in range(300)]),
        ("evaluate", "reply", "values", [0.5, 0.4]),
        ("evaluate", "reply", "values", [0.5, 0.4, math.nan]),
        ("evaluate", "reply", "values", [1, 2, 3]),
        ("evaluate", "reply", "patients", [0]),
        ("evaluate", "reply", "patients", [True]),
        ("evaluate", "reply", "patients", [3.0]),
        ("evaluate", "reply", "patients", 3),
        ("hello", "reply", "role", "king"),
        ("hello", "reply", "versions", "[]"),
        ("hello", "reply", "versions", '{"a": 1}'),
        ("hello", "reply", "versions", "["),
        ("hello", "reply", "versions", "[" * 100_000),
        ("hello", "reply", "public-size", -3),
        ("hello", "reply", "has-validation", 1),
        ("refusal", "reply", "reason", "because patient 17 died"),
        ("refusal", "reply", "kind", "delete"),
    ],
)
def test_a_changed_value_is_refused(name: str, record: str, key: str, value: Any) -> None:
    make, decode = CONTENTS[name]
    content = make()
    content[record][key] = value
    with pytest.raises(ContractViolation) as error:
        decode(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["flip", "short", "long", "stype", "dtype", "shape", "second", "numpy"])
def test_changed_array_bytes_are_refused(change: str) -> None:
    content: Any = request_content()
    state = content["arrays"]["state"]
    data, dtype, shape, stype = state.data, state.dtype, state.shape, state.stype
    if change == "flip":
        data = bytes([data[0] ^ 1]) + data[1:]
    elif change == "short":
        data = data[:-1]
    elif change == "long":
        data += b"\0"
    elif change == "stype":
        stype = "numpy.ndarray"
    elif change == "dtype":
        dtype = "int8"
    elif change == "shape":
        shape = (len(data), 1)
    record = {"state": Array(dtype, shape, stype, data)}
    if change == "second":
        record["other"] = Array(np.zeros(1))
    if change == "numpy":
        record["state"] = Array(np.frombuffer(data, np.uint8))
    content["arrays"] = ArrayRecord(record)
    with pytest.raises(ContractViolation):
        decode_request(content)


def test_a_study_with_another_digit_is_another_study() -> None:
    content: Any = request_content()
    other = Study.parse({"study": {"name": "toy", "seed": 1}, "training": {"local_steps": 1}})
    content["request"]["study"] = other.canonical
    with pytest.raises(ContractViolation, match="hash"):
        decode_request(content)


@pytest.mark.parametrize("bad", [np.zeros(2, np.complex64), np.array(["a"]), np.zeros(2, ">f4")])
def test_an_array_of_another_kind_does_not_travel(bad: NDArray[Any]) -> None:
    with pytest.raises(ContractViolation, match="dtype"):
        pack({"w": bad})


def test_no_arrays_are_no_model() -> None:
    with pytest.raises(ContractViolation, match="0 arrays"):
        pack({})


def test_a_decoded_array_shares_nothing_that_can_be_written() -> None:
    request = decode_request(request_content())
    assert request.arrays is not None
    with pytest.raises(ValueError, match="read-only"):
        request.arrays["b.weight"][0, 0] = 1
