# SPDX-License-Identifier: Apache-2.0
"""What hospitals told of their data sets, side by side. Each file is checked against what may be told at all.

The files come by hand, after the hospital's staff have read them; no message of a study carries them. Percentiles of
hospitals cannot be pooled, so they stand beside each other; rounded counts are added up.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ..privacy.data_statistics import Quantiles, Released
from ..privacy.errors import DataError

__all__ = ["beside_each_other", "read_released"]

MAX_BYTES: Final = 1 << 20


def read_released(path: Path) -> Released:
    """One hospital's file.

    Raises:
        DataError: it cannot be read, or holds something that may not be told.
    """
    try:
        raw = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file that a hospital released") from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: over {MAX_BYTES >> 20} MiB; expected a file of fedneuro-node data stats --release")
    try:
        return Released.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: not what a hospital may tell ({where}: {first['msg']}); expected a file of fedneuro-node data "
            "stats --release; ask for it again"
        ) from error


def beside_each_other(files: Sequence[Released]) -> dict[str, Any]:
    """Counts in all, and every hospital's percentiles by modality and label.

    Raises:
        DataError: a hospital is there twice.
    """
    names = [file.site for file in files]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{', '.join(twice)}: more than one file; expected one per hospital; give the latest")
    modalities: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for file in files:
        for what, group in file.modalities.items():
            entry = modalities.setdefault(what, {"patients": 0, "sites": {}})
            entry["patients"] += group.patients
            entry["sites"][file.site] = group.model_dump(mode="json", exclude_none=True)
        for mask, values in file.labels.items():
            for value, told in values.items():
                entry = labels.setdefault(mask, {}).setdefault(value, {"patients": 0, "sites": {}})
                entry["patients"] += told.patients
                entry["sites"][file.site] = told.model_dump(mode="json", exclude_none=True)
    return {
        "patients": sum(file.patients for file in files),
        "sites": {file.site: file.patients for file in files},
        "modalities": modalities,
        "labels": labels,
    }


def rows(files: Sequence[Released]) -> list[tuple[str, ...]]:
    """A line for each modality and label of each hospital: what, site, patients, typical values."""
    lines = []
    for file in files:
        for what, group in file.modalities.items():
            voxel = "×".join(_median(q) for q in group.voxel_mm)
            greys = " / ".join(_median(q) for q in (group.grey_p5, group.grey_p50, group.grey_p95))
            lines.append((what, file.site, str(group.patients), f"voxel {voxel} mm", f"grey p5/p50/p95 {greys}"))
        for mask, values in file.labels.items():
            for value, told in values.items():
                volume = told.volume_ml
                between = f"{_number(volume.p5)}–{_number(volume.p95)}"
                lines.append(
                    (f"{mask} {value}", file.site, str(told.patients), f"{_median(volume)} mL", f"p5–p95 {between} mL")
                )
    return sorted(lines)


def dumped(found: dict[str, Any]) -> str:
    """As a JSON file."""
    return json.dumps(found, indent=1) + "\n"


def _median(values: Quantiles) -> str:
    return _number(values.p50)


def _number(value: float | None) -> str:
    return "not told" if value is None else f"{value:g}"
