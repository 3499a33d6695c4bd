# SPDX-License-Identifier: Apache-2.0
"""Who asks the SuperLink again, because the answer was lost on the way, finds what he would have found.

Flower asks again where a link breaks before the answer is there. But three of its requests do not bear that:

    pull-messages   of the coordinator deletes a reply while it is given out: asked again, there is none. And it gives
                    out half replies, with which the message that they reply to is deleted: a node that has to ask
                    again which parts to send (``push-messages``) is then told "none", and the coordinator waits for
                    them for three minutes, and with it for all other hospitals
    push-object     takes a part once: sent again, it is refused. The node gives its reply up, half of which is there;
                    the coordinator's run ends

And a reply that is there is no answer to a coordinator who looks when its node has left: Flower first asks whether the
node is there, and throws the reply away. So a node that stops in order, after a round that it paid for, must be here
until somebody looked.

So here,

    a whole reply   is given out, also of a node that has left since
    a half reply    is not given out while its parts may still come: the node is there, and its time is not up
    a reply         stays until the coordinator confirms that it has all of it; asked for before, it is given out again
    a part          that is here already was stored

Nothing here depends on what this process remembers: a SuperLink that died before it answered has its database. Nobody
is given what he could not get before, since who asks is checked by Flower, and a part is compared byte by byte.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, Final

from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageRes, Node
from flwr.supercore.state.schema.objectstore_models import StoredObject
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select, update

__all__ = ["KeepsGiven", "LostAnswers", "is_here", "present_or_answered"]

_GIVEN: Final = MessageRes.delivered_at != ""
_ANSWERED: Final[ContextVar[frozenset[str]]] = ContextVar("answered", default=frozenset())


class LostAnswers:
    """Replies of one SuperLink.

    Args:
        state: Flower's.
    """

    def __init__(self, state: SqlLinkState) -> None:
        self._state = state

    def ready(self, asked: Iterable[str]) -> list[str]:
        """Which of these messages may be looked at for a reply; replies that were given out can be so again."""
        messages = list(asked)
        half = (
            select(MessageRes.reply_to_message_id)
            .join(ObjectPushSessionRoot, ObjectPushSessionRoot.root_object_id == MessageRes.message_id)
            .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
            .join(Node, Node.node_id == MessageRes.src_node_id)
            .where(
                MessageRes.reply_to_message_id.in_(messages),
                ObjectPushSession.pending_count > 0,
                ObjectPushSession.expires_at > now(),
                Node.online_until > now().timestamp(),
            )
        )
        given = select(MessageRes.message_id).where(MessageRes.reply_to_message_id.in_(messages), _GIVEN)
        with self._state.session() as session:
            unripe: set[Any] = set(session.scalars(half))
            if again := list(session.scalars(given)):
                session.execute(update(MessageRes).where(MessageRes.message_id.in_(again)).values(delivered_at=""))
        return [message for message in messages if message not in unripe]

    def whole(self, messages: set[str]) -> frozenset[str]:
        """Those of them whose reply is here with all of its parts."""
        half = (
            select(ObjectPushSessionRoot.root_object_id)
            .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
            .where(ObjectPushSession.pending_count > 0)
        )
        here = select(MessageRes.reply_to_message_id).where(
            MessageRes.reply_to_message_id.in_(messages), MessageRes.message_id.not_in(half)
        )
        with self._state.session() as session:
            found: frozenset[Any] = frozenset(session.scalars(here))
        return found

    def given(self, messages: set[str]) -> set[str]:
        """Those of them whose reply is on its way to the coordinator, with its parts."""
        kept = (
            select(MessageRes.reply_to_message_id)
            .join(StoredObject, StoredObject.object_id == MessageRes.message_id)
            .where(MessageRes.reply_to_message_id.in_(messages), _GIVEN)
        )
        with self._state.session() as session:
            found: set[Any] = set(session.scalars(kept))
        return found

    def arrived(self, run: int, reply: str) -> None:
        """The coordinator has all of a reply of its run: it goes, and the message with it."""
        replied = select(MessageRes.reply_to_message_id).where(
            MessageRes.message_id == reply, MessageRes.run_id == uint64_to_int64(run), _GIVEN
        )
        with self._state.session() as session:
            messages: set[Any] = set(session.scalars(replied))
            self._state.delete_messages(messages)


class KeepsGiven:
    """Flower's state for one ``pull-messages``: it keeps what it gives out. Otherwise it is Flower's.

    Args:
        state: Flower's.
        answers: of the same SuperLink.
    """

    def __init__(self, state: SqlLinkState, answers: LostAnswers) -> None:
        self._state, self._answers = state, answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Any]:
        """As Flower's, but that a whole reply counts more than whether its node is still there."""
        token = _ANSWERED.set(self._answers.whole(message_ids))
        try:
            return self._state.get_message_res(message_ids, run_id)
        finally:
            _ANSWERED.reset(token)

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """As Flower's, but for messages whose reply is given out; those of errors that it made up itself go."""
        self._state.delete_messages(message_ins_ids - self._answers.given(message_ins_ids))


def is_here(state: Any, part: str, content: bytes) -> bool:
    """Whether the part with this id and content is stored."""
    return bool(content and state.object_store.get(part) == content)


def present_or_answered(check: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's ``check_node_availability_for_in_message``, not asked of messages whose whole reply is here."""

    def checked(inquired_in_message_ids: set[str], **more: Any) -> Any:
        answered = inquired_in_message_ids & _ANSWERED.get()
        inquired_in_message_ids -= answered
        errors = check(inquired_in_message_ids=inquired_in_message_ids, **more)
        inquired_in_message_ids |= answered  # in place: Flower goes on with what is left in it
        return errors

    return checked
