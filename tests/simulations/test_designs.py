# SPDX-License-Identifier: Apache-2.0
"""Leave one site out, patient folds and searches on tiny hospitals: who is judged by whom, and no work is lost."""

import csv
import html
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedneuro.client.data import open_site, side_of
from fedneuro.client.patient_scores import FILE
from fedneuro.privacy.errors import DataError, EnvironmentProblem, FedNeuroError, StateError, StudyError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import describe
from fedneuro.server.statistics.evidence import ALL, BEST_LOCAL, INSIDE, OURS, OWN
from fedneuro.simulations.cli import app
from fedneuro.simulations.comparators import (
    Comparators,
    fine_tuned_study,
    local_study,
    parse_compare,
    pooled_study,
    scoring_study,
)
from fedneuro.simulations.designs.design import Options, perform, prepare
from fedneuro.simulations.designs.execute import execute
from fedneuro.simulations.designs.links import link_data_set, read_index, union
from fedneuro.simulations.designs.outcome import finish_design, finish_run
from fedneuro.simulations.designs.plan import Plan, cv_folds, loso_folds
from fedneuro.simulations.designs.space import Space
from fedneuro.simulations.designs.tasks import RunTask, ScoreTask
from tests.bids import make_study, write_site

SIZES = {"north": 7, "south": 6, "west": 5}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals; north and south use the same ids, west its own."""
    folder = tmp_path_factory.mktemp("sites")
    for index, (name, count) in enumerate(SIZES.items()):
        ids = [f"sub-W{k}" for k in range(count)] if name == "west" else count
        write_site(folder / name, patients=ids, shape=(16, 16, 3), seed=index)
    table = (folder / "north" / "participants.tsv").read_text().splitlines()
    rows = [f"{row}\t{30 + 10 * k}\t{'FM'[k % 2]}" for k, row in enumerate(table[1:])]
    (folder / "north" / "participants.tsv").write_text("\n".join([f"{table[0]}\tage\tsex", *rows]) + "\n")
    return folder


def tiny(**sections: Any) -> Study:
    return make_study(
        **{
            "study": {"name": "tiny", "seed": 3},
            "training": {"rounds": 2, "local_steps": 2, "local_epochs": 0, "batch_size": 2},
            "evaluation": {
                "bootstrap": 100,
                "validation_fraction": 0.4,
                "metrics": ["dice"],
                "previews": 0,
                "worst": 0,
            },
            **sections,
        }
    )


def go(plan: Plan, **options: Any) -> dict[str, Any]:
    return perform(plan, workers=1, begin=lambda _: None, tell=options.get("tell", lambda *_: None))


@pytest.fixture(scope="module")
def loso(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, dict[str, Any]]:
    """A whole design, once for all tests that look at it."""
    out = tmp_path_factory.mktemp("loso")
    options = Options(compare=parse_compare("local,pooled,untrained", tiny()))
    plan = prepare("loso", tiny(), sites, out, options)
    assert go(plan) == {}
    return out, plan, finish_design(out)


def test_each_site_is_held_out_once_and_judged_by_models_that_never_saw_it(
    loso: tuple[Path, Plan, dict[str, Any]], sites: Path
) -> None:
    _, plan, results = loso
    assert results["status"] == "complete" and [f["heldout"] for f in results["folds"]] == [
        ["north"],
        ["south"],
        ["west"],
    ]
    evidence = results["evidence"]
    scores = {(r["model"], r["site"]): r for r in evidence["scores"]}
    held = json.loads((plan.federation(plan.folds[0]).folder / "results.json").read_text())
    for site, count in SIZES.items():
        assert scores[OURS, site]["n"] == scores["pooled", site]["n"] == scores["untrained", site]["n"] == count
        for other in SIZES:
            data = open_site(sites / site, tiny())
            wanted = len(data.validation()) if other == site else count
            found = scores.get((f"local: {other}", site), {"n": 0})["n"]
            assert found == wanted, "a hospital's own model is judged on its validation patients, others on everybody"
    assert held["sites"]["north"]["role"] == "heldout" and set(held["rounds"][1]["train"]) == {"south", "west"}
    models = {(r["model"], r["site"]) for r in evidence["comparisons"]}
    assert {("pooled", ALL), (BEST_LOCAL, ALL), (OWN, ALL), ("local: west", "north")} <= models
    assert evidence["gap"] and all(row["paired"] for row in evidence["gap"]) and INSIDE in evidence["models"]
    assert evidence["matrix"]["rows"][0] == OURS and len(evidence["matrix"]["rows"]) == 6
    assert results["evidence"]["cohort"][0]["groups"]["sex"] == {"F": "<5", "M": "<5"}


def test_what_a_design_leaves(loso: tuple[Path, Plan, dict[str, Any]]) -> None:
    out, _, results = loso
    table = list(csv.DictReader((out / "table.csv").open()))
    assert {row["model"] for row in table} >= {"federated", "pooled training", "local, west alone"}
    patients = list(csv.DictReader((out / "patients.csv").open()))
    assert len({(r["site"], r["patient"]) for r in patients if r["model"] == OURS}) == sum(SIZES.values())
    page = (out / "report.html").read_text()
    assert page.index("At hospitals that never trained") < page.index("Against other models") < page.index("CLAIM 2024")
    for private in ("sub-W", "sub-P"):
        assert private not in page and private not in (out / "table.csv").read_text(), "the page names no patient"
    assert (
        "| federated |" in (out / "report.md").read_text() or "Dice at each hospital" in (out / "report.md").read_text()
    )
    assert json.loads((out / "results.json").read_text())["evidence"] == results["evidence"]


def test_a_pooled_run_trains_on_everybody_who_trains_and_on_nobody_else(
    loso: tuple[Path, Plan, dict[str, Any]],
) -> None:
    _, plan, _ = loso
    study = plan.pooled(plan.folds[2]).study
    assert study.training.local_steps == 4 and study.evaluation.heldout == (), "two hospitals' steps"
    index = read_index(plan.pool(plan.folds[2]))
    assert sorted(index.values()) == sorted(
        (s, f"sub-P{k:03d}") for s in ("north", "south") for k in range(1, SIZES[s] + 1)
    )
    data = open_site(plan.pool(plan.folds[2]), study)
    sides = {index[patient]: patient in data.training() for patient in data.patients}
    for (_, patient), trains in sides.items():
        assert trains is (side_of(patient, study.data.split_key, 0.4) == "train"), "the split of the federation"


def test_a_killed_design_goes_on_where_it_was(
    sites: Path, tmp_path: Path, loso: tuple[Path, Plan, dict[str, Any]]
) -> None:
    """Ends after the second federation's first round; the same command then gives the very same evidence."""
    options = Options(compare=Comparators())
    plan = prepare("loso", tiny(), sites, tmp_path, options)
    seen: list[str] = []

    def stop(name: str, event: Any) -> None:
        seen.append(name)
        if name == "south" and event is not None and event.kind == "round-done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(plan, tell=stop)
    partial = finish_design(tmp_path)
    assert partial["status"] == "partial" and {r["site"] for r in partial["evidence"]["scores"]} >= {"north"}
    assert any("not judged yet" in note for note in partial["evidence"]["notes"])
    assert "Not finished" in (tmp_path / "report.html").read_text()
    first = (tmp_path / "runs/north/model.safetensors").stat().st_mtime_ns
    again = prepare("loso", tiny(), sites, tmp_path, options)
    assert go(again) == {}
    assert (tmp_path / "runs/north/model.safetensors").stat().st_mtime_ns == first, "what was done is not done again"
    whole = {(r["model"], r["site"]): r["mean"] for r in finish_design(tmp_path)["evidence"]["scores"]}
    for (model, site), mean in whole.items():
        if model == OURS and site != ALL:
            reference = next(r for r in loso[2]["evidence"]["scores"] if (r["model"], r["site"]) == (model, site))
            assert mean == reference["mean"]


def test_another_design_in_the_same_folder_is_refused(loso: tuple[Path, Plan, dict[str, Any]], sites: Path) -> None:
    out, _, _ = loso
    with pytest.raises(StateError, match=r"another design, loso \(compare differ\)"):
        prepare("loso", tiny(), sites, out, Options())
    with pytest.raises(StateError, match="study differ"):
        prepare(
            "loso",
            tiny(training={"rounds": 3}),
            sites,
            out,
            Options(compare=parse_compare("local,pooled,untrained", tiny())),
        )


def test_cut_files_are_stated_and_made_again(loso: tuple[Path, Plan, dict[str, Any]]) -> None:
    out, plan, before = loso
    path = plan.federation(plan.folds[1]).folder / "sites/south" / FILE
    whole = path.read_text()
    results = plan.federation(plan.folds[1]).folder / "results.json"
    saved = results.read_text()
    path.write_text(whole[:40])
    results.write_text(saved[: len(saved) // 2])
    found = finish_design(out)
    assert any("cut or no JSON" in note for note in found["evidence"]["notes"]) and found["status"] == "partial"
    assert not plan.federation(plan.folds[1]).done()
    assert "south (its results.json is cut or of another schema)" in (out / "report.html").read_text()
    path.write_text(whole.replace('"schema_version": 1', '"schema_version": 7'))
    assert any("another schema" in note for note in finish_design(out)["evidence"]["notes"])
    path.write_text(whole)
    assert go(plan) == {}, "a cut results.json is written again from the saved state"
    assert finish_design(out)["evidence"]["scores"] == before["evidence"]["scores"]
    design = (out / "design.json").read_text()
    (out / "design.json").write_text("{")
    with pytest.raises(StateError, match="cut"):
        finish_design(out)
    (out / "design.json").write_text(design)  # the tests below read it again


def test_empty_references_are_counted_and_sizes_are_a_stratum(loso: tuple[Path, Plan, dict[str, Any]]) -> None:
    """Five of north's seven patients get an empty mask, two a large one, as if their files said so."""
    out, plan, before = loso
    assert not any("reference mask is empty" in note for note in before["evidence"]["notes"])
    path = plan.federation(plan.folds[0]).folder / "sites/north" / FILE
    whole = path.read_text()
    values = json.loads(whole)
    for number, scores in enumerate(values["patients"].values()):
        assert scores["reference_ml"] > 0 and "absent_lesion" not in scores
        scores |= {"reference_ml": 0.0, "absent_lesion": 1.0} if number < 5 else {"reference_ml": 50.0}
    path.write_text(json.dumps(values))
    evidence = finish_design(out)["evidence"]
    assert "north: the reference mask is empty for 5 of 7 patients" in " ".join(evidence["notes"])
    groups = {row["group"]: row["patients"] for row in evidence["strata"] if row["trait"] == "lesion volume"}
    assert groups == {"none": "5", "30 ml and more": "<5", "under 5 ml": "11"}
    assert not {row["metric"] for row in evidence["scores"]} & {"reference_ml", "absent_lesion"}
    path.write_text(whole)
    assert finish_design(out)["evidence"] == before["evidence"]


def test_folds_of_patients_are_even_and_apart(sites: Path, tmp_path: Path) -> None:
    plan = prepare("cv", tiny(training={"rounds": 1}), sites, tmp_path, Options(folds=2))
    seen: list[tuple[str, str]] = []
    for fold in plan.folds:
        for name, path in fold.tests.items():
            members, others = set(read_index(path).values()), set(read_index(fold.train[fold.hospital[name]]).values())
            assert members.isdisjoint(others) and abs(len(members) - SIZES[fold.hospital[name]] / 2) < 1
            seen += members
    assert len(seen) == len(set(seen)) == sum(SIZES.values())
    with pytest.raises(DataError, match=r"west has 5 patients for 6 folds"):
        cv_folds(tiny(), {"west": sites / "west"}, 1, folds=6, data=tmp_path / "more")
    assert go(plan) == {}
    scores = {(r["model"], r["site"]): r["n"] for r in finish_design(tmp_path)["evidence"]["scores"]}
    for site, count in SIZES.items():
        assert scores[OURS, site] == count, "every patient once, by a model without it"


def test_a_run_with_comparators_from_the_command_line(
    sites: Path, tmp_path: Path, loso: tuple[Path, Plan, dict[str, Any]]
) -> None:
    _, plan, _ = loso
    earlier = plan.federation(plan.folds[0]).folder / "model.safetensors"
    study = tiny(evaluation={"heldout": ["west"]}, training={"rounds": 1})
    (tmp_path / "study.toml").write_text(describe(study))
    out = tmp_path / "out"
    words = ["run", str(tmp_path / "study.toml"), "--sites", str(sites), "--out", str(out), "--workers", "1"]
    compare = f"local,pooled,fine-tuned,previous:{earlier}"
    found = CliRunner().invoke(app, [*words, "--compare", compare], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    results = json.loads((out / "results.json").read_text())
    scores = {(r["model"], r["site"]): r["n"] for r in results["evidence"]["scores"]}
    assert scores[OURS, "west"] == scores["pooled", "west"] == scores["local: north", "west"] == SIZES["west"]
    validation = len(open_site(sites / "north", study).validation())
    assert scores[OURS, "north"] == scores["pooled", "north"] == scores["local: north", "north"] == validation
    assert scores["local: south", "north"] == SIZES["north"] and scores["fine-tuned", "north"] == validation
    assert scores["previous", "west"] == SIZES["west"] and scores["previous", "north"] == SIZES["north"]
    assert any("nothing is known of whom it was trained on" in note for note in results["evidence"]["notes"])
    row = next(r for r in results["evidence"]["comparisons"] if (r["model"], r["site"]) == ("local: south", "north"))
    assert row["ours"]["n"] == validation, "only patients that both were judged on"
    assert "Against other models" in (out / "report.html").read_text()
    before = (out / "table.csv").read_text()
    (out / "evidence.json").write_text('{"schema')
    again = CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False)
    assert again.exit_code == 0 and (out / "table.csv").read_text() == before


def test_a_private_run_is_compared_with_the_same_without_a_promise(sites: Path, tmp_path: Path) -> None:
    private = {"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 1}
    study = tiny(
        privacy=private,
        evaluation={
            "heldout": ["west"], "bootstrap": 100, "metrics": ["dice"], "previews": 0, "worst": 0,
            "validation_fraction": 0.4,
        },
        training={"rounds": 1, "local_steps": 1, "local_epochs": 0, "batch_size": 2},
    )  # fmt: skip
    plan = prepare("run", study, sites, tmp_path, Options(compare=parse_compare("no-privacy", study)))
    plan.federation(plan.folds[0]).perform(cache=tmp_path / "cache", workers=1)
    assert go(plan) == {}
    results = finish_run(tmp_path)
    rows = {row["site"]: row for row in results["evidence"]["comparisons"] if row["model"] == "no-privacy"}
    assert {"north", "west", ALL} <= set(rows) and rows["west"]["difference"]["n"] == SIZES["west"]
    assert results["evidence"]["steps"]["run-no-privacy"]["status"] == "complete"
    page = (tmp_path / "report.html").read_text()
    assert "federated without privacy" in page and "8.00" in page, "the price stands beside the score"


def test_classes_are_compared_by_auroc_with_everyone_in_the_commonest(tmp_path: Path) -> None:
    """Two of three patients are "normal", so that model is right on two thirds, and ranks nobody: AUROC 0.5."""
    for index, name in enumerate(SIZES):
        classes = ("glioma", "normal", "normal")
        write_site(tmp_path / "sites" / name, patients=9, shape=(40, 40, 2), mask=None, classes=classes, seed=index)
    study = tiny(
        task={"kind": "classification", "labels": ["glioma", "normal"], "target": "kind"},
        data={"patch": [40, 40]},
        model={"name": "resnet", "channels": [4, 4, 8, 8], "norm": "group"},
        training={"rounds": 1, "local_steps": 1, "local_epochs": 0, "loss": "cross_entropy"},
        evaluation={"heldout": ["west"], "metrics": ["auroc", "accuracy"], "bootstrap": 100, "worst": 0, "previews": 0},
    )
    out = tmp_path / "out"
    options = Options(compare=parse_compare("majority,untrained", study))
    plan = prepare("run", study, tmp_path / "sites", out, options)
    plan.federation(plan.folds[0]).perform(cache=out / "cache", workers=1)
    assert go(plan) == {}
    evidence = finish_run(out)["evidence"]
    scores = {(row["model"], row["site"], row["metric"]): row["mean"] for row in evidence["scores"]}
    assert scores["majority", "west", "accuracy"] == pytest.approx(2 / 3)
    assert scores["majority", "west", "auroc"] == 0.5 and evidence["metric"] == "auroc"
    rows = {(row["model"], row["site"]): row for row in evidence["comparisons"] if row["metric"] == "auroc"}
    assert rows["majority", "west"]["test"] == "DeLong" and rows["untrained", "west"]["p_holm"] is not None
    assert any("AUROC rests on 3 patients of a class" in note for note in evidence["notes"])
    assert not any("no patient is of class" in note or "the same prediction" in note for note in evidence["notes"])

    # No positives in the west, and a model that says the same of everybody, as if the file said so.
    path = plan.federation(plan.folds[0]).folder / "sites/west" / FILE
    values = json.loads(path.read_text())
    for answer in values["patients"].values():
        answer |= {"class": 1.0, "probability_0": 0.3, "probability_1": 0.7, "accuracy": 1.0}
    path.write_text(json.dumps(values))
    found = finish_run(out)
    notes = " ".join(found["evidence"]["notes"])
    assert "west: no patient is of class glioma" in notes and "AUROC is undefined at west (one class only" in notes
    assert "federated at west: the same prediction for every patient" in notes
    assert all(note in html.unescape((out / "report.html").read_text()) for note in found["evidence"]["notes"])


def test_a_search_is_chosen_by_training_hospitals_and_keeps_what_it_did(sites: Path, tmp_path: Path) -> None:
    study = tiny(evaluation={"heldout": ["west"]}, training={"rounds": 1})
    (tmp_path / "study.toml").write_text(describe(study))
    out = tmp_path / "out"
    words = ["sweep", str(tmp_path / "study.toml"), "--sites", str(sites), "--out", str(out), "--workers", "1"]
    asked = [*words, "--grid", "training.learning_rate=[1e-2, 1e-5]"]
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    results = json.loads((out / "results.json").read_text())
    values = [row["value"] for row in results["settings"]]
    assert values == sorted(values, reverse=True) and results["status"] == "complete"
    runs = {p.parent.name: json.loads(p.read_text()) for p in out.glob("runs/*/results.json")}
    for row in results["settings"]:
        run = runs[row["name"]]
        assert (
            row["value"] == run["select"]["value"]
            and run["effective_study"]["training"]["learning_rate"] == row["setting"]["training.learning_rate"]
        )
        assert row["heldout"] == run["sites"]["west"]["metrics"]["dice"]["mean"]
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/model.safetensors")}
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/model.safetensors")} == before
    with pytest.raises(StateError, match="another search"):
        CliRunner().invoke(app, [*words, "--grid", "training.learning_rate=[1e-2]"], catch_exceptions=False)
    assert "trial-002" in (out / "table.csv").read_text() and "trial-002" in (out / "report.html").read_text()


def test_a_failed_task_is_written_down_and_the_others_go_on(sites: Path, tmp_path: Path) -> None:
    """Two processes; one run's hospital has no data set."""
    study = tiny(training={"rounds": 1})
    good = RunTask(name="good", study=study, sites={"west": sites / "west"}, folder=tmp_path / "good")
    bad = RunTask(name="bad", study=study, sites={"west": tmp_path / "absent"}, folder=tmp_path / "bad")
    ended: list[str] = []
    failures = execute(
        [bad, good],
        cache=tmp_path / "cache",
        workers=2,
        tell=lambda name, event: ended.append(name) if event is None else None,
    )
    assert set(failures) == {"bad"} and failures["bad"].exit_code == 2 and "absent" in failures["bad"].text
    assert good.done() and sorted(ended) == ["bad", "good"]


def test_a_model_of_another_network_is_refused(sites: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    task = ScoreTask(
        name="previous", study=tiny(), sites={"west": sites / "west"}, folder=tmp_path / "score",
        source="file", model=tmp_path / "model.safetensors",
    )  # fmt: skip
    with pytest.raises(StudyError, match="cannot be read as a model"):
        task.perform(cache=tmp_path / "cache", workers=1)
    assert not task.done()


def test_derived_studies_keep_the_budget_and_the_promise(tmp_path: Path) -> None:
    private = tiny(
        training={"rounds": 4, "local_steps": 1, "local_epochs": 0, "optimizer": "sgd"},
        privacy={"mode": "distributed", "epsilon": 4.0, "delta": 1e-2, "tolerate": 1, "crops_per_patient": 2},
    )
    local = local_study(private)
    assert local.privacy.mode == "local" and local.privacy.epsilon == 4.0 and local.total_steps == private.total_steps
    assert pooled_study(private, 3).training.local_steps == 1, "a private step takes a share of all patients"
    assert pooled_study(tiny(), 3).training.local_steps == 6
    scoring = scoring_study(private, ["a", "b"])
    assert scoring.privacy.mode == "none" and scoring.evaluation.heldout == ("a", "b")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    tuned = fine_tuned_study(private, tmp_path / "model.safetensors")
    assert tuned.training.rounds == 1 and tuned.training.init.source == "checkpoint"


@pytest.mark.parametrize(
    ("text", "says"),
    [("locl", "expected names out of"), ("previous", "previous:FILE"), ("previous:/absent", "no such file"),
     ("majority", "classification"), ("no-privacy", "already")],
)  # fmt: skip
def test_wrong_names_of_comparators(text: str, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        parse_compare(text, tiny())


@pytest.mark.parametrize(
    ("grid", "random", "search", "says"),
    [
        ([], [], "random", "nothing to vary"),
        (["training.learning_rate"], [], "random", "section.key"),
        (["training.learning_rate=3"], [], "random", "a list"),
        ([], ["training.learning_rate=log(0, 1)"], "random", "above 0"),
        ([], ["training.local_steps=int(1.5, 3)"], "random", "two numbers"),
        (["training.ema=[0.1]"], ["training.ema=uniform(0, 1)"], "random", "twice"),
        (["training.ema=[0.1]"], [], "optuna", "leave --grid out"),
        (["training.ema=[0.1]"], [], "bayes", "random or optuna"),
    ],
)
def test_wrong_spaces(grid: list[str], random: list[str], search: str, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        Space.parse(grid, random, trials=2, search=search, seeds=1)


def test_settings_are_the_same_each_time_and_within_bounds() -> None:
    space = Space.parse(
        ["model.norm=['a', 'b']"], ["training.learning_rate=log(1e-4, 1e-1)", "training.local_steps=int(2, 3)"],
        trials=20, search="random", seeds=1,
    )  # fmt: skip
    settings = list(space.settings(0))
    assert settings == list(space.settings(0)) != list(space.settings(1)) and len(settings) == 40
    rates = [s["training.learning_rate"] for s in settings]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates) and sum(rate < 10**-2.5 for rate in rates) > 8, (
        "even on a log scale"
    )
    assert {s["training.local_steps"] for s in settings} == {2, 3} and {s["model.norm"] for s in settings} == {"a", "b"}


def test_one_site_cannot_be_left_out(sites: Path) -> None:
    with pytest.raises(StudyError, match="at least two"):
        loso_folds(tiny(), {"west": sites / "west"}, 1)
    names = [fold.name for fold in loso_folds(tiny(), {n: sites / n for n in SIZES}, 2)]
    assert names[:2] == ["north-seed3", "south-seed3"] and len(names) == 6


def test_links_lose_nothing_and_say_where_they_fail(sites: Path, tmp_path: Path) -> None:
    index = link_data_set(tmp_path / "pool", union({n: sites / n for n in SIZES}), tiny())
    assert len(index) == sum(SIZES.values()) and {p for s, p in index.values() if s == "west"} <= set(index)
    renamed = next(name for name, (site, _) in index.items() if site == "south")
    assert len(list((tmp_path / "pool" / renamed / "anat").glob(f"{renamed}_*"))) == 1
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(EnvironmentProblem, match="links"):
            link_data_set(tmp_path / "locked/pool", union({"west": sites / "west"}), tiny())
    (tmp_path / "file").write_text("")
    with pytest.raises(FedNeuroError, match="links"):
        link_data_set(tmp_path / "file/pool", union({"west": sites / "west"}), tiny())
