# SPDX-License-Identifier: Apache-2.0
"""The rules of a policy, one function each: what the gate enforces and what ``policy explain`` prints.

A rule looks at a study and the site, and says whether it passes and why, in words for the hospital's staff. The
first rule that fails decides. Rules about the moment (time windows, requests per hour, hours of computing, repeated
rounds) need the node's state and are in :mod:`.gate`.

Unit of every privacy number: the patient. Neighbouring relation: zero-out of one patient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..privacy.accounting import COARSE_GRID, epsilon
from ..privacy.budget import evaluations, metric_event, site_delta, training_event
from ..privacy.contract import Role
from ..privacy.errors import BadInput, Reason, Refused
from ..privacy.signing import verify_study
from ..privacy.study import Study
from ..privacy.wire_layout import uplink_names
from .network_layout import Layout, network_layout
from .policy import Denied, Policy, StudyRule
from .settings import SiteSettings

__all__ = ["Case", "Verdict", "epsilon_per_round", "judge", "layout_of", "require"]

_ROUNDING = 1 + 1e-6  # σ was calibrated to meet ε exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A study that asks, and whom it asks.

    Attributes:
        study: the study.
        site: the hospital's data set.
        signature: what came with the study as the coordinator's signature, or empty.
    """

    study: Study
    site: SiteSettings
    signature: bytes = b""

    @property
    def trains(self) -> bool:
        """Whether the study asks this site to train."""
        return self.site.name not in self.study.evaluation.heldout

    @property
    def private(self) -> bool:
        """Whether the study promises privacy."""
        return self.study.privacy.mode != "none"

    @property
    def delta(self) -> float:
        """δ of the study at this site."""
        return site_delta(self.study.privacy.delta, self.site.public_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one rule says.

    Attributes:
        rule: the key of ``policy.toml``.
        passed: whether the study may go on.
        text: why, with the values; stays at the hospital.
        reason: the code that leaves where it fails.
    """

    rule: str
    passed: bool
    text: str
    reason: Reason = Reason.POLICY_REFUSED


Finding = tuple[bool, str]
Rule = Callable[[Policy, Case], Finding]


def judge(policy: Policy, case: Case) -> list[Verdict]:
    """Every rule's verdict, in the order in which they are asked; the first that fails decides."""
    return [
        Verdict(rule=name, passed=passed, text=text, reason=_REASONS.get(name, Reason.POLICY_REFUSED))
        for name, rule in _RULES.items()
        for passed, text in [_careful(rule, policy, case)]
    ]


def require(policy: Policy, case: Case) -> str:
    """The rule that lets the study in (``studies.approved`` or ``studies.rules``).

    Raises:
        Denied: with the text and reason of the first rule that fails.
    """
    for name, rule in _RULES.items():
        passed, text = _careful(rule, policy, case)
        if not passed:
            raise Denied(name, text, reason=_REASONS.get(name, Reason.POLICY_REFUSED))
    return "studies.approved" if case.study.hash in policy.studies.approved else "studies.rules"


def _careful(rule: Rule, policy: Policy, case: Case) -> Finding:
    """A rule whose number cannot be computed fails."""
    try:
        return rule(policy, case)
    except BadInput as error:
        return False, f"cannot be judged: {error}"


# -- which study, role and data set --------------------------------------------------------------------------


def _approved(policy: Policy, case: Case) -> Finding:
    short = case.study.hash[:12]
    if case.study.hash in policy.studies.approved:
        return True, f"study {short} is approved by its hash"
    why = []
    for number, rule in enumerate(policy.studies.rules, start=1):
        failed = list(_misses(rule, case))
        if not failed:
            return True, f"study {short} is approved by rule {number}"
        why.append(f"rule {number}: {failed[0]}")
    what = "; ".join(why) or "no rule is given"
    return False, f"study {short} ({case.study.study.name}) is not approved by its hash; {what}"


def _misses(rule: StudyRule, case: Case) -> Iterator[str]:
    study = case.study
    if study.task.kind not in rule.tasks:
        yield f"task {study.task.kind} is not in tasks"
    if case.site.dataset_id not in rule.datasets:
        yield f"data set {case.site.dataset_id} is not in datasets"
    if study.privacy.mode not in rule.modes:
        yield f"mode {study.privacy.mode} is not in modes"
    try:
        verify_study(study, case.signature, rule.coordinator)
    except Refused as error:
        yield str(error)


def _role(policy: Policy, case: Case) -> Finding:
    asked = Role.TRAIN if case.trains else Role.HELDOUT
    if asked is not case.site.role:
        return False, f"the study asks for role {asked.value}, the node's settings grant {case.site.role.value}"
    return asked in policy.grant.roles, f"role {asked.value}; granted: {_list(policy.grant.roles)}"


def _dataset(policy: Policy, case: Case) -> Finding:
    granted = policy.grant.datasets
    return case.site.dataset_id in granted, f"data set {case.site.dataset_id}; granted: {_list(granted)}"


# -- privacy -------------------------------------------------------------------------------------------------


def _mode(policy: Policy, case: Case) -> Finding:
    mode = case.study.privacy.mode
    return mode in policy.privacy.modes, f"mode {mode}; permitted: {_list(policy.privacy.modes)}"


def epsilon_per_round(study: Study, public_size: int) -> float:
    """ε of one round's private steps alone, at the site's δ; an upper bound.

    Raises:
        BadInput: no sensible noise reaches the study's ε.
    """
    event = training_event(study, public_size, steps=study.training.local_steps)
    return epsilon([event], site_delta(study.privacy.delta, public_size), grid=COARSE_GRID)


def _round_epsilon(policy: Policy, case: Case) -> Finding:
    limit, study = policy.privacy.max_epsilon_round, case.study
    if not case.private:
        return True, "the study promises no ε (see privacy.modes)"
    costs = []
    if case.trains:
        costs.append(epsilon_per_round(study, case.site.public_size))
    if study.privacy.metrics == "noise":
        costs.append(epsilon([metric_event(study, case.site.public_size)], case.delta, grid=COARSE_GRID))
    if not costs:
        return True, "this site adds nothing private in a round"
    return max(costs) <= limit * _ROUNDING, f"ε of a round {max(costs):.3g}; at most {limit:g}"


def _study_epsilon(policy: Policy, case: Case) -> Finding:
    limit, privacy = policy.privacy.max_epsilon_study, case.study.privacy
    if not case.private:
        return True, "the study promises no ε (see privacy.modes)"
    asked = privacy.epsilon if case.trains else 0.0
    if privacy.metrics == "noise":
        asked = max(asked, privacy.metrics_epsilon)
    return asked <= limit, f"ε of the study {asked:g}; at most {limit:g}"


def _dataset_epsilon(policy: Policy, case: Case) -> Finding:
    limit, privacy = policy.privacy.max_epsilon_dataset, case.study.privacy
    if not case.private:
        return True, "the study promises no ε (see privacy.modes)"
    spends = case.trains or privacy.metrics == "noise"
    text = f"all studies on data set {case.site.dataset_id} together may spend ε {limit:g}; the ledger counts"
    return limit > 0 or not spends, text


def _delta(policy: Policy, case: Case) -> Finding:
    if not case.private:
        return True, "the study promises no δ (see privacy.modes)"
    return case.delta <= policy.privacy.max_delta, f"δ {case.delta:g}; at most {policy.privacy.max_delta:g}"


def _noise(policy: Policy, case: Case) -> Finding:
    least = policy.privacy.min_noise_multiplier
    if not case.private or not case.trains:
        return True, "no noise is due: the study is not private, or this site does not train"
    sigma = training_event(case.study, case.site.public_size).noise_multiplier
    return sigma >= least, f"noise multiplier {sigma:.3g}; at least {least:g}"


def _cohort(policy: Policy, case: Case) -> Finding:
    least, size = policy.privacy.min_cohort, case.site.public_size
    return size >= least, f"declared cohort {size}; at least {least}"


# -- model and replies ---------------------------------------------------------------------------------------


def layout_of(study: Study) -> Layout:
    """Name, numbers and bytes of every array of a study's network; nothing of its size is allocated."""
    return network_layout(study.model.model_dump_json(), len(study.data.modalities), study.task.channels)


def _model_name(policy: Policy, case: Case) -> Finding:
    name = case.study.model.name
    return name in policy.model.names, f"model {name}; permitted: {_list(policy.model.names)}"


def _parameters(policy: Policy, case: Case) -> Finding:
    count, limit = sum(n for _, n, _ in layout_of(case.study)), policy.model.max_parameters
    return count <= limit, f"{count:,} parameters; at most {limit:,}"


def _bytes(policy: Policy, case: Case) -> Finding:
    size, limit = sum(b for _, _, b in layout_of(case.study)), policy.model.max_bytes
    return size <= limit, f"{size:,} bytes per model; at most {limit:,}"


def _arrays(policy: Policy, case: Case) -> Finding:
    if not case.trains:
        return True, "no arrays leave: this site does not train"
    patterns, leaving = policy.reply.arrays, uplink_names(case.study)
    names = [name for name, _, _ in layout_of(case.study) if leaving is None or name in leaving]
    kept = [name for name in names if not any(fnmatchcase(name, p) for p in patterns)]
    if kept:
        return False, f"{len(kept)} arrays of the reply match no pattern, such as {kept[0]}"
    return True, f"every array of the reply matches one of {_list(patterns)}"


def _metrics(policy: Policy, case: Case) -> Finding:
    extra = [name for name in case.study.metric_names if name not in policy.reply.metrics]
    return not extra, f"metrics {_list(case.study.metric_names)}; permitted: {_list(policy.reply.metrics)}"


def _exact(policy: Policy, case: Case) -> Finding:
    noised = case.study.privacy.metrics == "noise"
    text = "metrics carry noise" if noised else f"exact metrics, {evaluations(case.study)} times"
    return noised or policy.reply.exact_metrics, f"{text}; exact ones permitted: {policy.reply.exact_metrics}".lower()


def _strata(policy: Policy, case: Case) -> Finding:
    names = case.study.evaluation.strata
    if not names:
        return True, "no metrics of groups of patients leave"
    return policy.reply.strata, f"metrics by {_list(names)}; groups permitted: {policy.reply.strata}".lower()


def _rounds(policy: Policy, case: Case) -> Finding:
    rounds, limit = case.study.training.rounds, policy.limits.max_rounds
    return rounds <= limit, f"{rounds} rounds; at most {limit}"


_RULES: dict[str, Rule] = {
    "studies": _approved,
    "grant.roles": _role,
    "grant.datasets": _dataset,
    "privacy.modes": _mode,
    "privacy.max_epsilon_study": _study_epsilon,
    "privacy.max_epsilon_dataset": _dataset_epsilon,
    "privacy.max_delta": _delta,
    "privacy.min_cohort": _cohort,
    "limits.max_rounds": _rounds,
    "privacy.max_epsilon_round": _round_epsilon,
    "privacy.min_noise_multiplier": _noise,
    "model.names": _model_name,
    "model.max_parameters": _parameters,
    "model.max_bytes": _bytes,
    "reply.arrays": _arrays,
    "reply.metrics": _metrics,
    "reply.exact_metrics": _exact,
    "reply.strata": _strata,
}
"""By the key of ``policy.toml``; the cheap ones first, so that a flood costs little."""

_REASONS = {"studies": Reason.STUDY_NOT_APPROVED, "grant.roles": Reason.ROLE_REFUSED}


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
