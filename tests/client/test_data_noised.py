# SPDX-License-Identifier: Apache-2.0
"""Statistics for a private study: bounded contributions, the noise that was paid for, and one answer for each study."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import kstest
from typer.testing import CliRunner

from fedneuro.client.audit_chain import verify_log
from fedneuro.client.audit_views import egress_text
from fedneuro.client.cli_data import app
from fedneuro.client.data import noised as noised_release
from fedneuro.client.data.noised import counted, release_noised, with_noise
from fedneuro.client.data.statistics import Measured, measure, release
from fedneuro.client.data.telling import content_of, sealed
from fedneuro.privacy.accounting import epsilon
from fedneuro.privacy.errors import BadInput, BudgetExhausted, LedgerDistrusted, Refused
from fedneuro.privacy.identity import fingerprint, identity_of_pem
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.noise import SecureRandom
from fedneuro.privacy.noised_statistics import QUESTIONS, Noised, between, event_for, pooled, questions
from fedneuro.privacy.seals import as_text
from fedneuro.privacy.site_seals import check_site_seal, content_digest, read_site_sealed
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import load_study
from fedneuro.server.cli import app as server
from fedneuro.server.data_statistics import check_study, read_told
from tests.bids import image_path, mask_path, write_nifti, write_site
from tests.client.hospital import Hospital, private_study

NODE = f"""
[site]
name = "north"
role = "train"
public_size = 10
data = "bids"
state = "state"
[study]
policy = "policy.toml"
[budget]
dataset = "north"
[superlink]
address = "coordinator.example.org:8000"
root_certificate = "ca.crt"
key = "node.key"
[runner]
port = 9094
secret = "runner.secret"
bundle = "{"ab" * 32}"
"""


def patient_counts(root: Path, study: Study) -> list[np.ndarray[Any, Any]]:
    return counted(measure(root), study)


def test_counts_by_hand(tmp_path: Path) -> None:
    """Six patients, voxels of 1×1×2 mm; a lesion of 64 voxels is 0.128 mL; one patient has 400 times that."""
    root, affine = write_site(tmp_path / "north", patients=6, affine=(a := np.diag([1.0, 1.0, 2.0, 1.0]))), a
    write_nifti(mask_path(root, "sub-P002"), np.ones((80, 80, 4), np.uint8), affine=affine)
    found = dict(zip(questions(study := private_study()), patient_counts(root, study), strict=True))
    assert found["patients", "FLAIR"].tolist() == [6]
    assert found["finest_voxel_mm", "FLAIR"].tolist() == [0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]
    assert found["coarsest_voxel_mm", "FLAIR"].tolist() == [0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0]
    assert found["patients", "label-lesion_mask 1"].tolist() == [6]
    assert found["volume_ml", "label-lesion_mask 1"].tolist() == [0, 0, 5, 0, 0, 0, 0, 1, 0, 0, 0]
    assert found["grey_p50", "FLAIR"].sum() == 6


def test_no_patient_moves_the_counts_by_more_than_was_charged_for(tmp_path: Path) -> None:
    """The patient with two sessions and an odd image, too: √m at most, and √m where every question is answered."""
    study = private_study(data={"modalities": ["FLAIR", "T1w"]}, task={"labels": ["core", "edge"]})
    everyone, odd = ["sub-P001", "sub-P002", "sub-P003"], "sub-P002"
    moved = {}
    for name, ids in (("all", everyone), ("without", [p for p in everyone if p != odd])):
        root = write_site(
            tmp_path / name, patients=ids, labels=2, modalities=("FLAIR", "T1w"), sessions=("ses-1", "ses-2")
        )
        for session in ("ses-1", "ses-2"):
            path = root / odd / session / "anat" / f"{odd}_{session}_FLAIR.nii.gz"
            if path.exists():
                write_nifti(path, np.full((4, 4, 4), np.nan, np.float32), affine=np.diag([300.0, 1e-3, 2.0, 1.0]))
        moved[name] = patient_counts(root, study)
    m = len(questions(study))
    assert m == 12
    difference = np.concatenate([a - b for a, b in zip(moved["all"], moved["without"], strict=True)])
    assert np.linalg.norm(difference) <= math.sqrt(m) + 1e-12
    assert np.abs(difference).max() == 1 and difference.min() >= 0
    assert sum(np.abs(difference)) in (m - 1, m)  # the image of NaN alone may have no grey value


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (2 / 3, False), (1.5, False)])
def test_the_noise_has_the_size_that_it_was_charged_for(claimed: float, accepted: bool) -> None:
    """Four histograms: one patient moves them by √4 together."""
    empty = [np.zeros(1500, np.int64)] * 4
    noise = np.concatenate(with_noise(empty, 20.0, SecureRandom()))
    spread = noise + np.random.default_rng(0).uniform(-0.5, 0.5, len(noise))  # what rounding took
    assert bool(kstest(spread / (claimed * 20.0 * 2), "norm").pvalue > 1e-6) is accepted


def test_a_release_is_charged_once_and_written_down(tmp_path: Path) -> None:
    north, study = Hospital(tmp_path), private_study()
    found = measure(north.settings.data)
    with pytest.raises(Refused, match=r"reply.statistics: not permitted"):
        release_noised(found, north.settings, study, 1.0)
    north.edit("reply", statistics=True)
    with pytest.raises(Refused, match="not approved"):
        release_noised(found, north.settings, study, 1.0)
    assert [e["rule"] for e in north.logged(message="statistics", decision="refused")] == [
        "reply.statistics",
        "studies",
    ]
    north.approve(study)
    first = release_noised(found, north.settings, study, 1.0)
    assert not first.again and first.told.patients == 10 and first.told.epsilon == 1.0
    ledger = Ledger(north.settings.ledger, "north")
    events = ledger.events(study.hash, "north", "statistics")
    assert events == [event_for(study, 10, 1.0)] and events[0].noise_multiplier == first.told.noise_multiplier
    assert 0.99 < epsilon(events, first.told.delta) <= 1.0
    assert first.with_training > 2.0, "the study's own ε is 2"
    (out,) = north.logged(kind="out", answer="Statistics", study=study.hash)
    assert out["digest"] == content_digest(content_of(first.told)) and out["epsilon"] == 1.0 and out["policy"]
    (paid,) = north.logged(kind="ledger")
    assert paid["n"] < out["n"], "the charge stands in the log before what it paid for"
    again = release_noised(Measured(0, 0), north.settings, study, 1.0)
    assert again.again and again.told == first.told, "the same question has the same answer, for nothing"
    assert len(ledger.events(study.hash, "north", "statistics")) == 1
    kept = north.settings.state / "statistics" / f"{study.hash}.json"
    kept.write_text("{}")
    with pytest.raises(BadInput, match="is not as it was written; put it back"):
        release_noised(found, north.settings, study, 1.0)
    kept.unlink()
    with pytest.raises(BudgetExhausted):
        release_noised(found, north.settings, study, 1.0)
    assert north.logged(message="statistics", decision="refused")[-1]["reason"] == "budget-exhausted"
    with pytest.raises(BudgetExhausted):  # what was drawn for the charge that never came is not taken for paid
        release_noised(found, north.settings, study, 1.0)


def test_a_process_that_dies_between_the_charge_and_the_log_loses_no_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged, and nothing left: the next call hands over what was drawn. What was not paid for is drawn anew."""
    north, study = Hospital(tmp_path), private_study()
    north.approve(study)
    north.edit("reply", statistics=True)
    found = measure(north.settings.data)
    with monkeypatch.context() as patched:
        patched.setattr(noised_release, "_charge", _dies)
        with pytest.raises(KeyboardInterrupt):
            release_noised(found, north.settings, study, 1.0)
    drawn = north.settings.state / "statistics" / f"{study.hash}.drawn-1"
    unpaid = drawn.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(noised_release, "note_told", _dies)
        with pytest.raises(KeyboardInterrupt):
            release_noised(found, north.settings, study, 1.0)
    paid = drawn.read_bytes()
    assert paid != unpaid and not north.logged(kind="out")
    answer = release_noised(Measured(0, 0), north.settings, study, 1.0)
    assert not answer.again and as_text(content_of(answer.told)).encode() == paid and not drawn.exists()
    assert len(Ledger(north.settings.ledger, "north").events(study.hash, "north", "statistics")) == 1
    assert len(north.logged(kind="out", answer="Statistics")) == 1


def _dies(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_hospital_decides(tmp_path: Path) -> None:
    north, study = Hospital(tmp_path), private_study()
    north.approve(study)
    north.edit("reply", statistics=True)
    found = measure(north.settings.data)
    for threshold, wanted, words in ((11, 1.0, "threshold is 11"), (5, 0.0, "above 0"), (4, 1.0, "at least 5")):
        with pytest.raises((Refused, BadInput), match=words):
            release_noised(found, north.settings, study, wanted, threshold=threshold)
    north.edit("privacy", max_epsilon_round=10.0, max_epsilon_study=10.0, min_cohort=11)
    with pytest.raises(Refused, match=r"min_cohort"):
        release_noised(found, north.settings, study, 1.0)
    north.edit("privacy", min_cohort=5)
    with pytest.raises(Refused, match=r"max_epsilon_round: statistics of ε 20; at most 10"):
        release_noised(found, north.settings, study, 20.0)
    north.edit("privacy", max_epsilon_dataset=0.5)
    with pytest.raises(BudgetExhausted, match="beyond the hospital's budget"):
        release_noised(found, north.settings, study, 1.0)
    assert [path.name for path in (north.settings.state / "statistics").iterdir()] == ["lock"]
    north.edit("privacy", max_epsilon_dataset=10.0)
    release_noised(found, north.settings, study, 1.0)
    north.settings.ledger.unlink()
    north.settings.ledger.with_name("ledger.db.anchors").unlink()
    other = private_study(study={"name": "other"})
    north.approve(other)
    with pytest.raises(LedgerDistrusted):
        release_noised(found, north.settings, other, 1.0)


def noised(site: str, scale: int, sigma: float = 0.9) -> Noised:
    study = private_study()
    parts = []
    for question, of in questions(study):
        counts = [0] * (len(QUESTIONS[question]) + 1)
        counts[len(counts) // 2] = scale
        parts.append({"question": question, "of": of, "counts": counts})
    return Noised.model_validate({
        "site": site, "study": study.hash, "threshold": 5, "patients": scale, "epsilon": 10.0, "delta": 1e-3,
        "noise_multiplier": sigma, "histograms": parts,
    })  # fmt: skip


def test_hospitals_are_added_up_and_the_noise_with_them(tmp_path: Path) -> None:
    files = [noised("north", 300), noised("south", 200, 1.2)]
    volume = pooled(files)[-1]
    assert (volume["question"], sum(volume["counts"])) == ("volume_ml", 500)
    assert volume["noise"] == pytest.approx(math.sqrt(6 * (0.9**2 + 1.2**2)), abs=0.01)
    assert volume["percentiles"]["p50"] == (3.0, 10.0)
    assert set(volume["percentiles"]) == {"p5", "p25", "p50", "p75", "p95"}
    paths = [tmp_path / f"{file.site}.json" for file in files]
    for file, path in zip(files, paths, strict=True):
        path.write_text(file.model_dump_json())
    words = ["data-stats", *map(str, paths), "--unsigned", "--json", str(tmp_path / "all.json")]
    result = CliRunner().invoke(server, words)
    assert result.exit_code == 0, result.output
    assert result.output.count("NOT SIGNED") == 2
    assert "label-lesion_mask 1 volume_ml  500 ±" in result.output and "p50 3 to 10" in result.output
    assert "north: public size 300, cost ε = 10" in result.output
    assert json.loads((tmp_path / "all.json").read_text())["noised"]["patients"] == 500


def test_bounds_of_a_percentile_hold() -> None:
    """Over fresh noise, each side is wrong in 2.5 % at most; and noise as large as the cohort says nothing."""
    exact, edges, rng = np.array([3, 10, 20, 30, 25, 10, 2]), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), np.random.default_rng(0)
    wrong, told, trials = 0, 0, 1500
    for _ in range(trials):
        found = between([int(v) for v in np.rint(exact + 3 * rng.normal(size=7))], 3.0, edges, 0.5)
        low, high = found or (None, None)
        told += low is not None and high is not None
        wrong += (low is not None and low > 3.0) + (high is not None and high < 4.0)
    assert wrong / trials < 0.06 and told / trials > 0.9
    assert between([5, 5, 5], 50.0, (1.0, 2.0), 0.5) is None


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.3}, {"epsilon": 0.5}, {"patients": 3}, {"threshold": 300}, {"names": ["Doe"]},
        {"histograms": [{"question": "grey_p50", "of": "FLAIR", "counts": [1]}]}, {"neighbours": "add one"},
    ],
)  # fmt: skip
def test_a_file_that_tells_more_than_it_paid_for_is_none(change: dict[str, Any]) -> None:
    values = json.loads(noised("north", 50).model_dump_json())
    with pytest.raises(ValidationError):
        Noised.model_validate_json(json.dumps(values | change))


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    root = write_site(tmp_path / "north", patients=6)
    assert image_path(root).exists()
    study = tmp_path / "study.toml"
    study.write_text('[study]\nname = "toy"\n[training]\nlocal_steps = 1\n')
    result = CliRunner().invoke(app, ["stats", str(root), "--study", str(study), "--release", str(tmp_path / "o.json")])
    assert isinstance(result.exception, BadInput) and "--epsilon" in str(result.exception)
    result = CliRunner().invoke(app, ["stats", str(root), "--epsilon", "1"])
    assert isinstance(result.exception, BadInput) and "leave them out" in str(result.exception)
    result = CliRunner().invoke(app, ["stats", str(root), "--epsilon", "1", "--release", str(tmp_path / "o.json")])
    assert isinstance(result.exception, BadInput) and "leave it out" in str(result.exception)
    assert not (tmp_path / "o.json").exists()


def node_file(north: Hospital) -> Path:
    for name in ("ca.crt", "runner.secret"):
        (north.folder / name).write_text("x")
        (north.folder / name).chmod(0o600)
    config = north.folder / "node.toml"
    config.write_text(NODE)
    return config


def fingerprint_of(north: Hospital) -> str:
    return fingerprint(identity_of_pem(north.public_key.read_bytes()))


def test_the_whole_way_by_commands(tmp_path: Path) -> None:
    """From the hospital's folder to the coordinator's table; the policy, the ledger and the page of what left agree."""
    north = Hospital(tmp_path)
    study_file = tmp_path / "study.toml"
    study_file.write_text(
        '[study]\nname = "toy"\n[training]\nlocal_steps = 1\n[privacy]\ndelta = 1e-2\nepsilon = 2.0\n'
    )
    north.approve(load_study(study_file, []))
    config, told = node_file(north), tmp_path / "north.json"
    words = ["stats", str(tmp_path / "bids"), "--study", str(study_file), "--release", str(told)]
    words += ["--config", str(config)]
    denied = CliRunner().invoke(app, [*words, "--epsilon", "1"])
    assert isinstance(denied.exception, Refused) and "statistics = true" in str(denied.exception)
    north.edit("reply", statistics=True)
    other = CliRunner().invoke(app, [*words, "--epsilon", "1", "--site", "south"])
    assert isinstance(other.exception, BadInput) and "leave --site out" in str(other.exception)
    for again in (False, True):
        result = CliRunner().invoke(app, [*words, "--epsilon", "1"])
        assert result.exit_code == 0, result.output
        assert "cost: ε = 1 at δ = 0.01" in result.output and ("told before" in result.output) is again
        assert "signed by the node of north" in result.output
    page = egress_text(verify_log(north.settings.audit, None), "north")
    assert page.count("statistics of the data         noised, ε 1.000\n") == 1
    ask = ["data-stats", str(told), "--study", str(study_file)]
    stranger = CliRunner().invoke(server, ask)
    assert isinstance(stranger.exception, Refused) and "no node of north is known" in str(stranger.exception)
    result = CliRunner().invoke(server, [*ask, "--key", f"north={fingerprint_of(north)}"])
    assert result.exit_code == 0, result.output
    assert "north: public size 10, cost ε = 1 at δ = 0.01" in result.output
    digest = north.logged(answer="Statistics")[0]["digest"]
    assert f"north: signed by its node {fingerprint_of(north)[:16]}…; check sum {digest[:16]}…" in result.output
    wrong = CliRunner().invoke(server, [*ask, "--key", f"north={'0' * 64}"])
    assert isinstance(wrong.exception, Refused) and "is known by 0000" in str(wrong.exception)


def test_plain_statistics_pass_the_same_gate(tmp_path: Path) -> None:
    """Of a study without privacy, or of none: nothing is paid, all else is the same."""
    north = Hospital(tmp_path)
    config, told = node_file(north), tmp_path / "north.json"
    words = ["stats", str(tmp_path / "bids"), "--release", str(told), "--config", str(config)]
    denied = CliRunner().invoke(app, words)
    assert isinstance(denied.exception, Refused) and "reply.statistics" in str(denied.exception) and not told.exists()
    north.edit("reply", statistics=True)
    assert CliRunner().invoke(app, words).exit_code == 0
    key = fingerprint_of(north)
    assert read_told(told, {"north": key}).content.patients == 5, "six, rounded"
    page = egress_text(verify_log(north.settings.audit, None), "north")
    assert "statistics of the data         without noise" in page and "but the declared one and the rounded" in page
    few = CliRunner().invoke(app, [*words, "--threshold", "8"])
    assert isinstance(few.exception, Refused) and "6 patients, and the threshold is 8" in str(few.exception)
    assert len(north.logged(message="statistics", decision="refused")) == 2, "staff learn why, and the log that"
    north.edit("privacy", min_cohort=50)
    few = CliRunner().invoke(app, words)
    assert isinstance(few.exception, Refused) and "the threshold is 50" in str(few.exception)


@pytest.fixture(scope="module")
def signed_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """A file of north, and its node's fingerprint."""
    north = Hospital(tmp_path_factory.mktemp("north"))
    told = release(measure(north.settings.data), "north", None)
    return sealed(told, north.settings).encode(), fingerprint_of(north)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.replace(b'"patients": 5', b'"patients": 10', 1), "not what the node of north signed"),
        (lambda raw: raw.replace(b'"site": "north"', b'"site": "south"'), "not what the node of south signed"),
        (lambda raw: raw.replace(b'"study": ""', b'"study": "' + b"a" * 64 + b'"'), "not what the node"),
        (lambda raw: raw + b"\n", "not in the form"),
        (lambda raw: raw.replace(b'"key": "0', b'"key": "1'), "not in the form"),
        (lambda raw: json.dumps(json.loads(raw)["content"]).encode(), "is not signed"),
        (lambda raw: raw[: len(raw) // 2], "is no JSON"),
        (lambda _: b"[" * 100_000, "is no JSON"),
    ],
)
def test_one_change_and_the_file_is_none(
    tmp_path: Path, signed_file: tuple[bytes, str], change: Callable[[bytes], bytes], says: str
) -> None:
    raw, key = signed_file
    path = tmp_path / "north.json"
    known = {"north": key, "south": key}
    path.write_bytes(raw)
    assert read_told(path, known).key == key
    path.write_bytes(change(raw))
    assert path.read_bytes() != raw
    with pytest.raises((Refused, BadInput), match=says):
        read_told(path, known)


def test_a_seal_for_another_purpose_is_none(tmp_path: Path, signed_file: tuple[bytes, str]) -> None:
    (tmp_path / "north.json").write_bytes(signed_file[0])
    found = read_site_sealed(tmp_path / "north.json")
    assert found.seal is not None
    check_site_seal(found.seal, found.content, "statistics", site="north", study_hash="", expected=signed_file[1])
    with pytest.raises(Refused, match="does not hold"):
        check_site_seal(found.seal, found.content, "manifest", site="north", study_hash="", expected=signed_file[1])


def test_a_file_must_answer_the_study(tmp_path: Path, signed_file: tuple[bytes, str]) -> None:
    (tmp_path / "north.json").write_bytes(signed_file[0])
    plain = read_told(tmp_path / "north.json", {"north": signed_file[1]})
    with pytest.raises(Refused, match="is for no study"):
        check_study(plain, private_study())
    study = private_study()
    (tmp_path / "noised.json").write_text(noised("north", 50).model_dump_json())
    told = read_told(tmp_path / "noised.json", {}, unsigned=True)
    check_study(told, study)
    with pytest.raises(Refused, match="is for study"):
        check_study(told, private_study(study={"name": "other"}))
    fewer = told.content.model_copy(update={"histograms": told.content.histograms[1:]})  # type: ignore[union-attr]
    with pytest.raises(Refused, match="other questions"):
        check_study(replace(told, content=fewer), study)
