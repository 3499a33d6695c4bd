# SPDX-License-Identifier: Apache-2.0
"""A wrong settings file is told in one line, for node and coordinator alike."""

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedneuro.privacy.settings_faults import explain


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern="^[a-z]+$", description="small letters")]
    port: Annotated[int, Field(ge=1)] = 1


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    parts: list[Part] = []
    secret: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.secret and self.parts:
            raise ValueError("secret and parts exclude each other")
        return self


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"parts": [{"name": "A1"}]}, "parts.0.name = 'A1': expected small letters"),
        ({"parts": [{"name": "a", "port": 0}]}, "parts.0.port = 0: Input should be greater than or equal to 1"),
        ({"parts": [{"Name": "a"}]}, "parts.0.Name is not a known key; did you mean name?"),
        ({"parts": [{}]}, "parts.0.name is missing; add it"),
        ({"zzz": 1}, "zzz is not a known key; known: parts, secret"),
        ({"secret": "s3cret", "parts": [{"name": "a"}]}, "secret and parts exclude each other"),
        ({"parts": [{"name": "A" * 5000}]}, "parts.0.name = '" + "A" * 79 + "…: expected small letters"),
    ],
)
def test_one_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    assert explain(caught.value, Settings) == told
