# SPDX-License-Identifier: Apache-2.0
"""The manifest of a run: what was done, by whom and under which promise, in one sealed file that verifies offline.

``OUT/manifest.json`` names the study in full, the code, who approved and took part in each round, ε and the privacy
unit beside each site's metrics, and the SHA-256 of every file of the run's outcome. It holds nothing that did not
cross the hospitals' walls by the contract (:mod:`fedneuro.privacy.contract`), which carries no fingerprint of data.

Checked by :func:`verify_manifest`, in this order:

    1. form: the bytes are those that were written
    2. signature, and, where a key is named, that it signed or vouched (:mod:`fedneuro.privacy.seals`)
    3. study: its canonical text has the hash that everything else names
    4. model: digest of the arrays, and that the file belongs to this study
    5. every other file beside the manifest, by its SHA-256
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..models.state import digest, load_saved
from .errors import BadInput, Refused
from .identity import SITE_NAME
from .seals import Hex64, Hex128, Seal, check_seal, read_sealed
from .signing import verify_study_hash
from .study import Study

__all__ = ["MANIFEST", "MODEL", "PURPOSE", "Finding", "Manifest", "file_digest", "require", "verify_manifest"]

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.safetensors"
PURPOSE: Final = "manifest"
SiteName = Annotated[str, Field(pattern=SITE_NAME)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class RunPart(_Part):
    """How far it went. ``made``: when the manifest was first written, UTC."""

    made: str
    engine: str
    status: Literal["complete", "partial"]
    rounds: int
    selected_round: int
    seconds: float


class StudyPart(_Part):
    """The study in full: SHA-256 of ``canonical`` in UTF-8 is ``hash``. ``signature``: the coordinator's under it."""

    name: str
    hash: Hex64
    canonical: str
    signature: Hex128 | None

    def check(self) -> None:
        """Check that the text is the one that everything else names.

        Raises:
            Refused: it has another hash.
        """
        if hashlib.sha256(self.canonical.encode()).hexdigest() != self.hash:
            raise Refused("the study's text does not have the hash that the manifest names")

    def parsed(self) -> Study:
        """The study, also of an older version of FedNeuro: keys that came later have their defaults.

        The defaults of new keys are what was done before they were there, so the model is used as it was judged.

        Raises:
            Refused: this version does not know a key of it, or takes another value for it.
        """
        try:
            return Study.model_validate_json(self.canonical)
        except ValidationError as error:
            fault = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
            raise Refused(f"this version of FedNeuro does not know the study's {fault}; install the run's") from error


class CodePart(_Part):
    """Version and fingerprint (:mod:`fedneuro.privacy.code_hash`) of the coordinator's code; versions at the sites."""

    version: str
    fingerprint: str
    sites: dict[SiteName, dict[str, str]]


class DataPart(_Part):
    """Fingerprints of the sites' data, as far as the contract lets them out: today it carries none."""

    fingerprints: dict[SiteName, Hex64]
    note: str


class SitePart(_Part):
    """One site, with its privacy beside its metrics (those of the model, in the form of ``results.json``)."""

    role: str
    public_size: int
    state: str
    unit: str
    epsilon: float | None
    delta: float | None
    metrics: dict[str, Any]


class Approval(_Part):
    """A site's answer to the study before round 1: it joins only if its policy approves. ``reason``: a code."""

    answer: Literal["joined", "refused"]
    reason: str | None


class RoundPart(_Part):
    """Who trained and who judged in a round; who did not, with the reason code."""

    round: int
    trained: list[SiteName]
    missing: dict[SiteName, str]
    judged: list[SiteName]
    not_judged: dict[SiteName, str]


class ModelPart(_Part):
    """The selected round's model: digest of its arrays (:func:`fedneuro.models.state.digest`)."""

    round: int
    digest: Hex64


class Manifest(_Part):
    """Everything that is sealed."""

    format: Literal["fedneuro-manifest-1"]
    run: RunPart
    study: StudyPart
    code: CodePart
    data: DataPart
    approvals: dict[SiteName, Approval]
    sites: dict[SiteName, SitePart]
    participation: list[RoundPart]
    privacy: dict[str, Any]
    model: ModelPart | None
    files: dict[FileName, Hex64]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``verdict``: ``ok``, ``FAIL``, or ``-`` where there was nothing to look at."""

    verdict: Literal["ok", "FAIL", "-"]
    check: str
    seen: str

    def __str__(self) -> str:
        return f"{self.verdict:<4} {self.check:<18} {self.seen}"


def verify_manifest(
    path: Path, *, key: str | None = None, model: Path | None = None, complete: bool = False
) -> tuple[Manifest | None, list[Finding]]:
    """Check a manifest and the files beside it; see the module's text. Nothing is raised for a check that fails.

    Args:
        path: the manifest.
        key: public key that must have signed it or vouched for its signer, 64 hexadecimal digits.
        model: the model, where it does not lie beside the manifest.
        complete: a file that is named and absent is a failure.

    Returns:
        The manifest, or None where its form, signature or study is not sound, and one finding per check.

    Raises:
        BadInput: the manifest, or the ``model`` that was named, cannot be read.
    """
    findings: list[Finding] = []
    try:
        content, seal = read_sealed(path)
        findings.append(Finding("ok", "form", "as it was written"))
        manifest = Manifest.model_validate(content)
        signer = check_seal(seal, PURPOSE, manifest.study.hash, content, expected=key)
        findings.append(Finding("ok", "signature", signer))
        manifest.study.check()
        by = _study_signer(manifest, seal, key)
        findings.append(Finding("ok", "study", f"{manifest.study.name}, {manifest.study.hash[:16]}…{by}"))
    except ValidationError:
        return None, [*findings, Finding("FAIL", "form", "not a manifest that this version of FedNeuro knows")]
    except Refused as error:
        what = ("form", "signature", "study")[len(findings)]
        return None, [*findings, Finding("FAIL", what, str(error).removeprefix(f"{path}: "))]
    findings.append(_model_finding(manifest, model or path.parent / MODEL, named=model is not None or complete))
    findings += _file_findings(manifest, path.parent, complete=complete, skip={MODEL} if model else set())
    return manifest, findings


def _study_signer(manifest: Manifest, seal: Seal, key: str | None) -> str:
    """In words whose signature the study carries, where it carries one and its key is known."""
    owner = key or (seal.voucher.key if seal.voucher else None)
    if manifest.study.signature is None or owner is None:
        return ""
    verify_study_hash(manifest.study.hash, bytes.fromhex(manifest.study.signature), owner)
    return f", signed by {owner[:16]}… before it began"


def _model_finding(manifest: Manifest, path: Path, *, named: bool) -> Finding:
    """Step 4."""
    if manifest.model is None:
        return Finding("-", "model", "none: no round was saved")
    if not path.is_file():
        return Finding("FAIL" if named else "-", "model", f"{path.name} is not there: not checked")
    try:
        arrays, metadata = load_saved(path)
    except (OSError, ValueError) as error:
        return Finding("FAIL", "model", f"{path.name} cannot be read: {error}")
    if digest(arrays) != manifest.model.digest:
        return Finding("FAIL", "model", f"{path.name} holds other weights than the manifest names")
    if metadata.get("study_hash") != manifest.study.hash:
        return Finding("FAIL", "model", f"{path.name} names another study")
    return Finding("ok", "model", f"round {manifest.model.round}, {len(arrays)} arrays, {manifest.model.digest[:16]}…")


def _file_findings(manifest: Manifest, folder: Path, *, complete: bool, skip: Iterable[str]) -> Iterator[Finding]:
    """Step 5."""
    for name, expected in manifest.files.items():
        path = folder / name
        if name in skip:
            continue
        if not path.is_file():
            yield Finding("FAIL" if complete else "-", name, "is not beside the manifest: not checked")
        elif file_digest(path) != expected:
            yield Finding("FAIL", name, "was changed since the manifest was written")
        else:
            yield Finding("ok", name, f"{expected[:16]}…")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error


def require(path: Path, findings: Iterable[Finding]) -> None:
    """Refuse what was looked at unless every check passed.

    Raises:
        Refused: with the checks that failed.
    """
    failed = [f"{finding.check}: {finding.seen}" for finding in findings if finding.verdict == "FAIL"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise Refused(f"{path}: is not as it was signed; do not use it: {failed[0]}{more}")
