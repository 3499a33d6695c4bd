# SPDX-License-Identifier: Apache-2.0
"""What the pages say: plain values for the templates, which escape every one of them.

Held-out hospitals come first: what the model does where it never trained is what a study is for.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from markupsafe import Markup

from ...privacy.contract import Role
from ...privacy.errors import Reason
from ...privacy.study import Study
from ..consortium import Consortium
from ..events import Event
from ..registry import SiteRecord
from ..report_charts import metric_curve, train_curve
from ..report_words import curve_metric, duration_text, epsilon_text, main_metric, metric_name
from ..run_view import RunView, SiteView
from ..run_words import clock, sentence
from ..scores import heldout_scores, score_of, spent_so_far
from .home import Home, Shown

if TYPE_CHECKING:
    from ..control import NodeState

__all__ = ["FILES", "asked_sites", "consortium_page", "promise", "run_page", "runs_page", "studies_page"]

SOON_DAYS: Final = 30
FILES: Final = {
    "report.html": "Report",
    "evidence.html": "Evidence",
    "manifest.json": "Manifest",
    "results.json": "Results",
}
"""Files of a run that a browser may have, and what their links say."""
TONES: Final = {
    "complete": "good", "running": "good", "asking": "busy", "queued": "busy", "waiting": "warn", "stopped": "warn",
    "failed": "fault", "interrupted": "fault",
}  # fmt: skip
"""How a run's status looks."""
URGENT: Final = frozenset({"refused", "waiting", "fell-back", "failed", "stopped"})
EVENTS: Final = 30
MANY: Final = 6
"""Training hospitals; more share one look in the charts, so that the held-out ones can be seen."""


@dataclass(frozen=True, slots=True)
class Text:
    """Words with a tone: good, busy, warn, fault, or none."""

    words: str
    tone: str = ""


# -- consortium --------------------------------------------------------------------------------------------


def consortium_page(home: Home, consortium: Consortium) -> dict[str, Any]:
    """The sites with role, health, last contact and certificate; those that need attention first."""
    nodes, runs = home.nodes(), home.runs()
    heard: dict[str, float] = {}
    for shown in runs:
        for name, site in shown.view.sites.items():
            heard[name] = max(heard.get(name, 0.0), site.at)
    sites = [_site(site, nodes, heard.get(site.name, 0.0)) for site in consortium.registry.sites()]
    order = {"fault": 0, "warn": 1}
    urgency = {site["name"]: min(order.get(site[part].tone, 2) for part in ("health", "certificate")) for site in sites}
    sites.sort(key=lambda site: (urgency[site["name"]], site["name"]))
    enrolled = [site for site in sites if site["state"] == "enrolled"]
    return {
        "sites": sites,
        "up": nodes is not None,
        "down": home.is_down,
        "online": sum(site["health"].words == "online" for site in enrolled),
        "enrolled": len(enrolled),
        "invited": sum(site["state"] == "invited" for site in sites),
        "ending": [site["name"] for site in enrolled if site["certificate"].tone],
        "certificates": _own_certificates(consortium),
        "live": [_run_row(shown) for shown in runs if shown.view.is_live],
        "latest": [_run_row(shown) for shown in runs if not shown.view.is_live][:3],
    }


def asked_sites(sites: Sequence[SiteRecord], nodes: "Mapping[str, NodeState] | None") -> list[dict[str, Any]]:
    """Those that a launch would ask, the held-out ones first."""
    return [
        _site(site, nodes, 0.0) for site in sorted(sites, key=lambda site: (site.role is not Role.HELDOUT, site.name))
    ]


def _site(site: SiteRecord, nodes: "Mapping[str, NodeState] | None", heard: float) -> dict[str, Any]:
    node = nodes.get(site.name) if nodes is not None else None
    if site.state != "enrolled":
        health = Text(site.state, "busy" if site.state == "invited" else "")
    elif nodes is None:
        health = Text("not known")
    elif node is not None and node.online:
        health = Text("online", "good")
    else:
        health = Text("offline" if node and node.heard else "never online", "fault" if node and node.heard else "warn")
    heard = max(heard, node.heard if node else 0.0)
    return {
        "name": site.name,
        "role": "held out" if site.role is Role.HELDOUT else "trains",
        "heldout": site.role is Role.HELDOUT,
        "state": site.state,
        "health": health,
        "heard": clock(heard),
        "certificate": _until(site.expires) if site.expires else Text("none"),
    }


def _until(seconds: float) -> Text:
    """A certificate's end."""
    day, left = clock(seconds)[:10], (seconds - time.time()) / 86400
    if left <= 0:
        return Text(f"ended {day}", "fault")
    return Text(f"until {day}, {left:.0f} days left", "warn") if left < SOON_DAYS else Text(f"until {day}")


def _own_certificates(consortium: Consortium) -> list[tuple[str, Text]]:
    server = x509.load_pem_x509_certificate((consortium.folder / "tls" / "server.crt").read_bytes())
    found = [("server", server), *((f"issuing {number}", issuing) for number, issuing in consortium.issuing())]
    return [(name, _until(one.not_valid_after_utc.timestamp())) for name, one in [*found, ("root", consortium.root)]]


# -- runs and studies --------------------------------------------------------------------------------------


def runs_page(home: Home) -> dict[str, Any]:
    """All runs, the latest first."""
    return {"runs": [_run_row(shown) for shown in home.runs()]}


def _run_row(shown: Shown) -> dict[str, Any]:
    view = shown.view
    what = view.message or (f"round {view.selected_round} selected" if view.selected_round is not None else "")
    return {
        "name": view.name,
        "status": Text(view.status, TONES[view.status]),
        "round": view.round,
        "rounds": view.rounds,
        "who": view.who,
        "launched": clock(view.plan.launched or _first_heard(view)),
        "what": what,
        "scores": [str(score) for score in heldout_scores(view, shown.study)],
        "canary": view.plan.canary,
    }


def _first_heard(view: RunView) -> float:
    return min((site.at for site in view.sites.values() if site.at), default=0.0)


def studies_page(home: Home) -> dict[str, Any]:
    """Every study that was launched, and what each hospital last answered when asked to join."""
    found: dict[str, dict[str, Any]] = {}
    for shown in home.runs():
        study, view = shown.study, shown.view
        if study is None:
            continue
        entry = found.setdefault(
            study.hash,
            {
                "name": study.study.name, "description": study.study.description, "hash": study.hash,
                "privacy": promise(study), "rounds": study.training.rounds, "runs": [], "answers": {},
                "signed": shown.folder.study.with_suffix(".sig").is_file(),
                "heldout": study.evaluation.heldout,
            },
        )  # fmt: skip
        entry["runs"].append(view.name)
        for name, site in view.sites.items():
            entry["answers"].setdefault(name, _answer(site))
    for entry in found.values():
        heldout = entry["heldout"]
        entry["answers"] = sorted(entry["answers"].items(), key=lambda item: (item[0] not in heldout, item[0]))
        entry["joined"] = sum(answer.tone == "good" for _, answer in entry["answers"])
    return {"studies": list(found.values())}


def _answer(site: SiteView) -> Text:
    if site.role:
        return Text(f"joins, {site.public_size} patients declared", "good")
    if site.reason in ("", Reason.LOST.value, Reason.TIMEOUT.value):
        return Text(f"has not answered{f' ({site.reason})' if site.reason else ''}", "warn")
    return Text(f"refuses: {_why(site.reason)}", "fault")


def _why(reason: str) -> str:
    """A reason code with its meaning."""
    try:
        return f"{reason} ({Reason(reason).public_text})"
    except ValueError:
        return reason


def promise(study: Study) -> str:
    """What a study promises each patient."""
    privacy = study.privacy
    if privacy.mode == "none":
        return "no privacy promise"
    return f"{privacy.mode}, ε at most {privacy.epsilon:g} per patient"


# -- one run -----------------------------------------------------------------------------------------------


def run_page(shown: Shown, made: Mapping[str, Any], *, actions: bool) -> dict[str, Any]:
    """The live view of a run; ``made``: what is made of it, ``actions``: whether it can be stopped and resumed here."""
    view, study = shown.view, shown.study
    results = _results(shown) if study else None
    main = main_metric(results) if results else ""
    key = curve_metric(results, main) if results else ""
    sites = sorted(
        view.sites.values(), key=lambda site: (site.role != "heldout", site.missing_since is None, site.name)
    )
    privacy = spent_so_far(view.sites, study) if study else None
    rows = [_site_row(site, view, key, privacy) for site in sites]
    training = [site for site in sites if site.role != "heldout"]
    charts, budgets = _charts(results, sites, key), _gauges(study, training)
    return {
        "run": _run_row(shown),
        "made": made,
        "live": view.is_live,
        "stopping": view.stopping if view.is_live else "",
        "message": view.message,
        "study": _study_facts(study),
        "updated": clock(view.updated),
        "selected": view.selected_round,
        "pace": _pace(view),
        "answered": sum(site.state in ("trained", "evaluated") for site in training if site.missing_since is None),
        "training": len(training),
        "heldout": [row for row in rows if row["heldout"]],
        "sites": rows,
        "metric": metric_name(key) if key else "Metric",
        "charts": charts,
        "many": len(training) > MANY,
        "losses": any(row["loss"] for row in rows),
        "gauges": budgets,
        "private": bool(study and study.privacy.mode != "none"),
        "events": [_event(event) for event in shown.events[:EVENTS]],
        "files": [(name, words) for name, words in FILES.items() if (shown.folder.path / name).is_file()],
        "can_stop": actions and view.is_live,
        "can_resume": actions and not view.is_live and view.status != "complete" and bool(view.plan.launched),
    }


def _study_facts(study: Study | None) -> dict[str, str]:
    if study is None:
        return {}
    return {"name": study.study.name, "hash": study.hash, "privacy": promise(study)}


def _pace(view: RunView) -> str:
    """Seconds per round and what is left."""
    seconds = [entry.seconds for entry in view.history.values() if entry.seconds is not None]
    if not seconds:
        return ""
    mean = sum(seconds) / len(seconds)
    text = f"{duration_text(mean)} per round" if mean >= 1 else f"{mean:.2g} s per round"
    left = view.rounds - max(entry.round for entry in view.history.values() if entry.seconds is not None)
    return f"{text}, about {duration_text(mean * left)} left" if view.is_live and left > 0 else text


def _site_row(site: SiteView, view: RunView, key: str, privacy: Mapping[str, Any] | None) -> dict[str, Any]:
    score = score_of(site, key, privacy)
    return {
        "name": site.name,
        "heldout": site.role == "heldout",
        "role": {"heldout": "held out", "train": "trains"}.get(site.role, ""),
        "state": _state(site, view),
        "loss": "" if site.loss is None else f"{site.loss:.3f}",
        "epsilon": _epsilon(site, privacy),
        "score": score.value if score else "",
        "interval": score.interval if score else "",
        "price": score.price if score else "",
        "heard": clock(site.at)[11:],
    }


def _epsilon(site: SiteView, privacy: Mapping[str, Any] | None) -> str:
    """Its own, or for a score of a held-out hospital the largest of those that it owes to."""
    if site.epsilon is not None:
        return epsilon_text(site.epsilon)
    spent = privacy["epsilon"].values() if privacy else ()
    return f"≤ {epsilon_text(max(spent))}" if site.role == "heldout" and site.metrics and spent else ""


def _state(site: SiteView, view: RunView) -> Text:
    if site.missing_since is not None:
        since = f"round {site.missing_since}" if site.missing_since else "the start"
        return Text(f"missing since {since}: {_why(site.missing_reason)}", "fault")
    if site.reason:
        return Text(_why(site.reason), "fault")
    again = f", charged again (attempt {site.attempt})" if site.attempt > 1 and site.state == "trained" else ""
    if site.state == "training" and not view.is_live:
        return Text("had not finished")
    return Text(f"{site.state}{again}", "busy" if site.state in ("asked", "training") else "good")


def _gauges(study: Study | None, training: Sequence[SiteView]) -> list[dict[str, Any]]:
    """ε against the study's budget, the dearest first."""
    if study is None or study.privacy.mode == "none":
        return []
    budget = study.privacy.epsilon
    spent = sorted(((site.epsilon or 0.0, site.name) for site in training), key=lambda item: (-item[0], item[1]))
    return [
        {
            "name": name, "spent": epsilon_text(value), "budget": f"{budget:g}", "value": min(value, budget),
            "high": 0.9 * budget, "max": budget, "over": value > budget * (1 + 1e-9),
        }
        for value, name in spent
    ]  # fmt: skip


def _event(event: Event) -> dict[str, str]:
    tone = "fault" if event.kind == "failed" else "warn" if event.kind in URGENT else ""
    return {"at": clock(event.at), "text": sentence(event), "tone": tone}


def _results(shown: Shown) -> dict[str, Any]:
    """What the report's charts read, from what is known so far."""
    study, view = shown.study, shown.view
    assert study is not None  # noqa: S101 - for the checkers; the caller looked
    return {
        "rounds": [asdict(record) for record in shown.records],
        "selected_round": view.selected_round,
        "effective_study": study.model_dump(mode="json"),
        "select": {"metric": study.select_metric},
        "sites": {
            name: {"role": site.role, "metrics": dict.fromkeys(site.metrics)} for name, site in view.sites.items()
        },
    }


def _charts(results: Mapping[str, Any] | None, sites: Sequence[SiteView], key: str) -> list[tuple[str, Markup]]:
    """(title, drawing) of each curve that there is."""
    if results is None:
        return []
    seen = {name for record in results["rounds"] for name in (*record["metrics"], *record["train"])}
    heldout = [site.name for site in sites if site.role == "heldout" and site.name in seen]
    training = sorted(site.name for site in sites if site.role != "heldout" and site.name in seen)
    found = [
        (f"{metric_name(key)} by round", metric_curve(results, training, heldout, key)),
        ("Training loss by round", train_curve(results, training, "loss", "training loss")),
        ("Privacy spent by round", train_curve(results, training, "epsilon", "ε")),
    ]
    return [(title, drawing) for title, drawing in found if drawing is not None]
