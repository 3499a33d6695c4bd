# SPDX-License-Identifier: Apache-2.0
"""``results.json``: what a run found, in one documented, versioned structure (``docs/results.md``).

It is built from the saved state alone, so it can be written at any time, also after a crash, when it says
``"status": "partial"`` and takes the best saved round.
"""

from pathlib import Path
from typing import Any

from ..models.state import digest, save_arrays
from ..privacy.accounting import NEIGHBOURS
from ..privacy.budget import site_delta
from ..privacy.contract import Role
from .report_evidence import read_evidence
from .report_words import PROTECTS_AGAINST
from .selection import select_round, training_value
from .site_results import site_results
from .store import RunStore, dumps

__all__ = ["RESULTS_VERSION", "build_results", "write_results"]

RESULTS_VERSION = 1

NOT_COVERED = (
    "choices made by looking at results: hyper-parameters, rounds, the selected round",
    "public cohort sizes, and the presence of a hospital in the study",
    "a patient who was treated at two hospitals counts at each: the two ε compose",
)


EXACT_METRICS = "metrics on validation patients and held-out patients, which are not noised"
RELEASED_METRICS = {
    "suppress": "exact means over evaluated patients, none below the minimum cohort; training losses stay at the site",
    "noise": "means over evaluated patients with Gaussian noise, charged to the site's ledger; training losses stay at "
    "the site",
}


def build_results(store: RunStore) -> dict[str, Any]:
    """Everything that is known of a run, as JSON values."""
    study, final, rounds, sites = store.study, store.final(), store.rounds(), store.sites()
    selected = final["selected_round"] if final else select_round(study, rounds, sites)
    by_round = {record.round: record for record in rounds}
    chosen = by_round.get(selected)
    metrics = final["metrics"] if final else (chosen.metrics if chosen else {})
    start = by_round[0].metrics if 0 in by_round else {}
    initial = store.initial()
    value = training_value(chosen, study.select_metric, sites) if chosen and study.select_metric != "last" else None
    seen: dict[str, str] = {}
    for record in sites.values():
        seen |= record.versions
    return {
        "schema_version": RESULTS_VERSION,
        "study": {"name": study.study.name, "description": study.study.description},
        "study_hash": study.hash,
        "effective_study": study.model_dump(mode="json"),
        "status": "complete" if final else "partial",
        "engine": store.engine,
        "selected_round": selected,
        "select": {"metric": study.select_metric, "value": value},
        "start": {
            "from": study.training.init.source,
            "title": study.training.init.title,
            "digest": None if initial is None else digest(initial),
        },
        "sites": {
            name: {
                "role": site.role,
                "public_size": site.public_size,
                **site_results(metrics.get(name, {})),
                "untrained": {} if study.training.init.source else site_results(start.get(name, {}))["metrics"],
                "start": site_results(start.get(name, {}))["metrics"],
                "state": site.state,
            }
            for name, site in sites.items()
        },
        "rounds": [
            {
                "round": r.round, "seconds": r.seconds, "bytes_down": r.bytes_down, "bytes_up": r.bytes_up,
                "train": r.train, "metrics": r.metrics, "refusals": r.refusals,
            }
            for r in rounds
        ],
        "privacy": _privacy(store),
        "comparators": store.comparators(),
        "evidence": read_evidence(store.out),
        "versions": seen,
        "seconds": sum(r.seconds for r in rounds),
    }  # fmt: skip


def _privacy(store: RunStore) -> dict[str, Any]:
    """What was promised and spent. ε is what each site reported last, over all its rounds, at the site's own δ.

    Where sites differ in δ, ``delta`` is the largest, and ``delta_by_site`` has all.
    """
    privacy = store.study.privacy
    epsilon: dict[str, float] = {}
    sigma: dict[str, float] = {}
    for record in store.rounds():
        for name, trained in record.train.items():
            if trained["epsilon"] is not None:
                epsilon[name] = trained["epsilon"]
                sigma[name] = trained["noise_multiplier"]
    found: dict[str, Any] = {"mode": privacy.mode, "unit": "patient", "epsilon": dict(sorted(epsilon.items()))}
    if privacy.mode == "none":
        return {**found, "delta": None, "not_covered": ["everything: the study promises no privacy"]}
    deltas = {
        name: site_delta(privacy.delta, site.public_size)
        for name, site in store.sites().items()
        if site.role == Role.TRAIN.value
    }
    noised = privacy.metrics == "noise"
    return {
        **found,
        "delta": max(deltas.values(), default=privacy.delta or None),
        "delta_by_site": deltas,
        "neighbouring_relation": NEIGHBOURS,
        "protects_against": PROTECTS_AGAINST[privacy.mode],
        "tolerate": privacy.tolerate if privacy.mode == "distributed" else None,
        "clip": privacy.clip,
        "sample_rate": privacy.sample_rate,
        "steps": store.study.total_steps,
        "noise_multiplier": dict(sorted(sigma.items())),
        "accountant": "PLD (dp-accounting)",
        "metrics": RELEASED_METRICS[privacy.metrics],
        "metrics_epsilon": privacy.metrics_epsilon if noised else None,
        "not_covered": list(NOT_COVERED if noised else (NOT_COVERED[0], EXACT_METRICS, *NOT_COVERED[1:])),
    }


def write_results(store: RunStore) -> dict[str, Any]:
    """Write ``results.json`` and ``model.safetensors`` into the run's folder; returns the results.

    The model is the selected round's, with the study hash and its own digest in the metadata.
    """
    results = build_results(store)
    if store.rounds():
        groups = store.groups(results["selected_round"])
        arrays = groups.get("evaluated", groups["model"])
        results["model_digest"] = digest(arrays)
        metadata = {
            "study_hash": store.study.hash,
            "round": str(results["selected_round"]),
            "digest": results["model_digest"],
        }
        save_arrays(store.out / "model.safetensors", arrays, metadata)
    _write(store.out / "results.json", dumps(results))
    return results


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
