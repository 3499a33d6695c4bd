# SPDX-License-Identifier: Apache-2.0
"""Write the report of a run and make its release in a browser, and hand the release over as one file."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from ...privacy.errors import BadInput, StateError
from .forms import Forms, download
from .home import Shown
from .jobs import Jobs
from .pack import tar_of

__all__ = ["Releasing"]


class Releasing:
    """What is made of a run.

    Args:
        forms: what all forms share.
        jobs: who makes it.
    """

    def __init__(self, forms: Forms, jobs: Jobs) -> None:
        self._forms, self._jobs = forms, jobs

    def report(self, name: str) -> Response:
        """Write results, report and manifest of a run that did not come to its end."""
        shown = self._resting(name)
        if not shown.view.history:
            raise StateError(f"run {name} has no round yet, so there is nothing to report")
        self._jobs.start("report", name, ["report", str(shown.folder.path)])
        return RedirectResponse(f"/runs/{name}", 303)

    def release(self, request: Request, name: str) -> Response:
        """Make the release of a complete run."""
        consortium, shown, fields = self._forms.consortium, self._resting(name), request.state.fields
        if shown.view.status != "complete":
            raise StateError(f"run {name} is {shown.view.status}: only a complete run can be released")
        pack = self.pack_of(name)
        if pack.exists():
            raise StateError(f"{pack}: is there already; move it away to make it anew")
        authors = " ".join(fields.get("authors", "").split())
        if len(authors) > 200 or not authors.isprintable():
            raise BadInput("authors: at most 200 printable characters")
        passphrase = self._forms.unlock(request)
        words = ["release", str(shown.folder.path), "--out", str(pack), "--config", str(consortium.folder)]
        self._jobs.start("release", name, [*words, f"--authors={authors}", "--passphrase-fd=0"], passphrase.text)
        consortium.registry.note("release-asked", text=f"run {name}, from the dashboard")
        return RedirectResponse(f"/runs/{name}#release", 303)

    def pack_of(self, name: str) -> Path:
        """Where the release of a run lies, or would."""
        return self._forms.home.folder / "releases" / self._forms.home.find(name).name

    def release_tar(self, name: str) -> Response:
        """The release as one file."""
        pack = self._pack(name)
        return StreamingResponse(tar_of(pack), media_type="application/x-tar", headers=download(f"{pack.name}.tar"))

    def model_card(self, name: str) -> Response:
        """The release's model card, as the text that it is."""
        return FileResponse(self._pack(name) / "MODEL_CARD.md", media_type="text/plain; charset=utf-8")

    def about(self, shown: Shown) -> dict[str, Any]:
        """What the page of a run says about its report and release."""
        name, view = shown.folder.name, shown.view
        resting = self._forms.home.consortium is not None and not view.is_live and bool(view.plan.launched)
        pack, jobs = self.pack_of(name), {what: self._jobs.find(what, name) for what in ("report", "release")}
        return {
            "jobs": [job for job in jobs.values() if job and (job.running or job.fault)],
            "pack": pack if (pack / "release.json").is_file() else None,
            "can_report": resting and bool(view.history) and view.status != "complete",
            "can_release": resting and view.status == "complete" and not pack.exists(),
            "busy": any(job and job.running for job in jobs.values()),
        }

    def _resting(self, name: str) -> Shown:
        _ = self._forms.consortium
        shown = self._forms.home.run(name)
        if shown.view.is_live:
            raise StateError(f"run {name} is under way; wait until it is done, or stop it")
        return shown

    def _pack(self, name: str) -> Path:
        pack = self.pack_of(name)
        if not (pack / "release.json").is_file():
            raise BadInput(f"run {name} was not released yet")
        return pack
