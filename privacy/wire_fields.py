# SPDX-License-Identifier: Apache-2.0
"""Strict reading of one record of a message: every key once, of exactly the agreed type, and no key besides.

Knows nothing of Flower; :mod:`fedneuro.privacy.wire` hands it plain keys and values.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from .contract import Receipt
from .errors import ContractViolation, Reason

__all__ = [
    "MAX_ENTRIES",
    "MAX_TEXT",
    "VERSION",
    "Fields",
    "not_finite",
    "read_receipt",
    "read_versions",
    "receipt_text",
    "short",
]

VERSION: Final = 1
"""Version of this form. Both sides must speak the same."""

MAX_TEXT: Final = 512
MAX_ENTRIES: Final = 256

_RECEIPT: Final = re.compile(r"[1-9][0-9]{0,14}:[0-9a-f]{16}")
_T = TypeVar("_T")


class Fields:
    """Reads the scalar fields of one record, each once; :meth:`close` refuses what nobody asked for.

    Args:
        values: the record's keys and values, as they arrived.
        records: names of all records of the message.
    """

    def __init__(self, values: Mapping[str, Any], records: set[str]) -> None:
        self._records = records
        self._values = dict(values)
        if (version := self.whole("contract")) != VERSION:
            raise ContractViolation(f"the message is in form {version}; this version of FedNeuro speaks form {VERSION}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, kind: type[_T]) -> _T:
        """The value of ``key``, of exactly this type (so ``True`` is no number)."""
        value = self._values.pop(key, None)
        if type(value) is not kind:
            raise ContractViolation(f"{key} of the message is missing or is not of type {kind.__name__}")
        return value

    def many(self, key: str, kind: type[_T], limit: int = MAX_ENTRIES) -> list[_T]:
        """A list of values of exactly this type; texts are short."""
        values: list[Any] = self.take(key, list)
        wrong = any(type(v) is not kind or (isinstance(v, str) and len(v) > MAX_TEXT) for v in values)
        if wrong or len(values) > limit:
            raise ContractViolation(f"{key} of the message is not a list of at most {limit} values of {kind.__name__}")
        return values

    def whole(self, key: str) -> int:
        """A whole number from 0."""
        value = self.take(key, int)
        if not 0 <= value < 2**53:
            raise ContractViolation(f"{key} of the message is {value}; a whole number from 0 was agreed")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.take(key, float)
        if not math.isfinite(value):
            raise not_finite(key, value)
        return value

    def match(self, key: str, pattern: re.Pattern[str]) -> str:
        """A text of this form."""
        value = self.take(key, str)
        if not pattern.fullmatch(value):
            raise ContractViolation(f"{key} of the message is {short(value)}, not of the agreed form")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed texts."""
        value = self.take(key, str)
        if value not in allowed:
            raise ContractViolation(f"{key} of the message is {short(value)}; allowed: {', '.join(allowed)}")
        return value

    def close(self, records: set[str]) -> None:
        """Refuse keys that were not read, and records that the message should not have."""
        if self._values or self._records != records:
            extra = sorted(set(self._values) | (self._records - records))
            raise ContractViolation(
                f"the message holds {len(extra)} unexpected keys or records: {short(', '.join(extra))}"
            )


def not_finite(key: str, value: float) -> ContractViolation:
    """The error for a number that is NaN or infinite."""
    return ContractViolation(f"{key} of the message is {value}; a finite number was agreed", reason=Reason.NON_FINITE)


def short(text: str) -> str:
    """A foreign text made safe for one log line."""
    return ascii(text[:60])


def receipt_text(receipt: Receipt) -> str:
    """A ledger's receipt as it travels."""
    return f"{receipt.count}:{receipt.head}"


def read_receipt(fields: Fields) -> Receipt | None:
    """The receipt of a message, which may be absent."""
    if "receipt" not in fields:
        return None
    count, _, head = fields.match("receipt", _RECEIPT).partition(":")
    return Receipt(count=int(count), head=head)


def read_versions(text: str) -> dict[str, str]:
    """Software versions: a small JSON object of texts.

    Raises:
        ContractViolation: it is something else.
    """
    try:
        values = json.loads(text) if len(text) <= MAX_ENTRIES * MAX_TEXT else None
    except (ValueError, RecursionError):
        values = None
    if (
        not isinstance(values, dict)
        or len(values) > MAX_ENTRIES
        or not all(type(v) is str and len(v) <= MAX_TEXT and len(k) <= MAX_TEXT for k, v in values.items())
    ):
        raise ContractViolation("versions of the reply is not a small JSON object of texts")
    return values
