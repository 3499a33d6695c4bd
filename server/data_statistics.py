# SPDX-License-Identifier: Apache-2.0
"""What hospitals told of their data sets, side by side. Each file is checked against what may be told at all.

The files come by hand, after the hospital's staff have read them; no message of a study carries them. Each is sealed
with the key of the hospital's node (:mod:`fedneuro.privacy.site_seals`), which the consortium's registry knows: whose
it is, and that nobody changed it, need not be taken on trust. Percentiles of hospitals cannot be pooled, so they stand
beside each other; rounded counts are added up. Files of a private study hold noised histograms on common bins, which
are added up (:mod:`fedneuro.privacy.noised_statistics`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..privacy.data_statistics import PURPOSE, Quantiles, Released
from ..privacy.errors import DataError, FedNeuroError, Refused
from ..privacy.noised_statistics import Noised, pooled, questions
from ..privacy.site_seals import SiteSealed, check_site_seal, content_digest, read_site_sealed
from ..privacy.study import Study

__all__ = ["Told", "added_up", "beside_each_other", "check_study", "read_told"]


@dataclass(frozen=True, slots=True)
class Told:
    """One hospital's file.

    Attributes:
        content: what it says.
        digest: SHA-256 of the content, as it stands in the hospital's audit log.
        key: fingerprint of the node that signed it; empty: nobody did.
    """

    content: Released | Noised
    digest: str
    key: str


def read_told(path: Path, known: Mapping[str, str], *, unsigned: bool = False) -> Told:
    """One hospital's file, its seal checked.

    Args:
        path: of the file.
        known: fingerprint of the node of every hospital whose word counts, by its name.
        unsigned: a file without a seal is taken too; whose it is then nobody can say.

    Raises:
        BadInput: it cannot be read.
        DataError: it holds something that may not be told.
        Refused: it is not signed by the node of the hospital that it names.
    """
    found = read_site_sealed(path)
    try:
        kind = Noised if found.content.get("format") == 2 else Released
        content = kind.model_validate_json(json.dumps(found.content))
    except (ValidationError, RecursionError) as error:
        where, what = "the file", "nested too deep"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            where, what = ".".join(map(str, first["loc"])) or where, first["msg"]
        raise DataError(
            f"{path}: not what a hospital may tell ({where}: {what}); expected a file of fedneuro-node data "
            "stats --release; ask for it again"
        ) from error
    return Told(content, content_digest(found.content), _signer(path, found, content, known, unsigned=unsigned))


def _signer(
    path: Path, found: SiteSealed, content: Released | Noised, known: Mapping[str, str], *, unsigned: bool
) -> str:
    site = content.site
    if found.seal is None:
        if unsigned:
            return ""
        raise Refused(
            f"{path}: is not signed, so anybody may have written it in the name of {site}; let {site} make it with "
            "--config node.toml, or give --unsigned if you know whose it is"
        )
    if site not in known:
        raise Refused(
            f"{path}: no node of {site} is known; give the consortium's folder (--config), or the node's fingerprint "
            f"as {site} reads it to you (--key {site}=FINGERPRINT)"
        )
    try:
        check_site_seal(found.seal, found.content, PURPOSE, site=site, study_hash=content.study, expected=known[site])
    except FedNeuroError as error:
        raise Refused(f"{path}: {error}") from error
    return found.seal.fingerprint


def check_study(told: Told, study: Study) -> None:
    """Check that a file answers what ``study`` asks, under its rules.

    Raises:
        Refused: it is for another study, or asks or tells other things than the study permits.
    """
    content = told.content
    if content.study != study.hash:
        named = f"study {content.study[:12]}" if content.study else "no study"
        raise Refused(f"{content.site}: its file is for {named}, not for {study.hash[:12]} ({study.study.name})")
    if content.threshold < study.evaluation.min_patients and isinstance(content, Released):
        text = f"groups from {content.threshold} patients on; expected {study.evaluation.min_patients}, as it asks"
        raise Refused(f"{content.site}: {text}")
    if isinstance(content, Noised) != (study.privacy.mode != "none"):
        raise Refused(f"{content.site}: a study of mode {study.privacy.mode} gets statistics of another kind")
    if isinstance(content, Noised) and [(h.question, h.of) for h in content.histograms] != questions(study):
        raise Refused(f"{content.site}: the file asks other questions than the study")


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
