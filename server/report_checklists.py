# SPDX-License-Identifier: Apache-2.0
"""CLAIM (2024 update) and TRIPOD+AI (2024), filled with what a run knows; everything else is a person's to write.

What an item asks is put in our own short words; the published checklists are what a journal wants. An item is filled
only with facts of the study and its results, never with a judgement.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from .report_words import Json, metric_keys

__all__ = ["checklists"]

CLAIM_SOURCE: Final = (
    "Tejani et al., Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update, Radiology: "
    "Artificial Intelligence 2024;6(4):e240300."
)
TRIPOD_SOURCE: Final = "Collins et al., TRIPOD+AI statement, BMJ 2024;385:e078378."

CLAIM: Final = {
    "1": "title: an AI study, and of which kind", "2": "structured abstract", "3": "background and intended use",
    "4": "aims and hypotheses", "5": "prospective or retrospective", "6": "goal of the study", "7": "data sources",
    "8": "inclusion and exclusion criteria", "9": "preprocessing", "10": "selection of parts of the data",
    "11": "de-identification", "12": "missing data", "13": "acquisition protocol",
    "14": "how the reference standard was made", "15": "why this reference standard", "16": "who annotated",
    "17": "annotation of the test set", "18": "variability between and within raters", "19": "assignment to partitions",
    "20": "level at which partitions are disjoint", "21": "intended sample size", "22": "the model",
    "23": "software and versions", "24": "initialisation of weights", "25": "training and its settings",
    "26": "how the final model was chosen", "27": "ensembling", "28": "performance metrics",
    "29": "significance and uncertainty", "30": "robustness and sensitivity", "31": "explainability",
    "32": "evaluation on internal data", "33": "testing on external data", "34": "trial registration",
    "35": "patients included and excluded", "36": "characteristics of each partition",
    "37": "performance with uncertainty", "38": "diagnostic accuracy and its precision", "39": "failures",
    "40": "limitations", "41": "implications for practice", "42": "full protocol", "43": "availability of software, "
    "model and data", "44": "funding",
}  # fmt: skip
TRIPOD: Final = {
    "1": "title", "2": "abstract", "3": "background, target population, known inequalities", "4": "objectives",
    "5": "data sources and dates", "6": "participants: setting, eligibility, treatments", "7": "data preparation",
    "8": "outcome and how it was assessed", "9": "predictors", "10": "sample size", "11": "missing data",
    "12": "analysis: partitions, model, tuning, performance measures", "13": "class imbalance", "14": "fairness",
    "15": "model output", "16": "training against evaluation data", "17": "ethics approval",
    "18": "funding, interests, protocol, registration, data and code sharing", "19": "patient and public involvement",
    "20": "participants: flow and characteristics", "21": "numbers in development and evaluation",
    "22": "full specification of the model", "23": "performance with intervals, heterogeneity over sites",
    "24": "updating of the model", "25": "interpretation", "26": "limitations",
    "27": "use: input quality, skill, next steps",
}  # fmt: skip


def checklists(results: Json) -> list[dict[str, Any]]:
    """Both lists for the template.

    Args:
        results: of a run or of a design.
    """
    facts = {name: fact(results) for name, fact in _FACTS.items()}
    claim = {
        "9": "preprocessing", "12": "missing", "19": "partitions", "20": "level", "22": "model", "23": "software",
        "24": "start", "25": "training", "26": "selection", "27": "ensembling", "28": "metrics", "29": "uncertainty",
        "32": "internal", "33": "external", "35": "numbers", "36": "characteristics", "37": "performance",
        "38": "performance", "39": "failures", "42": "protocol",
    }  # fmt: skip
    tripod = {
        "7": "preprocessing", "10": "numbers", "11": "missing", "12": "analysis", "14": "fairness", "15": "output",
        "16": "partitions", "20": "characteristics", "21": "numbers", "22": "protocol", "23": "performance",
    }  # fmt: skip
    return [
        _filled("CLAIM 2024", CLAIM_SOURCE, CLAIM, claim, facts),
        _filled("TRIPOD+AI 2024", TRIPOD_SOURCE, TRIPOD, tripod, facts),
    ]


def _filled(
    title: str, source: str, items: Mapping[str, str], known: Mapping[str, str], facts: Mapping[str, str]
) -> dict[str, Any]:
    entries = [{"number": n, "asks": asks, "text": facts.get(known.get(n, ""), "")} for n, asks in items.items()]
    return {"title": title, "source": source, "entries": entries, "known": sum(bool(e["text"]) for e in entries)}


def _section(results: Json, name: str) -> Json:
    found: Json = results["effective_study"].get(name, {})
    return found


def _preprocessing(results: Json) -> str:
    data = _section(results, "data")
    spacing = data.get("spacing")
    resampled = f"resampled to {' × '.join(f'{side:g}' for side in spacing)} mm" if spacing else "voxels as acquired"
    return (
        f"modalities {', '.join(data.get('modalities', []))}; {resampled}; intensities: {data.get('normalise')}; "
        f"augmentation: {data.get('augment')}"
    )


def _missing(results: Json) -> str:
    data = _section(results, "data")
    return f"a missing modality: {data.get('missing_modality')}; empty masks: {data.get('empty_masks')}"


def _partitions(results: Json) -> str:
    evaluation = _section(results, "evaluation")
    if results.get("kind") == "design":
        what = {"loso": "each hospital held out once, the others train", "cv": "patients of each hospital in folds"}
        first = what.get(results["design"], "as the study says")
    else:
        first = f"held out: {', '.join(evaluation.get('heldout', [])) or 'no hospital'}"
    share = evaluation.get("validation_fraction", 0.0)
    return f"{first}; at training hospitals a share of {share:g} of patients validates, by keyed hash"


def _level(_: Json) -> str:
    return "patient: all scans of a patient are on one side; hospitals that are held out share no patient by design"


def _model(results: Json) -> str:
    model = _section(results, "model")
    return ", ".join(f"{key} {value}" for key, value in model.items())


def _software(results: Json) -> str:
    return ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())


def _start(results: Json) -> str:
    source = _section(results, "training").get("init", {}).get("from", "")
    title = results.get("start", {}).get("title") or (f"pre-trained: {source}" if source else "untrained network")
    return f"{title}, seed {_section(results, 'study').get('seed')}"


def _training(results: Json) -> str:
    training, strategy = _section(results, "training"), _section(results, "strategy")
    keys = (
        "rounds",
        "local_steps",
        "local_epochs",
        "batch_size",
        "optimizer",
        "learning_rate",
        "schedule",
        "loss",
        "ema",
    )
    shown = ", ".join(f"{key} {training[key]}" for key in keys if training.get(key))
    privacy = _section(results, "privacy")
    promise = (
        "no privacy"
        if results.get("privacy", privacy).get("mode") == "none"
        else (f"patient-level differential privacy, mode {privacy.get('mode')}, ε {privacy.get('epsilon'):g}")
    )
    return f"federated, {strategy.get('name')}; {shown}; {promise}"


def _selection(results: Json) -> str:
    select = _section(results, "evaluation").get("select") or "the first metric"
    return f"best round by {select} on validation patients of training hospitals; held-out hospitals never choose"


def _ensembling(results: Json) -> str:
    ema = _section(results, "training").get("ema", 0.0)
    return f"moving average of the model over rounds, decay {ema:g}" if ema else "none"


def _metrics(results: Json) -> str:
    if results.get("kind") == "design":
        evidence = results.get("evidence") or {}
        return ", ".join(dict.fromkeys(row["metric"] for row in evidence.get("scores", [])))
    return ", ".join(metric_keys(results))


def _uncertainty(results: Json) -> str:
    if not results.get("evidence"):
        if results.get("privacy", {}).get("metrics_epsilon"):
            return "95 % intervals of the noise and of sampling patients, made of public numbers"
        return "95 % intervals over patients of each hospital, by Bayesian or BCa bootstrap (docs/evidence.md)"
    return (
        "95 % intervals, patients resampled within hospitals, of differences by BCa bootstrap; paired Wilcoxon "
        "signed-rank over patients, Holm over each table; rank-biserial effect with interval; TOST for not worse than"
    )


def _numbers(results: Json) -> str:
    cohort = (results.get("evidence") or {}).get("cohort") or []
    if cohort:
        return "; ".join(f"{row['site']}: {row['patients']} patients" for row in cohort)
    return "; ".join(f"{name}: {site['public_size']} (public size)" for name, site in results.get("sites", {}).items())


def _characteristics(results: Json) -> str:
    cohort = (results.get("evidence") or {}).get("cohort") or []
    traits = sorted({trait for row in cohort for trait in row["groups"]})
    return f"cohort table, by {', '.join(traits)}" if traits else ""


def _performance(results: Json) -> str:
    return "score tables of this page, per hospital, with 95 % intervals" if _metrics(results) else ""


def _failures(results: Json) -> str:
    evidence = results.get("evidence")
    if not evidence:
        return ""
    failed = sum(row.get("failed", 0) for row in evidence["scores"] if row["site"] != "*")
    runs = len(evidence.get("failures", {}))
    return f"{failed} values that are not finite, and {runs} failed runs, are counted and shown"


def _protocol(results: Json) -> str:
    return f"the effective study on this page, SHA-256 {results['study_hash']}"


def _analysis(results: Json) -> str:
    return f"{_partitions(results)}. {_training(results)}. {_uncertainty(results)}"


def _fairness(results: Json) -> str:
    return (
        "disparity over hospitals, and groups of patients" if (results.get("evidence") or {}).get("disparity") else ""
    )


def _output(results: Json) -> str:
    task = _section(results, "task")
    kind, unit = task.get("kind"), f" ({task['unit']})" if task.get("unit") else ""
    if kind == "regression":
        return f"a number: {task['target']}{unit}"
    if kind == "survival":
        return f"time without the event up to {task['time_cuts'][-1]:g}{unit}: {task['target']}"
    what = "a label per voxel" if kind == "segmentation" else "a probability per class"
    return f"{what}: {', '.join(task.get('labels', []))}"


def _internal(results: Json) -> str:
    return "validation patients of training hospitals" if _metrics(results) else ""


def _external(results: Json) -> str:
    if results.get("kind") == "design":
        return "every hospital, held out in turn" if results["design"] == "loso" else ""
    held = _section(results, "evaluation").get("heldout", [])
    return f"hospitals that never trained: {', '.join(held)}" if held else ""


_FACTS: Final[Mapping[str, Callable[[Json], str]]] = {
    "preprocessing": _preprocessing, "missing": _missing, "partitions": _partitions, "level": _level, "model": _model,
    "software": _software, "start": _start, "training": _training, "selection": _selection, "ensembling": _ensembling,
    "metrics": _metrics, "uncertainty": _uncertainty, "internal": _internal, "external": _external, "numbers": _numbers,
    "characteristics": _characteristics, "performance": _performance, "failures": _failures, "protocol": _protocol,
    "analysis": _analysis, "fairness": _fairness, "output": _output,
}  # fmt: skip
