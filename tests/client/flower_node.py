# SPDX-License-Identifier: Apache-2.0
"""A real SuperNode without its SuperLink, for tests: Flower's own state, Runtime API and main loop's steps."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvicorn
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedneuro.server.bundle import bundle, bundle_hash

__all__ = ["BUNDLE", "SuperNode", "tampered"]

BUNDLE = bundle()


def tampered(message: Message, part: str, change: Callable[[bytes], bytes]) -> tuple[Any, dict[str, bytes]]:
    """A message that no honest coordinator makes: the body of its first part of type ``part`` is changed.

    Returns:
        its tree, and its parts by their (right) ids.
    """
    parts = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    tree = get_object_tree(message)
    old = next(key for key, value in parts.items() if value.startswith(f"{part} ".encode()))
    head, _, body = parts[old].partition(b"\0")
    body = change(body)
    parts[old] = head[: head.rindex(b" ") + 1] + str(len(body)).encode() + b"\0" + body
    renamed: dict[str, str] = {}
    for key in list(parts):  # children come before their parents
        value = parts.pop(key)
        for before, after in renamed.items():
            value = value.replace(before.encode(), after.encode())
        new = hashlib.sha256(value).hexdigest()
        parts[new] = value
        if new != key:
            renamed[key] = new

    def rename(node: Any) -> Any:
        return ObjectTree(
            object_id=str(renamed.get(node.object_id, node.object_id)),
            children=[rename(child) for child in node.children],
        )

    return rename(tree), parts


class SuperNode:
    """A real SuperNode without its SuperLink: messages are put in and taken out here."""

    def __init__(self, port: int, secret: bytes) -> None:
        self.factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        config = uvicorn.Config(create_app(self.factory, secret), host="127.0.0.1", port=port, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.state, self.store = self.factory.state(), self.factory.objectstore_factory.store()
        self.state.set_node_id(7)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, 1  # Flower makes no message without

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        for name in ("_task_id", "_run_id", "_node_id"):
            setattr(TaskIdentity, name, None)

    def receive(
        self,
        content: RecordDict,
        kind: str,
        fab: bytes = BUNDLE,
        pull: Callable[[str], bytes] | None = None,
        made: tuple[Any, dict[str, bytes]] | None = None,
    ) -> int | None:
        """Take a message in as the SuperNode's main loop does; the run that it belongs to.

        ``pull`` stands in place of the SuperLink; ``made`` by :func:`tampered` in place of the parts of ``content``.
        """
        message = Message(content, 7, kind, group_id="0")
        tree, objects = made or (
            get_object_tree(message),
            {key: value.deflate() for key, value in get_all_nested_objects(message).items()},
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        run = replace(Run.create_empty(5), fab_id="fedneuro/fedneuro", fab_hash=bundle_hash(fab), series_id=3)
        taken: int | None = vars(start_client_internal)["_pull_and_store_message"](
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, tree),
            get_run=lambda _: run,
            get_fab=lambda digest, _: Fab(digest, fab, {}),
            pull_object=lambda _, key: (pull or objects.__getitem__)(key),
            confirm_message_received=lambda _, __: None,
            trusted_entities=None,
        )
        return taken

    def reply(self) -> Message | None:
        """The reply that the main loop would send on, with its content."""
        replies = self.state.get_messages_legacy(is_reply=True)
        if not replies:
            return None
        tree = self.store.get_object_tree(replies[0].metadata.message_id)
        keys = [node.object_id for node in iterate_object_tree(tree)]
        contents = {key: value for key in keys if (value := self.store.get(key))}
        if len(contents) < len(set(keys)):
            return None
        full = inflatable_utils.inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(full, Message)
        return full
