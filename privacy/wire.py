# SPDX-License-Identifier: Apache-2.0
"""Contract objects as Flower records, and back: the only place that knows both.

A message is a Flower ``RecordDict`` of one or two records, whose keys are listed here in full:

    =========  ============  ====================================================================
    record     kind          holds
    =========  ============  ====================================================================
    request    ConfigRecord  contract, kind, round, final, study, study-hash, [receipt], [signature], [model keys],
                             [held], [threshold], and those of a step of secure aggregation (:mod:`~.wire_secure`)
    reply      ConfigRecord  contract, type, site, and the fields of that reply, [model keys];
                             of metrics: metrics (names), values (mean, low, high of each), patients
    arrays     ArrayRecord   ``state``: the bytes of all arrays of a model, one after another
    =========  ============  ====================================================================

Model keys: ``names``, ``dtypes`` and ``shapes`` of the arrays, in order, and their ``digest`` (SHA-256).

Parsing fails closed, on both sides: a record, a key or a type that is not expected, a number that is not
finite, a size beyond the limits below, a study that does not hash to its name or arrays that do not hash to
their digest raise :class:`ContractViolation`. All arrays travel as *one* Flower array, because Flower moves
each array as two objects, each with an HTTP request of its own on every hop: a U-Net of 60 arrays would cost
some 120 requests per hop, this form costs six.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..models.state import digest
from . import wire_secure
from .contract import (
    SECURE_KINDS,
    Arrays,
    Estimate,
    EvaluateReply,
    HelloReply,
    Kind,
    MaskedReply,
    Refusal,
    Reply,
    Request,
    Role,
    TrainReply,
    check_request,
)
from .errors import ContractViolation, Reason
from .study import Study
from .wire_fields import VERSION, Fields, read_receipt, read_versions, receipt_text, short

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

__all__ = ["MESSAGE_TYPES", "Packed", "decode_reply", "decode_request", "encode_reply", "encode_request", "pack"]

MESSAGE_TYPES: Final[Mapping[Kind, str]] = {
    "hello": "query.hello", "train": "train", "evaluate": "evaluate",
    "keys": "query.keys", "shares": "query.shares", "masked": "train.masked", "unmask": "query.unmask",
}  # fmt: skip
"""Flower's message type of each kind of request."""

# Limits against a message that is made to exhaust memory; each is far above what a study needs.
MAX_STUDY_BYTES: Final = 256 * 1024
MAX_STATE_BYTES: Final = 4 * 1024**3
MAX_ARRAYS: Final = 16_384
MAX_METRICS: Final = 1024

_STYPE: Final = "fedneuro.state"
_DTYPES: Final = frozenset(
    {"float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint16", "uint64", "bool"}
)
_SITE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SHAPE: Final = re.compile(r"([0-9]{1,12}(,[0-9]{1,12}){0,7})?")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
_METRIC: Final = re.compile(r"[A-Za-z][A-Za-z0-9_ :.-]{0,127}")

Packed = tuple[Mapping[str, Any], "ArrayRecord"]
"""Arrays made ready to travel: model keys and bytes. One serves the requests to all sites."""


# -- encoding ------------------------------------------------------------------------------------------------


def pack(arrays: Arrays) -> Packed:
    """Arrays as model keys and ``arrays`` record.

    Raises:
        ContractViolation: an array of a kind that does not travel, or too many.
    """
    from flwr.app import Array, ArrayRecord

    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, part in parts.items():
        if part.dtype.name not in _DTYPES or part.dtype.byteorder == ">":
            raise ContractViolation(f"array {name} has dtype {part.dtype}; {', '.join(sorted(_DTYPES))} may travel")
    size = sum(part.nbytes for part in parts.values())
    if not parts or len(parts) > MAX_ARRAYS or size > MAX_STATE_BYTES:
        raise ContractViolation(
            f"{len(parts)} arrays of {size} bytes; 1 to {MAX_ARRAYS} of {MAX_STATE_BYTES} may travel"
        )
    data = b"".join(part.reshape(-1).view(np.uint8).data for part in parts.values())
    keys = {
        "names": list(parts),
        "dtypes": [part.dtype.name for part in parts.values()],
        "shapes": [",".join(map(str, arrays[name].shape)) for name in parts],
        "digest": digest(arrays),
    }
    return keys, ArrayRecord({"state": Array("uint8", (size,), _STYPE, data)})


def encode_request(request: Request, packed: Packed | None = None) -> "RecordDict":
    """A request as Flower records.

    Args:
        request: what is asked.
        packed: ``pack(request.arrays)``, where the caller sends the same arrays to several sites.

    Raises:
        ContractViolation: the request contradicts itself.
    """
    from flwr.app import ConfigRecord, RecordDict

    check_request(request)
    values: dict[str, Any] = {
        "contract": VERSION,
        "kind": request.kind,
        "round": request.round,
        "final": request.final,
        "study": request.study.canonical,
        "study-hash": request.study.hash,
    }
    if request.receipt is not None:
        values["receipt"] = receipt_text(request.receipt)
    if request.signature:
        values["signature"] = request.signature.hex()
    if request.secure is not None:
        values |= wire_secure.step_values(request.kind, request.secure)
    values |= {"held": request.held} if request.held else {}
    values |= {} if request.threshold is None else {"threshold": float(request.threshold)}
    records: dict[str, Any] = {}
    if request.arrays is not None:
        keys, records["arrays"] = packed or pack(request.arrays)
        values |= keys
    return RecordDict({"request": ConfigRecord(values), **records})


def encode_reply(reply: Reply) -> "RecordDict":
    """A reply as Flower records.

    Raises:
        ContractViolation: the reply holds a number that is not finite, or an array that may not travel.
    """
    from flwr.app import ConfigRecord, RecordDict

    records: dict[str, Any] = {}
    values: dict[str, Any] = {"contract": VERSION, "site": reply.site}
    if isinstance(reply, HelloReply):
        values |= {"type": "hello", "role": reply.role.value, "public-size": reply.public_size}
        values |= {"versions": json.dumps(dict(reply.versions)), "has-validation": reply.has_validation}
        values |= {"keeps-model": reply.keeps_model} | ({"identity": reply.identity} if reply.identity else {})
    elif isinstance(reply, TrainReply):
        values |= {"type": "train", "round": reply.round, "steps": reply.steps, "seconds": float(reply.seconds)}
        optional = {"loss": reply.loss, "epsilon": reply.epsilon, "noise-multiplier": reply.noise_multiplier}
        values |= {key: float(value) for key, value in optional.items() if value is not None}
        values |= _charge_values(reply)
        keys, records["arrays"] = pack(reply.arrays)
        values |= keys
    elif isinstance(reply, EvaluateReply):
        values |= {"type": "evaluate", "round": reply.round, "seconds": float(reply.seconds)}
        estimates = reply.metrics.values()
        values |= {"metrics": list(reply.metrics), "patients": [e.n for e in estimates]}
        values |= {"values": [float(number) for e in estimates for number in (e.mean, e.low, e.high)]}
    elif isinstance(reply, MaskedReply):
        values |= {"type": "masked", "round": reply.round, "seconds": float(reply.seconds)}
        values |= {"epsilon": float(reply.epsilon), "noise-multiplier": float(reply.noise_multiplier)}
        values |= _charge_values(reply)
        keys, records["arrays"] = pack({"vector": reply.vector})
        values |= keys
    elif isinstance(reply, Refusal):
        values |= {"type": "refusal", "kind": reply.kind, "round": reply.round, "reason": reply.reason.value}
    else:
        values |= wire_secure.reply_values(reply)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ContractViolation(
                f"{key} of the reply is {value}; a finite number was agreed", reason=Reason.NON_FINITE
            )
    return RecordDict({"reply": ConfigRecord(values), **records})


# -- decoding ------------------------------------------------------------------------------------------------


def decode_request(content: "RecordDict") -> Request:
    """The request in Flower records that came from a coordinator.

    Raises:
        ContractViolation: anything in it is not as agreed.
    """
    fields = Fields(_record(content, "request"), set(content))
    kind = cast(Kind, fields.choice("kind", get_args(Kind)))
    study_bytes = fields.take("study", bytes)
    if len(study_bytes) > MAX_STUDY_BYTES:
        raise ContractViolation(f"the study has {len(study_bytes)} bytes; at most {MAX_STUDY_BYTES} may travel")
    study = Study.from_canonical(study_bytes, fields.match("study-hash", _HASH))
    arrays = _unpack(content, fields) if "digest" in fields else None
    signature = bytes.fromhex(fields.match("signature", _SIGNATURE)) if "signature" in fields else b""
    held = fields.match("held", _HASH) if "held" in fields else ""
    number, final, receipt = fields.whole("round"), fields.take("final", bool), read_receipt(fields)
    threshold = fields.number("threshold") if "threshold" in fields else None
    secure = wire_secure.read_step(kind, fields) if kind in SECURE_KINDS else None
    fields.close({"request"} if arrays is None else {"request", "arrays"})
    request = Request(
        kind=kind,
        study=study,
        round=number,
        arrays=arrays,
        held=held,
        final=final,
        threshold=threshold,
        receipt=receipt,
        secure=secure,
        signature=signature,
    )
    check_request(request)
    return request


def decode_reply(content: "RecordDict") -> Reply:
    """The reply in Flower records that came from a site.

    Raises:
        ContractViolation: anything in it is not as agreed.
    """
    fields = Fields(_record(content, "reply"), set(content))
    kind = fields.choice("type", tuple(_REPLIES))
    return _REPLIES[kind](content, fields, fields.match("site", _SITE))


def _hello(_: "RecordDict", fields: Fields, site: str) -> Reply:
    role = Role(fields.choice("role", tuple(Role)))
    reply = HelloReply(
        site=site,
        role=role,
        public_size=fields.whole("public-size"),
        versions=read_versions(fields.take("versions", str)),
        has_validation=fields.take("has-validation", bool),
        keeps_model=fields.take("keeps-model", bool),
        identity=wire_secure.identity(fields) if "identity" in fields else b"",
    )
    fields.close({"reply"})
    return reply


def _train(content: "RecordDict", fields: Fields, site: str) -> Reply:
    arrays = _unpack(content, fields)
    optional = {key: fields.number(key) if key in fields else None for key in ("loss", "epsilon", "noise-multiplier")}
    reply = TrainReply(
        site=site,
        round=fields.whole("round"),
        arrays=arrays,
        steps=fields.whole("steps"),
        seconds=fields.number("seconds"),
        loss=optional["loss"],
        epsilon=optional["epsilon"],
        noise_multiplier=optional["noise-multiplier"],
        attempt=fields.whole("attempt") if "attempt" in fields else None,
        receipt=read_receipt(fields),
    )
    fields.close({"reply", "arrays"})
    return reply


def _masked(content: "RecordDict", fields: Fields, site: str) -> Reply:
    arrays = _unpack(content, fields)
    vector = arrays.get("vector")
    if len(arrays) != 1 or vector is None or vector.dtype != np.uint64 or vector.ndim != 1:
        raise ContractViolation("a masked reply does not hold one vector of uint64")
    reply = MaskedReply(
        site=site,
        round=fields.whole("round"),
        vector=cast(NDArray[np.uint64], vector),
        seconds=fields.number("seconds"),
        epsilon=fields.number("epsilon"),
        noise_multiplier=fields.number("noise-multiplier"),
        attempt=fields.whole("attempt") if "attempt" in fields else None,
        receipt=read_receipt(fields),
    )
    fields.close({"reply", "arrays"})
    return reply


def _secure(_: "RecordDict", fields: Fields, site: str, *, kind: str) -> Reply:
    reply = wire_secure.read_reply(kind, fields, site)
    fields.close({"reply"})
    return reply


def _evaluate(_: "RecordDict", fields: Fields, site: str) -> Reply:
    names, values = fields.many("metrics", str, MAX_METRICS), fields.many("values", float, 3 * MAX_METRICS)
    patients = fields.many("patients", int, MAX_METRICS)
    if len(set(names)) != len(names) or len(values) != 3 * len(names) or len(patients) != len(names):
        raise ContractViolation("the reply does not give each metric three numbers and a count of patients")
    estimates: dict[str, Estimate] = {}
    for index, name in enumerate(names):
        if not _METRIC.fullmatch(name) or not all(map(math.isfinite, values[3 * index : 3 * index + 3])):
            raise ContractViolation(f"metric {short(name)} has another name or value than a metric may have")
        mean, low, high = values[3 * index : 3 * index + 3]
        estimates[name] = Estimate(mean=mean, low=low, high=high, n=patients[index])
    reply = EvaluateReply(site=site, round=fields.whole("round"), metrics=estimates, seconds=fields.number("seconds"))
    fields.close({"reply"})
    return reply


def _refusal(_: "RecordDict", fields: Fields, site: str) -> Reply:
    kind = cast(Kind, fields.choice("kind", get_args(Kind)))
    reason = Reason(fields.choice("reason", tuple(Reason)))
    number = fields.whole("round")
    fields.close({"reply"})
    return Refusal(site=site, kind=kind, round=number, reason=reason)


_REPLIES: Final[Mapping[str, Callable[["RecordDict", Fields, str], Reply]]] = {
    "hello": _hello,
    "train": _train,
    "evaluate": _evaluate,
    "refusal": _refusal,
    "masked": _masked,
    **{kind: partial(_secure, kind=kind) for kind in ("keys", "shares", "unmask")},
}


def _unpack(content: "RecordDict", fields: Fields) -> dict[str, NDArray[np.generic]]:
    """The arrays of a message: read-only views of the bytes that came, verified against the digest."""
    from flwr.app import ArrayRecord

    expected = fields.match("digest", _HASH)
    names, dtypes, shapes = _layout(fields)
    record = content.get("arrays")
    if type(record) is not ArrayRecord or list(record) != ["state"]:
        raise ContractViolation("record arrays of the message does not hold state, and state only")
    state = record["state"]
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    total = sum(sizes)
    if state.stype != _STYPE or state.dtype != "uint8" or tuple(state.shape) != (total,) or len(state.data) != total:
        raise ContractViolation(f"the arrays of the message have {len(state.data)} bytes; its layout says {total}")
    if total > MAX_STATE_BYTES:
        raise ContractViolation(f"the arrays of the message have {total} bytes; at most {MAX_STATE_BYTES} may travel")
    arrays: dict[str, NDArray[np.generic]] = {}
    offset = 0
    for name, dtype, shape, size in zip(names, dtypes, shapes, sizes, strict=True):
        part = np.frombuffer(state.data, np.uint8, size, offset) if size else np.empty(0, np.uint8)
        if dtype == "bool" and size and part.max() > 1:
            raise ContractViolation(f"array {short(name)} is not made of true and false")
        array = part.view(dtype).reshape(shape)
        arrays[name] = array if array.flags.aligned else array.copy()
        offset += size
    if digest(arrays) != expected:
        raise ContractViolation("the arrays of the message do not have the digest that it names")
    return arrays


def _layout(fields: Fields) -> tuple[list[str], list[str], list[tuple[int, ...]]]:
    """Names, dtypes and shapes, checked."""
    names, dtypes, shape_texts = (fields.many(key, str, MAX_ARRAYS) for key in ("names", "dtypes", "shapes"))
    if not names or len(set(names)) != len(names):
        raise ContractViolation("the message names no array, or one twice")
    if not len(names) == len(dtypes) == len(shape_texts) or not set(dtypes) <= _DTYPES:
        raise ContractViolation("the message does not give each array one shape and one known dtype")
    shapes = []
    for text in shape_texts:
        if not _SHAPE.fullmatch(text):
            raise ContractViolation(f"the message holds shape {short(text)}; whole numbers with commas were agreed")
        shapes.append(tuple(int(side) for side in text.split(",") if side))
    return names, dtypes, shapes


def _charge_values(reply: TrainReply | MaskedReply) -> dict[str, Any]:
    """What a reply tells of the ledger."""
    values: dict[str, Any] = {} if reply.attempt is None else {"attempt": reply.attempt}
    return values if reply.receipt is None else values | {"receipt": receipt_text(reply.receipt)}


def _record(content: "RecordDict", name: str) -> Mapping[str, Any]:
    """A ConfigRecord of the message."""
    from flwr.app import ConfigRecord

    record = content.get(name)
    if type(record) is not ConfigRecord:
        raise ContractViolation(f"record {name} of the message is missing or of another kind")
    return cast(Mapping[str, Any], record)
