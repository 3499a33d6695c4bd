# SPDX-License-Identifier: Apache-2.0
"""A strategy's part at the site: what it starts from, what it adds to gradients, and what of the result leaves.

    1. the global model is checked and loaded; fedbn puts the site's own normalisations in their places
    2. after each gradient is made, and noised where the study is private, a term is added:
           fedprox    mu (w - w_global)          :class:`Pull`
           scaffold   c - c_i                    :class:`Drift`
    3. what leaves is chosen (:mod:`fedneuro.privacy.wire_layout`) and rounded (:mod:`fedneuro.privacy.wire_numbers`)
    4. what stays is written down (:mod:`.site_state`)

Why the terms cost no privacy (``privacy.mode = "local"``): the accountant charges every noised gradient as if it were
published. w is a function of w_global and of the noised gradients so far; c and c_i are functions of updates that were
sent. So a term is data-independent given what is published, and adding it *after* the noise is post-processing. Added
before, it would be clipped with each patient's gradient: its bound would still hold, but clipping would distort it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.state import load_arrays, to_arrays
from ..privacy.contract import Arrays, check_arrays
from ..privacy.errors import ContractViolation
from ..privacy.wire_layout import control_of, model_of, stays, uplink_names
from ..privacy.wire_numbers import relative_error, with_feedback
from .session import Session
from .site_state import SiteState

__all__ = ["Drift", "LocalRound", "Pull", "load_for_evaluation", "personal_state"]


Floats = Mapping[str, NDArray[np.float32]]


class Pull:
    """The gradient of ``strength / 2 · ‖w - anchor‖²``, with the weights at construction as anchor."""

    def __init__(self, parameters: Iterable[nn.Parameter], strength: float) -> None:
        self._pairs = [(p, p.detach().clone()) for p in parameters if p.requires_grad]
        self._strength = strength

    def add(self) -> None:
        """Add it to the ``.grad`` of each parameter that has one."""
        for parameter, anchor in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._strength)


class Drift:
    """A constant to add to gradients.

    Args:
        parameters: those that are trained.
        constants: one for each, of its shape.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], constants: Sequence[Tensor]) -> None:
        self._pairs = list(zip(parameters, constants, strict=True))

    def add(self) -> None:
        """Add it to the ``.grad`` of each parameter that has one."""
        for parameter, constant in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(constant)


class LocalRound:
    """One round's; construction is step 1.

    Args:
        session: the study at this site.
        number: round, from 1.
        arrays: what came down.

    Raises:
        ContractViolation: that is not what was agreed.
    """

    def __init__(self, session: Session, number: int, arrays: Arrays) -> None:
        self._session, self._number = session, number
        self.model = model_of(arrays)
        self._own: Floats = {}
        session.load(self.model)
        if stays(session.study):
            load_arrays(session.network, self.model | _norms(session).before(number))
        self._trained = {n: p for n, p in session.network.named_parameters() if p.requires_grad}
        self._control = self._checked(control_of(arrays))
        self._term = self._build_term()

    def correct(self) -> None:
        """Step 2: add the strategy's term to the gradients."""
        if self._term:
            self._term.add()

    def outgoing(self) -> Arrays:
        """Steps 3 and 4, once, after the steps of the round."""
        session, after, names = self._session, to_arrays(self._session.network), uplink_names(self._session.study)
        if stays(session.study):
            _norms(session).save(self._number, {name: after[name] for name in after if name in stays(session.study)})
        leaving = {name: array for name, array in after.items() if names is None or name in names}
        check_arrays(leaving, {name: session.shapes[name] for name in leaving})
        sent: Arrays = leaving
        read = _floats(leaving)
        if session.study.wire.up != "float32":
            sent, read = self._rounded(read)
        if session.study.strategy.name == "scaffold":
            self._move_variate(read)
        return sent

    def _checked(self, control: Arrays) -> Floats:
        if not control:
            return {}
        if self._session.study.strategy.name != "scaffold":
            raise ContractViolation("a control variate came, and the study's strategy has none")
        check_arrays(control, {name: self._session.shapes[name] for name in self._trained})
        return _floats(control)

    def _build_term(self) -> Pull | Drift | None:
        strategy = self._session.study.strategy
        if strategy.name == "fedprox":
            return Pull(self._trained.values(), strategy.proximal)
        if strategy.name != "scaffold":
            return None
        self._own = _floats(SiteState(self._session, "variate").before(self._number))
        constants = [torch.from_numpy(self._difference(name)).to(self._session.device) for name in self._trained]
        return Drift(self._trained.values(), constants)

    def _difference(self, name: str) -> NDArray[np.float32]:
        """The term c - c_i of one array; both are zero at first."""
        zero = np.zeros(self._trained[name].shape, np.float32)
        return (self._control.get(name, zero) - self._own.get(name, zero)).astype(np.float32)

    def _move_variate(self, read: Floats) -> None:
        """Option II: c_i ← c_i - c + (x - y_i) / (K η), with y_i as the coordinator reads it."""
        training = self._session.study.training
        path = np.float32(training.local_steps * training.learning_rate)
        model = _floats(self.model)
        moved = {name: (model[name] - read[name]) / path - self._difference(name) for name in self._trained}
        SiteState(self._session, "variate").save(self._number, moved)

    def _rounded(self, leaving: Floats) -> tuple[Arrays, Floats]:
        """What travels, and the weights that the coordinator reads from it."""
        session, wire = self._session, self._session.study.wire
        state = SiteState(session, "residual")
        model, before = _floats(self.model), _floats(state.before(self._number))
        change = {name: array - model[name] for name, array in leaving.items()}
        sent, changes, left = with_feedback(change, before if wire.error_feedback else {}, wire.up)
        if wire.error_feedback:
            state.save(self._number, left)
        share, fate = relative_error(left, changes), "goes into the next round" if wire.error_feedback else "is lost"
        session.notes.append(f"train round {self._number}: sent as {wire.up}; {share:.2%} of the update {fate}")
        return sent, {name: model[name] + array for name, array in changes.items()}


def personal_state(session: Session) -> SiteState:
    """Ditto's personal model, ``model/<name>``, and its optimiser, ``optimizer/<name>``."""
    return SiteState(session, "personal")


def load_for_evaluation(session: Session, number: int, arrays: Arrays) -> None:
    """Load the global ``arrays`` of round ``number`` and, at a site that trains, what it has of its own instead.

    Raises:
        ContractViolation: the arrays are not the agreed ones.
    """
    session.load(arrays)
    if not session.trained:
        return
    if stays(session.study):
        load_arrays(session.network, {**arrays, **_norms(session).after(number)})
    elif session.study.strategy.name == "ditto" and (own := personal_state(session).after(number)):
        weights = {name.removeprefix("model/"): a for name, a in own.items() if name.startswith("model/")}
        load_arrays(session.network, weights)


def _floats(arrays: Arrays) -> Floats:
    """``arrays``, which are float32, as such; nothing is copied."""
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def _norms(session: Session) -> SiteState:
    return SiteState(session, "norms", every_round=True)
