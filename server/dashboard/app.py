# SPDX-License-Identifier: Apache-2.0
"""The dashboard's pages and actions.

.. code-block:: text

    GET  /                          the consortium: sites, health, certificates, what runs
    GET  /studies /runs /events     studies with each hospital's answer; runs; what happened in the consortium
    GET  /runs/RUN                  live: round, hospitals, curves, ε; /events: all that happened; /files/…: its results
    POST /runs/RUN/stop /resume     what the commands of the same names do; /report /release too, in their own time
    GET  /runs/RUN/release.tar      the release, and its /model-card
    GET  POST /invite /launch       forms: a hospital is invited, a study launched; GET /invitations/SITE
    GET  /metrics                   Prometheus
    GET  /login  POST /login /logout

A page is live because its script asks for the page itself every second, with the tag of what it has, and puts in place
the parts that changed. So there is one way to make each part, and without scripts the pages reload instead.
"""

import base64
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from fastapi import Depends, FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from ...privacy.errors import BadInput, FedNeuroError, Refused, StateError
from ..consortium import Consortium
from ..limits import TooMany
from ..run_view import read_events
from ..run_words import clock, sentence
from .forms import Forms, code_of
from .home import Home
from .inviting import Inviting
from .jobs import Jobs
from .launching import MAX_STUDY, Launching
from .metrics import exposition
from .pages import Pages
from .releasing import Releasing
from .security import MAX_FORM, REPORT_HEADERS, Door, Shield, read_form
from .views import FILES, consortium_page, run_page, runs_page, studies_page

__all__ = ["create_app"]

MOST_EVENTS: Final = 1000
"""On one page, the latest first; ``fedneuro-server logs`` has all."""
_Handler: TypeAlias = Callable[..., Response]
_log = logging.getLogger("fedneuro.dashboard")


class _LoginFirst(Exception):
    """The page is for those who are logged in."""


def create_app(home: Home, door: Door, hosts: frozenset[str], jobs: Jobs) -> ASGIApp:
    """The whole application.

    Args:
        home: what is shown.
        door: who may see it.
        hosts: names by which this machine may be called, in lower case, without port.
        jobs: what takes longer than a page; the caller closes it.
    """
    app, site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), _Dashboard(home, door, jobs)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    inside, form, large = Depends(site.inside), Depends(site.form), Depends(site.large_form)
    inviting, launching, made = site.inviting, site.launching, site.releasing
    pages: dict[str, _Handler] = {
        "/": site.start, "/studies": site.studies, "/runs": site.runs, "/events": site.events, "/runs/{name}": site.run,
        "/runs/{name}/events": site.run_events, "/runs/{name}/files/{file}": site.file,
        "/runs/{name}/release.tar": made.release_tar, "/runs/{name}/model-card": made.model_card,
        "/invite": inviting.invite_page, "/invitations/{site}": inviting.invitation,
        "/invitations/{site}/file": inviting.invitation_file, "/launch": launching.launch_page,
    }  # fmt: skip
    for path, page in pages.items():
        app.add_api_route(path, page, dependencies=[inside], response_model=None)
    actions: dict[str, _Handler] = {
        "/runs/{name}/stop": site.stop, "/runs/{name}/resume": site.resume, "/runs/{name}/report": made.report,
        "/runs/{name}/release": made.release, "/invite": inviting.invite, "/launch": launching.launch,
    }  # fmt: skip
    for path, action in actions.items():
        fields = large if path == "/launch" else form
        app.add_api_route(path, action, methods=["POST"], dependencies=[inside, fields], response_model=None)
    app.add_api_route("/metrics", site.metrics, response_model=None)
    app.add_api_route("/login", site.login_page, response_model=None)
    app.add_api_route("/login", site.login, methods=["POST"], dependencies=[form], response_model=None)
    app.add_api_route("/logout", site.logout, methods=["POST"], dependencies=[form], response_model=None)
    app.add_exception_handler(_LoginFirst, lambda *_: RedirectResponse("/login", 303))
    app.add_exception_handler(FedNeuroError, site.refused)
    app.add_exception_handler(HTTPException, site.http_error)
    return Shield(app, hosts)


class _Dashboard:
    """One method for each page and action."""

    def __init__(self, home: Home, door: Door, jobs: Jobs) -> None:
        self._home, self._door, self._pages = home, door, Pages(home, door)
        forms = Forms(home, self._pages)
        self.inviting, self.launching, self.releasing = Inviting(forms, door), Launching(forms), Releasing(forms, jobs)

    def inside(self, request: Request) -> None:
        """Those who are not let in are sent to the login."""
        if not self._door.admits(request):
            raise _LoginFirst

    async def form(self, request: Request) -> None:
        """Read and check what was posted."""
        await self._read(request, MAX_FORM)

    async def large_form(self, request: Request) -> None:
        """The same, with room for a study file."""
        await self._read(request, MAX_STUDY)

    async def _read(self, request: Request, most: int) -> None:
        fields = await read_form(request, most)
        self._door.check_form(request, fields)
        request.state.fields = fields

    # -- pages -----------------------------------------------------------------------------------------

    def start(self, request: Request) -> Response:
        """The consortium, or the run where there is only one."""
        if run := self._home.only_run:
            return RedirectResponse(f"/runs/{run.name}", 303)
        if self._home.consortium is None:
            return RedirectResponse("/runs", 303)
        return self._pages.show(request, "consortium.html", **consortium_page(self._home, self._home.consortium))

    def studies(self, request: Request) -> Response:
        """Studies, and what hospitals answered."""
        return self._pages.show(request, "studies.html", **studies_page(self._home))

    def runs(self, request: Request) -> Response:
        """All runs."""
        return self._pages.show(request, "runs.html", **runs_page(self._home))

    def run(self, request: Request, name: str) -> Response:
        """One run, live."""
        shown = self._home.run(name)
        view = run_page(shown, self.releasing.about(shown), actions=self._home.consortium is not None)
        return self._pages.show(request, "run.html", **view)

    def run_events(self, request: Request, name: str) -> Response:
        """What happened in a run."""
        folder = self._home.find(name)
        found = [(clock(event.at), event.site, sentence(event)) for _, event in read_events(folder)]
        return self._pages.show(request, "events.html", title=name, back=f"/runs/{name}", **_latest(found))

    def events(self, request: Request) -> Response:
        """What happened in the consortium."""
        if self._home.consortium is None:
            raise BadInput("there is no consortium here; each run has its own events")
        every = self._home.consortium.registry.events()
        found = [(clock(at), site, f"{kind} {text}".strip()) for _, at, kind, site, text in every]
        return self._pages.show(request, "events.html", title=self._home.name, back="/", **_latest(found))

    def file(self, name: str, file: str) -> Response:
        """Report, manifest or results of a run."""
        path = self._home.find(name).path / file
        if file not in FILES or not path.is_file():
            raise BadInput(f"run {name} has no such file; fedneuro-server report makes results and report")
        page = path.suffix == ".html"
        kind = "text/html" if page else "application/json"
        return FileResponse(path, media_type=kind, headers=REPORT_HEADERS if page else None)

    def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        if not self._door.admits(request):
            self._basic(request)
        return Response(exposition(self._home), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- actions ---------------------------------------------------------------------------------------

    def stop(self, request: Request, name: str) -> Response:
        """Ask a run to stop."""
        consortium, shown = self._acting(), self._home.run(name)
        if not shown.view.is_live:
            raise StateError(f"run {name} is not under way: it is {shown.view.status}")
        now = request.state.fields.get("when") == "now"
        shown.folder.request_stop("now" if now else "round")
        text = f"run {name}, {'at once' if now else 'after its round'}, from the dashboard"
        consortium.registry.note("stop-asked", text=text)
        return RedirectResponse(f"/runs/{name}", 303)

    def resume(self, name: str) -> Response:
        """Go on with a run."""
        from ..launch import submit

        consortium, shown = self._acting(), self._home.run(name)
        if shown.view.status == "complete":
            raise StateError(f"run {name} is complete; launch the study again for another run")
        submit(consortium, shown.folder)
        consortium.registry.note("resume-asked", text=f"run {name}, from the dashboard")
        return RedirectResponse(f"/runs/{name}", 303)

    def _acting(self) -> Consortium:
        if self._home.consortium is None:
            raise BadInput("only runs of a consortium can be stopped and resumed here")
        return self._home.consortium

    # -- login -----------------------------------------------------------------------------------------

    def login_page(self, request: Request) -> Response:
        """Ask for the password."""
        if self._door.admits(request):
            return RedirectResponse("/", 303)
        return self._pages.show(request, "login.html", fault="")

    def login(self, request: Request) -> Response:
        """Let in who knows the password."""
        address = _address(request)
        try:
            session = self._door.log_in(address, request.state.fields.get("password", ""))
        except Refused as error:
            _log.warning("login from %s refused: %s", address, error)
            return self._pages.show(request, "login.html", status=code_of(error), fault=str(error))
        _log.info("login from %s", address)
        response = RedirectResponse("/", 303)
        self._door.remember(response, session)
        return response

    def logout(self, request: Request) -> Response:
        """End the session."""
        self._door.log_out(request)
        return RedirectResponse("/login" if self._door.is_locked else "/", 303)

    def _basic(self, request: Request) -> None:
        """For Prometheus, which has no cookies: HTTP Basic authentication with any name.

        Raises:
            HTTPException: no password, a wrong one, or too many tries.
        """
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        challenge = {"www-authenticate": 'Basic realm="fedneuro"'}
        if kind.lower() != "basic":
            raise HTTPException(401, headers=challenge)
        try:
            password = base64.b64decode(given, validate=True).decode().partition(":")[2]
            self._door.try_password(_address(request), password)
        except (ValueError, Refused) as error:
            _log.warning("/metrics from %s refused: %s", _address(request), error)
            raise HTTPException(429 if isinstance(error, TooMany) else 401, headers=challenge) from error

    # -- faults ----------------------------------------------------------------------------------------

    def refused(self, request: Request, error: Exception) -> Response:
        """One clear line, as on the command line."""
        code = 404 if isinstance(error, BadInput) and request.method == "GET" else code_of(error)
        _log.warning("%s %r: %s", request.method, request.url.path[:200], error)
        return self._pages.show(request, "error.html", status=code, fault=str(error))

    def http_error(self, request: Request, error: Exception) -> Response:
        """No such page, no such method."""
        code = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        fault = "there is no such page" if code == 404 else "the request was refused"
        return self._pages.show(request, "error.html", status=code, headers=headers, fault=fault)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _latest(found: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {"events": found[: -MOST_EVENTS - 1 : -1], "older": max(0, len(found) - MOST_EVENTS)}
