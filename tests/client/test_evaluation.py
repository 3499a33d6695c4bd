# SPDX-License-Identifier: Apache-2.0
"""What a site computes of a model: metrics, groups, failures, a threshold from elsewhere; and what of it may leave."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydantic import ValidationError

from fedneuro.client import gate
from fedneuro.client.evaluation_cohort import cohort_estimates
from fedneuro.client.evaluation_patients import PatientResult
from fedneuro.client.evaluation_strata import patient_cells
from fedneuro.client.metric_release import cells_that_leave
from fedneuro.client.policy import load_policy
from fedneuro.client.policy_rules import Case, judge
from fedneuro.client.session import Session
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.client.study_summary import summary
from fedneuro.privacy.contract import Estimate, EvaluateReply, Refusal, Request, Role
from fedneuro.privacy.errors import ContractViolation, Reason
from fedneuro.privacy.released import released_names
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_request, encode_request
from fedneuro.server.rounds import initial_arrays
from fedneuro.server.selection import final_threshold
from fedneuro.server.site_results import site_results
from fedneuro.server.store import RoundRecord, SiteRecord
from tests.bids import image_path, make_study, write_nifti, write_site
from tests.client.hospital import Hospital, private_study

_NIB: Any = nibabel


def heldout_study(**sections: Any) -> Study:
    evaluation = {"heldout": ["north"], "bootstrap": 100, "previews": 0, "worst": 0, **sections.pop("evaluation", {})}
    return make_study(evaluation=evaluation, **sections)


def settings_of(tmp_path: Path, **changes: Any) -> SiteSettings:
    base = SiteSettings(
        name="north", data=tmp_path / "north", state=tmp_path / "state", role=Role.HELDOUT, public_size=10
    )
    return replace(base, **changes)


def evaluate(settings: SiteSettings, study: Study, *, final: bool = True, **more: Any) -> dict[str, Estimate]:
    more = {"arrays": initial_arrays(study)["model"], **more}
    request = Request(kind="evaluate", study=study, round=0, final=final, **more)
    reply = Site(settings).handle(request)
    assert isinstance(reply, EvaluateReply), (settings.state / "last-fault.json").read_text()
    return dict(reply.metrics)


def classifying_site(tmp_path: Path, patients: int = 12) -> Path:
    return write_site(
        tmp_path / "north", patients=patients, shape=(40, 40, 2), mask=None, classes=("glioma", "meningioma")
    )


def classifying_study(**evaluation: Any) -> Study:
    return heldout_study(
        task={"kind": "classification", "labels": ["glioma", "meningioma"], "target": "kind"},
        data={"patch": [40, 40]},
        model={"name": "resnet", "channels": [4, 4, 8, 8]},
        training={"loss": "cross_entropy"},
        evaluation=evaluation,
    )


# -- which metrics, and when ----------------------------------------------------------------------------------


def test_every_segmentation_metric_comes_with_the_final_evaluation_and_cheap_ones_before(tmp_path: Path) -> None:
    write_site(tmp_path / "north", patients=6, shape=(18, 18, 4), labels=2)
    names = ["dice", "nsd", "hd95", "volume_difference", "lesion_f1", "lesion_sensitivity", "false_positives"]
    study = heldout_study(task={"labels": ["oedema", "core"]}, evaluation={"metrics": names, "select": "lesion_f1"})
    final = evaluate(settings_of(tmp_path), study)
    assert {name for name in final if ":" not in name} == {
        key for name in names for key in (name, f"{name}_oedema", f"{name}_core")
    }
    before = evaluate(settings_of(tmp_path), study, final=False)
    assert {name.partition("_o")[0].partition("_core")[0] for name in before} == {"dice", "lesion_f1"}
    assert {name: final[name] for name in before} == before, "the same model, the same bits"


def test_every_classification_metric_is_computed_and_the_curve_is_told_in_cells(tmp_path: Path) -> None:
    classifying_site(tmp_path)
    names = ["accuracy", "auroc", "auprc", "sensitivity", "specificity", "brier", "ece", "reliability"]
    found = evaluate(settings_of(tmp_path), classifying_study(metrics=names, bins=2))
    assert set(names) - {"reliability"} <= set(found)
    curve = {name: estimate.n for name, estimate in found.items() if name.startswith("reliability")}
    assert curve and all(n % 5 == 0 and n >= 5 for n in curve.values())
    assert len({name.rpartition(":")[2] for name in curve}) * 2 == len(curve), "each bin has both of its numbers"


def test_one_class_only_leaves_out_what_needs_two(tmp_path: Path) -> None:
    write_site(tmp_path / "north", patients=6, shape=(40, 40, 2), mask=None, classes=("glioma",))
    found = evaluate(settings_of(tmp_path), classifying_study(metrics=["accuracy", "auroc", "auprc", "brier"]))
    assert set(found) == {"accuracy", "brier"}


def test_a_sensitivity_speaks_of_the_patients_of_its_class_alone(tmp_path: Path) -> None:
    """Twelve patients, six of each class: an exact mean over six stays where the hospital wants seven."""
    classifying_site(tmp_path)
    study = classifying_study(metrics=["accuracy", "sensitivity", "specificity"])
    for least, leaves in ((6, {"accuracy", "sensitivity", "specificity"}), (7, {"accuracy"})):
        found = evaluate(settings_of(tmp_path, min_patients=least), study)
        assert set(found) - {"threshold"} == leaves and {estimate.n for estimate in found.values()} == {10}


def test_a_score_that_is_no_number_is_not_left_out_of_a_mean() -> None:
    results = {"a": PatientResult(scores={"dice": 0.9}), "b": PatientResult(scores={"dice": math.nan})}
    with pytest.raises(ContractViolation, match="dice of 1 patients is no finite number"):
        cohort_estimates(heldout_study(), ["dice"], results, 0.5)


# -- failures -------------------------------------------------------------------------------------------------


def break_image(root: Path, patient: str) -> None:
    """Finite in the file, beyond what the network can compute with."""
    path = image_path(root, patient)
    data = np.asarray(_NIB.load(path).dataobj)
    write_nifti(path, (data * np.float32(1e36)).astype(np.float32))


def test_a_patient_on_whom_the_network_fails_is_counted_with_the_worst_score(tmp_path: Path) -> None:
    root = write_site(tmp_path / "north", patients=6, shape=(18, 18, 4))
    study = heldout_study(data={"normalise": "none"})
    whole = evaluate(settings_of(tmp_path), study)
    assert "failures" not in whole
    break_image(root, "sub-P002")
    settings = settings_of(tmp_path, state=tmp_path / "broken")
    found = evaluate(settings, study)
    assert found["failures"].mean == pytest.approx(1 / 6) and found["failures"].n == 10
    kept = json.loads((settings.state / "patient-scores.json").read_text())["patients"]
    assert kept["sub-P002"]["dice"] == 0.0 and kept["sub-P002"]["failures"] == 1.0 and len(kept) == 6
    assert kept["sub-P002"]["hd95"] == pytest.approx(np.linalg.norm([18, 18, 4]))
    assert found["dice"].mean == pytest.approx(np.mean([scores["dice"] for scores in kept.values()]))


def test_a_failed_patient_is_wrong_about_every_class(tmp_path: Path) -> None:
    root = classifying_site(tmp_path, patients=6)
    break_image(root, "sub-P001")
    study = classifying_study(metrics=["accuracy", "brier"])
    study = Study.parse(study.model_dump(mode="json") | {"data": {"patch": [40, 40], "normalise": "none"}})
    settings = settings_of(tmp_path)
    arrays = dict(initial_arrays(study)["model"])
    first = next(iter(arrays))
    weights: Any = arrays[first]
    arrays[first] = weights * 1000  # its norm takes that out again, but for an image that is beyond all bounds
    assert evaluate(settings, study, arrays=arrays)["failures"].mean == pytest.approx(1 / 6)
    kept = json.loads((settings.state / "patient-scores.json").read_text())["patients"]["sub-P001"]
    assert (kept["accuracy"], kept["class"], kept["probability_0"], kept["probability_1"]) == (0.0, 0.0, 0.0, 1.0)


# -- groups ---------------------------------------------------------------------------------------------------


def describe_patients(root: Path, rows: dict[str, tuple[str, str]], scanners: dict[str, object]) -> None:
    table = ["participant_id\tAge\tsex", *("\t".join((p, *values)) for p, values in rows.items())]
    (root / "participants.tsv").write_text("\n".join(table) + "\n")
    for patient, sidecar in scanners.items():
        path = image_path(root, patient)
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))


def test_groups_follow_the_study_and_never_the_words_of_a_file(tmp_path: Path) -> None:
    root = write_site(tmp_path / "north", patients=6, shape=(18, 18, 4))
    ids = [f"sub-P{i:03d}" for i in range(1, 7)]
    ages = ["39", "40", "89+", "n/a", "-3", "60.5"]
    sexes = ["F", "male", "o", "", "Smith, John", "M"]
    describe_patients(
        root,
        dict(zip(ids, zip(ages, sexes, strict=True), strict=True)),
        {
            ids[0]: {"Manufacturer": "SIEMENS Healthineers", "MagneticFieldStrength": 2.89},
            ids[1]: {"Manufacturer": "GE MEDICAL SYSTEMS", "MagneticFieldStrength": 15000},
            ids[2]: {"Manufacturer": "Dr. Smith's scanner", "MagneticFieldStrength": "3"},
            ids[3]: ["not", "a", "table"],
        },
    )
    (root / "FLAIR.json").write_text('{"Manufacturer": "Philips", "MagneticFieldStrength": 7.0}')
    study = heldout_study(evaluation={"strata": ["age", "sex", "vendor", "field", "size"], "size_cuts": [0.01, 0.02]})
    session = Session(settings_of(tmp_path), study)
    from fedneuro.client.evaluation_patients import judge_patients

    found = patient_cells(session, judge_patients(session, ["dice"]))
    assert list(found["age"].values()) == ["to-39", "40-59", "from-75", "unknown", "unknown", "60-74"]
    assert list(found["sex"].values()) == ["F", "M", "other", "unknown", "unknown", "M"]
    assert list(found["vendor"].values()) == ["siemens", "ge", "other", "philips", "philips", "philips"]
    assert list(found["field"].values()) == ["3T", "1.5T", "unknown", "7T", "7T", "7T"]
    assert set(found["size"].values()) == {"large"}, "64 voxels of 1 mm³"


def test_a_small_group_stays_and_takes_the_next_with_it(tmp_path: Path) -> None:
    """Twelve women, six men, two of unknown sex: the men would give the two away. Of ages all are told."""
    root = write_site(tmp_path / "north", patients=20, shape=(18, 18, 2))
    sex = ["F"] * 12 + ["M"] * 6 + [""] * 2
    age = ["30"] * 10 + ["50"] * 10
    describe_patients(root, {f"sub-P{i + 1:03d}": (age[i], sex[i]) for i in range(20)}, {})
    study = heldout_study(evaluation={"strata": ["age", "sex"]})
    found = evaluate(settings_of(tmp_path, public_size=20), study)
    cells = {name: estimate.n for name, estimate in found.items() if ":" in name}
    assert cells == {"dice:age:to-39": 10, "dice:age:40-59": 10, "dice:sex:F": 10}
    higher = evaluate(settings_of(tmp_path, public_size=20, min_patients=11), study)
    assert {name for name in higher if ":" in name} == set(), "the hospital's own minimum counts for groups too"
    assert not any(":" in name for name in evaluate(settings_of(tmp_path, public_size=20), study, final=False))


@pytest.mark.parametrize(
    ("counts", "left"),
    [
        ([9, 8, 7], {0, 1, 2}),
        ([9, 8, 4], {0}),
        ([9, 4, 4], {0}),  # eight together: nobody can be told apart from them
        ([9, 3], set()),
        ([4], set()),
        ([5, 0], {0}),
    ],
)
def test_what_is_held_back_cannot_be_computed(counts: list[int], left: set[int]) -> None:
    cells = {f"dice:sex:{i}": Estimate(mean=0.5, low=0.4, high=0.6, n=n) for i, n in enumerate(counts) if n}
    found = cells_that_leave(cells, 5)
    assert {int(name.rpartition(":")[2]) for name in found} == left
    hidden = sum(counts) - sum(counts[i] for i in left)
    assert hidden == 0 or hidden >= 5 or not left


def test_the_gate_knows_every_name_and_the_least_of_a_cell() -> None:
    study = heldout_study(evaluation={"strata": ["sex"], "metrics": ["dice", "lesion_sensitivity"]})
    request = Request(kind="evaluate", study=study, round=0)
    good = Estimate(mean=0.5, low=0.4, high=0.6, n=5)
    fine = {"dice:sex:F": good, "lesion_sensitivity:small": good, "failures": replace(good, n=1)}
    gate.leave(EvaluateReply(site="north", round=0, metrics=fine, seconds=0), request)
    for name, estimate in (
        ("dice:sex:F", replace(good, n=4)),
        ("dice:sex:Smith", good),
        ("dice:age:to-39", good),
        ("hd95:sex:F", good),
        ("threshold", good),
        ("reliability:observed:01", good),
    ):
        with pytest.raises(ContractViolation):
            gate.leave(EvaluateReply(site="north", round=0, metrics={name: estimate}, seconds=0), request)


def test_groups_need_the_hospitals_leave_and_are_in_its_summary(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    study = private_study(evaluation={"strata": ["age", "vendor"]})
    hospital.approve(study)
    case = Case(study=study, site=hospital.settings)
    assert [v.rule for v in judge(load_policy(hospital.policy), case) if not v.passed] == ["reply.strata"]
    hospital.edit("reply", strata=True)
    assert all(v.passed for v in judge(load_policy(hospital.policy), case))
    assert any("dice by age, vendor" in line for line in summary(study, hospital.settings))
    assert not any(" by age" in line for line in summary(private_study(), hospital.settings))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"metrics": ["auroc"]}}, '"auroc" for segmentation'),
        ({"evaluation": {"age_cuts": [60, 40]}}, "rising"),
        ({"evaluation": {"strata": ["sex", "sex"]}}, "repeats a name"),
        ({"evaluation": {"lesion_cuts": [1.0]}}, "2 items"),
        ({"evaluation": {"strata": ["sex"]}, "privacy": {"mode": "local", "metrics": "noise"}}, "evaluation.strata"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(sections: dict[str, Any], words: str) -> None:
    sections["training"] = {"local_steps": 1, "local_epochs": 0}
    with pytest.raises(ValidationError) as error:
        make_study(**sections)
    assert words in str(error.value) or words in str(error.value.errors())


def test_a_curve_cannot_select_and_only_lesions_have_a_size() -> None:
    with pytest.raises(ValidationError, match="is the first metric"):
        classifying_study(metrics=["reliability"])
    with pytest.raises(ValidationError, match="lesions to measure"):
        classifying_study(strata=["size"])


def test_names_are_fixed_by_the_study() -> None:
    study = classifying_study(metrics=["auroc", "sensitivity", "reliability"], bins=2, strata=["sex"])
    assert released_names(study) == {
        "auroc", "sensitivity", "failures", "threshold",
        "reliability:predicted:01", "reliability:predicted:02", "reliability:observed:01", "reliability:observed:02",
        "auroc:sex:F", "auroc:sex:M", "auroc:sex:other", "auroc:sex:unknown",
    }  # fmt: skip
    noised = private_study(privacy={"metrics": "noise"})
    assert released_names(noised) == {"dice", "dice_lesion"}


# -- the threshold of sensitivity and specificity -------------------------------------------------------------


def test_a_training_site_tells_its_threshold_and_a_heldout_one_uses_what_it_is_told(tmp_path: Path) -> None:
    classifying_site(tmp_path)
    study = classifying_study(metrics=["accuracy", "sensitivity", "specificity"])
    low = evaluate(settings_of(tmp_path), study, threshold=0.01)
    high = evaluate(settings_of(tmp_path), study, threshold=0.99)
    assert (
        (low["sensitivity"].mean, low["specificity"].mean)
        == (1.0, 0.0)
        == (high["specificity"].mean, high["sensitivity"].mean)
    )
    assert low["threshold"].mean == 0.01 and evaluate(settings_of(tmp_path), study)["threshold"].mean == 0.5
    assert "threshold" not in evaluate(settings_of(tmp_path), study, final=False), "a held-out site chooses nothing"
    training = Study.parse(study.model_dump(mode="json") | {"evaluation": {
        **study.evaluation.model_dump(mode="json"), "heldout": [], "validation_fraction": 0.7,
    }})  # fmt: skip
    own = evaluate(settings_of(tmp_path, role=Role.TRAIN), training, final=False)["threshold"].mean
    assert 0.01 <= own <= 0.99 and own == round(own, 2)


def test_the_coordinator_takes_the_mean_over_training_sites_by_public_size() -> None:
    study = classifying_study(metrics=["accuracy", "sensitivity"])
    told = {"a": 0.2, "b": 0.6, "north": 0.99}
    record = RoundRecord(
        round=2, metrics={n: {"threshold": {"mean": t, "ci95": [t, t], "n": 5}} for n, t in told.items()}
    )
    sites = {
        n: SiteRecord(role="heldout" if n == "north" else "train", public_size=s)
        for n, s in (("a", 30), ("b", 10), ("north", 99))
    }
    assert final_threshold(study, [record], 2, sites) == pytest.approx(0.3)
    assert final_threshold(study, [record], 1, sites) is None
    assert final_threshold(classifying_study(), [record], 2, sites) is None


def test_a_threshold_travels_with_the_final_evaluation_only_and_once(tmp_path: Path) -> None:
    study = private_study(evaluation={"heldout": ["north"]})
    arrays = initial_arrays(study)["model"]
    request = Request(kind="evaluate", study=study, round=1, arrays=arrays, final=True, threshold=0.37)
    assert decode_request(encode_request(request)).threshold == 0.37
    for wrong in (replace(request, final=False), replace(request, threshold=1.0), replace(request, threshold=-0.1)):
        with pytest.raises(ContractViolation, match="threshold"):
            encode_request(wrong)
    hospital = Hospital(tmp_path, role=Role.HELDOUT)
    hospital.approve(study)
    for threshold, reason in ((0.4, None), (0.4, None), (0.41, Reason.ROUND_REPLAYED), (None, Reason.ROUND_REPLAYED)):
        reply = hospital.ask(study, "evaluate", final=True, threshold=threshold)
        assert (reply.reason if isinstance(reply, Refusal) else None) is reason


# -- what the coordinator makes of it -------------------------------------------------------------------------


def test_names_become_a_structure() -> None:
    one = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 10}
    found = site_results({
        "auroc": one, "failures": one, "threshold": {**one, "mean": 0.3}, "auroc:sex:F": one,
        "lesion_sensitivity:small": one, "reliability:predicted:02": {**one, "mean": 0.7},
        "reliability:observed:02": one, "reliability:observed:01": one,
    })  # fmt: skip
    assert found == {
        "metrics": {"auroc": one}, "failures": one, "threshold": 0.3, "lesion_sizes": {"small": one},
        "reliability": [{"bin": 2, "predicted": 0.7, "observed": one}], "strata": {"sex": {"F": one}},
    }  # fmt: skip
    assert site_results({})["failures"] is None
