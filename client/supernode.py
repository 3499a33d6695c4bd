# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperNode with shorter pauses: ``python -m fedneuro.client.supernode`` takes its own options.

Beside them ``--client-certificate`` and ``--client-key``: what it shows to the coordinator's guard
(:mod:`.mutual_tls`); ``--revocations``: what the coordinator's root took back (:mod:`.revocations`); ``--bundle``:
SHA-256 of the only app bundle whose settings are read at all, so that a zip bomb in another one is never opened;
``--policy``: the hospital's, for how large a message may be (:mod:`.message_bounds`); and ``--lease``: a note for the
SuperNode that is started after this one died (:mod:`.lease`). On SIGUSR1 it sends the reply in hand, and ends when
none is.

Flower 1.41 pauses for a fixed 3 s between two looks for a message and for 0.5 s between two looks for the
reply (``flwr/supernode/start_client_internal.py``); a round of two messages loses up to seven seconds to it.
This launcher gives that one module a clock whose pauses follow :class:`~fedneuro.privacy.pace.Pace`, and are the
shortest where the coordinator holds a look until there is a message; then it calls Flower's own entry point. The look
for a part of a message that is on its way begins sooner too (:func:`~fedneuro.privacy.flower_tasks.quicken_transfers`),
and a link that breaks during a TLS handshake is a broken link (:func:`keep_trying`), a message whose run ends while it
is on its way is put aside (:func:`put_aside_ended_runs`), and every other message is answered, also where the runner
dies (:mod:`.lost_tasks`). The runner's requests pass through less (:mod:`fedneuro.privacy.light_layers`). Nothing else
is touched. Contract tests read Flower's source and fail if what is changed is no longer where it was.
"""

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..privacy.flower_tasks import quicken_transfers
from ..privacy.light_layers import lighten_layers, take_values_at_once
from ..privacy.pace import Pace
from .lease import end_lost_lease
from .lost_tasks import RunnerWatch, answer_lost_tasks
from .message_bounds import bound_answers, bound_messages, largest_message
from .mutual_tls import present_certificate

__all__ = [
    "IDLE_PAUSE",
    "REPLY_PAUSE",
    "announce_tasks",
    "end_when_sent_away",
    "keep_trying",
    "main",
    "open_only",
    "put_aside_ended_runs",
    "rest_after_a_reply",
    "shorten_pauses",
]

IDLE_PAUSE = 3
REPLY_PAUSE = 0.5
"""Flower's own pauses in seconds, by which the two places are told apart."""
HELD_SECONDS = 1.0
"""A look for a message that took longer was held by the coordinator."""
DRAIN_SECONDS = 5.0
"""How long an ending SuperNode waits for a reply that no runner gives any more."""

_BROKEN = ("unexpected_eof", "eof occurred", "timed out", "reset by peer", "broken pipe")
"""What OpenSSL and the kernel say of a link that breaks; none says it of a certificate."""

_draining: list[float] = []
"""When it was told to end, if it was."""
_connected: list[bool] = []
"""Holds something once the main loop pauses: there is a connection, and perhaps a reply in hand."""


def shorten_pauses(wait: Callable[[float], None] = time.sleep) -> None:
    """Let the SuperNode's main loop pause as long as :class:`Pace` says.

    Args:
        wait: waits for a reply, at most so many seconds.
    """
    from flwr.supernode import start_client_internal as loop

    idle, reply = Pace(shortest=0.08), Pace(shortest=0.01, longest=0.25)
    last, woke = "", time.monotonic()

    def sleep(seconds: float) -> None:
        """A pause of the other kind than the last one means that something was received or sent."""
        nonlocal last, woke
        held = last == "idle" and time.monotonic() - woke > HELD_SECONDS
        if seconds not in (IDLE_PAUSE, REPLY_PAUSE):
            raise RuntimeError(f"the SuperNode pauses for {seconds} s, which Flower 1.41 does not")
        _connected[:] = [True]
        kind, pace = ("idle", idle) if seconds == IDLE_PAUSE else ("reply", reply)
        if kind != last or held:
            pace.news()
            last = kind
        if _draining and (kind == "idle" or time.monotonic() - _draining[0] > DRAIN_SECONDS):
            _draining.clear()
            _leave()
        (wait if kind == "reply" else time.sleep)(pace.pause())
        woke = time.monotonic()

    loop.__dict__["time"] = SimpleNamespace(sleep=sleep)


def _leave() -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # Flower's own way out: it tells the SuperLink


def _drain(_number: int, _frame: object) -> None:
    if _connected:
        _draining.append(time.monotonic())
    else:
        _leave()


def open_only(bundle: str) -> None:
    """Let the SuperNode read the settings in the bundle with this SHA-256, and in no other.

    A task with another bundle reaches the runner without settings, and is refused there.
    """
    from flwr.supernode import start_client_internal as loop

    read = loop.__dict__["get_fused_config_from_fab"]

    def guarded(content: bytes, run: object) -> object:
        return read(content, run) if hashlib.sha256(content).hexdigest() == bundle else {}

    loop.__dict__["get_fused_config_from_fab"] = guarded


def announce_tasks(watch: RunnerWatch) -> None:
    """Ring the runner's bell whenever a message, with all of its parts, has been taken in."""
    from flwr.supernode import start_client_internal as loop

    pull = loop.__dict__["_pull_and_store_message"]

    def announced(*arguments: Any, **named: Any) -> Any:
        run_id = pull(*arguments, **named)
        if run_id is not None:
            watch.taken(named.get("state"))
        return run_id

    loop.__dict__["_pull_and_store_message"] = announced


def rest_after_a_reply() -> None:
    """Leave out the look for a message that Flower takes as soon as a reply was sent.

    A look is a write to the SuperLink's database, for which the other nodes' replies wait just then; there is no new
    message before the coordinator has seen them all. Where the message before had been there at once, more may wait:
    then it is taken.
    """
    from flwr.supernode import start_client_internal as loop

    pull = loop.__dict__["_pull_and_store_message"]
    waited = replied = False

    def pulled(*arguments: Any, **named: Any) -> Any:
        nonlocal waited, replied
        if waited and replied:
            waited = replied = False
            return None
        run_id = pull(*arguments, **named)
        replied = run_id is not None
        waited = waited or not replied
        return run_id

    loop.__dict__["_pull_and_store_message"] = pulled


def put_aside_ended_runs() -> None:
    """Let the SuperNode clean up after a message whose run ended before all of its parts were there.

    Flower ends the task of a message that it could not take in, but does so for an ``Exception``; that the SuperLink
    says "not running" is a ``BaseException`` there, passes by, and leaves a task that the runner takes and a part
    that it waits for. A coordinator that dies between a message and its parts would stop the node for two hours.
    """
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal as loop

    pull = loop.__dict__["_pull_and_store_message"]

    def named_as_error(call: Callable[[int, str], Any]) -> Callable[[int, str], Any]:
        def called(run_id: int, object_id: str) -> Any:
            try:
                return call(run_id, object_id)
            except RunNotRunningException:
                raise RuntimeError(f"run {run_id} ended while the message was on its way") from None

        return called

    def pulled(*arguments: Any, **named: Any) -> Any:
        for name in ("pull_object", "confirm_message_received"):
            named[name] = named_as_error(named[name])
        return pull(*arguments, **named)

    loop.__dict__["_pull_and_store_message"] = pulled


def keep_trying() -> None:
    """Let the SuperNode try again where a link breaks in a TLS handshake, as it does where a link breaks later.

    Flower takes every error whose text says "SSL" for a wrong certificate and gives up for good. A proxy or firewall
    that restarts, or a second of lost packets, would end the SuperNode, and cost the minute in which the coordinator
    still takes the old one for connected. Certificates that do not pass still end it.
    """
    import httpx
    from flwr.supernode import fleet_http_connection as connection

    make = connection.__dict__["make_simple_http_retry_invoker"]

    def made() -> Any:
        invoker = make()
        gives_up = invoker.should_giveup

        def should_give_up(error: Exception) -> bool:
            text = str(error).lower()
            broken = isinstance(error, httpx.TransportError) and any(term in text for term in _BROKEN)
            return False if broken else bool(gives_up(error))

        invoker.should_giveup = should_give_up
        return invoker

    connection.__dict__["make_simple_http_retry_invoker"] = made


def end_when_sent_away() -> None:
    """Let a SuperNode that the SuperLink does not know (any more) say so and end with code 1.

    At an answer 401 Flower sends itself SIGINT, which looks like an ordinary end on request.
    """
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection

    def kill(_process: int, _signal: int) -> None:
        print("the coordinator refuses this node (401): revoked, or its clock is wrong", file=sys.stderr, flush=True)
        os._exit(1)

    for module in (http_retry, fleet_http_connection):
        module.__dict__["os"] = SimpleNamespace(kill=kill, getpid=os.getpid)


def main() -> int:
    """Run the SuperNode with the options on the command line; returns when it gave its connection up.

    Flower logs an answer such as 403 and returns, while the thread of its own Runtime API keeps the process: it
    looks alive and does nothing. So the caller ends the process (code 1), and whoever supervises it starts it again.
    """
    from flwr.supernode.cli.flower_supernode import flower_supernode

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--client-certificate", type=Path)
    own.add_argument("--client-key", type=Path)
    own.add_argument("--revocations", type=Path)
    own.add_argument("--bundle")
    own.add_argument("--policy", type=Path)
    own.add_argument("--lease", type=Path)
    own.add_argument("--superexec-auth-secret-file", type=Path)  # Flower's own, read here too
    options, rest = own.parse_known_args()
    bound_answers()
    if options.client_certificate and options.client_key:
        present_certificate(options.client_certificate, options.client_key, options.revocations)
    if options.lease:
        end_lost_lease(options.lease)
    keep_trying()
    end_when_sent_away()
    put_aside_ended_runs()
    answer_lost_tasks()
    quicken_transfers()
    lighten_layers({})
    take_values_at_once()
    if options.superexec_auth_secret_file:
        watch = RunnerWatch(options.superexec_auth_secret_file)
        bound_messages(largest_message(options.policy), watch.refused)
        announce_tasks(watch)
        shorten_pauses(watch.wait)
        rest += ["--superexec-auth-secret-file", str(options.superexec_auth_secret_file)]
    else:
        bound_messages(largest_message(options.policy))
        shorten_pauses()
    rest_after_a_reply()
    if options.bundle:
        open_only(options.bundle)
    signal.signal(signal.SIGUSR1, _drain)
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()
    print("the SuperNode lost its connection for good: start it again", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    os._exit(main())
