# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server verify`` and ``release``: evidence that anyone can check, and a pack that can be handed on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..privacy.errors import BadInput, Refused

if TYPE_CHECKING:
    from ..privacy.seals import Signer

__all__ = ["register"]

Pub = Annotated[
    str | None,
    typer.Option("--key", metavar="PUB", help="Public key that must have signed: 64 digits, or a file (study.pub)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedneuro-server``."""
    for command in (verify, release):
        app.command()(command)


def verify(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json; or the folder of a run or of a release.")
    ],
    key: Pub = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The model, where it does not lie beside the manifest.")
    ] = None,
) -> None:
    """Check signature, study, model and files of a run or a release, offline. Exit code 3: a check fails."""
    from ..privacy.manifest import MANIFEST, Finding, verify_manifest
    from ..privacy.release_pack import RELEASE, verify_release
    from ..privacy.seals import public_key

    expected = public_key(key) if key else None
    if manifest.is_dir() and (manifest / RELEASE).is_file():
        if model is not None:
            raise BadInput("--model: a release holds its model; leave it out")
        _, found, findings = verify_release(manifest, key=expected)
    else:
        path = manifest / MANIFEST if manifest.is_dir() else manifest
        found, findings = verify_manifest(path, key=expected, model=model)
    for finding in findings:
        print(finding)
    failed = sum(finding.verdict == "FAIL" for finding in findings)
    if failed or found is None:
        raise Refused(f"{manifest}: {failed} of {len(findings)} checks fail; do not use it")
    if found.run.status != "complete":
        print(Finding("-", "run", f"not finished: {found.run.rounds} rounds are saved"))
    print(f"verified: {len(findings)} checks")


def release(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run; or, with --config, a run's name.")],
    out: Annotated[Path, typer.Option("--out", metavar="PACK", help="New folder of the release.")],
    config: Annotated[
        Path | None, typer.Option("--config", metavar="DIR", help="The consortium's folder: its key signs.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Ed25519 private key that signs, in place of that.")] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the consortium's key.")
    ] = None,
    passphrase_fd: Annotated[
        int | None, typer.Option("--passphrase-fd", help="Open file descriptor that gives the passphrase.")
    ] = None,
    authors: Annotated[str, typer.Option("--authors", help="For the bundle's metadata.")] = "",
    licence: Annotated[Path | None, typer.Option("--license", help="Text of the licence of the weights.")] = None,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Leave ONNX out.")] = False,
    schema: Annotated[
        Path | None, typer.Option("--monai-schema", help="MONAI's metadata schema, downloaded; see docs/release.md.")
    ] = None,
) -> None:
    """Make a signed release of a finished run: MONAI bundle, ONNX, model card, evidence. Exit code 3: not verified."""
    from .release import ReleaseOptions, make_release
    from .scores import final_scores

    folder = _folder(run, config)
    signer = _signer(folder, config, key, passphrase_file, passphrase_fd)
    options = ReleaseOptions(
        authors=authors,
        licence=licence.read_text(encoding="utf-8") if licence else "",
        onnx=not no_onnx,
        schema=schema,
    )
    made = make_release(folder, out, signer, options)
    for what, seen in made.checks.items():
        print(f"{what:<10} {seen}")
    for score in final_scores(json.loads((out / "results.json").read_text(encoding="utf-8"))):
        print(f"{'held out':<10} {score}")
    print(f"{out}: {len(made.files)} files, signed; check with: fedneuro-server verify {out}")


def _folder(run: str, config: Path | None) -> Path:
    if Path(run).is_dir() or config is None:
        return Path(run)
    from .consortium import Consortium
    from .run_folder import find_run

    return find_run(Consortium(config).folder / "runs", run).path


def _signer(
    folder: Path, config: Path | None, key: Path | None, passphrase_file: Path | None, passphrase_fd: int | None
) -> "Signer":
    """The consortium's key, the one that was given, or the run's own."""
    from ..privacy.seals import Signer
    from ..privacy.signing import load_signing_key

    if key is not None:
        return Signer(load_signing_key(key))
    if config is not None:
        from .consortium import Consortium
        from .sealed_keys import Passphrase

        words = Passphrase("the key that signs studies", "FEDNEURO_PASSPHRASE", passphrase_file, passphrase_fd)
        return Signer(Consortium(config).unlock_study_key(words))
    from ..privacy.release_pack import open_released
    from .run_key import run_signer

    return run_signer(folder, open_released(folder).manifest.study.hash)
