# SPDX-License-Identifier: Apache-2.0
"""``privacy.mode = "distributed"`` in a study: what contradicts it, and the one σ that all hospitals share."""

from typing import Any

import pytest
from pydantic import ValidationError

from fedneuro.privacy.accounting import epsilon
from fedneuro.privacy.budget import training_event
from fedneuro.privacy.study import Study


def study_of(training: dict[str, Any] | None = None, **privacy: Any) -> Study:
    return Study.parse(
        {
            "study": {"name": "toy"},
            "training": {"rounds": 20, "local_steps": 1} | (training or {}),
            "privacy": {"mode": "distributed", "delta": 1e-3} | privacy,
        }
    )


@pytest.mark.parametrize(
    ("training", "privacy", "key"),
    [
        ({"local_steps": 2}, {}, "training.local_steps"),
        ({"local_steps": 0, "local_epochs": 1}, {}, "training.local_steps"),
        ({}, {"delta": 0.0}, "privacy.delta"),
    ],
)
def test_contradictions(training: dict[str, Any], privacy: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        study_of(training, **privacy)
    assert key in {error.get("ctx", {}).get("key") for error in caught.value.errors()}


def test_one_sigma_for_all_with_a_millionth_to_spare() -> None:
    study = study_of()
    event = training_event(study, 10)
    assert event == training_event(study, 10_000)
    assert epsilon([event], 1e-3 * (1 - 1e-6)) <= 8.0 * (1 - 1e-6)
