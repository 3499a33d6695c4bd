# SPDX-License-Identifier: Apache-2.0
"""A release pack, or the folder of a run, as who receives it must treat it: checked in full before anything is used.

.. code-block:: text

    PACK/release.json         sealed (:mod:`fedneuro.privacy.seals`): SHA-256 of every file below, and what was checked
    PACK/SHA256SUMS           the same digests for sha256sum --check
    PACK/manifest.json        of the run (:mod:`fedneuro.privacy.manifest`), with results.json, report.html
    PACK/model.safetensors    the weights
    PACK/…                    MONAI bundle, model card, bill of materials

:func:`verify_release` checks:

    1. form and signature of ``release.json``
    2. that every file is there as it was signed, and no other file is
    3. the manifest, and that it is of the same study and model, signed by the same key
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ..models.state import digest, load_arrays, load_saved
from .errors import BadInput, EnvironmentProblem, Refused
from .manifest import MANIFEST, MODEL, Finding, Manifest, file_digest, require, verify_manifest
from .seals import Hex64, check_seal, read_sealed
from .study import Study

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "PURPOSE",
    "RELEASE",
    "SUMS",
    "Release",
    "Released",
    "open_released",
    "sums_text",
    "verify_release",
]

RELEASE: Final = "release.json"
SUMS: Final = "SHA256SUMS"
PURPOSE: Final = "release"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\n" in name:
        raise ValueError("not a path below the pack")
    return name


class Release(BaseModel):
    """What is sealed in ``release.json``. ``checks``: what was tried before it was signed, and what was seen."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    format: Literal["fedneuro-release-1"]
    made: str
    study_hash: Hex64
    model: Hex64
    bundle: str
    checks: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_inside)], Hex64]


@dataclass(frozen=True, slots=True)
class Released:
    """A model that was checked: ``arrays`` are those whose digest the manifest names. ``signed``: by whom, in words."""

    folder: Path
    study: Study
    arrays: dict[str, NDArray[Any]]
    manifest: Manifest
    signed: str

    def network(self) -> "nn.Module":
        """The weights in the study's network, in evaluation mode.

        Raises:
            EnvironmentProblem: this version of FedNeuro builds another network.
        """
        from ..models.networks import build_network

        channels, model = len(self.study.data.modalities), self.study.model
        seed = self.study.study.seed
        network = build_network(model, in_channels=channels, out_channels=self.study.task.channels, seed=seed)
        try:
            load_arrays(network, self.arrays)
        except ValueError as error:
            text = f"this version of FedNeuro builds another network than the run's: {error}"
            raise EnvironmentProblem(text) from error
        return network.eval()


def sums_text(files: Mapping[str, str]) -> str:
    """``SHA256SUMS`` of files by name."""
    return "".join(f"{value}  {name}\n" for name, value in files.items())


def verify_release(folder: Path, *, key: str | None = None) -> tuple[Release | None, Manifest | None, list[Finding]]:
    """Check a pack; see the module's text. Nothing is raised for a check that fails.

    Args:
        folder: the pack.
        key: public key that must have signed, 64 hexadecimal digits; None: any, and the finding names it.

    Returns:
        Release and manifest, None where their form or signature is not sound, and one finding per check.

    Raises:
        BadInput: there is no ``release.json``.
    """
    path, findings = folder / RELEASE, list[Finding]()
    try:
        content, seal = read_sealed(path)
        release = Release.model_validate(content)
        findings.append(Finding("ok", "release form", "as it was written"))
        signer = check_seal(seal, PURPOSE, release.study_hash, content, expected=key)
        findings.append(Finding("ok", "release signature", signer))
    except ValidationError:
        return None, None, [Finding("FAIL", "release form", "not a release that this version of FedNeuro knows")]
    except Refused as error:
        what = "release signature" if findings else "release form"
        return None, None, [*findings, Finding("FAIL", what, str(error).removeprefix(f"{path}: "))]
    faults = list(_file_faults(folder, release))
    findings += faults or [Finding("ok", "files", f"{len(release.files)}, each as it was signed, and no others")]
    try:
        manifest, more = verify_manifest(folder / MANIFEST, key=seal.key, complete=True)
    except BadInput:
        return release, None, [*findings, Finding("FAIL", "manifest", "is not there")]
    findings += more
    named = (manifest.study.hash, manifest.model.digest if manifest.model else "") if manifest else None
    if named is not None and named != (release.study_hash, release.model):
        findings.append(Finding("FAIL", "release", "is of another study or model than the manifest"))
    return release, manifest, findings


def _file_faults(folder: Path, release: Release) -> Iterator[Finding]:
    """Step 2."""
    for name, expected in release.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            yield Finding("FAIL", name, "is not there")
        elif file_digest(path) != expected:
            yield Finding("FAIL", name, "was changed since it was signed")
    known = set(release.files) | {RELEASE, SUMS}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            yield Finding("FAIL", name, "is no part of what was signed")
    sums = folder / SUMS
    if not sums.is_file() or sums.read_bytes() != sums_text(release.files).encode():
        yield Finding("FAIL", SUMS, "does not hold the digests that were signed")


def open_released(path: Path, *, key: str | None = None) -> Released:
    """The model of a pack, or of a finished run's folder, after every check.

    Args:
        path: the folder.
        key: public key that must have signed.

    Raises:
        BadInput: neither a pack nor a run with a manifest.
        Refused: a check fails, the run is not finished, or holds no model.
    """
    if (path / RELEASE).is_file():
        _, manifest, findings = verify_release(path, key=key)
    elif (path / MANIFEST).is_file():
        manifest, findings = verify_manifest(path / MANIFEST, key=key, complete=True)
    else:
        text = f"{path}: is neither a release nor a run: no {RELEASE} and no {MANIFEST}"
        raise BadInput(f"{text}; fedneuro-server report OUT writes the manifest of an older run")
    require(path, findings)
    if manifest is None or manifest.model is None or manifest.run.status != "complete":
        raise Refused(f"{path}: the run is not finished; there is no model to use yet")
    arrays, _ = load_saved(path / MODEL)
    if digest(arrays) != manifest.model.digest:  # changed since the check
        raise Refused(f"{path / MODEL}: holds other weights than were signed")
    signed = next(finding.seen for finding in findings if finding.check.endswith("signature"))
    return Released(path, manifest.study.parsed(), arrays, manifest, signed)
