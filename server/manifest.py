# SPDX-License-Identifier: Apache-2.0
"""Writes the manifest of a run, ``OUT/manifest.json``, from its saved state and the files beside it.

It is written whenever results and report are, so it always belongs to them. Signed it is with the run's own key
(:mod:`.run_key`), for which the consortium's key vouches in a deployment. What it holds, and how it is checked, is
:mod:`fedneuro.privacy.manifest`; the code that it names is the code that first wrote it for this outcome.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..privacy.code_hash import code_hash
from ..privacy.contract import Role
from ..privacy.errors import FedNeuroError
from ..privacy.manifest import (
    MANIFEST,
    MODEL,
    PURPOSE,
    Approval,
    CodePart,
    DataPart,
    Manifest,
    ModelPart,
    RoundPart,
    RunPart,
    SitePart,
    StudyPart,
    file_digest,
    verify_manifest,
)
from ..privacy.seals import write_sealed
from .run_key import run_signer
from .store import RoundRecord, RunStore, SiteRecord

__all__ = ["FILES", "build_manifest", "write_manifest"]

FILES = ("results.json", "evidence.json", "report.html", MODEL)
"""What a run leaves, beside its state; evidence only where several models were compared."""
NO_FINGERPRINTS = (
    "The contract lets no fingerprint of data out of a hospital: it would tell when a data set changes. "
    "Each hospital's own audit log and data check hold what its data were."
)


def write_manifest(out: Path, results: Mapping[str, Any]) -> Path:
    """Write the manifest of the run in ``out``; call it after results and report were written.

    Args:
        out: the run's folder.
        results: the content of ``results.json``.
    """
    store = RunStore.load(out)
    try:
        manifest = build_manifest(store, results)
    finally:
        store.close()
    path = out / MANIFEST
    write_sealed(
        path, PURPOSE, manifest.study.hash, manifest.model_dump(mode="json"), run_signer(out, store.study.hash)
    )
    return path


def build_manifest(store: RunStore, results: Mapping[str, Any]) -> Manifest:
    """What the manifest of a run says."""
    study, sites, rounds, asked = store.study, store.sites(), store.rounds(), _refusals(store)
    digest = results.get("model_digest")
    before = _before(store.out, digest) if results["status"] == "complete" else None
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Manifest(
        format="fedneuro-manifest-1",
        run=RunPart(
            made=before.run.made if before else made,
            engine=results["engine"],
            status=results["status"],
            rounds=max((record.round for record in rounds), default=0),
            selected_round=results["selected_round"],
            seconds=results["seconds"],
        ),
        study=StudyPart(
            name=study.study.name,
            hash=study.hash,
            canonical=study.canonical.decode(),
            signature=_study_signature(store.out),
        ),
        code=before.code
        if before
        else CodePart(
            version=version("fedneuro"),
            fingerprint=code_hash(),
            sites={name: dict(site.versions) for name, site in sites.items()},
        ),
        data=DataPart(fingerprints={}, note=NO_FINGERPRINTS),
        approvals={
            **{name: Approval(answer="refused", reason=reason) for name, reason in asked["hello", 0].items()},
            **{name: Approval(answer="joined", reason=None) for name in sites},
        },
        sites={name: _site(name, site, results) for name, site in sites.items()},
        participation=[_round(record, sites, asked) for record in rounds],
        privacy=results["privacy"],
        model=ModelPart(round=results["selected_round"], digest=digest) if digest else None,
        files={name: file_digest(store.out / name) for name in FILES if (store.out / name).is_file()},
    )


def _site(name: str, site: SiteRecord, results: Mapping[str, Any]) -> SitePart:
    privacy = results["privacy"]
    return SitePart(
        role=site.role,
        public_size=site.public_size,
        state=site.state,
        unit=privacy["unit"],
        epsilon=privacy["epsilon"].get(name),
        delta=privacy.get("delta_by_site", {}).get(name),
        metrics=results["sites"][name]["metrics"],
    )


def _round(
    record: RoundRecord, sites: Mapping[str, SiteRecord], asked: Mapping[tuple[str, int], Mapping[str, str]]
) -> RoundPart:
    """Round 0 has no training. A site without an answer and without a reason was not asked."""
    number, why = record.round, asked["evaluate", record.round]
    training = [name for name, site in sites.items() if site.role == Role.TRAIN.value] if number else []
    missing = {name: record.refusals.get(name, "not-asked") for name in training if name not in record.train}
    judged = sorted(record.metrics)
    not_judged = {name: why.get(name, "not-asked") for name in sites if name not in record.metrics} if judged else {}
    return RoundPart(round=number, trained=sorted(record.train), missing=missing, judged=judged, not_judged=not_judged)


def _refusals(store: RunStore) -> defaultdict[tuple[str, int], dict[str, str]]:
    """Latest reason code by (kind of request, round) and site."""
    found: defaultdict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for _, event in store.events():
        if event.kind == "refused" and event.site:
            found[str(event.values.get("during")), event.round][event.site] = str(event.values.get("reason"))
    return found


def _before(out: Path, digest: str | None) -> Manifest | None:
    """A sound manifest that is there for the same model: a later report must not rename the code that ran."""
    path = out / MANIFEST
    if not path.is_file():
        return None
    try:
        found, _ = verify_manifest(path)
    except FedNeuroError:
        return None
    return found if found and found.run.status == "complete" and found.model and found.model.digest == digest else None


def _study_signature(out: Path) -> str | None:
    """The coordinator's signature that the study was launched with (:mod:`.study_signature`)."""
    path = out / "study.sig"
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{128}", text) else None
