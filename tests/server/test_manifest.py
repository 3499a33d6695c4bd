# SPDX-License-Identifier: Apache-2.0
"""The manifest: what it says of a run, that every changed byte is found, and whose signature counts."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedneuro.privacy.errors import BadInput, Refused
from fedneuro.privacy.manifest import PURPOSE, Finding, Manifest, require, verify_manifest
from fedneuro.privacy.seals import Signer, as_text, public_key, read_sealed, vouch, write_sealed
from fedneuro.privacy.signing import public_text, sign_study
from fedneuro.server.manifest import write_manifest
from fedneuro.server.run_key import run_signer, vouch_for_run
from fedneuro.simulations.run import finish
from tests.bids import make_study
from tests.finished_run import finished_run

STUDY = make_study(
    training={"rounds": 2, "local_epochs": 0, "local_steps": 1},
    privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5},
    evaluation={"heldout": ["west"], "metrics": ["dice"]},
)
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
PUBLIC = public_text(COORDINATOR)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("made") / "out", STUDY)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def failed(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.verdict == "FAIL"]


def verified(run: Path, **options: Any) -> Manifest:
    manifest, findings = verify_manifest(run / "manifest.json", **options)
    assert failed(findings) == [] and manifest is not None
    return manifest


def test_it_says_what_happened(made: Path) -> None:
    manifest = verified(made, complete=True)
    assert hashlib.sha256(manifest.study.canonical.encode()).hexdigest() == STUDY.hash == manifest.study.hash
    assert manifest.study.parsed() == STUDY
    assert manifest.approvals["east"].reason == "study-not-approved" and manifest.approvals["north"].answer == "joined"
    north, west = manifest.sites["north"], manifest.sites["west"]
    assert (north.epsilon, north.delta, north.unit) == (3.0, 1e-2, "patient")
    assert west.epsilon is None and west.metrics["dice"]["mean"] == pytest.approx(0.2)
    last = manifest.participation[2]
    assert (last.trained, last.missing) == (["north"], {"south": "lost"})
    assert (last.judged, last.not_judged) == (["north", "west"], {"south": "timeout"})
    assert set(manifest.files) == {"results.json", "report.html", "model.safetensors"}
    assert manifest.data.fingerprints == {}
    assert manifest.code.fingerprint.startswith(("record:", "source:"))


def test_a_simulation_ends_with_it_and_a_later_report_keeps_the_code_that_ran(run: Path) -> None:
    before = verified(run)
    (run / "manifest.json").unlink()
    finish(run)
    assert verified(run).model == before.model
    content, _ = read_sealed(run / "manifest.json")
    content["code"]["fingerprint"] = "source:of-the-version-that-ran"
    write_sealed(run / "manifest.json", PURPOSE, STUDY.hash, content, run_signer(run, STUDY.hash))
    results = finish(run)
    assert verified(run).code.fingerprint == "source:of-the-version-that-ran"
    write_manifest(run, results | {"status": "partial"})
    assert verified(run).code.fingerprint != "source:of-the-version-that-ran"


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "report.html", "model.safetensors"])
def test_any_changed_byte_is_found(run: Path, name: str) -> None:
    """Every byte of the manifest's first and last part, and one in so many of the rest and of the other files."""
    path = run / name
    content = path.read_bytes()
    few = {*range(0, len(content), max(1, len(content) // 60)), len(content) - 1}
    edges = {*range(40), *range(len(content) - 220, len(content))} if name == "manifest.json" else set()
    for place in sorted(few | edges):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert failed(verify_manifest(run / "manifest.json")[1]), (place, bytes(changed[place - 5 : place + 5]))
    path.write_bytes(content + b"\n")
    assert failed(verify_manifest(run / "manifest.json")[1])
    path.write_bytes(content[:-1])
    assert failed(verify_manifest(run / "manifest.json")[1])
    path.write_bytes(content)
    verified(run)


def of(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]  # type: ignore[index]
        values[path[-1]] = value  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    "change",
    [
        of("content", "sites", "north", "epsilon", value=0.1),
        of("content", "sites", "west", "metrics", "dice", "mean", value=0.9),
        of("content", "participation", 2, "missing", value={}),
        of("content", "approvals", "east", value={"answer": "joined", "reason": None}),
        of("content", "code", "fingerprint", value="source:other"),
        of("content", "files", value={}),
        of("content", "model", "digest", value="0" * 64),
        of("content", "study", "canonical", value="{}"),
        of("content", "run", "made", value="2020-01-01T00:00:00Z"),
        of("content", "format", value="fedneuro-manifest-2"),
        of("content", "privacy", "delta", value=1e-9),
        of("seal", "key", value=PUBLIC),
        of("seal", "signature", value="0" * 128),
        of("seal", "voucher", value={"key": PUBLIC, "signature": "0" * 128}),
    ],
)
def test_every_part_is_signed(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Written again in the right form, so that only the signature can tell."""
    path = run / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(as_text(values))
    manifest, findings = verify_manifest(path)
    assert manifest is None and failed(findings)
    with pytest.raises(Refused, match="do not use it"):
        require(run, findings)


def test_another_key_signs_as_well_but_is_not_the_one_that_was_named(run: Path) -> None:
    content, seal = read_sealed(run / "manifest.json")
    forged = Signer(Ed25519PrivateKey.generate())
    write_sealed(run / "manifest.json", PURPOSE, STUDY.hash, content, forged)
    verified(run)
    assert failed(verify_manifest(run / "manifest.json", key=seal.key)[1]) == ["signature"]
    # A signature for another purpose or study is none here.
    for purpose, study_hash in (("release", STUDY.hash), (PURPOSE, "0" * 64)):
        write_sealed(run / "manifest.json", purpose, study_hash, content, forged)
        assert failed(verify_manifest(run / "manifest.json")[1]) == ["signature"]


def test_a_consortium_vouches_for_a_run(run: Path) -> None:
    vouch_for_run(run, STUDY.hash, COORDINATOR)
    (run / "study.sig").write_text(sign_study(STUDY, COORDINATOR).hex() + "\n")
    finish(run)
    assert verified(run, key=PUBLIC).study.signature
    assert "signed by" in verify_manifest(run / "manifest.json")[1][2].seen
    content, seal = read_sealed(run / "manifest.json")
    run_key = run_signer(run, STUDY.hash).key
    # The voucher of one run does not serve another key, nor another study.
    stolen = Signer(Ed25519PrivateKey.generate(), seal.voucher)
    write_sealed(run / "manifest.json", PURPOSE, STUDY.hash, content, stolen)
    assert failed(verify_manifest(run / "manifest.json")[1]) == ["signature"]
    other = Signer(run_key, vouch(COORDINATOR, public_text(run_key), "0" * 64))
    write_sealed(run / "manifest.json", PURPOSE, STUDY.hash, content, other)
    assert failed(verify_manifest(run / "manifest.json")[1]) == ["signature"]
    write_sealed(run / "manifest.json", PURPOSE, STUDY.hash, content, Signer(run_key))
    assert failed(verify_manifest(run / "manifest.json", key=PUBLIC)[1]) == ["signature"]
    assert run_signer(run, "0" * 64).voucher is None


def test_the_keys_of_a_run_are_its_owners(made: Path) -> None:
    assert (made / "keys").stat().st_mode & 0o077 == 0 == (made / "keys" / "run.key").stat().st_mode & 0o077


def test_public_keys_as_people_have_them(tmp_path: Path) -> None:
    key = COORDINATOR.public_key()
    forms = {
        "study.pub": PUBLIC.encode() + b"\n",
        "key.pem": key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "id_ed25519.pub": key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" someone@somewhere\n",
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert public_key(str(tmp_path / name)) == PUBLIC == public_key(PUBLIC)
    (tmp_path / "other").write_text("hello")
    for text in (str(tmp_path / "other"), str(tmp_path / "absent"), "abc"):
        with pytest.raises(BadInput):
            public_key(text)


def test_the_command(run: Path, tmp_path: Path) -> None:
    """One process each: exit codes and lines as a person meets them."""

    def verify(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "fedneuro-server"), "verify", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    moved = tmp_path / "alone"
    moved.mkdir()
    shutil.copyfile(run / "manifest.json", moved / "manifest.json")
    key = run_signer(run, STUDY.hash).key
    alone = verify(str(moved / "manifest.json"), "--model", str(run / "model.safetensors"), "--key", public_text(key))
    assert alone.returncode == 0, alone.stderr
    assert "-    report.html" in alone.stdout and "ok   model" in alone.stdout and "as expected" in alone.stdout
    (run / "results.json").write_text("{}")
    changed = verify(str(run), "--key", PUBLIC)
    assert changed.returncode == 3 and "FAIL signature" in changed.stdout and "Traceback" not in changed.stderr
    absent = verify(str(tmp_path / "absent.json"))
    assert absent.returncode == 2 and "absent.json" in absent.stderr
