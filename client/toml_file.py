# SPDX-License-Identifier: Apache-2.0
"""Reading a hospital's own TOML files: frozen, strict types, and one clear line for each kind of fault."""

import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..privacy.errors import BadInput

__all__ = ["Part", "explain", "parse_toml", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)


class Part(BaseModel):
    """A section of a file: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def parse_toml(content: bytes, path: Path) -> dict[str, Any]:
    """The values of a TOML file whose bytes were read from ``path``.

    Raises:
        BadInput: it is not TOML in UTF-8.
    """
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: is not TOML: {error}") from error


def validate(model: type[_Model], values: dict[str, Any], path: Path) -> _Model:
    """``values`` as ``model``.

    Raises:
        BadInput: one line that names the first fault.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, model)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One fault as one line: where, what was found, what is allowed. A misspelt key says more than a missing one."""
    fault = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        fields = _model_at(model, fault["loc"][:-1]).model_fields
        known = sorted(field.alias or name for name, field in fields.items())
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, 1)
        return f"{where} is not a known key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"{where} is missing; add it"
    return f"{where} = {fault['input']!r}: {fault['msg']}"


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The model that describes the table at ``place``; numbers are positions in a list of tables."""
    for key in place:
        if isinstance(key, str) and key in model.model_fields:
            model = next(_models_in(model.model_fields[key].annotation), model)
    return model


def _models_in(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)
