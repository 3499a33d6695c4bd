# SPDX-License-Identifier: Apache-2.0
"""Launch a study in a browser: it is checked and shown with who is asked, and then signed; or one step of it first."""

import time
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ...privacy.errors import FedNeuroError, StudyError
from ...privacy.study import Study
from ...privacy.study_file import describe, parse_study
from ..consortium import Consortium
from ..sealed_keys import Passphrase
from .forms import Forms
from .views import asked_sites, promise

__all__ = ["MAX_STUDY", "Launching"]

MAX_STUDY: Final = 1 << 18
"""Bytes of a form that carries a study file, encoded."""


class Launching:
    """The page of a launch.

    Args:
        forms: what all forms share.
    """

    def __init__(self, forms: Forms) -> None:
        self._forms = forms

    def launch_page(self, request: Request) -> Response:
        """Ask for a study file."""
        _ = self._forms.consortium
        self._forms.home.nodes()  # who is online is known when the study is shown
        return self._launch_page(request, "")

    def launch(self, request: Request) -> Response:
        """Show a study, or sign and launch it, or one step of it."""
        consortium, fields = self._forms.consortium, request.state.fields
        text, wanted = fields.get("study", ""), fields.get("do", "check")
        study: Study | None = None
        try:
            study = parse_study(text, "study")
            shown = self._shown(consortium, study)
            if wanted == "check":
                return self._launch_page(request, text, shown=shown)
            if fields.get("seen") != study.hash:
                raise StudyError("the study was changed since it was shown; this is how it is now")
            passphrase = self._forms.unlock(request)
            run = _launch(consortium, study, passphrase, canary=wanted == "canary")
        except FedNeuroError as error:
            return self._launch_page(request, text, error, shown=self._shown(consortium, study) if study else None)
        consortium.registry.note("launch-asked", text=f"run {run}, from the dashboard")
        return RedirectResponse(f"/runs/{run}", 303)

    def _launch_page(
        self, request: Request, text: str, fault: FedNeuroError | None = None, shown: Mapping[str, Any] | None = None
    ) -> Response:
        return self._forms.show(request, "launch.html", fault, text=text, shown=shown)

    def _shown(self, consortium: Consortium, study: Study) -> dict[str, Any]:
        """What a person reads before it is signed."""
        from ..launch import CANARY_EPSILON, choose_sites

        known, nodes, fault = consortium.registry.sites(), self._forms.home.nodes(), ""
        try:
            chosen = choose_sites(study, known)
        except StudyError as error:
            chosen, fault = (), str(error)
        private = study.privacy.mode != "none"
        return {
            "name": study.study.name, "description": study.study.description, "hash": study.hash,
            "privacy": promise(study), "rounds": study.training.rounds, "text": describe(study),
            "sites": asked_sites([site for site in known if site.name in chosen], nodes), "fault": fault,
            "down": self._forms.home.is_down, "quorum": study.strategy.min_sites or "all",
            "canary": f"{min(CANARY_EPSILON, study.privacy.epsilon):g}" if private else "",
        }  # fmt: skip


def _launch(consortium: Consortium, study: Study, passphrase: Passphrase, *, canary: bool) -> str:
    """Sign and submit; the run's name."""
    from ..launch import Launch, canary_of, choose_sites, online, submit

    wanted = Launch(consortium=consortium, study=study, sites=choose_sites(study, consortium.registry.sites()))
    online(consortium)  # is `start` running? before a run's folder is made
    folder = wanted.prepare(passphrase, canary_of(study, time.time()) if canary else None)
    submit(consortium, folder)
    return folder.name
