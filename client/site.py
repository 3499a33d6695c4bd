# SPDX-License-Identifier: Apache-2.0
"""One hospital: takes a request, passes it through the gate, does the work, passes the reply through the gate.

:class:`Site` is what every engine runs: in process, in worker processes, on Ray and behind the node's runner.
:meth:`Site.handle` never raises for what a study, a data set or a disk can do wrong. The full explanation goes
to the site's own log and to ``last-fault.json`` in its state folder; only a reason code is returned.
"""

import errno
import json
import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..privacy.contract import SECURE_KINDS, HelloReply, MaskedReply, Refusal, Reply, Request, Role
from ..privacy.errors import ContractViolation, EnvironmentProblem, FedNeuroError, Reason
from ..privacy.study import Study
from . import gate
from .gatekeeper import Gatekeeper
from .held_model import HeldModel
from .settings import SiteSettings

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Site", "SiteSettings"]


class Site:
    """A hospital that lives on between rounds: data, network, optimiser and ledger stay in memory."""

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self._keeper = Gatekeeper(settings)
        self._session: Session | None = None
        self._held = HeldModel()
        self._log: logging.Logger | None = None

    def handle(self, request: Request) -> Reply:
        """Answer ``request``, or refuse it with a reason code.

        Guarantee: the reply holds only what :mod:`fedneuro.privacy.contract` allows for its kind.
        """
        try:
            request = self._held.complete(request)
        except ContractViolation as error:  # no fault: the coordinator sends everything then
            self._keeper.turn_away_part(request, error.reason)
            return Refusal(site=self.settings.name, kind=request.kind, round=request.round, reason=error.reason)
        try:
            self.settings = self._keeper.enter(request)
            reply = self._keeper.leave(self._dispatch(request), request)
        except Exception as error:
            reason, exit_code, text = self.explain(error)
            return self._refuse(request, reason, exit_code, text)
        self._held.keep(request)
        return reply

    def compute(self, request: Request) -> gate.Answer:
        """The work alone, between the two gates; for the process that trains behind a runner that holds them."""
        return self._dispatch(request)

    def explain(self, error: Exception) -> tuple[Reason, int, str]:
        """An error as the code that may leave, an exit code, and a line that stays here."""
        name = self.settings.name
        if isinstance(error, FedNeuroError):
            return error.reason, error.exit_code, str(error)
        if isinstance(error, MemoryError):
            return Reason.ENVIRONMENT, 5, f"site {name}: out of memory; use a smaller patch or batch"
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free space on the disk, then resume" if full else "check the path and its permissions"
            what = f"{error.strerror or error} ({error.filename or 'file unknown'})"
            return Reason.ENVIRONMENT, EnvironmentProblem.exit_code, f"site {name}: {what}; {remedy}"
        self._write_log("".join(traceback.format_exception(error)))
        what = f"unexpected {type(error).__name__}: {error}"
        return Reason.INTERNAL, 1, f"site {name}: {what} (details in {self.settings.state / 'site.log'})"

    def turn_away(self, kind: str, error: Exception) -> None:
        """Write down a message that was no request, or came with another bundle: a reason code leaves."""
        self._keeper.turn_away(kind, error.reason if isinstance(error, FedNeuroError) else Reason.INTERNAL)

    def close(self) -> None:
        """The node stops: sign the audit log, let go of the site's own."""
        self._keeper.close()
        for handler in self._log.handlers if self._log else ():
            handler.close()

    def _dispatch(self, request: Request) -> gate.Answer:
        import torch  # and what else computes: a runner whose child does it never loads them

        from .evaluation import evaluate
        from .gpu_share import limit_gpu_memory
        from .secure_training import answer_step
        from .session import software_versions
        from .training import train

        torch.set_num_threads(request.study.training.threads)
        limit_gpu_memory(self.settings.gpu_memory_fraction)
        session = self._open(request.study)
        if request.kind == "hello":
            self._clear_fault()
            return HelloReply(
                site=self.settings.name,
                role=self.settings.role,
                public_size=self.settings.public_size,
                versions=software_versions(),
                keeps_model=True,
                identity=self._identity(request.study),
            )
        if request.kind in SECURE_KINDS:
            answered = answer_step(session, request)
            self._note_attempt(request, answered.attempt if isinstance(answered, MaskedReply) else None)
            for note in session.take_notes():
                self._write_log(note)
            return answered
        if request.arrays is None:
            raise gate.missing_arrays(request)
        if request.kind == "train":
            trained = train(session, request.round, request.arrays, request.receipt)
            self._note_attempt(request, trained.attempt)
            for note in session.take_notes():
                self._write_log(note)
            return trained
        judged = evaluate(session, request.round, request.arrays, final=request.final, threshold=request.threshold)
        for note in session.take_notes():
            self._write_log(note)
        return judged

    def _identity(self, study: Study) -> bytes:
        """The site's public key, where the study has other hospitals ask for it."""
        if study.privacy.mode != "distributed" or self.settings.role is not Role.TRAIN:
            return b""
        from .secure_training import identity_of

        return identity_of(self.settings).public

    def _note_attempt(self, request: Request, attempt: int | None) -> None:
        if (attempt or 1) > 1:
            self._write_log(
                f"{request.kind} round {request.round}: attempt {attempt}; the privacy ledger was charged again"
            )

    def _open(self, study: Study) -> "Session":
        from .session import Session

        if self._session is None or self._session.study.hash != study.hash:
            self._session = None  # frees the old study's memory before the new one is loaded
            self._session = Session(self.settings, study)
            for warning in (*self._session.data.warnings, *self._session.take_notes()):
                self._write_log(warning)
        self._session.settings = self.settings  # the policy may have changed since
        return self._session

    def _refuse(self, request: Request, reason: Reason, exit_code: int, text: str) -> Refusal:
        self._write_log(f"{request.kind} round {request.round}: refused ({reason.value}): {text}")
        fault = {
            "reason": reason.value,
            "exit_code": exit_code,
            "text": text,
            "kind": request.kind,
            "round": request.round,
        }
        self._quietly(lambda: (self.settings.state / "last-fault.json").write_text(json.dumps(fault), encoding="utf-8"))
        self._keeper.refuse(request, reason)
        return Refusal(site=self.settings.name, kind=request.kind, round=request.round, reason=reason)

    def _clear_fault(self) -> None:
        self._quietly(lambda: (self.settings.state / "last-fault.json").unlink(missing_ok=True))

    def _write_log(self, text: str) -> None:
        def write() -> None:
            if self._log is None:
                self.settings.state.mkdir(parents=True, exist_ok=True)
                handler = logging.FileHandler(self.settings.state / "site.log", encoding="utf-8", delay=True)
                handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
                self._log = logging.Logger(f"fedneuro.site.{self.settings.name}")
                self._log.addHandler(handler)
            self._log.info(text)

        self._quietly(write)

    @staticmethod
    def _quietly(action: Callable[[], object]) -> None:
        """Local notes are best effort: a full disk must not hide the reason of the refusal."""
        try:
            action()
        except OSError:
            return
