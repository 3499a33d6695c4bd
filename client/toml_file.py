# SPDX-License-Identifier: Apache-2.0
"""Reading a hospital's own TOML files: frozen, strict types, and one clear line for each kind of fault."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..privacy.errors import BadInput
from ..privacy.settings_faults import explain

__all__ = ["Part", "parse_toml", "validate"]

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
