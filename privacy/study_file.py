# SPDX-License-Identifier: Apache-2.0
"""Reading a study file: TOML text and ``--set`` overrides in, a validated :class:`Study` or clear faults out.

All faults are found in one pass and reported together, one line each::

    glioma.toml:14: training.learning_rte = 0.1: unknown key; did you mean learning_rate? (allowed: rounds, …)
    glioma.toml:9: data.normalise = "zscor": expected one of "zscore", "percentile", "none"; did you mean "zscore"?
    --set training.rounds=0: expected an integer from 1 to 10000

The rules themselves are the types of :mod:`fedneuro.privacy.study`; this module only finds lines and words.
"""

import datetime
import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import StudyError
from .study import Study
from .study_faults import KeyPath, Places, dotted, fault_lines, short
from .study_words import describe, json_schema, reference_markdown, section_of, section_schemas

__all__ = ["describe", "json_schema", "load_study", "parse_study", "reference_markdown"]

_BARE_WORD = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
_HEADER = re.compile(r"\s*\[\[?([^\[\]]+)\]")
_KEY_PART = r"""(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = re.compile(rf"\s*({_KEY_PART}(?:\s*\.\s*{_KEY_PART})*)\s*=")
_TOKEN = re.compile(r""" \"\"\" | ''' | "(?:\\.|[^"\\])*" | '[^']*' | \#.* | [\[\]{}] """, re.VERBOSE)
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and validate a study file.

    Args:
        path: A TOML file in UTF-8.
        overrides: Texts ``section.key=value`` that replace or add keys, the last one winning. The value is a
            TOML value; a single word that is not one, as in ``privacy.mode=local``, is taken as a string.

    Returns:
        The study with its defaults filled in.

    Raises:
        StudyError: The file cannot be read, is not TOML, or is not a valid study: one line per fault, each with
            its place, key, what was found and what is allowed.
    """
    path = Path(path)
    return parse_study(_read(path), str(path), overrides)


def parse_study(text: str, name: str, overrides: Sequence[str] = ()) -> Study:
    """Validate the text of a study file; ``name`` stands for the file in faults. Otherwise as :func:`load_study`.

    Raises:
        StudyError: The text is not TOML, or is not a valid study.
    """
    places = Places(name, _key_lines(text))
    values = _parse(text, places)
    faults = _apply(values, overrides, places)
    if faults:
        raise StudyError("\n".join(faults))
    for section in section_schemas():
        if "." not in section:
            values.setdefault(section, {})  # so that a missing section shows as its missing keys
    try:
        return Study.parse(_without_dates(values))
    except ValidationError as error:
        raise StudyError("\n".join(fault_lines(error.errors(include_url=False), values, places))) from error


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 text (byte {error.start}); save the study file as UTF-8") from error
    except FileNotFoundError as error:
        raise StudyError(f"{path}: no such study file{_nearby(path)}") from error
    except IsADirectoryError as error:
        raise StudyError(f"{path}: a folder; give the study file, such as {path / 'study.toml'}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(f"{path}: the study file cannot be read: {reason}") from error


def _nearby(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def _parse(text: str, places: Places) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        repeated = [(key, lines) for key, lines in places.lines.items() if len(lines) > 1]
        if repeated and re.search("overwrite|twice", str(error)):
            key, lines = min(repeated, key=lambda item: item[1][1])
            message = f"{dotted(key)} is given twice, first in line {lines[0]}; remove one of them"
            raise StudyError(f"{places.file}:{lines[1]}: {message}") from error
        reason = str(error)
        place = _TOML_PLACE.search(reason)
        lines_of_text = text.split("\n")
        line = int(place[1]) if place and place[1] else len(lines_of_text)
        shown = lines_of_text[line - 1].strip() or "end of the file"
        raise StudyError(
            f"{places.file}:{line}: not TOML: {_TOML_PLACE.sub('', reason)}: {short(shown)}; "
            "strings stand in double quotes, lists in brackets, keys below a [section]"
        ) from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{places.file}: not TOML: a number or a nesting is too long") from error


def _key_lines(text: str) -> dict[KeyPath, list[int]]:
    """Lines (from 1) on which each table header and key stands, by full key path."""
    found: dict[KeyPath, list[int]] = {}
    table: KeyPath = ()
    depth, quote = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        rest = line
        if not depth and not quote:
            if header := _HEADER.match(line):
                table = _split_key(header[1])
                found.setdefault(table, []).append(number)
                continue
            key = _KEY.match(line)
            if not key:
                continue
            found.setdefault(table + _split_key(key[1]), []).append(number)
            rest = line[key.end() :]
        depth, quote = _scan(rest, depth, quote)
    return found


def _split_key(text: str) -> KeyPath:
    return tuple(part.strip("\"'") for part in re.findall(_KEY_PART, text))


def _scan(text: str, depth: int, quote: str) -> tuple[int, str]:
    """Follow brackets and multi-line strings through one line of a value: the depth and the open quote after it."""
    position = 0
    while position < len(text):
        if quote:
            end = text.find(quote, position)
            if end < 0:
                return depth, quote
            position, quote = end + 3, ""
            continue
        token = _TOKEN.search(text, position)
        if not token:
            break
        position = token.end()
        if token[0] in ('"""', "'''"):
            quote = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth = max(0, depth - 1)
    return depth, quote


def _apply(values: dict[str, Any], overrides: Iterable[str], places: Places) -> list[str]:
    """Put the overrides into ``values``; returns the faults of their syntax."""
    faults = []
    for given in overrides:
        # A message is one line of text, whatever stands on the command line; both escapes make the value invalid.
        text = given.encode(errors="backslashreplace").decode().replace("\n", "\\n")
        key, equals, value_text = (part.strip() for part in text.partition("="))
        path = tuple(part.strip() for part in key.split("."))
        placed = len(path) == 2 or (len(path) == 3 and section_of(path) == ".".join(path[:2]))
        if not equals or not all(path) or not placed:
            faults.append(f"--set {text}: expected section.key=value, such as --set training.rounds=5")
            continue
        try:
            value = _override_value(value_text)
        except ValueError:
            faults.append(
                f"--set {text}: {value_text or 'nothing'} is not a TOML value; strings need quotes, lists brackets: "
                f"--set '{key}=\"text\"', --set '{key}=[1, 2]'"
            )
            continue
        places.overrides[path] = f"--set {key}={value_text}"
        table: Any = values
        for part in path[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[path[-1]] = value
    return faults


def _override_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if _BARE_WORD.fullmatch(text):
            return text
        raise ValueError(text) from error


def _without_dates(value: Any) -> Any:
    """``value`` with every TOML date replaced by an empty table: no key takes either, and JSON has no dates."""
    if isinstance(value, dict):
        return {key: _without_dates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_dates(item) for item in value]
    return {} if isinstance(value, datetime.date | datetime.time) else value
