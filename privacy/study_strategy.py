# SPDX-License-Identifier: Apache-2.0
"""The study's ``[strategy]`` and ``[wire]``: how updates become the next model, and in what form they travel.

What goes with what is decided here, once, for the study file, the messages and every node. The reasons:

* ``privacy.mode = "distributed"``: the coordinator only ever sees a *sum* of gradients, on which it takes the step that
  ``training.optimizer`` names. Nothing that looks at single updates (median, krum), sends something else besides or
  changes the words of the sum (int8) can be had there.
* ``privacy.mode = "local"``: what leaves is a noised update. All that the coordinator computes from it is
  post-processing, and so is what a site adds *after* the noise from numbers that were released before: the proximal
  term, a control variate made of earlier noised updates, the rounding of a noised update and what it carries over.
* ``ditto``: the personal model is trained without noise, and would tell of patients through its metrics.
"""

from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import Field, model_validator

from ..models.spec import Section, contradiction

if TYPE_CHECKING:
    from .study import Study

__all__ = ["StrategySection", "WireSection", "check_strategy"]

ADAPTIVE: Final = ("fedadam", "fedyogi", "fedadagrad")
OWNERS: Final = {
    "learning_rate": ("fedavgm", *ADAPTIVE, "scaffold"),
    "momentum": ("fedavgm", *ADAPTIVE),
    "second_moment": ("fedadam", "fedyogi"),
    "adaptivity": ADAPTIVE,
    "proximal": ("fedprox", "ditto"),
    "trim": ("trimmed_mean",),
    "byzantine": ("krum",),
    "keep": ("krum",),
}
"""Which strategies read a key."""


class StrategySection(Section):
    """How updates become the next global model. docs/strategies.md says when each suits."""

    name: Literal[
        "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedbn", "scaffold", "ditto",
        "trimmed_mean", "median", "krum",
    ] = Field(
        default="fedavg",
        description="fedavg: weighted mean of the sites' weights (McMahan 2017). fedprox: sites are held near the "
        "global model. fedavgm, fedadam, fedyogi, fedadagrad: the coordinator takes a step with memory. fedbn: "
        "normalisation layers stay at the site. scaffold: control variates take out the drift of sites. ditto: a "
        "personal model stays at each site. trimmed_mean, median, krum: bear faulty or hostile sites.",
    )  # fmt: skip
    weighting: Literal["public_size", "equal"] = Field(
        default="public_size",
        description="Weight of a site: its declared, rounded cohort size, or one. Never the true count. trimmed_mean, "
        "median and krum count every site once, whatever it declares.",
    )
    min_sites: int = Field(
        default=0, ge=0, le=10_000, description="Training sites that must answer in a round. 0: all that joined."
    )
    round_timeout: float = Field(
        default=3600.0, gt=0, le=7 * 86400, description="Seconds to wait for a site in a round."
    )
    max_update_norm: float = Field(
        default=0.0,
        ge=0,
        le=1e9,
        description="A site whose update (the change of all weights in the round) has a larger L2 norm is left out of "
        "the round, and named. 0: no bound.",
    )
    learning_rate: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="fedavgm, fedadam, fedyogi, fedadagrad, scaffold: step size of the coordinator. 0: 1 for fedavgm "
        "and scaffold, 0.01 for the others, whose step is about this large in every weight.",
    )
    momentum: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="fedavgm, fedadam, fedyogi, fedadagrad: share of the last step that is kept.",
    )
    second_moment: float = Field(
        default=0.99, ge=0, lt=1, description="fedadam, fedyogi: decay of the running mean of squares."
    )
    adaptivity: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="fedadam, fedyogi, fedadagrad: added to the root of the squares; the larger, the less adaptive.",
    )
    proximal: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="fedprox, ditto: strength of the pull of a site's model towards the global one.",
    )
    trim: float = Field(
        default=0.2,
        gt=0,
        lt=0.5,
        description="trimmed_mean: share of the sites that is left out at each end, for every weight by itself.",
    )
    byzantine: int = Field(
        default=1, ge=1, le=1000, description="krum: sites f that may be hostile; needs 2 f + 3 sites that answer."
    )
    keep: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="krum: updates whose mean is taken, at most answers - f - 2. 1: Krum; more: Multi-Krum.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, owners in OWNERS.items():
            if self.name not in owners and getattr(self, key) != type(self).model_fields[key].default:
                text = f'{key} = {getattr(self, key)} with name = "{self.name}"'
                raise contradiction(key, text, f"it belongs to {', '.join(owners)}: leave it out")
        if self.name == "krum" and 0 < self.min_sites < 2 * self.byzantine + 3:
            raise contradiction(
                "min_sites",
                f'min_sites = {self.min_sites} with name = "krum" and byzantine = {self.byzantine}',
                f"give at least {2 * self.byzantine + 3} (2 f + 3), or 0",
            )
        return self

    @property
    def step_size(self) -> float:
        """``learning_rate``, or its default for this strategy."""
        return self.learning_rate or (0.01 if self.name in ADAPTIVE else 1.0)


class WireSection(Section):
    """In what form a site's update travels. The global model goes down exactly."""

    up: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        default="float32",
        description="float32: weights as they are. The others send the change of the weights in the round, rounded; "
        "int8 with one scale for 256 numbers. They save a half, a half and three quarters of what goes up.",
    )
    error_feedback: bool = Field(
        default=True,
        description="A site adds what rounding took from its last update to its next one, so that nothing is lost for "
        "good. Stays at the site.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.up == "float32" and not self.error_feedback:
            raise contradiction("error_feedback", 'error_feedback with up = "float32"', "nothing is rounded: leave it")
        return self


def check_strategy(study: "Study") -> None:
    """Refuse a strategy or a form of updates that does not go with the rest of ``study``.

    Raises:
        PydanticCustomError: naming the key, what was found and what is allowed.
    """
    strategy, training, mode = study.strategy, study.training, study.privacy.mode
    name = strategy.name
    key, found = "strategy.name", f'strategy.name = "{name}"'
    if mode == "distributed":
        _check_distributed(study)
    if name == "fedprox" and training.local_steps == 1:
        allowed = "a site's first step starts at the global model, where the pull is zero: take more steps, or fedavg"
        raise contradiction(key, f"{found} with training.local_steps = 1", allowed)
    if name == "scaffold":
        _check_scaffold(study)
    if name == "fedbn" and training.trainable == "head":
        raise contradiction(key, f'{found} with training.trainable = "head"', "no normalisation is trained: use fedavg")
    if name == "ditto" and mode != "none":
        allowed = "metrics of a personal model that was trained without noise would leave: use fedavg, or fedbn"
        raise contradiction(key, f'{found} with privacy.mode = "{mode}"', allowed)
    if name == "ditto" and study.select_metric != "last":
        allowed = 'a site keeps the personal model of its last round alone: set evaluation.select = "last"'
        raise contradiction("evaluation.select", f'{found} with evaluation.select = "{study.select_metric}"', allowed)


def _check_distributed(study: "Study") -> None:
    name, mode = study.strategy.name, 'privacy.mode = "distributed"'
    if name in ("fedavgm", *ADAPTIVE):
        allowed = "there the coordinator steps with training.optimizer (sgd with momentum, adam): use fedavg"
    else:
        allowed = "the coordinator sees the sum over hospitals alone, and takes one step on it: use fedavg"
    if name != "fedavg":
        raise contradiction("strategy.name", f'strategy.name = "{name}" with {mode}', allowed)
    if bound := study.strategy.max_update_norm:
        found = f"strategy.max_update_norm = {bound:g} with {mode}"
        raise contradiction("strategy.max_update_norm", found, "the coordinator sees no single update: leave it out")
    if study.wire.up != "float32":
        raise contradiction(
            "wire.up",
            f'wire.up = "{study.wire.up}" with {mode}',
            "masked sums are whole numbers of 64 bits, which cannot be rounded: leave it out",
        )


def _check_scaffold(study: "Study") -> None:
    """The variate is (global - local weights) / (steps × rate): right for plain steps of a rate that all know."""
    training, found = study.training, 'with strategy.name = "scaffold"'
    if not training.local_steps:
        allowed = "control variates count steps, and epochs would tell the number of patients: set local_steps"
        raise contradiction("training.local_steps", f"training.local_epochs {found}", allowed)
    if training.optimizer != "sgd" or training.momentum:
        which = f'training.optimizer = "{training.optimizer}", momentum = {training.momentum:g}'
        allowed = 'control variates are means of plain gradients: set optimizer = "sgd" and momentum = 0'
        raise contradiction("training.optimizer", f"{which} {found}", allowed)
    if training.schedule != "constant":
        allowed = 'control variates divide by the step size: set "constant"'
        raise contradiction("training.schedule", f'training.schedule = "{training.schedule}" {found}', allowed)
