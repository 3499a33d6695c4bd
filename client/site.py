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

import torch

from ..privacy.contract import EvaluateReply, HelloReply, Refusal, Reply, Request, TrainReply
from ..privacy.errors import EnvironmentProblem, FedNeuroError, Reason
from ..privacy.study import Study
from . import gate
from .evaluation import evaluate
from .session import Session, software_versions
from .settings import SiteSettings
from .training import train

__all__ = ["Site", "SiteSettings"]


class Site:
    """A hospital that lives on between rounds: data, network, optimiser and ledger stay in memory."""

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self._session: Session | None = None
        self._log: logging.Logger | None = None

    def handle(self, request: Request) -> Reply:
        """Answer ``request``, or refuse it with a reason code.

        Guarantee: the reply holds only what :mod:`fedneuro.privacy.contract` allows for its kind.
        """
        try:
            gate.enter(request, self.settings)
            reply = self._dispatch(request)
            gate.leave(reply, request)
        except FedNeuroError as error:
            return self._refuse(request, error.reason, error.exit_code, str(error))
        except MemoryError:
            return self._refuse(
                request,
                Reason.ENVIRONMENT,
                5,
                f"site {self.settings.name}: out of memory; use a smaller patch or batch",
            )
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free space on the disk, then resume" if full else "check the path and its permissions"
            what = f"{error.strerror or error} ({error.filename or 'file unknown'})"
            text = f"site {self.settings.name}: {what}; {remedy}"
            return self._refuse(request, Reason.ENVIRONMENT, EnvironmentProblem.exit_code, text)
        except Exception as error:
            self._write_log(traceback.format_exc())
            what = f"unexpected {type(error).__name__}: {error}"
            text = f"site {self.settings.name}: {what} (details in {self.settings.state / 'site.log'})"
            return self._refuse(request, Reason.INTERNAL, 1, text)
        return reply

    def _dispatch(self, request: Request) -> HelloReply | TrainReply | EvaluateReply:
        torch.set_num_threads(request.study.training.threads)
        session = self._open(request.study)
        if request.kind == "hello":
            self._clear_fault()
            return HelloReply(
                site=self.settings.name,
                role=self.settings.role,
                public_size=self.settings.public_size,
                versions=software_versions(),
            )
        if request.arrays is None:
            raise gate.missing_arrays(request)
        if request.kind == "train":
            return train(session, request.round, request.arrays)
        return evaluate(session, request.round, request.arrays, final=request.final)

    def _open(self, study: Study) -> Session:
        if self._session is None or self._session.study.hash != study.hash:
            self._session = None  # frees the old study's memory before the new one is loaded
            self._session = Session(self.settings, study)
            for warning in self._session.data.warnings:
                self._write_log(warning)
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
