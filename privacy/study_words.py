# SPDX-License-Identifier: Apache-2.0
"""The keys of a study in words, read from its types: what is allowed, the effective study, the reference.

Everything here follows from the pydantic models of :mod:`fedneuro.privacy.study`, so a key is described in one
place only. :func:`expectation` turns the JSON Schema of a key into the words of an error message;
:func:`describe` prints the effective study; :func:`json_schema` serves editors (Taplo, Even Better TOML);
:func:`reference_markdown` writes ``docs/study-file.md``.
"""

import datetime
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from .study import Study

__all__ = [
    "describe",
    "expectation",
    "json_schema",
    "reference_markdown",
    "section_of",
    "section_schemas",
    "toml_value",
]

Schema = Mapping[str, Any]

_TYPE_NAMES = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "string": ("a string", "strings"),
    "boolean": ("true or false", "true or false"),
}


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the study file, for editors and other tools. Do not modify the result."""
    schema = Study.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "FedNeuro study",
        "description": "What a consortium learns, from which data, how, and what each patient is promised.",
    }


@cache
def section_schemas() -> dict[str, dict[str, Schema]]:
    """The schema of every key: ``{section: {key: schema}}``, in the order of the study.

    A table within a section follows it as a section of its own, such as ``training.init``.
    """
    sections: dict[str, dict[str, Schema]] = {}
    for section, link in json_schema()["properties"].items():
        keys = dict(_resolve(link)["properties"])
        tables = {key: keys.pop(key) for key, schema in tuple(keys.items()) if "$ref" in schema}
        sections[section] = keys
        for key, table in tables.items():
            sections[f"{section}.{key}"] = dict(_resolve(table)["properties"])
    return sections


def section_of(key: Sequence[str]) -> str:
    """The innermost section that the parts of a key lie in, or name; empty where there is none.

    Example:
        >>> section_of(("training", "init", "steps")), section_of(("training", "rounds"))
        ('training.init', 'training')
    """
    parts = {tuple(name.split(".")): name for name in section_schemas()}
    found = [parts[head] for end in (1, 2) if (head := tuple(key[:end])) in parts]
    return found[-1] if found else ""


def _resolve(link: Schema) -> Schema:
    name = str(link["$ref"]).rsplit("/", 1)[-1]
    resolved: Schema = json_schema()["$defs"][name]
    return resolved


def choices(schema: Schema) -> list[Any]:
    """The values of a key, or of the items of a list, that is chosen from a list; empty for all others.

    Example:
        >>> choices(section_schemas()["privacy"]["mode"])
        ['none', 'local', 'distributed']
    """
    if "items" in schema:
        return choices(schema["items"])
    if "anyOf" in schema:
        return [value for option in schema["anyOf"] for value in choices(option)]
    return list(schema["enum"]) if "enum" in schema else [schema["const"]] if "const" in schema else []


def expectation(schema: Schema) -> str:
    """What a key may hold, in words that follow "expected".

    Example:
        >>> expectation(section_schemas()["training"]["learning_rate"])
        'a number above 0, at most 100'
        >>> expectation(section_schemas()["data"]["patch"])
        'a list of 2 to 3 integers from 8 to 1024'
    """
    if schema.get("type") == "array":
        count = _count(schema.get("minItems"), schema.get("maxItems"))
        options = choices(schema)
        plural = "names out of " + ", ".join(map(toml_value, options)) if options else _plain(schema["items"], 1)
        return " ".join(filter(None, ("a list of", count, plural)))
    if options := choices(schema):
        return "one of " + ", ".join(map(toml_value, options))
    return _plain(schema, 0)


def _plain(schema: Schema, plural: int) -> str:
    kind = str(schema["type"])
    words = _TYPE_NAMES[kind][plural]
    if kind == "string":
        if "pattern" in schema:
            return f"{words} of the form {schema['pattern']}"
        length = _count(schema.get("minLength"), schema.get("maxLength"))
        return f"{words} of {length} characters" if length else words
    return words + _range(schema)


def _range(schema: Schema) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if max(abs(low), abs(high)) < 1e6 else f" from {low} to {high}"
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    texts = [f"{word} {value:g}" for word, value in bounds if value is not None]
    return " " + ", ".join(texts) if texts else ""


def _count(low: int | None, high: int | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"{low} to {high}"


def toml_value(value: object) -> str:
    """``value`` as TOML writes it.

    Example:
        >>> toml_value(("FLAIR", 1e-05, True))
        '["FLAIR", 1e-05, true]'
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A TOML basic string is a JSON string; what would not show on a screen, or break a line there, is escaped too.
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)


def describe(study: Study) -> str:
    """The effective study, defaults filled in, as TOML text with each key's meaning above it.

    The text is a study file itself: loading it gives a study of the same hash.
    """
    lines = ["# Effective study: defaults are filled in.", f"# Study hash: {study.hash}"]
    for section, keys in section_schemas().items():
        lines += ["", f"[{section}]"]
        hashed: Any = json.loads(study.canonical)
        for name in section.split("."):
            hashed = hashed[name]
        for key, schema in keys.items():
            field, value = _value(study, section, key)
            if key not in hashed and value == field.default:
                continue  # no part of the canonical form
            lines += textwrap.wrap(_meaning(schema), 100, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def _value(study: Study, section: str, key: str) -> tuple[FieldInfo, Any]:
    """The field and value of a key, which may be a name that Python does not take, such as ``from``."""
    part: Any = study
    for name in section.split("."):
        part = getattr(part, name)
    fields = type(part).model_fields
    name = next(name for name, field in fields.items() if key in (name, field.alias))
    return fields[name], getattr(part, name)


def _meaning(schema: Schema) -> str:
    words = expectation(schema)
    return f"{schema['description']} {words[0].upper()}{words[1:]}."


def reference_markdown() -> str:
    """The reference of the study file, ``docs/study-file.md``, generated so that it cannot be out of date."""
    lines = [
        "# The study file",
        "",
        "<!-- Generated by fedneuro.privacy.study_words.reference_markdown(); after a change: make docs -->",
        "",
        textwrap.fill(_REFERENCE_HEAD, 110, break_on_hyphens=False),
    ]
    for section, keys in section_schemas().items():
        about = " ".join(str(_resolve(_link(section))["description"]).split())
        lines += ["", f"## [{section}]", "", about, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        for key, schema in keys.items():
            default = f"`{toml_value(schema['default'])}`" if "default" in schema else "required"
            allowed = re.sub(r"of the form (\S.*)$", r"of the form `\1`", expectation(schema))
            cells = (f"`{key}`", default, allowed, str(schema["description"]))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _link(section: str) -> Schema:
    outer, _, inner = section.partition(".")
    link: Schema = json_schema()["properties"][outer]
    return _resolve(link)["properties"][inner] if inner else link


_REFERENCE_HEAD = (
    "A study is one TOML file with the sections below. Every key is typed and ranged; an unknown key, a wrong "
    "type or a contradiction is refused with its line. Only `study.name` and one of `training.local_steps` or "
    "`training.local_epochs` must be given. `fedneuro-sim check STUDY` prints the effective study and its hash, "
    "`--set section.key=value` overrides a key, and `docs/study.schema.json` lets an editor complete and check the "
    "file as you type. The study hash is the SHA-256 of the effective study as JSON with sorted keys: comments, "
    "order and defaults that you write out do not change it; any digit that means something does."
)


def write_documents(folder: Path) -> None:
    """Write ``study-file.md`` and ``study.schema.json`` into ``folder``; ``make docs`` calls it."""
    (folder / "study-file.md").write_text(reference_markdown(), encoding="utf-8")
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    (folder / "study.schema.json").write_text(schema + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
