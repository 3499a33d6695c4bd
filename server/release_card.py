# SPDX-License-Identifier: Apache-2.0
"""The model card of a release, in Markdown: what a reader must know before the model meets a patient.

Everything that the run knows is filled in; what only a person can know is marked ``TO WRITE``, and counted. Held-out
sites come first, ε and its unit stand in the same row as the score, and sizes are the public ones alone.

Reference: Mitchell et al. 2019, Model cards, https://doi.org/10.1145/3287560.3287596; CLAIM 2024 update,
https://doi.org/10.1148/ryai.240300.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..privacy.study import Study
from ..privacy.study_data import PreprocessingSection
from .report_words import epsilon_text
from .scores import price_per_unit

__all__ = ["NOT_A_DEVICE", "TO_WRITE", "model_card", "privacy_words"]

TO_WRITE: Final = "**TO WRITE**"
NOT_A_DEVICE: Final = (
    "Not a medical device. Not cleared, certified or validated for diagnosis or treatment; for research use only."
)
_CLAIM: Final = (
    ("Ethics approval and consent, by hospital", ""),
    ("Inclusion and exclusion criteria, dates of the scans", ""),
    ("De-identification, and who did it", ""),
    ("Reference standard: who drew it, with which tool, agreement between readers", ""),
    ("Scanners, field strengths, sequences, by hospital", ""),
    ("Age, sex and disease stage of patients, by hospital", ""),
    ("Data splits", "patients by a keyed hash; whole hospitals held out"),
    ("Preprocessing", "in the study, identical at every hospital (above)"),
    ("Model, initialisation, training", "in the study, every default filled in (manifest.json)"),
    ("Selection of the model", "by {select} on validation patients of training hospitals; held-out ones never choose"),
    ("Uncertainty", "95 % intervals {uncertainty}"),
    ("Failure analysis", ""),
    ("External validation beyond this study", ""),
    ("Funding and conflicts of interest", ""),
)


def privacy_words(privacy: Mapping[str, Any]) -> str:
    """What was promised, in a sentence."""
    if privacy["mode"] == "none":
        return (
            "No differential privacy: the model may have memorised patients. Share it as you would share patient data."
        )
    spent = privacy["epsilon"].values()
    worst = f"ε = {epsilon_text(max(spent))}" if spent else "no ε was spent"
    return (
        f"Differential privacy, unit: the {privacy['unit']} (all scans of one patient); mode {privacy['mode']}; "
        f"largest {worst} at δ = {privacy['delta']:g}, all rounds and retries composed by {privacy['accountant']}."
    )


def model_card(results: Mapping[str, Any], study: Study, facts: Mapping[str, str]) -> str:
    """The card.

    Args:
        results: the content of ``results.json``.
        study: of the run.
        facts: further rows of the first table (parameters, digest, ONNX, signature).
    """
    name, task = study.study.name, study.task
    what = {"segmentation": "Segments", "classification": "Classifies scans into"}.get(task.kind, "Predicts")
    parts = [
        f"# Model card: {name}",
        f"> {NOT_A_DEVICE}",
        _plain(study.study.description) or f"{TO_WRITE}: what it is for, in a sentence.",
        "## The model",
        _table(("", ""), [*_model_rows(study), *facts.items()]),
        "## Intended use",
        f"{what} {', '.join(task.outputs)} from {', '.join(study.data.modalities)}. Research on data like that of the "
        "hospitals below; compare with your own readers on your own scans first (`fedneuro-node predict`).",
        f"{TO_WRITE}: patients, indications, scanners and users that it is meant for, and those that it is not.",
        "## Results",
        _results(results, study),
        f"{_start(results)} `report.html` shows curves, the start and comparisons; `results.json` every number.",
        "## Privacy",
        privacy_words(results["privacy"]),
        *_privacy(results["privacy"]),
        "## Hospitals",
        _table(
            ("hospital", "part", "declared size", "in the last round"),
            [(n, _part(s), f"about {s['public_size']}", s["state"]) for n, s in _sites(results)],
        ),
        "Sizes are those that each hospital declared, rounded; no other size, and nothing of single patients, is known "
        "to the coordinator.",
        "## Limitations",
        _limitations(results, study),
        "## Reporting items (after CLAIM)",
        _claim(study),
    ]
    return "\n\n".join(parts) + "\n"


def _model_rows(study: Study) -> list[tuple[str, str]]:
    model, data = study.model, study.data
    shape = "slices (" + data.slice_axis + ")" if model.dims == 2 else "volumes"
    spacing = " × ".join(f"{mm:g}" for mm in data.spacing) + " mm" if data.spacing else "as acquired"
    usual = PreprocessingSection().model_dump()
    extra = {key: value for key, value in data.preprocessing.model_dump().items() if value != usual[key]}
    steps = f"to RAS+; voxels {spacing}; {data.normalise}" + "".join(f"; {k} = {v}" for k, v in extra.items())
    size = "-".join(map(str, model.channels))
    return [
        ("network", f"{model.name}, {model.dims}D, {size} channels, {model.norm} norm"),
        ("input", f"{', '.join(data.modalities)}; {shape}"),
        ("output", ", ".join(study.task.outputs)),
        ("preprocessing", steps),
        ("training", f"{study.training.rounds} rounds, {study.strategy.name}, start: {study.training.init.title}"),
    ]


def _sites(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Held-out sites first."""
    return sorted(results["sites"].items(), key=lambda item: (item[1]["role"] != "heldout", item[0]))


def _part(site: Mapping[str, Any]) -> str:
    return "held out" if site["role"] == "heldout" else "training"


def _results(results: Mapping[str, Any], study: Study) -> str:
    names = list(dict.fromkeys(n for _, s in _sites(results) for n, v in s["metrics"].items() if _is_estimate(v)))
    names = sorted(names, key=lambda name: name not in study.metric_names)  # stable: totals before single labels
    if not names:
        return "No hospital returned a metric."
    rows = []
    for name, site in _sites(results):
        cost = price_per_unit(results["privacy"], name, heldout=site["role"] == "heldout")
        rows.append((f"{name} ({_part(site)})", *(_cell(site["metrics"].get(n)) for n in names), cost))
    return _table(("hospital", *names, "privacy spent for it"), rows) + (
        "\n\nMean over patients, [95 % interval], n = declared number of patients. At training hospitals: over their "
        "validation patients. No patient of a held-out hospital trained: what its score cost, patients of the training "
        "hospitals paid, at most so much."
    )


def _is_estimate(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("mean"), int | float) and len(value.get("ci95", ())) == 2


def _cell(value: Any) -> str:
    if not _is_estimate(value):
        return "not told"
    return f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}], n = {value['n']}"


def _start(results: Mapping[str, Any]) -> str:
    return f"Round {results['selected_round']} was chosen by {results['select']['metric']}."


def _privacy(privacy: Mapping[str, Any]) -> list[str]:
    lines = [f"Protects against: {privacy['protects_against']}"] if "protects_against" in privacy else []
    covered = "".join(f"- {line}\n" for line in privacy["not_covered"])
    return [*lines, f"Not covered:\n\n{covered}".rstrip()]


def _limitations(results: Mapping[str, Any], study: Study) -> str:
    heldout = [name for name, site in _sites(results) if site["role"] == "heldout"]
    judged = "It was never tried at a hospital that did not train it."
    if heldout:
        judged = f"Judged at {len(heldout)} held-out: {', '.join(heldout)}. Another hospital may differ more."
    lines = [
        judged,
        "Intervals are over patients of a hospital; they say nothing about another hospital.",
        f"Scans of other sequences than {', '.join(study.data.modalities)} are not its input, whatever they look like.",
    ]  # fmt: skip
    if results["engine"] != "deployment":
        lines.append(f"The run was a simulation on one machine (engine {results['engine']}), not a federation.")
    missing = [f"{name}: {site['state']}" for name, site in _sites(results) if site["state"] != "answered"]
    lines += [f"A hospital was missing: {text}." for text in missing]
    lines.append(f"{TO_WRITE}: known failures, groups of patients that are under-represented.")
    return "".join(f"- {_plain(line)}\n" for line in lines).rstrip()


def _claim(study: Study) -> str:
    noised = study.privacy.mode != "none" and study.privacy.metrics == "noise"
    resampled = f"by bootstrap over patients, {study.evaluation.bootstrap} resamples"
    uncertainty = "of the noise and of sampling patients, made of public numbers" if noised else resampled
    values = {"select": study.select_metric, "uncertainty": uncertainty}
    return _table(("item", ""), [(item, text.format(**values) if text else TO_WRITE) for item, text in _CLAIM])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        safe = (_plain(str(cell)).replace("|", "&#124;") for cell in cells)
        return "| " + " | ".join(safe) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _plain(text: str) -> str:
    """Texts of studies and states are other people's: no markup of theirs makes a tag, a heading or a line."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
