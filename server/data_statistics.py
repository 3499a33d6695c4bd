# SPDX-License-Identifier: Apache-2.0
"""What hospitals told of their data sets, side by side. Each file is checked against what may be told at all.

The files come by hand, after the hospital's staff have read them; no message of a study carries them. Percentiles of
hospitals cannot be pooled, so they stand beside each other; rounded counts are added up. Files of a private study hold
noised histograms on common bins, which are added up (:mod:`fedneuro.privacy.noised_statistics`).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ..privacy.data_statistics import Quantiles, Released
from ..privacy.errors import DataError
from ..privacy.noised_statistics import Noised, pooled

__all__ = ["added_up", "beside_each_other", "read_released"]

MAX_BYTES: Final = 1 << 20
_NOISED: Final = re.compile(rb'"format"\s*:\s*2\b')


def read_released(path: Path) -> Released | Noised:
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
        return (Noised if _NOISED.search(raw) else Released).model_validate_json(raw)
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
    _once(files)
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


def added_up(files: Sequence[Noised]) -> dict[str, Any]:
    """Noised histograms over all hospitals, with what each cost its patients.

    Raises:
        DataError: a hospital is there twice, or the files are of several studies.
    """
    _once(files)
    if len(studies := {file.study for file in files}) > 1:
        names = ", ".join(sorted(study[:12] for study in studies))
        raise DataError(f"files of several studies ({names}); expected one study; show each by itself")
    return {
        "study": files[0].study,
        "patients": sum(file.patients for file in files),
        "sites": {
            file.site: {"patients": file.patients, "epsilon": file.epsilon, "delta": file.delta, "noise": file.noise}
            for file in files
        },
        "questions": pooled(files),
    }


def noised_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A line for each question: what, of what, patients as far as the noise tells, percentiles likewise."""
    lines: list[tuple[str, str, str]] = []
    for asked in found["questions"]:
        spread = 1.96 * asked["noise"] * len(asked["counts"]) ** 0.5
        about = f"{sum(asked['counts'])} ± {spread:.0f} patients"
        levels = [f"{name} {_range(*ends)}" for name, ends in asked["percentiles"].items()]
        said = ", ".join(levels) or ("the noise hides the rest" if asked["edges"] else "")
        lines.append((f"{asked['of']} {asked['question']}", about, said))
    return lines


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"< {_number(high)}"
    return f"> {_number(low)}" if high is None else f"{_number(low)} to {_number(high)}"


def _once(files: Sequence[Released] | Sequence[Noised]) -> None:
    names = [file.site for file in files]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{', '.join(twice)}: more than one file; expected one per hospital; give the latest")


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
