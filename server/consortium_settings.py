# SPDX-License-Identifier: Apache-2.0
"""``server.toml``: what a coordinator may set, read once, typed and checked.

.. code-block:: toml

    [consortium]
    name = "glioma-net"

    [server]
    host = "coordinator.example.org"   # the name in the server's certificate, by which hospitals reach it
    listen = "0.0.0.0"                 # address of the three ports that hospitals reach

    [ports]
    guard = 8443                       # Flower's Fleet paths only, behind client certificates
    enrolment = 8444                   # first contact, by invitation
    renewal = 8445                     # new certificates, behind client certificates
    superlink = 8000                   # Flower itself: always on 127.0.0.1

    [guard]
    nginx = "nginx"                    # the program; "" where you run the printed configuration yourself
    max_request_mib = 16               # Flower sends arrays in parts of 5 MiB

    [state]
    url = "sqlite:///state.db"         # or postgresql+psycopg://USER@HOST/NAME; paths are relative to this file

    [runs]
    resume = "free"                    # which interrupted runs go on by themselves: free (no budget is charged again),
                                       # all, or none

    [dashboard]
    port = 8450                        # for a browser
    listen = "127.0.0.1"               # another address: TLS with the server's certificate, and a password, are asked

    [sinks]                            # needs pip install 'fedneuro[sinks]'
    mlflow = ""                        # a tracking server, https://..., or a folder; "": none
    tensorboard = ""                   # a folder; "": none

There is no key that turns TLS, node authentication or process isolation off.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..privacy.errors import BadInput
from ..privacy.settings_faults import explain

__all__ = ["Resume", "ServerSettings", "load_server_settings", "settings_text"]

Port = Annotated[int, Field(ge=1, le=65535)]
Resume = Literal["free", "all", "none"]
"""Which interrupted runs go on by themselves; free: those that cost no patient anything."""
Host = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$",
        description="a host name or an IPv4 address, without https:// and without a port",
    ),
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ConsortiumPart(_Part):
    """Who this is."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$",
            description="1 to 64 letters (a to z, A to Z), digits, blanks and _ . -, a letter or digit first",
        ),
    ]


class ServerPart(_Part):
    """Where hospitals reach it."""

    host: Host
    listen: Annotated[str, Field(pattern=r"^[0-9.]{7,15}$", description="an IPv4 address")] = "0.0.0.0"  # noqa: S104 - the outer, guarded ports


class PortsPart(_Part):
    """One number each."""

    guard: Port = 8443
    enrolment: Port = 8444
    renewal: Port = 8445
    superlink: Port = 8000

    @model_validator(mode="after")
    def _check(self) -> Self:
        numbers = (self.guard, self.enrolment, self.renewal, self.superlink)
        if len(set(numbers)) != len(numbers):
            raise ValueError("the four ports must differ")
        return self


class GuardPart(_Part):
    """The reverse proxy in front of Flower."""

    nginx: Annotated[str, Field(max_length=4096)] = "nginx"
    max_request_mib: Annotated[int, Field(ge=6, le=1024)] = 16


class StatePart(_Part):
    """Where the state store is."""

    url: Annotated[str, Field(min_length=1, max_length=4096)] = "sqlite:///state.db"


class RunsPart(_Part):
    """What ``start`` does about runs; ``resume`` is that of :mod:`.resumption`."""

    resume: Resume = "free"


class DashboardPart(_Part):
    """The coordinator's web page."""

    port: Port = 8450
    listen: Annotated[str, Field(pattern=r"^[0-9.]{7,15}$")] = "127.0.0.1"


class SinksPart(_Part):
    """Other programs that runs are shown in; folders are relative to the settings' file."""

    mlflow: Annotated[str, Field(max_length=4096)] = ""
    tensorboard: Annotated[str, Field(max_length=4096)] = ""

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self.mlflow or self.tensorboard)


class ServerSettings(_Part):
    """A whole ``server.toml``."""

    consortium: ConsortiumPart
    server: ServerPart
    ports: PortsPart = Field(default_factory=PortsPart)
    guard: GuardPart = Field(default_factory=GuardPart)
    state: StatePart = Field(default_factory=StatePart)
    runs: RunsPart = Field(default_factory=RunsPart)
    dashboard: DashboardPart = Field(default_factory=DashboardPart)
    sinks: SinksPart = Field(default_factory=SinksPart)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "@" in self.sinks.mlflow:
            raise ValueError("sinks.mlflow holds a name; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        if self.dashboard.port in self.ports.model_dump().values():
            raise ValueError("dashboard.port is one of the four ports in [ports]; it needs one of its own")
        return self

    def outer(self, port: int) -> str:
        """``host:port`` as a hospital writes it."""
        return f"{self.server.host}:{port}"


def load_server_settings(path: Path) -> ServerSettings:
    """Read and check a ``server.toml``.

    Raises:
        BadInput: the file is missing or not TOML; a key is unknown, missing, of another type or out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        text = (
            f"{path}: cannot be read ({error.strerror}); make a consortium first: fedneuro-server init NAME --out DIR"
        )
        raise BadInput(text) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is not TOML: {error}") from error
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, ServerSettings)}") from error


def settings_text(settings: ServerSettings) -> str:
    """``settings`` as the file that :func:`load_server_settings` reads."""
    lines = ["# FedNeuro coordinator: every key is explained in docs/coordinator.md", ""]
    for section, part in settings.model_dump().items():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in part.items()), ""]
    return "\n".join(lines)


def _toml(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
