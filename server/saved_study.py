# SPDX-License-Identifier: Apache-2.0
"""A study as a run saved it, also one that an older version of FedNeuro wrote: to look at, never to run.

The study hash stands on every message and ledger entry of a run, so a run goes on only where its study's text reads
today as it did then. What is finished must stay readable all the same: keys that came later take their defaults, which
are what the run did without them; keys that are gone are left out of view. Text and hash stay those that were saved.
"""

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from ..privacy.errors import ContractViolation, StateError
from ..privacy.study import Study

__all__ = ["OLDER", "read_saved"]

OLDER = (
    "saved by another version of FedNeuro, whose studies read otherwise: it can be shown, reported and verified, "
    "not gone on with; launch the study again for a new run"
)


def read_saved(canonical: bytes, study_hash: str) -> tuple[Study, bool]:
    """The study, and whether its text is of another version.

    Returns:
        A study whose ``canonical`` and ``hash`` are what was saved; True where this version would write another text.

    Raises:
        StateError: the text is not that of the hash, or no study that this version can show.
    """
    if hashlib.sha256(canonical).hexdigest() != study_hash:
        raise StateError(f"the saved study is not the one with hash {study_hash[:12]}; restore the run from a backup")
    try:
        return Study.from_canonical(canonical, study_hash), False
    except ContractViolation:
        study = _without_unknown(canonical)
    # The text that was signed and charged for, in the place of what this version would write.
    vars(study).update(canonical=canonical, hash=study_hash)
    return study, True


def _without_unknown(canonical: bytes) -> Study:
    try:
        values = json.loads(canonical)
        try:
            return Study.model_validate_json(canonical)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                if fault["type"] == "extra_forbidden":
                    _remove(values, fault["loc"])
        return Study.model_validate_json(json.dumps(values))
    except (ValueError, TypeError, KeyError) as error:  # ValidationError is a ValueError
        raise StateError(
            "the saved study is of a version of FedNeuro that this one cannot show; use that version"
        ) from error


def _remove(values: Any, location: tuple[int | str, ...]) -> None:
    for part in location[:-1]:
        values = values[part]
    del values[location[-1]]
