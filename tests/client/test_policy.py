# SPDX-License-Identifier: Apache-2.0
"""``policy.toml``: an empty one denies everything, each key grants one thing, a change counts at the next message."""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from fedneuro.client.cli import app
from fedneuro.client.gatekeeper import Gatekeeper, under_policy
from fedneuro.client.policy import Denied, Policy, load_policy
from fedneuro.client.policy_edit import approve, revoke, write_policy
from fedneuro.client.policy_rules import Case, judge
from fedneuro.client.round_guard import Answered, RoundGuard
from fedneuro.client.study_summary import summary
from fedneuro.privacy.contract import HelloReply, Refusal, Request, Role, TrainReply
from fedneuro.privacy.errors import BadInput, Reason, Refused
from fedneuro.privacy.signing import load_signing_key, public_text, sign_study, verify_study
from fedneuro.privacy.study_words import describe
from fedneuro.server.events import Event
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.engines.inprocess import InProcessTransport
from tests.bids import make_study
from tests.client.hospital import Hospital, private_study

STUDY = private_study()


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    hospital = Hospital(tmp_path)
    hospital.approve(STUDY)
    return hospital


# -- the file -------------------------------------------------------------------------------------------------


def test_an_empty_policy_denies_every_study(hospital: Hospital) -> None:
    verdicts = judge(Policy(), Case(study=STUDY, site=hospital.settings))
    # 10 patients; any noise; the study asks for no groups
    granted_by_default = {"privacy.min_cohort", "privacy.min_noise_multiplier", "reply.strata"}
    assert {v.rule for v in verdicts if v.passed} == granted_by_default
    hospital.policy.write_text("")
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.OUTSIDE_HOURS
    assert Policy().limits.max_requests_per_hour == Policy().limits.max_hours == 0


@pytest.mark.parametrize("section", ["studies", "grant", "privacy", "model", "reply", "limits", "windows"])
def test_every_section_that_is_left_out_denies(hospital: Hospital, section: str) -> None:
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)
    text = re.sub(rf"(?ms)^\[+{section}\]+.*?(?=^\[|\Z)", "", hospital.policy.read_text())
    hospital.policy.write_text(text)
    assert isinstance(hospital.ask(STUDY, "hello"), Refusal)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_rounds = 200", "max_round = 200", ["limits.max_round", "did you mean max_rounds?"]),
        ("[privacy]", "[privcy]", ["privcy is not a known key", "did you mean privacy?"]),
        ('from = "00:00"', 'frm = "00:00"', ["windows.0.frm", "did you mean from?"]),
        ('from = "00:00"', 'from = "25:00"', ["windows.0.from = '25:00'"]),
        ("max_delta = 0.01", "max_delta = 1.5", ["privacy.max_delta = 1.5", "less than 1"]),
        ("max_delta = 0.01", "max_delta = nan", ["privacy.max_delta = nan"]),
        ("max_epsilon_round = 8.0", 'max_epsilon_round = "8"', ["privacy.max_epsilon_round = '8'"]),
        ("approved = []", 'approved = ["all"]', ["studies.approved.0 = 'all'"]),
        ("exact_metrics = true", "exact_metrics = 1", ["reply.exact_metrics = 1"]),
        ('roles = ["train"]', 'roles = ["king"]', ["grant.roles.0 = 'king'"]),
        ("[model]", "[model", ["is not TOML"]),
    ],
)
def test_a_wrong_file_is_one_line_and_permits_nothing(hospital: Hospital, old: str, new: str, words: list[str]) -> None:
    hospital.edit("studies", approved=[])
    text = hospital.policy.read_text()
    assert old in text
    hospital.policy.write_text(text.replace(old, new))
    with pytest.raises(BadInput) as error:
        load_policy(hospital.policy)
    line = str(error.value)
    assert line.startswith(f"{hospital.policy}: ") and "\n" not in line
    for word in words:
        assert word in line
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.POLICY_INVALID


def test_a_policy_that_is_gone_or_open_to_others_permits_nothing(hospital: Hospital) -> None:
    hospital.policy.chmod(0o666)
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.POLICY_INVALID
    hospital.policy.chmod(0o644)
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)
    hospital.policy.unlink()
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.POLICY_INVALID
    assert "cannot be read" in hospital.logged(kind="policy")[-1]["problem"]


def test_a_change_takes_effect_at_the_next_message_and_is_logged(hospital: Hospital) -> None:
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)
    hospital.edit("privacy", modes=["distributed"])
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.POLICY_REFUSED
    hospital.edit("privacy", modes=["local"])
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)
    digests = [e["digest"] for e in hospital.logged(kind="policy")]
    assert len(set(digests)) == 3 and [e["policy"] for e in hospital.logged(kind="in")] == digests


def test_a_first_policy_is_not_overwritten_and_values_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(BadInput):
        write_policy(path, role=Role.TRAIN, dataset="d", max_delta=2.0)
    assert not path.exists()
    write_policy(path, role=Role.HELDOUT, dataset="glioma 1".replace(" ", "-"))
    assert load_policy(path).grant.roles == (Role.HELDOUT,) and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="there is a policy already"):
        write_policy(path, role=Role.TRAIN, dataset="d")


def test_approvals_keep_every_comment(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    write_policy(path, role=Role.TRAIN, dataset="d")
    comments = path.read_text().count("#")
    assert approve(path, "ab" * 32) and approve(path, "cd" * 32) and not approve(path, "ab" * 32)
    assert load_policy(path).studies.approved == ("ab" * 32, "cd" * 32)
    assert revoke(path, "ab" * 32) and not revoke(path, "ab" * 32)
    assert load_policy(path).studies.approved == ("cd" * 32,)
    assert path.read_text().count("#") == comments and path.stat().st_mode & 0o777 == 0o600


# -- rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "keys", "rule"),
    [
        ("studies", {"approved": []}, "studies"),
        ("grant", {"roles": ["heldout"]}, "grant.roles"),
        ("grant", {"datasets": ["south"]}, "grant.datasets"),
        ("privacy", {"modes": ["none"]}, "privacy.modes"),
        ("privacy", {"max_epsilon_round": 0.1}, "privacy.max_epsilon_round"),
        ("privacy", {"max_epsilon_study": 1.99}, "privacy.max_epsilon_study"),
        ("privacy", {"max_epsilon_dataset": 0.0}, "privacy.max_epsilon_dataset"),
        ("privacy", {"max_delta": 1e-3}, "privacy.max_delta"),
        ("privacy", {"min_noise_multiplier": 1.2}, "privacy.min_noise_multiplier"),
        ("privacy", {"min_cohort": 11}, "privacy.min_cohort"),
        ("model", {"names": ["resnet"]}, "model.names"),
        ("model", {"max_parameters": 100}, "model.max_parameters"),
        ("model", {"max_bytes": 100}, "model.max_bytes"),
        ("reply", {"arrays": ["model.0.*"]}, "reply.arrays"),
        ("reply", {"metrics": ["dice"]}, "reply.metrics"),
        ("reply", {"exact_metrics": False}, "reply.exact_metrics"),
        ("limits", {"max_rounds": 1}, "limits.max_rounds"),
    ],
)
def test_each_rule_refuses_alone(hospital: Hospital, section: str, keys: dict[str, Any], rule: str) -> None:
    case = Case(study=STUDY, site=hospital.settings)
    assert all(v.passed for v in judge(load_policy(hospital.policy), case))
    hospital.edit(section, **keys)
    assert [v.rule for v in judge(load_policy(hospital.policy), case) if not v.passed] == [rule]


def test_a_study_without_privacy_needs_its_mode_and_keeps_its_loss(hospital: Hospital) -> None:
    study = make_study(evaluation={"bootstrap": 100, "previews": 0})
    hospital.approve(study)
    assert hospital.refused(hospital.ask(study)) is Reason.POLICY_REFUSED
    hospital.edit("privacy", modes=["none"])
    reply = hospital.ask(study)
    assert isinstance(reply, TrainReply) and reply.loss is None
    hospital.edit("reply", training_loss=True)
    reply = hospital.ask(study)
    assert isinstance(reply, TrainReply) and reply.loss is not None


def test_the_policy_narrows_the_budget_and_the_gpu(hospital: Hospital) -> None:
    hospital.edit("privacy", max_epsilon_dataset=3.0)
    hospital.edit("limits", gpu_memory_fraction=0.25)
    found = under_policy(hospital.settings, load_policy(hospital.policy))
    assert found.lifetime is not None and found.lifetime.epsilon == 3.0 and found.gpu_memory_fraction == 0.25
    assert under_policy(found, Policy()).lifetime == found.lifetime


@pytest.mark.parametrize(
    ("days", "start", "end", "moment", "is_open"),
    [
        (["mon"], "08:00", "18:00", "2026-11-23T08:00", True),
        (["mon"], "08:00", "18:00", "2026-11-23T18:00", False),
        (["mon"], "08:00", "24:00", "2026-11-23T23:59", True),
        (["tue"], "00:00", "24:00", "2026-11-23T12:00", False),
        (["fri"], "20:00", "06:00", "2026-11-28T05:59", True),  # Saturday morning of Friday's night
        (["fri"], "20:00", "06:00", "2026-11-27T05:59", False),
    ],
)
def test_time_windows(hospital: Hospital, days: list[str], start: str, end: str, moment: str, is_open: bool) -> None:
    document = hospital.policy.read_text().partition("[[windows]]")[0]
    document += f'[[windows]]\ndays = {json.dumps(days)}\nfrom = "{start}"\nto = "{end}"\n'
    hospital.policy.write_text(document)
    keeper = Gatekeeper(hospital.settings, now=lambda: datetime.fromisoformat(moment))
    request = Request(kind="hello", study=STUDY)
    if is_open:
        assert keeper.enter(request).name == "north"
    else:
        with pytest.raises(Denied) as error:
            keeper.enter(request)
        assert error.value.reason is Reason.OUTSIDE_HOURS


def test_hours_of_computing_run_out(hospital: Hospital) -> None:
    assert isinstance(hospital.ask(STUDY), TrainReply)
    spent = RoundGuard(hospital.settings.state).read(STUDY.hash).seconds
    assert spent > 0
    hospital.edit("limits", max_hours=spent / 3600)
    assert hospital.refused(hospital.ask(STUDY, number=2)) is Reason.POLICY_REFUSED
    assert hospital.logged(rule="limits.max_hours")


def test_a_coordinator_that_crashed_is_resumed(hospital: Hospital) -> None:
    """It dies between a site's answer and its own save, twice; the policy lets the last round be repeated."""
    study = make_study(evaluation={"bootstrap": 100, "previews": 0})
    hospital.approve(study)
    hospital.edit("privacy", modes=["none"])
    out = hospital.folder / "run"
    store = RunStore.create(out, study, engine="inprocess")

    def crash(event: Event) -> None:
        if event.kind == "trained" and event.round == 2:
            raise KeyboardInterrupt

    for observer in (crash, crash, lambda _: None):
        with InProcessTransport({"north": hospital.settings}) as transport:
            if observer is crash:
                with pytest.raises(KeyboardInterrupt):
                    run_study(study, transport, store, observer)
            else:
                run_study(study, transport, store, observer)
        store.close()
        store = RunStore.resume(out, study, engine="inprocess")
    assert store.status == "complete"
    store.close()
    answers = [e["round"] for e in hospital.logged(kind="out", answer="TrainReply")]
    assert answers == [1, 2, 2, 2]


def test_a_damaged_record_of_rounds_permits_nothing(hospital: Hospital) -> None:
    assert isinstance(hospital.ask(STUDY), TrainReply)
    path = hospital.settings.state / STUDY.hash[:16] / "answered.json"
    path.write_text("{")
    hospital.restart()
    assert isinstance(hospital.ask(STUDY, number=2), Refusal)
    assert RoundGuard(hospital.settings.state).forget(STUDY.hash).round == -1
    assert RoundGuard(hospital.settings.state).read(STUDY.hash) == Answered()


# -- signatures -----------------------------------------------------------------------------------------------


def test_a_signature_holds_for_one_study_and_one_key(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.key"
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(BadInput, match="chmod 600"):
        path.chmod(0o644)
        load_signing_key(path)
    path.chmod(0o600)
    assert public_text(load_signing_key(path)) == public_text(key)
    verify_study(STUDY, sign_study(STUDY, key), public_text(key))
    for study, signature in (
        (make_study(), sign_study(STUDY, key)),
        (STUDY, bytes(64)),
        (STUDY, key.sign(STUDY.hash.encode())),
    ):
        with pytest.raises(Refused, match="is not signed"):
            verify_study(study, signature, public_text(key))


# -- commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def node(hospital: Hospital) -> Iterator[Any]:
    """Runs ``fedneuro-node`` on the hospital's own files; the study approved by nobody yet."""
    hospital.edit("studies", approved=[])
    folder = hospital.folder
    (folder / "study.toml").write_text(describe(STUDY))
    for name in ("ca.crt", "runner.secret"):
        (folder / name).write_text("x")
        (folder / name).chmod(0o600)
    parts: dict[str, dict[str, Any]] = {
        "site": {"name": "north", "role": "train", "public_size": 10, "data": "bids", "state": "state"},
        "study": {"policy": "policy.toml"},
        "superlink": {"address": "127.0.0.1:1", "root_certificate": "ca.crt", "key": "node.key"},
        "runner": {"port": 9094, "secret": "runner.secret", "bundle": "0" * 64},
    }
    text = "".join(
        f"[{p}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in part.items()) for p, part in parts.items()
    )
    (folder / "node.toml").write_text(text)

    def run(*words: str, answer: str = "") -> Any:
        command = [str(folder / "study.toml") if word == "STUDY" else word for word in words]
        return CliRunner().invoke(app, [*command, "--config", str(folder / "node.toml")], input=answer)

    return run  # type: ignore[return-value]


def test_approve_shows_asks_writes_and_logs(hospital: Hospital, node: Any) -> None:
    said_no = node("approve", "STUDY", answer="n\n")
    assert said_no.exit_code == 3 and STUDY.hash not in hospital.policy.read_text()
    done = node("approve", "STUDY", answer="y\n")
    assert done.exit_code == 0, done.output
    for words in ("ε 2 over 2 rounds at δ 0.01", "2 times: the trained model", "dice, hd95", STUDY.hash, "Stays"):
        assert words in done.output
    assert load_policy(hospital.policy).studies.approved == (STUDY.hash,)
    assert hospital.logged(kind="approve", study=STUDY.hash)
    assert "approved before" in node("approve", "STUDY", "--yes").output
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)
    assert node("revoke-approval", STUDY.hash).exit_code == 0
    assert hospital.refused(hospital.ask(STUDY, "hello")) is Reason.STUDY_NOT_APPROVED
    assert hospital.logged(kind="revoke-approval")
    assert isinstance(node("revoke-approval", STUDY.hash).exception, BadInput)


def test_approve_refuses_what_the_policy_forbids(hospital: Hospital, node: Any) -> None:
    hospital.edit("privacy", max_epsilon_study=1.0)
    failed = node("approve", "STUDY", "--yes")
    assert isinstance(failed.exception, Refused) and "privacy.max_epsilon_study" in str(failed.exception)
    assert load_policy(hospital.policy).studies.approved == ()


def test_explain_says_which_rule_decides(hospital: Hospital, node: Any) -> None:
    refused = node("policy", "explain", "STUDY")
    assert isinstance(refused.exception, Refused) and refused.exception.exit_code == 3
    assert "FAIL  studies" in refused.output and "pass  privacy.max_delta" in refused.output
    canonical = hospital.folder / "study.json"
    canonical.write_bytes(STUDY.canonical)
    hospital.approve(STUDY)
    permitted = node("policy", "explain", str(canonical))
    assert permitted.exit_code == 0 and "is approved by its hash" in permitted.output.splitlines()[-1]
    canonical.write_bytes(STUDY.canonical + b" ")
    assert isinstance(node("policy", "explain", str(canonical)).exception, BadInput)


def test_forget_rounds_lets_a_study_begin_anew(hospital: Hospital, node: Any) -> None:
    hospital.approve(STUDY)
    assert isinstance(hospital.ask(STUDY, number=2), TrainReply)
    assert hospital.refused(hospital.ask(STUDY)) is Reason.ROUND_REPLAYED
    assert node("policy", "forget-rounds", "STUDY").exit_code == 0
    assert isinstance(hospital.ask(STUDY), TrainReply)
    assert hospital.logged(kind="forget-rounds", round=2)


@pytest.mark.parametrize("mode", ["none", "local"])
def test_the_summary_is_plain(hospital: Hospital, mode: str) -> None:
    study = STUDY if mode == "local" else make_study()
    text = "\n".join(summary(study, hospital.settings))
    assert ("NO PROMISE" in text) is (mode == "none") and all(len(line) < 200 for line in text.splitlines())
    heldout = private_study(evaluation={"heldout": ["north"]})
    words = "\n".join(summary(heldout, hospital.settings))
    assert "only judges" in words and "it will refuse" in words and "trained model" not in words
    assert initial_arrays(study)["model"]
