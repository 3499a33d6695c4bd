# SPDX-License-Identifier: Apache-2.0
"""How the three commands end: one clear line on standard error and an exit code, never a traceback.

Codes: 0 done, 1 a bug of ours, 2 bad input, 3 refused by policy or budget, 4 quorum lost, 5 environment, and
130 after Ctrl-C or ``SIGTERM``, which end a command in order: workers and children are stopped on the way out.
"""

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import typer

from .errors import EnvironmentProblem, FedNeuroError

__all__ = ["run_command"]

INTERRUPTED = 130


def run_command(app: typer.Typer) -> NoReturn:
    """Run a Typer application as the whole process."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except FedNeuroError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", EnvironmentProblem.exit_code)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error}; this is a bug, please report it with {_report()}", 1)
    if code == INTERRUPTED:  # Typer turns Ctrl-C into this value
        _fail("stopped; what was saved is whole: give the same command again (a run: with --resume)", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> NoReturn:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)


def _report() -> Path:
    """Save the traceback for a bug report; it does not belong on a user's screen."""
    descriptor, name = tempfile.mkstemp(prefix="fedneuro-bug-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return Path(name)
