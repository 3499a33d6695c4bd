# SPDX-License-Identifier: Apache-2.0
"""The audit log: whatever is done to it afterwards shows, with the public key alone; a crash leaves it provable."""

import csv
import io
import json
import multiprocessing as mp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from fedneuro.client.audit import AuditLog
from fedneuro.client.audit_chain import Entry, Head, Signer, line_of, load_public_key, seal, verify_log
from fedneuro.client.audit_views import egress, egress_html, egress_text, to_csv, to_json
from fedneuro.client.cli import app
from fedneuro.privacy.errors import BadInput, Reason, Refused


def make_key(folder: Path, name: str = "node", *, edwards: bool = False) -> Path:
    key = Ed25519PrivateKey.generate() if edwards else ec.generate_private_key(ec.SECP384R1())
    path = folder / f"{name}.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of ten entries with a checkpoint after every four, and the node's keys beside it."""
    log = AuditLog(tmp_path / "audit.jsonl", "north", make_key(tmp_path), every=4)
    for number in range(1, 9):
        log.append(
            "out", message="train", study="ab" * 32, round=number, answer="TrainReply", bytes=10, epsilon=number / 4
        )
    return tmp_path / "audit.jsonl"


def verify(path: Path, **more: Any) -> list[Entry]:
    return verify_log(path, load_public_key(path.with_name("node.pub")), **more)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rechained(entries: list[bytes]) -> bytes:
    """A forger who computes every hash anew but has no key."""
    previous, out = "0" * 64, b""
    for number, line in enumerate(entries, start=1):
        values = {k: v for k, v in json.loads(line).items() if k != "hash"} | {"n": number, "previous": previous}
        entry = seal(values)
        previous, out = entry["hash"], out + line_of(entry)
    return out


def forge(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(rechained(change(lines(path))))
    last = json.loads(lines(path)[-1])
    head = json.loads(path.with_suffix(".head").read_text())
    path.with_suffix(".head").write_text(json.dumps(head | {"n": last["n"], "hash": last["hash"]}))


def test_a_log_as_it_was_written_verifies(path: Path) -> None:
    entries = verify(path)
    assert [e["kind"] for e in entries] == ["begin", *["out"] * 4, "checkpoint", *["out"] * 4, "checkpoint"]
    assert [e["round"] for e in entries if e["kind"] == "out"] == list(range(1, 9))
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_log_goes_on_after_a_restart(path: Path) -> None:
    log = AuditLog(path, "north", path.with_name("node.key"), every=4)
    log.append("stop")
    log.checkpoint()
    assert [e["kind"] for e in verify(path)][-2:] == ["stop", "checkpoint"]
    with pytest.raises(Refused, match="is of hospital north, not south"):
        AuditLog(path, "south", path.with_name("node.key")).append("start")


@pytest.mark.parametrize("kind", ["ed25519", "none"])
def test_other_keys(tmp_path: Path, kind: str) -> None:
    key = make_key(tmp_path, edwards=True) if kind == "ed25519" else None
    AuditLog(tmp_path / "audit.jsonl", "north", key, every=2).append("x")
    assert len(verify_log(tmp_path / "audit.jsonl", None)) == 2
    if key:
        assert verify(tmp_path / "audit.jsonl")
        assert Signer(key).public_pem == (tmp_path / "node.pub").read_text()


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "edit": (lambda p: p.write_bytes(p.read_bytes().replace(b'"epsilon":1.0', b'"epsilon":0.1')), "line 5 was changed"),
    "white space": (lambda p: p.write_bytes(p.read_bytes().replace(b'"round":3', b'"round": 3')), "line 4 was changed"),
    "removal": (lambda p: p.write_bytes(b"".join(lines(p)[:3] + lines(p)[4:])), "line 4 is not the one"),
    "order": (lambda p: p.write_bytes(b"".join([*lines(p)[:2], *lines(p)[3:1:-1], *lines(p)[4:]])), "line 3 is not"),
    "insertion": (lambda p: p.write_bytes(b"".join([*lines(p)[:3], *lines(p)[2:]])), "line 4 is not the one"),
    "cut short": (lambda p: p.write_bytes(b"".join(lines(p)[:-1])), "cut short: it has 10 entries, its head says 11"),
    "cut at a checkpoint": (lambda p: p.write_bytes(b"".join(lines(p)[:6])), "cut short"),
    "cut in a line": (lambda p: p.write_bytes(p.read_bytes()[:-5]), "cut short"),
    "emptied": (lambda p: p.write_bytes(b""), "does not begin"),
    "not JSON": (lambda p: p.write_bytes(p.read_bytes() + b"\xff\xfe\n"), "line 12 was changed"),
    "forged and chained anew": (lambda p: forge(p, lambda e: [*e[:4], *e[5:]]), "signature at entry 5"),
    "forged after the last checkpoint": (
        lambda p: forge(p, lambda e: [*e[:6], e[6].replace(b'"round":5', b'"round":6')]), "signature at entry 7",
    ),
    "head gone": (lambda p: p.with_suffix(".head").unlink(), "head audit.head is gone"),
    "head changed": (lambda p: p.with_suffix(".head").write_text("{}"), "head audit.head was changed"),
    "head moved back": (
        lambda p: p.with_suffix(".head").write_text(json.dumps(json.loads(p.with_suffix(".head").read_text()) | {
            "n": 7, "hash": json.loads(lines(p)[6])["hash"]})), "signature at entry 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_shows(path: Path, name: str) -> None:
    tamper, words = TAMPERINGS[name]
    tamper(path)
    with pytest.raises(Refused, match=words) as error:
        verify(path)
    assert error.value.reason is Reason.AUDIT_DISTRUSTED and "\n" not in str(error.value)
    with pytest.raises(Refused):  # the node that meets it writes nothing more, so nothing leaves
        AuditLog(path, "north", path.with_name("node.key")).append("out")


def test_another_key_and_an_older_copy_show(path: Path) -> None:
    make_key(path.parent, "other")
    with pytest.raises(Refused, match="not of this node's key"):
        verify_log(path, load_public_key(path.with_name("other.pub")))
    old = path.read_bytes(), path.with_suffix(".head").read_bytes()
    AuditLog(path, "north", path.with_name("node.key")).append("out")
    noted = json.loads(lines(path)[-1])
    verify(path, expect=(noted["n"], noted["hash"][:16]))
    path.write_bytes(old[0])
    path.with_suffix(".head").write_bytes(old[1])
    verify(path)  # both put back: only what was noted elsewhere shows it
    with pytest.raises(Refused, match="another log was put in its place"):
        verify(path, expect=(noted["n"], noted["hash"][:16]))


def test_a_cut_while_the_node_runs_shows(path: Path) -> None:
    log = AuditLog(path, "north", path.with_name("node.key"))
    log.append("start")
    path.write_bytes(b"".join(lines(path)[:-2]))
    with pytest.raises(Refused, match="cut short while the node ran"):
        log.append("out")


# -- crashes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"{", b'{"kind":"out","n":12', b"\0\0\0"])
def test_a_line_that_a_power_cut_tore_is_named_and_its_removal_is_logged(path: Path, torn: bytes) -> None:
    with path.open("ab") as file:
        file.write(torn)
    with pytest.raises(Refused, match=rf"last line was cut short after {len(torn)} bytes"):
        verify(path)
    AuditLog(path, "north", path.with_name("node.key")).append("start")
    repair, start = verify(path)[-2:]
    assert (repair["kind"], repair["torn_bytes"], start["kind"]) == ("repair", len(torn), "start")
    assert path.with_name("audit.torn-12").read_bytes() == torn


def test_killed_between_line_and_head(path: Path) -> None:
    """The log may be ahead of its head, never behind: the line counts, nothing was let out for it."""
    before = path.with_suffix(".head").read_bytes()
    AuditLog(path, "north", path.with_name("node.key")).append("in")
    path.with_suffix(".head").write_bytes(before)
    AuditLog(path, "north", path.with_name("node.key")).append("start")
    assert [e["kind"] for e in verify(path)][-2:] == ["in", "start"]


def test_killed_in_the_very_first_entry(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    AuditLog(log, "north").append("start")
    log.write_bytes(lines(log)[0])
    log.with_suffix(".head").unlink()
    AuditLog(log, "north").append("start")
    assert [e["kind"] for e in verify_log(log, None)] == ["begin", "start"]


def test_a_full_disk_is_an_error_and_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path, "north", path.with_name("node.key"))
    log.append("in")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: real(d, data[:20], at))
    with pytest.raises(Exception, match="disk is full"):
        log.append("out")
    monkeypatch.undo()
    assert verify(path)[-1]["kind"] == "in"
    log.append("out")
    assert verify(path)[-1]["kind"] == "out"


def _append(path: Path, count: int) -> None:
    log = AuditLog(path, "north", path.with_name("node.key"), every=7)
    for _ in range(count):
        log.append("x")


def test_two_processes_write_one_log(path: Path) -> None:
    processes = [mp.get_context("fork").Process(target=_append, args=(path, 20)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(e["kind"] == "x" for e in verify(path)) == 40


def test_a_key_that_cannot_sign_is_named(tmp_path: Path) -> None:
    for content, words in ((None, "cannot be read"), (b"no key", "is not a private key")):
        if content:
            (tmp_path / "node.key").write_bytes(content)
        with pytest.raises(BadInput, match=words):
            AuditLog(tmp_path / "audit.jsonl", "north", tmp_path / "node.key").append("x")


# -- what people read -----------------------------------------------------------------------------------------


def test_export_holds_every_entry(path: Path) -> None:
    entries = verify(path)
    assert json.loads(to_json(entries)) == entries
    rows = list(csv.DictReader(io.StringIO(to_csv(entries))))
    assert [int(row["n"]) for row in rows] == list(range(1, 12))
    assert rows[1]["epsilon"] == "0.25" and rows[1]["hash"] == entries[1]["hash"]
    assert "'=HYPERLINK" in to_csv([*entries, {"n": 12, "at": "", "kind": "policy", "problem": "=HYPERLINK(1)"}])


def test_egress_is_one_page_of_what_left(path: Path) -> None:
    log = AuditLog(path, "north", path.with_name("node.key"))
    log.append("out", message="evaluate", study="ab" * 32, round=1, answer="EvaluateReply", bytes=0, metrics=["dice"])
    log.append("out", message="train", study="cd" * 32, round=1, answer="Refusal", reason="budget-exhausted")
    first, second = egress(verify(path))
    assert (first.updates, first.bytes, first.epsilon, first.rounds) == (8, 80, 2.0, set(range(1, 9)))
    assert dict(first.metrics) == {"dice": 1} and dict(second.refusals) == {"budget-exhausted": 1}
    text = egress_text(verify(path), "north")
    assert "8 (rounds 1 to 8), 80 bytes" in text and "ε 2.000" in text and len(text.splitlines()) < 60
    page = egress_html(verify(path), "<script>")
    assert "<script>" not in page and "budget-exhausted" in page and "http" not in page


def test_commands(path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["audit", *words])

    done = run("verify", str(path), "--public-key", str(path.with_name("node.pub")))
    assert done.exit_code == 0 and "11 entries of hospital north, 2 checkpoints" in done.output
    assert "--expect 11:" in done.output
    assert run("export", str(path)).output.startswith("n,at,kind,")
    out = path.with_name("page.html")
    assert run("egress", str(path), "--format", "html", "--out", str(out)).exit_code == 0
    assert out.read_text().startswith("<!doctype html>")
    path.write_bytes(path.read_bytes().replace(b"train", b"trein", 1))
    failed = run("verify", str(path), "--public-key", str(path.with_name("node.pub")))
    assert isinstance(failed.exception, Refused) and failed.exception.exit_code == 3
    assert isinstance(run("verify", str(path), "--public-key", str(path)).exception, BadInput)
    odd = run("verify", str(path), "--public-key", str(path.with_name("node.pub")), "--expect", "x")
    assert isinstance(odd.exception, BadInput)
    assert Head.read(path) is not None
