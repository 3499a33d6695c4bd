# SPDX-License-Identifier: Apache-2.0
"""Every message that the SuperNode takes in gets an answer, at once, also where the runner gives none.

Flower's SuperNode takes one message after another and waits for the answer to each. That a runner died it learns from
a minute of silence; of a task that the runner gave up, or half an answer that a dying runner handed over, never: the
node would look alive and do nothing more. So, in the SuperNode's process:

    the runner died       the kernel says so: a line to it (:class:`~fedneuro.privacy.flower_tasks.RunnerLine`) breaks.
                          What it had claimed expires now, not in a minute; what it had not begun goes to the next one
    a task failed         the message is answered with "lost", as Flower 1.41 does for tasks of another kind only
    half an answer        is held back until all of it is there, and thrown away with its task; when it is whole, the
                          main loop, which would look for it from time to time, is told

The privacy ledger knows nothing of this: what was charged stays charged, and the round that is asked again is charged
again. Contract tests read Flower's source and fail if what is changed is no longer where it was.
"""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStore
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR, InMemoryNodeState

from ..privacy.flower_tasks import TURNED_AWAY, RunnerLine

__all__ = ["AnsweringNodeState", "RunnerWatch", "answer_lost_tasks"]

LOOK_SECONDS = 0.2


class AnsweringNodeState(InMemoryNodeState):
    """Flower's state of a SuperNode, less the ways in which a message stays without an answer.

    Attributes:
        whole: is set when an answer is.
    """

    def __init__(self, object_store: ObjectStore) -> None:
        super().__init__(object_store)
        self.whole = threading.Event()

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """As Flower's; the last part of an answer is news."""
        stored = bool(super().store_object(run_id, session_id, object_id, object_content))
        if stored and not self._half_replies():
            self.whole.set()
        return stored

    def get_messages_legacy(
        self, *, run_ids: Sequence[int] | None = None, is_reply: bool | None = None, limit: int | None = None
    ) -> Sequence[Message]:
        """As Flower's; but an answer that is not whole yet is not given out."""
        if is_reply and self._half_replies():
            self.get_tasks(task_ids=[])  # which lets a claim expire whose owner is silent
            if self._half_replies():
                return []
        found: Sequence[Message] = super().get_messages_legacy(run_ids=run_ids, is_reply=is_reply, limit=limit)
        return found

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """As Flower's; the message of a task that failed is answered."""
        finished = bool(super().finish_task(task_id, sub_status, details))
        if finished and sub_status == SubStatus.FAILED:
            runs = {task.run_id for task in self.get_tasks(task_ids=[task_id]) if task.type == TaskType.CLIENT_APP}
            if runs:
                self._store_error_replies(runs, CLIENT_APP_CRASHED_ERROR)
        return finished

    def expire_claims(self) -> None:
        """Whoever had claimed a task is gone."""
        with self.lock_task_store:
            for record in self.task_token_store.values():
                record.active_until = now() - timedelta(seconds=1)
            self._cleanup_expired_task_tokens_locked()

    def _store_error_replies(self, run_ids: set[int], error: Error) -> None:
        """As Flower's, also for a message that was never fetched, or is half answered; one is there at a time."""
        with self._lock_object_push_sessions, self.lock_msg_store:
            for message_id, session_id in self._half_replies(run_ids).items():
                self._cleanup_push_session(session_id, cleanup_messages=False)
                self.delete_messages(message_ids=[message_id])
                self.object_store.delete(message_id)
            for entry in self.msg_store.values():
                metadata = entry.message.metadata
                if metadata.run_id in run_ids and not metadata.reply_to_message_id and not entry.is_retrieved:
                    self.record_message_processing_start(metadata.message_id)
                    entry.is_retrieved = True
            super()._store_error_replies(run_ids, error)
            self.whole.set()

    def _half_replies(self, run_ids: set[int] | None = None) -> dict[str, str]:
        """Answers of which parts are still missing: the session in which they are handed over, by message."""
        found: dict[str, str] = {}
        with self._lock_object_push_sessions, self.lock_msg_store:
            for message_id, entry in self.msg_store.items():
                metadata = entry.message.metadata
                if entry.is_retrieved or not metadata.reply_to_message_id:
                    continue
                session_id = self._object_push_session_by_root.get(message_id, "")
                session = self._object_push_sessions.get(session_id)
                if session and session.pending_object_ids and (run_ids is None or metadata.run_id in run_ids):
                    found[message_id] = session_id
        return found


def answer_lost_tasks() -> None:
    """From now on the SuperNode of this process keeps its state in an :class:`AnsweringNodeState`."""
    nodestate_factory.__dict__["InMemoryNodeState"] = AnsweringNodeState


class RunnerWatch:
    """Rings the runner when a message is there, and sees that it lives until the answer is.

    Args:
        secret: file of the secret that SuperNode and runner share.
    """

    def __init__(self, secret: Path) -> None:
        self._line = RunnerLine(secret)
        self._state: AnsweringNodeState | None = None
        self._again = 0.0

    def taken(self, state: object) -> None:
        """A message was taken in."""
        self._state = state if isinstance(state, AnsweringNodeState) else None
        if not self._line.ring():
            self._line.ring()  # the runner before is gone; now the one that waits
        self._again = time.monotonic() + LOOK_SECONDS

    def refused(self) -> None:
        """A message was turned away before it was all here; the runner is to write that into the audit log."""
        if not self._line.ring(TURNED_AWAY):
            self._line.ring(TURNED_AWAY)

    def wait(self, seconds: float) -> None:
        """Wait for an answer, at most so long; see that the runner lives."""
        if self._state is None:
            time.sleep(seconds)
            return
        if time.monotonic() >= self._again:
            self._again = time.monotonic() + LOOK_SECONDS
            if not self._line.ring():
                self._state.expire_claims()
        self._state.whole.wait(seconds)
        self._state.whole.clear()
