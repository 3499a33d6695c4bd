# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperLink, quicker and surer: ``python -m fedneuro.server.superlink`` takes its own options.

    looks          for messages and answers are held until there is one (:mod:`.held_looks`)
    deliveries     that did not reach their node are made again (:mod:`.second_delivery`)
    answers        that were lost on the way can be asked for again (:mod:`.lost_answers`)
    requests       of nodes and runners pass through less (:mod:`fedneuro.privacy.light_layers`)

What Flower checks of a request (versions, signatures, tokens, secrets) it checks as ever. Nothing is kept that Flower
does not keep: a SuperLink that dies goes on from its database. Contract tests read Flower's source and fail if what is
changed is no longer where it was.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..privacy.light_layers import FLEET, RUNTIME, lighten_layers, take_values_at_once
from .held_looks import GRID_PULL, NODE_PULL, HeldLooks, News

__all__ = [
    "SUPERLINK",
    "answer_again",
    "do_less_around_requests",
    "hold_looks",
    "idle_layers",
    "main",
    "make_deliveries_again",
    "superlink_arguments",
]

SUPERLINK = "fedneuro.server.superlink:main"


def superlink_arguments(
    address: str, database: Path, *, authority: Path, certificate: Path, key: Path, secret: Path
) -> list[str]:
    """Options of a SuperLink with TLS, node authentication, SQLite and runners of its own.

    Args:
        address: host:port.
        database: file of its state; made if it is not there.
        authority: certificate of the authority that signed ``certificate``.
        certificate: the SuperLink's own.
        key: its private key.
        secret: file of the secret that a runner must know.
    """
    host, port = address.rsplit(":", 1)
    arguments = ["--host", host, "--port", port, "--database", str(database)]
    arguments += ["--ssl-ca-certfile", str(authority), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    arguments += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    return [*arguments, "--isolation", "process", "--superexec-auth-secret-file", str(secret)]


def hold_looks(news: News) -> None:
    """Tell ``news`` what the SuperLink of this process takes in, and hold who asks for it; before it starts."""
    import uvicorn
    from flwr.superlink import main as application
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers
    from starlette.middleware import Middleware

    for handlers, path in ((runtime_handlers, NODE_PULL), (fleet_handlers, GRID_PULL)):
        _tell(handlers.__dict__, path, news)
    for name in ("deactivate_node", "activate_node"):  # its messages are answered "unavailable" now
        _then(fleet_handlers.__dict__, name, lambda *_: news.tell(GRID_PULL))
    names: Any = vars(application)
    layers = names["_get_middleware"]
    names["_get_middleware"] = lambda: [Middleware(HeldLooks, news=news), *layers()]
    leave: Any = uvicorn.Server.handle_exit

    def handle_exit(self: uvicorn.Server, number: int, frame: FrameType | None) -> None:
        news.close()
        leave(self, number, frame)

    uvicorn.Server.handle_exit = handle_exit  # type: ignore[method-assign, assignment]


def _tell(handlers: dict[str, Any], path: str, news: News) -> None:
    """Messages that these handlers take in are news at ``path``."""

    def announced(_request: Any, response: Any) -> None:
        if path == NODE_PULL:
            news.not_there(GRID_PULL, filter(None, response.message_ids))
        news.announced(path, response.session_id, set(response.objects_to_push))

    def arrived(request: Any, response: Any) -> None:
        if response.stored:
            news.arrived(path, request.session_id, request.object_id)

    _then(handlers, "push_messages", announced)
    _then(handlers, "push_object", arrived)


def _then(handlers: dict[str, Any], name: str, after: Callable[[Any, Any], None]) -> None:
    handler = handlers[name]

    def handled(request: Any, *arguments: Any, **named: Any) -> Any:
        response = handler(request, *arguments, **named)
        after(request, response)
        return response

    handlers[name] = handled


def make_deliveries_again() -> None:
    """Let the SuperLink of this process give out again what did not reach its node; see :mod:`.second_delivery`."""
    from flwr.server.superlink.linkstate import SqlLinkState
    from flwr.superlink.servicer.fleet import fleet_handlers

    from .second_delivery import SecondDelivery

    handlers = fleet_handlers.__dict__
    pull, deactivate = handlers["pull_messages"], handlers["deactivate_node"]
    made: dict[int, SecondDelivery] = {}

    def of(state: Any) -> SecondDelivery | None:
        if not isinstance(state, SqlLinkState):
            return None
        return made.setdefault(id(state), SecondDelivery(state, state.object_store))

    def pull_messages(request: Any, state: Any, store: Any) -> Any:
        response = pull(request=request, state=state, store=store)
        delivery = None if response.messages_list else of(state)
        if delivery is None or not delivery.give_out_again(request.node.node_id):
            return response
        return pull(request=request, state=state, store=store)

    def deactivate_node(request: Any, state: Any) -> Any:
        response = deactivate(request=request, state=state)
        if (delivery := of(state)) is not None:
            delivery.drop_half_answers(request.node_id)
        return response

    handlers["pull_messages"], handlers["deactivate_node"] = pull_messages, deactivate_node


def answer_again() -> None:
    """Let the SuperLink of this process bear to be asked again; see :mod:`.lost_answers`."""
    from flwr.proto.message_pb2 import PushObjectResponse
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
    from flwr.server.superlink.linkstate import SqlLinkState, sql_linkstate
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.superlink.servicer.runtime import runtime_handlers

    from .lost_answers import KeepsGiven, LostAnswers, is_here, present_or_answered

    available = "check_node_availability_for_in_message"
    setattr(sql_linkstate, available, present_or_answered(getattr(sql_linkstate, available)))
    coordinators = runtime_handlers.__dict__
    pull, confirm = coordinators["pull_messages"], coordinators["confirm_message_received"]

    def pull_messages(request: Any, state: Any, task: Any) -> Any:
        if not isinstance(state, SqlLinkState) or not request.message_ids:
            return pull(request, state, task)
        answers = LostAnswers(state)
        if not (ready := answers.ready(request.message_ids)):
            return PullAppMessagesResponse()
        return pull(PullAppMessagesRequest(message_ids=ready), KeepsGiven(state, answers), task)

    def confirm_message_received(request: Any, state: Any, task: Any) -> Any:
        if isinstance(state, SqlLinkState):
            LostAnswers(state).arrived(task.run_id, request.message_object_id)
        return confirm(request, state, task)

    coordinators["pull_messages"], coordinators["confirm_message_received"] = pull_messages, confirm_message_received
    for handlers in (coordinators, fleet_handlers.__dict__):
        push = handlers["push_object"]

        def push_object(request: Any, state: Any, *task: Any, push: Callable[..., Any] = push) -> Any:
            response = push(request, state, *task)
            if response.stored or not is_here(state, request.object_id, request.object_content):
                return response
            return PushObjectResponse(stored=True)

        handlers["push_object"] = push_object


def idle_layers() -> dict[Any, tuple[str, ...]]:
    """Layers of the SuperLink's application, and the paths for whose requests they do nothing."""
    from flwr.supercore.routers.runtime.tracing import RuntimeTracingMiddleware
    from flwr.superlink.routers.control import middlewares as control
    from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
    from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware

    both = (FLEET, RUNTIME)
    return {
        control.ControlSensitiveResponseMiddleware: both,
        control.ControlAuthenticationMiddleware: both,
        control.ControlLicenseMiddleware: both,
        control.ControlEventLogMiddleware: both,
        NodeAuthMiddleware: (RUNTIME,),
        FleetEventLogMiddleware: (RUNTIME,) if "--enable-event-log" in sys.argv else both,
        RuntimeTracingMiddleware: (FLEET,) if os.environ.get("FLWR_TRACING_ENABLED") == "1" else both,
    }


def do_less_around_requests() -> None:
    """Of nodes and runners, in the SuperLink of this process; see :mod:`fedneuro.privacy.light_layers`."""
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.routers.fleet.router import get_enable_supernode_auth

    lighten_layers(idle_layers())
    take_values_at_once(get_linkstate, get_enable_supernode_auth)


def main() -> None:
    """Run the SuperLink with the options on the command line."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    do_less_around_requests()
    make_deliveries_again()
    answer_again()
    hold_looks(News())
    sys.argv = ["flower-superlink", *sys.argv[1:]]
    flower_superlink()


if __name__ == "__main__":
    main()
