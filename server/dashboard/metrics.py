# SPDX-License-Identifier: Apache-2.0
"""``/metrics``: the consortium and its latest runs for Prometheus."""

from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..run_view import RunView, Status
from .home import Home, Shown

__all__ = ["exposition"]

LATEST = 20
"""Runs: what Prometheus has seen of older ones, it keeps."""
PATIENCE = 5.0
"""Seconds: whoever asks once a minute must not be told each time that nobody is online."""


def exposition(home: Home) -> bytes:
    """All metrics in Prometheus' text format. Times are seconds since 1970; ε is what hospitals reported so far."""
    registry = CollectorRegistry()
    registry.register(_Collector(home))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, home: Home) -> None:
        self._home = home

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if self._home.consortium:
            yield from _sites(self._home)
        yield from _runs(self._home.runs()[:LATEST])


def _sites(home: Home) -> Iterator[Metric]:
    assert home.consortium is not None  # noqa: S101 - for the checkers; the caller looked
    nodes, sites = home.nodes(PATIENCE), home.consortium.registry.sites()
    up = GaugeMetricFamily("fedneuro_superlink_up", "1 while the SuperLink of start answers")
    up.add_metric([], float(nodes is not None))
    count = GaugeMetricFamily("fedneuro_sites", "Sites by state", labels=["state"])
    for state in ("invited", "enrolled", "revoked"):
        count.add_metric([state], sum(site.state == state for site in sites))
    online = GaugeMetricFamily("fedneuro_site_online", "1 while the site's node is online", labels=["site", "role"])
    heard = GaugeMetricFamily("fedneuro_site_last_contact_seconds", "Last heartbeat", labels=["site"])
    ends = GaugeMetricFamily("fedneuro_site_certificate_end_seconds", "End of its certificate", labels=["site"])
    for site in sites:
        if site.state != "enrolled":
            continue
        ends.add_metric([site.name], site.expires)
        if nodes is not None:
            node = nodes.get(site.name)
            online.add_metric([site.name, site.role.value], float(bool(node and node.online)))
            if node and node.heard:
                heard.add_metric([site.name], node.heard)
    yield from (up, count, online, heard, ends)


def _runs(runs: list[Shown]) -> Iterator[Metric]:
    status = GaugeMetricFamily("fedneuro_run_status", "1 for the run's status, else 0", labels=["run", "status"])
    number = GaugeMetricFamily("fedneuro_run_round", "Round under way, or the last", labels=["run"])
    rounds = GaugeMetricFamily("fedneuro_run_rounds", "Rounds of the study", labels=["run"])
    seconds = GaugeMetricFamily("fedneuro_run_round_seconds", "Duration of the last whole round", labels=["run"])
    missing = GaugeMetricFamily("fedneuro_run_site_missing", "1 while the site is missing", labels=["run", "site"])
    loss = GaugeMetricFamily("fedneuro_run_site_loss", "Last training loss", labels=["run", "site"])
    epsilon = GaugeMetricFamily("fedneuro_run_site_epsilon", "Privacy spent per patient", labels=["run", "site"])
    budget = GaugeMetricFamily("fedneuro_run_epsilon_budget", "The study's budget at each site", labels=["run"])
    labels = ["run", "site", "role", "metric"]
    metric = GaugeMetricFamily("fedneuro_run_site_metric", "Last evaluation, mean over patients", labels=labels)
    for shown in runs:
        view = shown.view
        for one in get_args(Status):
            status.add_metric([view.name, one], float(view.status == one))
        number.add_metric([view.name], view.round)
        rounds.add_metric([view.name], view.rounds)
        if (last := _last_seconds(view)) is not None:
            seconds.add_metric([view.name], last)
        if shown.study and shown.study.privacy.mode != "none":
            budget.add_metric([view.name], shown.study.privacy.epsilon)
        for site in view.sites.values():
            missing.add_metric([view.name, site.name], float(site.missing_since is not None))
            if site.loss is not None:
                loss.add_metric([view.name, site.name], site.loss)
            if site.epsilon is not None:
                epsilon.add_metric([view.name, site.name], site.epsilon)
            for name, value in site.metrics.items():
                metric.add_metric([view.name, site.name, site.role, name], value)
    yield from (status, number, rounds, seconds, missing, loss, epsilon, budget, metric)


def _last_seconds(view: RunView) -> float | None:
    done = [entry.seconds for _, entry in sorted(view.history.items()) if entry.seconds is not None]
    return done[-1] if done else None
