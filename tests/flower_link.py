# SPDX-License-Identifier: Apache-2.0
"""A real SuperLink without HTTP, for tests: Flower's own state, handlers and client; only the wire is left out."""

from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient

__all__ = ["Link"]


class Link:
    """A SuperLink with one node, and a run that is under way.

    Args:
        database: file of its state; by default Flower keeps it in memory.
    """

    def __init__(self, database: Path | None = None) -> None:
        where = FLWR_IN_MEMORY_DB_NAME if database is None else str(database)
        self.factory = LinkStateFactory(where, NoOpFederationManager(), ObjectStoreFactory(where))
        self.state = self.factory.state()
        self.node = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 0)
        self.run = self.state.create_run(
            "fedneuro/fedneuro", "1.0.0", "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )  # fmt: skip
        task = self.state.get_tasks(run_ids=[self.run])[0]
        self.token = self.state.claim_task(task.task_id)
        assert self.token and self.state.activate_task(task.task_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, self.run, 1

    def close(self) -> None:
        """Flower's messages take their sender's ids from this process."""
        for name in ("_task_id", "_run_id", "_node_id"):
            setattr(TaskIdentity, name, None)

    def client(self) -> type[Any]:
        """The class of a SuperNode's client."""
        state = self.state

        class Client(FleetHttpClient):
            def __init__(self) -> None:
                pass

            def _unary_unary(self, *, path: str, request: Any, **_: Any) -> Any:
                name = path.removeprefix("/v1/fleet/").replace("-", "_")
                store = {"store": state.object_store} if name in ("pull_messages", "confirm_message_received") else {}
                try:
                    return getattr(fleet_handlers, name)(request=request, state=state, **store)
                except FlowerError as error:
                    asked = httpx.Request("POST", "https://superlink")
                    raise httpx.HTTPStatusError(str(error), request=asked, response=httpx.Response(400)) from error

        return Client

    def ask(self) -> str:
        """The coordinator sends a message; its id."""
        message = Message(RecordDict(), self.node, "train", ttl=3600.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, parts = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for key, part in get_all_nested_objects(message).items():
            assert key not in parts or self.state.store_object(self.run, session, key, part.deflate())
        return message.object_id

    def answer(self, asked: str) -> Message | None:
        """What the coordinator finds when it looks for the answer."""
        found = self.state.get_message_res({asked}, self.run)
        return found[0] if found else None
