# SPDX-License-Identifier: Apache-2.0
"""An old copy of the privacy ledger: its own anchors were put back with it, the audit log still knows better."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedneuro.client import private_training
from fedneuro.client.audit_chain import load_public_key, verify_log
from fedneuro.client.budget import statement
from fedneuro.client.gatekeeper import audit_log
from fedneuro.client.ledger_witness import LedgerWitness, accept_ledger
from fedneuro.privacy.contract import HelloReply, TrainReply
from fedneuro.privacy.dpsgd import PatientGradient
from fedneuro.privacy.errors import LedgerDistrusted, Reason
from fedneuro.privacy.ledger import Ledger
from tests.client.hospital import Hospital, private_study

STUDY = private_study(training={"rounds": 40})


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    hospital = Hospital(tmp_path)
    hospital.approve(STUDY)
    yield hospital
    hospital.site.close()
    verify_log(hospital.settings.audit, load_public_key(hospital.public_key))


def ledger_files(hospital: Hospital) -> list[Path]:
    return sorted(hospital.settings.state.glob("ledger.db*"))


def trained(hospital: Hospital, number: int, **more: Any) -> TrainReply:
    reply = hospital.ask(STUDY, number=number, **more)
    assert isinstance(reply, TrainReply), reply
    return reply


def put_back(hospital: Hospital, copy: Path) -> None:
    """An administrator restores last night's ledger, with its anchors; they agree with each other."""
    for path in ledger_files(hospital):
        path.unlink()
    for path in copy.iterdir():
        shutil.copy2(path, hospital.settings.state)
    assert len(Ledger(hospital.settings.ledger, "north").entries()) == 3


@pytest.fixture
def rolled_back(hospital: Hospital, tmp_path: Path) -> Hospital:
    """Two rounds left, and the ledger is the one of after the first."""
    first = trained(hospital, 1)
    copy = tmp_path / "last-night"
    copy.mkdir()
    for path in ledger_files(hospital):
        shutil.copy2(path, copy)
    trained(hospital, 2, arrays=first.arrays)
    put_back(hospital, copy)
    return hospital


def test_an_old_copy_is_refused_though_its_anchors_agree(rolled_back: Hospital) -> None:
    """The coordinator shows no receipt here, as one would that helps the hospital to spend its budget twice."""
    for restart in (False, True):
        if restart:
            rolled_back.restart()
        assert rolled_back.refused(rolled_back.ask(STUDY, number=3)) is Reason.LEDGER_ROLLED_BACK
    assert len(Ledger(rolled_back.settings.ledger, "north").entries()) == 3, "nothing was charged"
    assert rolled_back.logged(kind="in", decision="refused", reason="ledger-rolled-back")
    assert isinstance(rolled_back.ask(STUDY, "hello"), HelloReply), "the node lives"
    with pytest.raises(LedgerDistrusted, match="it has 3 entries, but 5 were written, says the audit log"):
        statement(rolled_back.settings)  # fedneuro-node budget


def test_without_the_witness_the_old_copy_would_be_spent_again(
    rolled_back: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defence is this one and no other."""
    monkeypatch.setattr(LedgerWitness, "check", lambda _: None)
    monkeypatch.setattr(LedgerWitness, "note", lambda _: None)
    trained(rolled_back, 3)


def test_a_ledger_that_was_deleted_with_its_anchors_is_refused(hospital: Hospital) -> None:
    trained(hospital, 1)
    for path in ledger_files(hospital):
        path.unlink()
    assert hospital.refused(hospital.ask(STUDY, number=2)) is Reason.LEDGER_ROLLED_BACK
    assert ledger_files(hospital) == [], "no new ledger is begun by the way"


def test_the_hospital_may_accept_a_new_ledger_and_that_is_logged(rolled_back: Hospital) -> None:
    before, now = accept_ledger(rolled_back.settings, audit_log(rolled_back.settings))
    assert before is not None and (before[0], now[0]) == (5, 3)
    trained(rolled_back, 3)
    (accepted,) = rolled_back.logged(kind="ledger", accepted=True)
    assert accepted["entries"] == 3 and accepted["instead_of"] == f"{before[0]}:{before[1]}"


def test_the_charge_is_in_the_log_before_the_answer_that_it_paid_for(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a charge whose round ended in a refusal."""
    trained(hospital, 1)

    class Failing(PatientGradient):
        def accumulate(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("in the middle of a round")

    monkeypatch.setattr(private_training, "PatientGradient", Failing)
    assert hospital.refused(hospital.ask(STUDY, number=2)) is Reason.INTERNAL
    told = [(entry["kind"], entry.get("entries")) for entry in hospital.log if entry["kind"] in ("ledger", "out")]
    assert told == [("ledger", 3), ("out", None), ("ledger", 4), ("out", None)]
    head = Ledger(hospital.settings.ledger, "north").entries()[-1]
    assert hospital.logged(kind="ledger")[-1]["head"] == head.hash


def test_where_the_head_cannot_be_noted_nothing_leaves(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: LedgerWitness) -> None:
        raise OSError(28, "No space left on device", "audit.jsonl")

    monkeypatch.setattr(LedgerWitness, "note", full)
    assert hospital.refused(hospital.ask(STUDY)) is Reason.ENVIRONMENT
    assert not hospital.logged(kind="out", answer="TrainReply")
