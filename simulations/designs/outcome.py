# SPDX-License-Identifier: Apache-2.0
"""What a design leaves for people and programs: ``results.json``, ``table.csv``, ``patients.csv``, report.

``patients.csv`` holds values of single patients and stays on the researcher's machine; the others may be shown.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...server.report_design import write_design_report
from ...server.report_evidence import EVIDENCE
from ...server.report_files import write_text_report
from ...server.statistics.evidence import Judged
from ...server.store import dumps
from ..run import finish
from .collect import gather
from .design import evidence_of, load_design
from .plan import Plan
from .tasks import read_results

__all__ = ["finish_design", "finish_run", "write_patients"]

CUT: Final = "its results.json is cut or of another schema"


def finish_design(out: Path) -> dict[str, Any]:
    """Write everything that a ``loso`` or ``cv`` leaves, from what is saved; returns the results.

    Raises:
        StateError: ``out`` holds no design.
    """
    plan, values = load_design(out)
    evidence = evidence_of(plan, values)
    results = {
        "schema_version": 1,
        "kind": "design",
        "design": plan.design,
        "study": {"name": plan.study.study.name, "description": plan.study.study.description},
        "study_hash": plan.study.hash,
        "effective_study": plan.study.model_dump(mode="json"),
        "asked": values["asked"],
        "status": "complete" if all(plan.federation(fold).done() for fold in plan.folds) else "partial",
        "folds": [_fold(plan, number) for number in range(len(plan.folds))],
        "evidence": evidence,
        "versions": _versions(plan),
        "seconds": sum(step["seconds"] or 0.0 for step in evidence["steps"].values()),
    }
    _write(out / "results.json", dumps(results))
    write_patients(out / "patients.csv", plan, values)
    write_design_report(results, out / "report.html")
    write_text_report(results, out)
    return results


def finish_run(out: Path) -> dict[str, Any]:
    """Evidence of a plain run with comparators into its results and report; returns the results.

    Raises:
        StateError: ``out`` holds no run, or no comparators.
    """
    plan, values = load_design(out, inside="comparators")
    evidence = evidence_of(plan, values)
    _write(out / EVIDENCE, dumps(evidence))
    results = finish(out)
    write_patients(out / "patients.csv", plan, values)
    return results


def write_patients(path: Path, plan: Plan, values: Mapping[str, Any]) -> None:
    """Every value of every patient, one row each: model, site, patient, seed, metric, value."""
    judged: Judged = gather(plan, traits={}, majority=values["majority"])
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["metric", "seed", "model", "site", "patient", "value"])
    for metric, by_seed in judged.metrics.items():
        for number, models in enumerate(by_seed):
            for model, sites in models.items():
                for site, patients in sites.items():
                    for patient, value in patients.items():
                        table.writerow([metric, number, model, site, patient, "" if value is None else repr(value)])
    for metric, by_seed in judged.ranked.items():  # what it rests on: no patient has one
        for number, models in enumerate(by_seed):
            for model, sites in models.items():
                for site, patients in sites.items():
                    for patient, record in patients.items():
                        for name, value in _parts(metric, record):
                            table.writerow([name, number, model, site, patient, repr(value)])
    _write(path, text.getvalue())


def _parts(metric: str, record: Any) -> list[tuple[str, float]]:
    """What AUROC or concordance take of a patient, by name."""
    if metric == "c_index":
        return list(zip(("predicted", "observed", "event"), map(float, record), strict=True))
    label, probabilities = record
    return [("class", float(label)), *((f"probability_{k}", p) for k, p in enumerate(probabilities))]


def _fold(plan: Plan, number: int) -> dict[str, Any]:
    """A federation of the design in short, with its curve at the sites that it judged."""
    fold = plan.folds[number]
    folder = plan.federation(fold).folder
    found = read_results(folder)
    lacking = CUT if (folder / "results.json").exists() else "not run"
    summary: dict[str, Any] = {
        "name": fold.name,
        "seed": fold.seed,
        "heldout": [fold.hospital[name] for name in fold.tests],
        "status": found["status"] if found else lacking,
    }
    if not found:
        return summary
    tests = fold.hospital
    return summary | {
        "study_hash": found["study_hash"],
        "model_digest": found.get("model_digest"),
        "selected_round": found["selected_round"],
        "seconds": found["seconds"],
        "privacy": {key: found["privacy"].get(key) for key in ("mode", "epsilon", "delta", "unit")},
        "start": found.get("start", {}),
        # What a cohort has and no patient: calibration, sensitivity at the training hospitals' threshold, AUPRC.
        "sites": {
            tests[name]: {key: site.get(key) for key in ("metrics", "reliability", "threshold")}
            for name, site in found["sites"].items()
            if name in tests
        },
        "rounds": [
            {
                "round": record["round"], "seconds": record["seconds"],
                "bytes": record["bytes_down"] + record["bytes_up"],
                "metrics": {tests[name]: record["metrics"][name] for name in tests if name in record["metrics"]},
                "refusals": record["refusals"],
            }
            for record in found["rounds"]
        ],
    }  # fmt: skip


def _versions(plan: Plan) -> dict[str, str]:
    seen: dict[str, str] = {}
    for fold in plan.folds:
        seen |= (read_results(plan.federation(fold).folder) or {}).get("versions", {})
    return seen


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
