# SPDX-License-Identifier: Apache-2.0
"""Templates into answers: every value is escaped, and a page that the browser has already is not sent again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from .home import Home
from .security import Door

__all__ = ["Pages"]


class Pages:
    """The pages of one dashboard.

    Args:
        home: what is shown.
        door: who may see it.
    """

    def __init__(self, home: Home, door: Door) -> None:
        self._home, self._door = home, door
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def show(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **view: Any,
    ) -> Response:
        """A page; nothing but its tag where the browser has it already."""
        session = self._door.session(request)
        inside = self._door.admits(request)
        frame = {
            "home": self._home.name if inside else "", "is_consortium": self._home.consortium is not None,
            "only_run": self._home.only_run is not None, "path": request.url.path, "token": self._door.token(session),
            "inside": inside, "locked": self._door.is_locked,
        }  # fmt: skip
        content = self._templates.get_template(template).render(frame=frame, **view).encode()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        fields = {"etag": tag, **(headers or {})}
        if status == 200 and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=fields)
        response = Response(content, status, fields, "text/html; charset=utf-8")
        if request.cookies.get(self._door.cookie) != session:
            self._door.remember(response, session)
        return response
