# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a study, in words: one line per faulty key, with its place and the nearest remedy.

pydantic names the key and the kind of fault; the place comes from the file's own lines or the ``--set`` text,
and what is allowed from the key's schema (:mod:`fedneuro.privacy.study_words`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import ErrorDetails

from .study_words import choices, expectation, section_of, section_schemas, toml_value

__all__ = ["KeyPath", "Places", "fault_lines"]

KeyPath = tuple[str, ...]
"""A key with the tables around it, such as ``("training", "rounds")``."""

_SHOWN = 60  # characters of a value in a message
_LAST = 1 << 30  # sorts overrides behind every line of the file
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "boolean": bool,
}


@dataclass(frozen=True, slots=True)
class Places:
    """Where each key of a study was given: lines of the file (from 1), or the text of an override."""

    file: str
    lines: Mapping[KeyPath, list[int]]
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def line(self, key: KeyPath) -> int:
        """Line of ``key``, or of the nearest table around it; 0 where the file has neither."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.lines:
                return self.lines[key[:end]][0]
        return 0

    def label(self, key: KeyPath) -> str:
        """``file:line``, or the file alone."""
        line = self.line(key)
        return f"{self.file}:{line}" if line else self.file


def fault_lines(errors: Iterable[ErrorDetails], values: Mapping[str, Any], places: Places) -> list[str]:
    """One line per faulty key, in the order of the file, overrides last.

    Args:
        errors: What pydantic found.
        values: The study as it was read, overrides applied.
        places: Where its keys were given.
    """
    found: dict[KeyPath, tuple[int, str]] = {}
    for error in errors:
        key = _key(error)
        subject, verdict = _fault(error, key, values)
        if key in places.overrides:
            # The text of the override shows key and value already.
            fault = (_LAST, f"{places.overrides[key]}: {verdict}")
        else:
            fault = (places.line(key), ": ".join(filter(None, (places.label(key), subject, verdict))))
        found.setdefault(key, fault)
    return [text for _, text in sorted(found.values(), key=lambda fault: fault[0])]


def _key(error: ErrorDetails) -> KeyPath:
    location = tuple(map(str, error["loc"]))
    section = section_of(location)
    depth = len(section.split(".")) if section else 1
    if error["type"] != "contradiction":
        return location[: depth + 1]
    name = str(error.get("ctx", {})["key"])
    return tuple(name.split(".")) if "." in name else (*location[:depth], name)


def _fault(error: ErrorDetails, key: KeyPath, values: Mapping[str, Any]) -> tuple[str, str]:
    """The subject of a fault (``section.key = value``) and the verdict on it."""
    if error["type"] == "contradiction":
        context = error.get("ctx", {})
        subject = "" if str(context["found"]).startswith(dotted(key)) else dotted(key)
        return subject, f"{context['found']}; {context['allowed']}"
    section, name = section_of(key[:-1]), key[-1]
    if not section or section.split(".") != list(key[:-1]) or section_of(key) != section:
        return _section_fault(key, values)
    schemas = section_schemas()[section]
    if error["type"] == "missing":
        schema = schemas[name]
        return dotted(key), f"missing; expected {expectation(schema)} ({schema['description']})"
    value = _found(values, key)
    if name not in schemas:
        return _shown(key, value), _unknown_key(section, name)
    schema, place = schemas[name], ""
    index = error["loc"][len(key)] if len(error["loc"]) > len(key) else None
    item = value
    if isinstance(index, int) and isinstance(value, list):
        item = value[index]
        place = f"; item {index + 1} is {short(toml_value(item))}"
        return _shown(key, value), f"expected {expectation(schema)}{place}{_remedy(schema['items'], item)}"
    return _shown(key, value), f"expected {expectation(schema)}{_remedy(schema, item)}"


def _found(values: Mapping[str, Any], key: KeyPath) -> Any:
    value: Any = values
    for part in key:
        value = value[part]
    return value


def _section_fault(key: KeyPath, values: Mapping[str, Any]) -> tuple[str, str]:
    name, value = key[0], _found(values, key)
    if section := section_of(key):
        return _shown(key, value), f"expected a section: [{section}] on a line of its own and its keys below it"
    sections = [section for section in section_schemas() if "." not in section]
    if isinstance(value, dict):
        return f"[{dotted(key)}]", f"unknown section{_nearest(name, sections, '[{}]')} (allowed: {', '.join(sections)})"
    return _shown(key, value), f"a key outside the sections{_home(name)}"


def _unknown_key(section: str, name: str) -> str:
    allowed = list(section_schemas()[section])
    return f"unknown key{_home(name) or _nearest(name, allowed)} (allowed: {', '.join(allowed)})"


def _home(name: str) -> str:
    homes = [f"[{section}]" for section, keys in section_schemas().items() if name in keys]
    return f"; it belongs to {' or '.join(homes)}" if homes else ""


def _nearest(name: str, allowed: Sequence[str], form: str = "{}") -> str:
    close = difflib.get_close_matches(name.lower(), allowed, n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def _remedy(schema: Mapping[str, Any], value: object) -> str:
    """What is wrong with ``value`` beyond what was expected: its type, or the choice it is nearest to."""
    options = choices(schema)
    if options and isinstance(value, str) and schema.get("type") != "array":
        return _nearest(value, [str(option) for option in options], '"{}"')
    kind = _PYTHON_TYPES.get(str(schema.get("type")), object)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return f" ({schema['description']})" if "pattern" in schema and "description" in schema else ""
    advice = f"; write [{short(toml_value(value))}]" if kind is list and isinstance(value, str | int | float) else ""
    return f", found {_type_words(value)}{advice}"


def _type_words(value: object) -> str:
    names = ((bool, ""), (int, "the integer "), (float, "the number "), (str, "the string "), (list, "the list "))
    for kind, name in names:
        if isinstance(value, kind):
            return name + short(toml_value(value))
    return "a table of keys" if isinstance(value, dict) else f"the date {toml_value(value)}"


def _shown(key: KeyPath, value: object) -> str:
    return dotted(key) if isinstance(value, dict) else f"{dotted(key)} = {short(toml_value(value))}"


def dotted(key: KeyPath) -> str:
    """``key`` as TOML writes it, quoted where it must be."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else toml_value(part) for part in key)


def short(text: str) -> str:
    """``text`` cut to a length that keeps a message on one line."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
