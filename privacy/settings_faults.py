# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a settings file of a node or a coordinator, in one line: where, what was found, what is allowed.

For study files, which also name the line, see :mod:`fedneuro.privacy.study_faults`.
"""

import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["explain"]

_SHOWN = 80  # characters of a value in a message


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault of ``error``, which ``model`` raised. A misspelt key says more than a missing one.

    Where a field has a ``description``, that stands for what is allowed, in place of pydantic's words.
    """
    fault = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    place, where = fault["loc"], ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        fields = _model_at(model, place[:-1]).model_fields
        known = sorted(field.alias or name for name, field in fields.items())
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        return f"{where} is not a known key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"{where} is missing; add it"
    allowed = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault["input"], dict):  # a rule of several keys; the values say no more, and may be secret
        return f"{f'[{where}]: ' if where else ''}{allowed}"
    field = _field_at(model, place)
    if field is not None and field.description:
        allowed = f"expected {field.description}"
    return f"{where} = {_short(fault['input'])}: {allowed}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _field_at(model: type[BaseModel], place: Sequence[int | str]) -> FieldInfo | None:
    names = [key for key in place if isinstance(key, str)]
    return _model_at(model, place[:-1]).model_fields.get(names[-1]) if names else None


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The model that describes the table at ``place``; numbers are positions in a list of tables."""
    for key in place:
        if isinstance(key, str) and key in model.model_fields:
            model = next(_models_in(model.model_fields[key].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)
