# SPDX-License-Identifier: Apache-2.0
"""A coordinator that wants more than was agreed. Each test is one attempt, through the code that a node runs.

After every attempt: only a reason code left, the ledger holds what it should, the audit log names the refusal and
verifies with the node's public key, and the node answers an honest request.
"""

import hashlib
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedneuro.client.app import answer, masked
from fedneuro.client.audit_chain import load_public_key, verify_log
from fedneuro.client.gatekeeper import Gatekeeper
from fedneuro.client.node_settings import load_node_settings
from fedneuro.client.runner import Runner
from fedneuro.client.site import Site
from fedneuro.models.state import digest
from fedneuro.privacy.accounting import epsilon
from fedneuro.privacy.contract import Estimate, EvaluateReply, HelloReply, Refusal, Request, Role, TrainReply
from fedneuro.privacy.errors import ContractViolation, Reason
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.signing import public_text, sign_study
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_reply, encode_request
from fedneuro.server.bundle import bundle, bundle_hash
from fedneuro.server.rounds import initial_arrays
from tests.client.hospital import Hospital, private_study

STUDY = private_study()
MODEL = initial_arrays(STUDY)["model"]


@pytest.fixture(autouse=True)
def task() -> Iterator[None]:
    """Flower makes no message outside a task."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, 7
    yield
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, None)


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    hospital = Hospital(tmp_path)
    hospital.approve(STUDY)
    yield hospital
    # Whatever was tried: the log is whole and signed, and the node lives.
    hospital.site.close()
    entries = verify_log(hospital.settings.audit, load_public_key(hospital.public_key))
    assert any(entry.get("decision") == "refused" or entry.get("answer") == "Refusal" for entry in entries)
    text = hospital.settings.audit.read_text()
    assert str(hospital.folder) not in text.replace("policy.toml", "") and "sub-P" not in text


def charges(hospital: Hospital) -> int:
    if not hospital.settings.ledger.exists():
        return 0
    entries = Ledger(hospital.settings.ledger, "north").entries()
    return sum(entry.kind == "reserve" for entry in entries)


def lives(hospital: Hospital) -> None:
    assert isinstance(hospital.ask(STUDY, "hello"), HelloReply)


# -- studies --------------------------------------------------------------------------------------------------


def test_unknown_study(hospital: Hospital) -> None:
    unknown = private_study(study={"name": "other"})
    for kind in ("hello", "train", "evaluate"):
        assert hospital.refused(hospital.ask(unknown, kind)) is Reason.STUDY_NOT_APPROVED
    assert charges(hospital) == 0
    assert len(hospital.logged(kind="in", decision="refused", rule="studies", study=unknown.hash)) == 3
    lives(hospital)


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {"epsilon": 2.5}},  # ε raised in mid-run
        {"privacy": {"clip": 100.0}},
        {"training": {"rounds": 3}},
        {"evaluation": {"min_patients": 2}},
    ],
)
def test_study_changed_after_approval(hospital: Hospital, change: dict[str, Any]) -> None:
    assert isinstance(hospital.ask(STUDY), TrainReply)
    assert hospital.refused(hospital.ask(private_study(**change), number=2)) is Reason.STUDY_NOT_APPROVED
    assert charges(hospital) == 1
    lives(hospital)


def test_a_study_that_lies_about_its_hash(hospital: Hospital) -> None:
    """The approved hash on a study with another ε."""
    content = encode_request(
        Request(kind="train", study=private_study(privacy={"epsilon": 9.0}), round=1, arrays=MODEL)
    )
    record = content["request"]
    assert isinstance(record, ConfigRecord)
    record["study-hash"] = STUDY.hash
    refused_message(hospital, content)
    assert charges(hospital) == 0


def test_approved_by_hash_but_beyond_the_policy(hospital: Hospital) -> None:
    """Somebody approved it in the file by hand; the limits hold all the same."""
    greedy = private_study(privacy={"epsilon": 50.0})
    hospital.approve(STUDY, greedy)
    assert hospital.refused(hospital.ask(greedy)) is Reason.POLICY_REFUSED
    assert hospital.logged(rule="privacy.max_epsilon_study", decision="refused")
    lives(hospital)


def test_signature_of_another_study_or_key(hospital: Hospital) -> None:
    """A rule approves what the coordinator signed, and nothing that it did not sign."""
    key, signed = Ed25519PrivateKey.generate(), private_study(study={"name": "signed"})
    rule = {"coordinator": public_text(key), "tasks": ["segmentation"], "datasets": ["north"], "modes": ["local"]}
    hospital.edit("studies", rules=[rule])
    good = sign_study(signed, key)
    assert isinstance(hospital.ask(signed, "hello", signature=good), HelloReply)
    other = private_study(study={"name": "signed"}, privacy={"epsilon": 7.0})
    bad = [(other, good), (signed, sign_study(signed, Ed25519PrivateKey.generate())), (signed, b""), (signed, b"x")]
    for study, signature in bad:
        assert hospital.refused(hospital.ask(study, "hello", signature=signature)) is Reason.STUDY_NOT_APPROVED
    hospital.edit("studies", rules=[rule | {"modes": ["distributed"]}])
    assert hospital.refused(hospital.ask(signed, "hello", signature=good)) is Reason.STUDY_NOT_APPROVED


def test_role_switched_from_heldout_to_train(tmp_path: Path) -> None:
    """Even a signature that a rule accepts gives no role that the hospital did not grant."""
    hospital = Hospital(tmp_path, role=Role.HELDOUT)
    key = Ed25519PrivateKey.generate()
    rule = {"coordinator": public_text(key), "tasks": ["segmentation"], "datasets": ["north"], "modes": ["local"]}
    hospital.edit("studies", rules=[rule])
    agreed = private_study(evaluation={"heldout": ["north"]})
    assert isinstance(hospital.ask(agreed, "evaluate", signature=sign_study(agreed, key)), EvaluateReply)
    for study in (STUDY, agreed):
        assert hospital.refused(hospital.ask(study, signature=sign_study(study, key))) is Reason.ROLE_REFUSED
    assert charges(hospital) == 0
    # The settings of the node say train, the policy does not.
    hospital.restart(role=Role.TRAIN)
    assert hospital.refused(hospital.ask(STUDY, signature=sign_study(STUDY, key))) is Reason.ROLE_REFUSED


# -- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["noise-multiplier", "privacy.epsilon", "sigma", "run-config", "site", "steps"])
def test_noise_lowered_through_the_message(hospital: Hospital, key: str) -> None:
    """No setting travels but the study; a message with one more key is refused, whatever it says."""
    content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
    record = content["request"]
    assert isinstance(record, ConfigRecord)
    record[key] = 0.01
    refused_message(hospital, content)
    assert charges(hospital) == 0


def test_noise_below_the_hospitals_least(hospital: Hospital) -> None:
    hospital.edit("privacy", min_noise_multiplier=50.0)
    assert hospital.refused(hospital.ask(STUDY)) is Reason.POLICY_REFUSED
    assert hospital.logged(rule="privacy.min_noise_multiplier")
    assert charges(hospital) == 0


# -- arrays and metrics in ------------------------------------------------------------------------------------


def forged(name: str) -> dict[str, Any]:
    arrays = {key: value.copy() for key, value in MODEL.items()}
    first = next(iter(arrays))
    if name == "extra":
        arrays["patients"] = np.zeros(3, np.float32)
    elif name == "renamed":
        arrays = {f"sub-P001:{key}" if key == first else key: value for key, value in arrays.items()}
    elif name == "shape":
        arrays[first] = arrays[first][..., :1]
    else:
        arrays[first].flat[0] = {"nan": np.nan, "huge": 1e30, "infinite": np.inf}[name]
    return arrays


@pytest.mark.parametrize("name", ["extra", "renamed", "shape", "nan", "huge", "infinite"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_model_that_is_not_the_agreed_one(hospital: Hospital, name: str, kind: str) -> None:
    reason = Reason.NON_FINITE if name in ("nan", "huge", "infinite") else Reason.CONTRACT_VIOLATION
    assert hospital.refused(hospital.ask(STUDY, kind, arrays=forged(name))) is reason
    assert charges(hospital) == 0
    assert isinstance(hospital.ask(STUDY), TrainReply), "the round is still open for the agreed model"


def test_two_gigabytes_are_claimed(hospital: Hospital) -> None:
    """Claimed sizes are compared with what came before anything is made of that size."""
    content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
    record = content["request"]
    assert isinstance(record, ConfigRecord)
    shapes = record["shapes"]
    assert isinstance(shapes, list)
    record["shapes"] = ["500000000", *map(str, shapes[1:])]
    tracemalloc.start()
    refused_message(hospital, content)
    record["shapes"] = [",".join(["999999999999"] * 8), *map(str, shapes[1:])]
    refused_message(hospital, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_network_that_would_fill_the_memory(hospital: Hospital) -> None:
    """An approved study whose network has 10⁹ weights is counted without being built."""
    giant = private_study(model={"channels": [1024] * 7, "dims": 3, "norm": "group"}, data={"patch": [64, 64, 64]})
    hospital.approve(STUDY, giant)
    assert hospital.refused(hospital.ask(giant, arrays=MODEL)) is Reason.POLICY_REFUSED
    assert hospital.logged(rule="model.max_parameters")
    lives(hospital)


# -- arrays and metrics out -----------------------------------------------------------------------------------


class Memorising(Site):
    """A site whose (compromised) code wants to let something else out."""

    reply: Any = None

    def _dispatch(self, request: Request) -> Any:
        del request
        return self.reply


HONEST = TrainReply(site="north", round=1, arrays=MODEL, steps=1, seconds=0.0, epsilon=1.0, noise_multiplier=2.0)
DICE = Estimate(mean=0.5, low=0.4, high=0.6, n=10)


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("train", replace(HONEST, arrays={f"{k}.sub-P001-is-43": v for k, v in MODEL.items()})),
        ("train", replace(HONEST, arrays={**MODEL, "image": np.zeros((18, 18), np.float32)})),
        ("train", replace(HONEST, arrays=dict(reversed(list(MODEL.items()))))),
        ("train", replace(HONEST, arrays=forged("nan"))),
        ("train", replace(HONEST, loss=0.125)),  # exact: not noised
        ("train", replace(HONEST, epsilon=8.5)),
        ("train", replace(HONEST, noise_multiplier=0.26)),
        ("evaluate", EvaluateReply(site="north", round=1, metrics={"age_of_sub-P001": DICE}, seconds=0.0)),
        ("evaluate", EvaluateReply(site="north", round=1, metrics={"auroc": DICE}, seconds=0.0)),
        ("evaluate", EvaluateReply(site="north", round=1, metrics={"dice": replace(DICE, n=1)}, seconds=0.0)),
    ],
)
def test_a_model_that_memorised_an_input(hospital: Hospital, kind: str, reply: Any) -> None:
    """Names of arrays and metrics are fixed by the installed code and the study: none carries anything out."""
    study = private_study(evaluation={"min_patients": 2})
    hospital.approve(STUDY, study)
    hospital.edit("privacy", min_noise_multiplier=0.3)
    site = Memorising(hospital.settings)
    site.reply = reply
    found = site.handle(Request(kind=kind, study=study, round=1, arrays=MODEL))  # type: ignore[arg-type]
    assert isinstance(found, Refusal) and set(encode_reply(found)) == {"reply"}
    assert not hospital.logged(kind="out", answer=type(reply).__name__)
    site.reply = HONEST
    assert isinstance(site.handle(Request(kind="train", study=study, round=1, arrays=MODEL)), TrainReply)
    site.close()


def test_metrics_that_the_hospital_does_not_permit(hospital: Hospital) -> None:
    hospital.edit("reply", metrics=["hd95"])
    assert hospital.refused(hospital.ask(STUDY, "evaluate")) is Reason.POLICY_REFUSED
    hospital.edit("reply", metrics=["dice", "hd95"], exact_metrics=False)
    assert hospital.refused(hospital.ask(STUDY, "evaluate")) is Reason.POLICY_REFUSED
    assert [e["rule"] for e in hospital.logged(decision="refused")] == ["reply.metrics", "reply.exact_metrics"]


# -- rounds ---------------------------------------------------------------------------------------------------


def test_round_replayed(hospital: Hospital) -> None:
    """The last round may be repeated for the same model, charged again, so often as the policy says; no other may."""
    study = private_study(training={"rounds": 40})
    hospital.approve(STUDY, study)
    hospital.edit("limits", max_retries=1)
    first = hospital.ask(study)
    assert isinstance(first, TrainReply) and isinstance(hospital.ask(study), TrainReply)
    assert charges(hospital) == 2, "a retry is charged again"
    assert hospital.refused(hospital.ask(study)) is Reason.ROUND_REPLAYED
    hospital.restart()
    assert hospital.refused(hospital.ask(study)) is Reason.ROUND_REPLAYED, "remembered on disk"
    assert charges(hospital) == 2
    assert isinstance(hospital.ask(study, number=2, arrays=first.arrays), TrainReply)
    assert hospital.refused(hospital.ask(study, number=2)) is Reason.ROUND_REPLAYED, "another model"
    assert charges(hospital) == 3


def test_round_rolled_back(hospital: Hospital) -> None:
    study = private_study(training={"rounds": 40})
    hospital.approve(STUDY, study)
    second = hospital.ask(study, number=2)
    assert isinstance(second, TrainReply)
    assert hospital.refused(hospital.ask(study, number=1)) is Reason.ROUND_REPLAYED
    assert hospital.refused(hospital.ask(study, number=1, arrays=second.arrays)) is Reason.ROUND_REPLAYED
    assert charges(hospital) == 1


def test_one_round_evaluated_with_many_models(hospital: Hospital) -> None:
    """Exact metrics of models of one's choice are an oracle about patients: one model per round is judged."""
    assert isinstance(hospital.ask(STUDY, "evaluate"), EvaluateReply)
    assert isinstance(hospital.ask(STUDY, "evaluate"), EvaluateReply), "the same model: a resumed coordinator"
    probe = {key: np.add(value, 1e-3, dtype=np.float32) for key, value in MODEL.items()}
    assert hospital.refused(hospital.ask(STUDY, "evaluate", arrays=probe)) is Reason.ROUND_REPLAYED
    assert isinstance(hospital.ask(STUDY, "evaluate", number=2, arrays=probe), EvaluateReply)


def test_a_round_that_ended_in_a_refusal_is_still_open(hospital: Hospital) -> None:
    """Nothing left, so nothing was answered: a data set that vanished for an hour costs no retry."""
    hospital.edit("limits", max_retries=0)
    data = hospital.settings.data
    data.rename(data.with_name("gone"))
    for _ in range(2):
        assert hospital.refused(hospital.ask(STUDY)) in (Reason.DATA_INVALID, Reason.ENVIRONMENT)
    data.with_name("gone").rename(data)
    assert isinstance(hospital.ask(STUDY), TrainReply)


def test_two_studies_drain_one_budget_at_once(hospital: Hospital) -> None:
    """Both ask for all that is left of the data set's budget; the ledger serves one after the other."""
    studies = [private_study(study={"name": name}, privacy={"epsilon": 1.5}, training={"rounds": 1}) for name in "ab"]
    hospital.approve(STUDY, *studies)
    hospital.edit("privacy", max_epsilon_dataset=2.0)
    sites = [Site(hospital.settings) for _ in studies]
    with ThreadPoolExecutor(2) as pool:
        requests = [Request(kind="train", study=study, round=1, arrays=MODEL) for study in studies]
        replies = list(pool.map(lambda pair: pair[0].handle(pair[1]), zip(sites, requests, strict=True)))
    kinds = sorted(type(reply).__name__ for reply in replies)
    assert kinds == ["Refusal", "TrainReply"]
    assert next(r for r in replies if isinstance(r, Refusal)).reason is Reason.BUDGET_EXHAUSTED
    events = [e.event() for e in Ledger(hospital.settings.ledger, "north").entries() if e.kind == "reserve"]
    assert epsilon(events, 1e-2) <= 2.0


# -- what comes over the wire ---------------------------------------------------------------------------------


def refused_message(hospital: Hospital, content: RecordDict, kind: str = "train") -> Reason:
    """The node's own code on a message; the reason code must be all that it says."""
    message = Message(content, 7, kind)
    message.metadata.__dict__["_message_id"] = "m"
    before = len(hospital.log) if hospital.settings.audit.exists() else 0
    try:
        reply = answer(message, hospital.site)
    except Exception as error:
        hospital.site.turn_away(kind, error)
        reply = masked(message, error)
    assert reply.has_error()
    reason = Reason(str(reply.error.reason))
    added = hospital.log[before:]
    assert any(e["kind"] == "in" and e.get("reason") == reason.value for e in added), "the refusal is logged"
    return reason


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_pickle_in_a_record(hospital: Hospital, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    payload = pickle.dumps(_Trap(str(trap)))
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Trap(str(trap))], dtype=object), allow_pickle=True)
    for data, stype in ((payload, "pickle"), (buffer.getvalue(), "numpy.ndarray"), (payload, "fedneuro.state")):
        content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
        content["arrays"] = ArrayRecord({"state": Array("uint8", (len(data),), stype, data)})
        assert refused_message(hospital, content) is Reason.CONTRACT_VIOLATION
    content = encode_request(Request(kind="hello", study=STUDY))
    content["pickle"] = ConfigRecord({"data": payload})
    assert refused_message(hospital, content, "query.hello") is Reason.CONTRACT_VIOLATION
    assert not trap.exists()
    lives(hospital)


def test_oversized_records(hospital: Hospital) -> None:
    """A study of a megabyte, ten thousand names, a nesting that exhausts a parser."""
    for key, value in (
        ("study", b" " * 1_000_000),
        ("study", b"[" * 200_000),
        ("names", ["x" * 600] * 3),
        ("names", [str(i) for i in range(20_000)]),
        ("digest", "0" * 64),
    ):
        content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
        record = content["request"]
        assert isinstance(record, ConfigRecord)
        record[key] = value
        assert refused_message(hospital, content) is Reason.CONTRACT_VIOLATION
    lives(hospital)


def test_a_study_that_is_too_long_is_not_read(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode_request(Request(kind="hello", study=STUDY))
    record = content["request"]
    assert isinstance(record, ConfigRecord)
    record["study"] = long = b"[" * 1_000_000
    record["study-hash"] = hashlib.sha256(long).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(Study, "from_canonical", lambda *_: pytest.fail("it was read"))
        assert refused_message(hospital, content, "query.hello") is Reason.CONTRACT_VIOLATION
    lives(hospital)


def test_lists_that_are_too_long(hospital: Hospital) -> None:
    """Twenty thousand arrays of nothing, in a message that is else right."""
    nothing = {str(number): np.zeros(0, np.float32) for number in range(20_000)}
    content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
    record = content["request"]
    assert isinstance(record, ConfigRecord)
    record["names"], record["dtypes"], record["shapes"] = list(nothing), ["float32"] * 20_000, ["0"] * 20_000
    record["digest"] = digest(nothing)
    content["arrays"] = ArrayRecord({"state": Array("uint8", (0,), "fedneuro.state", b"")})
    assert refused_message(hospital, content) is Reason.CONTRACT_VIOLATION
    lives(hospital)


def test_gzip_and_zip_bombs(hospital: Hospital) -> None:
    """Nothing is ever unpacked: compressed bytes are bytes of the wrong number."""
    zeros = bytes(20_000_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state", zeros)
    tracemalloc.start()
    for data in (zlib.compress(zeros), packed.getvalue()):
        content = encode_request(Request(kind="train", study=STUDY, round=1, arrays=MODEL))
        content["arrays"] = ArrayRecord({"state": Array("uint8", (len(zeros),), "fedneuro.state", data)})
        assert refused_message(hospital, content) is Reason.CONTRACT_VIOLATION
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    lives(hospital)


def test_a_frame_whose_arrays_are_each_other(hospital: Hospital) -> None:
    """A message of one record, where every second array goes back to where the one before it began."""
    size = 1_000_000
    layout = [[f"{i}{sign}", "uint8", [1], "x", sign * (size - 1)] for i in range(100) for sign in (1, -1)]
    head = json.dumps({"records": {"arrays": {"arrays": layout}}}).encode()
    frame = struct.pack("<IQ", len(head), size) + head + bytes(size)
    content = RecordDict({"frame": ConfigRecord({"frame": frame})})
    tracemalloc.start()
    assert refused_message(hospital, content) is Reason.CONTRACT_VIOLATION
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    lives(hospital)


def test_a_bundle_of_another_hash(hospital: Hospital) -> None:
    """The runner's own path: a bundle that is a zip bomb with its own ``fedneuro`` is neither unpacked nor heard."""
    folder = hospital.folder
    for name in ("ca.crt", "runner.secret"):
        (folder / name).write_text("x")
        (folder / name).chmod(0o600)
    (folder / "node.toml").write_text(
        '[site]\nname = "north"\nrole = "train"\npublic_size = 10\ndata = "bids"\nstate = "state"\n'
        '[study]\npolicy = "policy.toml"\n[superlink]\naddress = "127.0.0.1:1"\nroot_certificate = "ca.crt"\n'
        f'key = "node.key"\n[runner]\nport = 9\nsecret = "runner.secret"\nbundle = "{bundle_hash(bundle())}"\n'
    )
    runner = Runner(load_node_settings(folder / "node.toml"), hospital.site)
    message = Message(encode_request(Request(kind="hello", study=STUDY)), 7, "query.hello")
    message.metadata.__dict__["_message_id"] = "m"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fedneuro/client/app.py", bytes(1_000_000))
    reply = runner._reply(message, bundle_hash(packed.getvalue()))
    assert reply.has_error() and reply.error.reason == Reason.POLICY_REFUSED.value
    assert hospital.logged(kind="in", decision="refused", message="hello", reason="policy-refused")
    assert not runner._reply(message, bundle_hash(bundle())).has_error()
    runner.close()


def test_a_flood_of_a_thousand_tasks(hospital: Hospital) -> None:
    """The first hundred of the hour are let in, each of the others is refused and logged, at little cost."""
    hospital.edit("limits", max_requests_per_hour=100)
    unknown = private_study(study={"name": "flood"})
    request = Request(kind="hello", study=unknown)
    reasons = [hospital.refused(hospital.site.handle(request)) for _ in range(1000)]
    assert reasons.count(Reason.STUDY_NOT_APPROVED) == 100
    assert reasons.count(Reason.TOO_MANY_REQUESTS) == 900
    assert len(hospital.logged(kind="in", rule="limits.max_requests_per_hour")) == 900
    assert not (hospital.settings.state / unknown.hash[:16]).exists(), "a flood leaves nothing else on the disk"
    hospital.edit("limits", max_requests_per_hour=2000)
    lives(hospital)


def test_a_flood_that_builds_on_models_that_are_not_here(hospital: Hospital) -> None:
    """Such a message is put together before any gate; it is logged and counted all the same, whoever sends it."""
    hospital.edit("limits", max_requests_per_hour=20)
    unknown = private_study(study={"name": "flood"})
    request = Request(kind="train", study=unknown, round=1, held="0" * 64)
    reasons = {hospital.refused(hospital.site.handle(request)) for _ in range(30)}
    assert reasons == {Reason.MODEL_NOT_HELD} and charges(hospital) == 0
    about = {"study": unknown.hash, "round": 1, "reason": "model-not-held"}
    assert len(hospital.logged(kind="in", decision="refused", **about)) == 30
    assert len(hospital.logged(kind="out", answer="Refusal", **about)) == 30
    assert hospital.refused(hospital.ask(STUDY)) is Reason.TOO_MANY_REQUESTS
    hospital.edit("limits", max_requests_per_hour=2000)
    lives(hospital)


def test_nothing_leaves_where_the_log_cannot_be_written(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the site trains: the update stays, and so does the charge."""
    keeper: Gatekeeper = hospital.site._keeper
    write = keeper._append

    def full(kind: str, **fields: Any) -> None:
        if kind == "out":
            raise OSError(28, "No space left on device", "audit.jsonl")
        write(kind, **fields)

    monkeypatch.setattr(keeper, "_append", full)
    assert hospital.refused(hospital.ask(STUDY)) is Reason.ENVIRONMENT
    assert charges(hospital) == 1
    monkeypatch.undo()
    hospital.ask(private_study(study={"name": "unknown"}))  # for the fixture: a refusal that is logged
    lives(hospital)


def test_approval_taken_back_during_a_round_holds_the_answer_back(hospital: Hospital) -> None:
    class Slow(Site):
        def _dispatch(self, request: Request) -> Any:
            reply = super()._dispatch(request)
            hospital.approve()
            return reply

    hospital.site = Slow(hospital.settings)
    assert hospital.refused(hospital.ask(STUDY)) is Reason.STUDY_NOT_APPROVED
    assert not hospital.logged(answer="TrainReply")


def test_the_log_says_what_left(hospital: Hospital) -> None:
    """Message, study, round, digest, ε, bytes, code and policy of an answer are in the log before it is handed over."""
    reply = hospital.ask(STUDY)
    assert isinstance(reply, TrainReply)
    (entry,) = hospital.logged(kind="out", answer="TrainReply")
    assert entry["arrays"] == digest(reply.arrays) and entry["bytes"] == sum(a.nbytes for a in reply.arrays.values())
    assert entry["study"] == STUDY.hash and entry["round"] == 1 and entry["epsilon"] == reply.epsilon
    assert entry["code"].partition(":")[2] and len(entry["policy"]) == 64
    (asked,) = hospital.logged(kind="in", message="train")
    assert asked["arrays"] == digest(MODEL) and asked["decision"] == "allowed" and asked["rule"] == "studies.approved"
    assert asked["n"] < entry["n"]
    hospital.ask(private_study(study={"name": "unknown"}))


def test_a_violation_in_the_codec_is_a_reason_code() -> None:
    """The words of an error that leaves are fixed; values and paths are not among them."""
    message = Message(RecordDict(), 7, "train")
    message.metadata.__dict__["_message_id"] = "m"
    error = masked(message, ContractViolation("/data/sub-P001 holds 43")).error
    assert error.reason == Reason.CONTRACT_VIOLATION.value
    assert json.dumps(error.reason) == '"contract-violation"'
    assert Study.parse(json.loads(STUDY.canonical)).hash == STUDY.hash
