# SPDX-License-Identifier: Apache-2.0
"""The steps of a secure aggregation as plain keys and values, and back; :mod:`fedneuro.privacy.wire` does the rest.

    =========  ==========================================================================================
    message    keys
    =========  ==========================================================================================
    keys       roster, roster-keys; reply: encryption, masking, signature
    shares     the same, with advert-sites, advert-encryption, advert-masking, advert-signatures;
               reply: sealed-sites, sealed
    masked     context, sealed-sites, sealed, the model; its reply is in :mod:`fedneuro.privacy.wire`
    unmask     context, survivors; reply: seed-sites, seed-shares, key-sites, key-shares, and, before the last
               round, encryption, masking, signature of the next
    =========  ==========================================================================================

Lists of one message belong together item by item. Names are sites' names, each once; lengths are exact.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .contract import Advert, KeysReply, Kind, SecureStep, SharesReply, UnmaskReply
from .errors import ContractViolation
from .secagg.grid import MAX_SITES
from .secagg.keys import IDENTITY_BYTES
from .secagg.shamir import SHARE_BYTES
from .wire_fields import Fields, short

__all__ = ["identity", "read_reply", "read_step", "reply_values", "step_values"]

_SITE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CONTEXT: Final = re.compile(r"[0-9a-f]{64}")
_KEY_BYTES: Final = 32
_MAX_SIGNATURE: Final = 112  # ECDSA P-384 in DER form
_SEALED_BYTES: Final = 2 * SHARE_BYTES + 16


def step_values(kind: Kind, step: SecureStep) -> dict[str, Any]:
    """The keys of a request of ``kind``."""
    values: dict[str, Any] = {}
    if kind in ("keys", "shares"):
        values |= _table("roster", step.roster, "roster-keys")
    if kind == "shares":
        adverts = step.adverts.values()
        values |= {"advert-sites": list(step.adverts), "advert-encryption": [a.encryption for a in adverts]}
        values |= {"advert-masking": [a.masking for a in adverts], "advert-signatures": [a.signature for a in adverts]}
    if kind in ("masked", "unmask"):
        values["context"] = step.context
    if kind == "masked":
        values |= _table("sealed-sites", step.sealed, "sealed")
    if kind == "unmask":
        values["survivors"] = list(step.survivors)
    return values


def read_step(kind: Kind, fields: Fields) -> SecureStep:
    """The secure step of a request of ``kind``.

    Raises:
        ContractViolation: anything in it is not as agreed.
    """
    if kind == "masked":
        context = fields.match("context", _CONTEXT)
        return SecureStep(context=context, sealed=_read_table(fields, "sealed-sites", "sealed", _SEALED_BYTES))
    if kind == "unmask":
        return SecureStep(context=fields.match("context", _CONTEXT), survivors=tuple(_sites(fields, "survivors")))
    roster = _read_table(fields, "roster", "roster-keys", IDENTITY_BYTES)
    return SecureStep(roster=roster, adverts=_adverts(fields) if kind == "shares" else {})


def reply_values(reply: KeysReply | SharesReply | UnmaskReply) -> dict[str, Any]:
    """The keys of a reply."""
    values: dict[str, Any] = {"round": reply.round}
    if isinstance(reply, KeysReply):
        return values | {"type": "keys"} | _advert_values(reply.advert)
    if isinstance(reply, SharesReply):
        return values | {"type": "shares"} | _table("sealed-sites", reply.sealed, "sealed")
    values |= {"type": "unmask"} | _table("seed-sites", reply.self_shares, "seed-shares")
    values |= _table("key-sites", reply.key_shares, "key-shares")
    return values | (_advert_values(reply.advert) if reply.advert else {})


def read_reply(kind: str, fields: Fields, site: str) -> KeysReply | SharesReply | UnmaskReply:
    """The reply of ``site`` to a step.

    Raises:
        ContractViolation: anything in it is not as agreed.
    """
    number = fields.whole("round")
    if kind == "keys":
        return KeysReply(site=site, round=number, advert=_read_advert(fields))
    if kind == "shares":
        return SharesReply(site=site, round=number, sealed=_read_table(fields, "sealed-sites", "sealed", _SEALED_BYTES))
    return UnmaskReply(
        site=site,
        round=number,
        self_shares=_read_table(fields, "seed-sites", "seed-shares", SHARE_BYTES),
        key_shares=_read_table(fields, "key-sites", "key-shares", SHARE_BYTES),
        advert=_read_advert(fields) if "encryption" in fields else None,
    )


def identity(fields: Fields) -> bytes:
    """The public identity of a site."""
    return _sized(fields.take("identity", bytes), "identity", IDENTITY_BYTES)


def _advert_values(advert: Advert) -> dict[str, Any]:
    return {"encryption": advert.encryption, "masking": advert.masking, "signature": advert.signature}


def _read_advert(fields: Fields) -> Advert:
    return Advert(
        encryption=_sized(fields.take("encryption", bytes), "encryption", _KEY_BYTES),
        masking=_sized(fields.take("masking", bytes), "masking", _KEY_BYTES),
        signature=_signature(fields.take("signature", bytes)),
    )


def _adverts(fields: Fields) -> dict[str, Advert]:
    names = _sites(fields, "advert-sites")
    encryption = _many(fields, "advert-encryption", len(names), _KEY_BYTES)
    masking = _many(fields, "advert-masking", len(names), _KEY_BYTES)
    signatures = [_signature(value) for value in _many(fields, "advert-signatures", len(names), None)]
    rows = zip(names, encryption, masking, signatures, strict=True)
    return {name: Advert(encryption=e, masking=m, signature=s) for name, e, m, s in rows}


def _table(names: str, values: Mapping[str, bytes], key: str) -> dict[str, Any]:
    return {names: list(values), key: list(values.values())}


def _read_table(fields: Fields, names: str, key: str, size: int) -> dict[str, bytes]:
    sites = _sites(fields, names)
    return dict(zip(sites, _many(fields, key, len(sites), size), strict=True))


def _sites(fields: Fields, key: str) -> list[str]:
    names = fields.many(key, str, MAX_SITES)
    if len(set(names)) != len(names) or not all(map(_SITE.fullmatch, names)):
        raise ContractViolation(f"{key} of the message does not name sites, each once: {short(', '.join(names))}")
    return names


def _many(fields: Fields, key: str, count: int, size: int | None) -> Sequence[bytes]:
    values = fields.many(key, bytes, MAX_SITES)
    if len(values) != count:
        raise ContractViolation(f"{key} of the message has {len(values)} items; its names are {count}")
    return values if size is None else [_sized(value, key, size) for value in values]


def _sized(value: bytes, key: str, size: int) -> bytes:
    if len(value) != size:
        raise ContractViolation(f"{key} of the message has {len(value)} bytes; {size} were agreed")
    return value


def _signature(value: bytes) -> bytes:
    if not 8 <= len(value) <= _MAX_SIGNATURE:
        text = f"a signature of the message has {len(value)} bytes"
        raise ContractViolation(f"{text}; at most {_MAX_SIGNATURE} may travel")
    return value
