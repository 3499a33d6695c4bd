# SPDX-License-Identifier: Apache-2.0
"""A message that did not reach its node is given out again; half an answer goes with the node that was sending it.

Flower's SuperLink gives each message out once. If the link breaks while the node reads it, or the node dies, nobody has
it: the coordinator waits to the end of the round for an answer that nobody works on. And an answer of which parts are
missing is waited for for three minutes, also where its node is gone. But a node takes one message after another, and
says when it has all of one (``confirm-message-received``, which removes the message's parts). So,

    a node that asks for a message     has none in hand: what it was given and neither confirmed nor answered is given
                                       out again
    a node that says that it is gone   (its next process says so for one that died: :mod:`fedneuro.client.lease`) sends
                                       nothing more: its half answers are removed, and who was fetching one is told

Who may ask and say so, Flower has checked by then. What is given out twice is worked on once, for the node did not get
it the first time; and a round that is asked twice is the hospital's to judge (``fedneuro.client.round_guard``). A
message that a node gets and cannot read is given out :data:`MOST_TIMES`.
"""

import logging
from collections import OrderedDict
from typing import Any, Final

from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select, update

__all__ = ["MOST_TIMES", "SecondDelivery"]

MOST_TIMES: Final = 4
MOST_KNOWN: Final = 4096
_log = logging.getLogger("fedneuro.superlink")


class SecondDelivery:
    """Of one SuperLink.

    Args:
        state: Flower's.
        store: Flower's, of messages' parts.
    """

    def __init__(self, state: SqlLinkState, store: ObjectStore) -> None:
        self._state, self._store = state, store
        self._times: OrderedDict[str, int] = OrderedDict()

    def give_out_again(self, node: int) -> bool:
        """Let the node be given again what it was given, and neither confirmed nor answered; whether there is any."""
        answered = select(MessageRes.message_id).where(MessageRes.reply_to_message_id == MessageIns.message_id)
        given = select(MessageIns.message_id).where(
            MessageIns.dst_node_id == uint64_to_int64(node), MessageIns.delivered_at != "", ~answered.exists()
        )
        with self._state.session() as session:
            messages: list[Any] = list(session.scalars(given))
            again = [message for message in messages if message in self._store and self._once_more(message)]
            if again:
                session.execute(update(MessageIns).where(MessageIns.message_id.in_(again)).values(delivered_at=""))
        if again:
            _log.warning("%d message(s) did not reach node %d and are given out again", len(again), node)
        return bool(again)

    def drop_half_answers(self, node: int) -> int:
        """Remove the node's answers of which parts are missing; returns how many."""
        half = (
            select(ObjectPushSession.session_id)
            .join(ObjectPushSessionRoot, ObjectPushSessionRoot.session_id == ObjectPushSession.session_id)
            .join(MessageRes, MessageRes.message_id == ObjectPushSessionRoot.root_object_id)
            .where(MessageRes.src_node_id == uint64_to_int64(node), ObjectPushSession.pending_count > 0)
        )
        with self._state.session() as session:
            sessions: list[Any] = list(session.scalars(half))
            for name in sessions:
                self._state._cleanup_push_session(name, cleanup_messages=True)
        if sessions:
            _log.warning("%d half answer(s) of node %d are removed: it is gone", len(sessions), node)
        return len(sessions)

    def _once_more(self, message: str) -> bool:
        self._times[message] = self._times.get(message, 1) + 1
        self._times.move_to_end(message)
        while len(self._times) > MOST_KNOWN:
            self._times.popitem(last=False)
        return self._times[message] <= MOST_TIMES
