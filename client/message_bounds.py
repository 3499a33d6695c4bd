# SPDX-License-Identifier: Apache-2.0
"""How much of the node's memory a coordinator can take: bounds on answers, on messages, and on what they unfold to.

The policy and the contract judge a message when all of it is here and put together. Flower, which brings it here,
trusts the SuperLink. So, before anything of ours is asked:

    an answer     of the SuperLink is at most :data:`LARGEST_ANSWER`, not compressed (a gzip bomb is small on the wire),
                  and no redirect to another address, where the node's signed request would follow it
    a message     has at most four times the bytes that the policy permits a model (as the policy is then), in at most
                  :data:`MOST_PARTS` parts; the rest of a larger one is not fetched, it is answered
                  "contract-violation", and the runner writes that into the audit log
    an array      names the parts that it consists of, and may name one again and again: they are counted
                  before the array is made

A message that cannot be taken in for another reason is answered "lost"; Flower 1.41 would say nothing.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from ..privacy.errors import ContractViolation, Reason, Refused
from .policy import PolicyFile

__all__ = ["bound_answers", "bound_messages", "bound_unfolding", "largest_message", "unfolded_bytes"]

LARGEST_ANSWER: Final = 32 * 2**20
"""Bytes; Flower moves arrays in parts of 5 MiB, bundles of at most 10 MiB."""
MOST_PARTS: Final = 8192
BESIDE_THE_MODEL: Final = 64 * 2**20
"""Bytes of a message that are not its model: the study, keys, shares, headers of parts."""
MODELS_IN_A_MESSAGE: Final = 4
"""Strategies send a second or third array for each weight."""
WITHOUT_POLICY: Final = 5 * 2**30
"""Bytes of a message for a node that has no policy file (a rehearsal)."""

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
_log = logging.getLogger("fedneuro.supernode")


def largest_message(policy: Path | None) -> Callable[[], int]:
    """How many bytes a message may have now; a policy that cannot be read permits no model."""
    file = None if policy is None else PolicyFile(policy)

    def largest() -> int:
        if file is None:
            return WITHOUT_POLICY
        try:
            return BESIDE_THE_MODEL + MODELS_IN_A_MESSAGE * file.look()[0].model.max_bytes
        except Refused:
            return BESIDE_THE_MODEL

    return largest


# -- answers of the SuperLink --------------------------------------------------------------------------------


class _Bounded(httpx.SyncByteStream):
    """A body that ends with an error where it is too long."""

    def __init__(self, body: httpx.SyncByteStream) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._body:
            size += len(part)
            if size > LARGEST_ANSWER:
                raise httpx.DecodingError(f"the coordinator's answer has more than {LARGEST_ANSWER >> 20} MiB")
            yield part

    def close(self) -> None:
        self._body.close()


def _check_answer(response: httpx.Response) -> None:
    """Before the body is read.

    Raises:
        httpx.DecodingError: it is compressed. Flower does not ask again then; the node's supervisor starts anew.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.DecodingError("the coordinator's answer is compressed, which was not asked for")
    if isinstance(response.stream, httpx.SyncByteStream):
        response.stream = _Bounded(response.stream)


def bound_answers() -> None:
    """From now on, the SuperNode of this process takes no other answer; call it before ``present_certificate``."""
    from flwr.supernode import fleet_http_connection as connection

    class BoundedFleetHttpClient(connection.FleetHttpClient):  # type: ignore[misc,name-defined]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._client.follow_redirects = False
            self._client.headers["accept-encoding"] = "identity"
            self._client.event_hooks = {"response": [_check_answer]}

    connection.__dict__["FleetHttpClient"] = BoundedFleetHttpClient


# -- messages ------------------------------------------------------------------------------------------------


class _Intake:
    """One message on its way in."""

    def __init__(self, largest: Callable[[], int]) -> None:
        self._largest, self._size = largest, 0
        self.message: Message | None = None
        self.reason = Reason.LOST
        self.ended = False

    def receive(self, call: Callable[[], Any]) -> Any:
        try:
            found = call()
        except _MALFORMED as error:
            _log.warning("what the coordinator sent is no message: %s", error)
            return None
        if found is not None:
            self.message, tree = found
            if _more_parts(tree, MOST_PARTS) < 0:
                raise self._too_large(f"more than {MOST_PARTS} parts")
        return found

    def pull(self, call: Callable[[int, str], bytes], run_id: int, object_id: str) -> bytes:
        from flwr.supercore.run import RunNotRunningException

        try:
            content = call(run_id, object_id)
        except RunNotRunningException:
            self.ended = True
            raise
        self._size += len(content)
        if self._size > (most := self._largest()):
            raise self._too_large(f"more than {most} bytes, which the policy's model.max_bytes allows")
        return content

    def _too_large(self, what: str) -> ContractViolation:
        self.reason = Reason.CONTRACT_VIOLATION
        return ContractViolation(f"a message of {what}")


def _more_parts(tree: Any, left: int) -> int:
    """How many parts may follow; negative as soon as there are too many."""
    left -= 1
    for child in tree.children:
        if left < 0:
            break
        left = _more_parts(child, left)
    return left


def bound_messages(largest: Callable[[], int], refused: Callable[[], None] = lambda: None) -> None:
    """Let the SuperNode of this process take in no message of more bytes, and answer every one that it does not.

    Args:
        largest: bytes of a message; asked while it comes in.
        refused: is called after one that was too large.
    """
    from flwr.supernode import start_client_internal as loop

    pull = loop.__dict__["_pull_and_store_message"]

    def pulled(*, receive: Callable[[], Any], pull_object: Callable[[int, str], bytes], **named: Any) -> Any:
        intake = _Intake(largest)
        try:
            run_id = pull(
                receive=lambda: intake.receive(receive),
                pull_object=lambda run, key: intake.pull(pull_object, run, key),
                **named,
            )
        except (*_MALFORMED, ContractViolation) as error:
            if intake.message is None:
                raise
            _log.warning("a message was not taken in: %s", error)
            run_id = None
        if run_id is not None or intake.message is None or intake.ended:
            return run_id
        code = ErrorCode.MESSAGE_UNAVAILABLE
        if intake.reason is not Reason.LOST:
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            refused()
        reply = Message(Error(code, intake.reason.value), reply_to=intake.message)
        loop.__dict__["_insert_message"](reply, named["state"], named["object_store"])
        return intake.message.metadata.run_id

    loop.__dict__["_pull_and_store_message"] = pulled


# -- arrays, in the runner -----------------------------------------------------------------------------------


def unfolded_bytes(contents: Mapping[str, bytes]) -> int:
    """Bytes of all arrays that the parts of a message, by their id, would be put together to.

    Raises:
        ValueError, TypeError, LookupError: they are no parts of a message.
    """
    from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content as head_of

    total = 0
    for content in contents.values():
        kind, children, size = head_of(content)
        if kind == "Array":
            sizes = [len(contents[child]) for child in children]
            total += sum(sizes[index] for index in json.loads(content[-size:])["arraychunk_ids"])
    return total


def bound_unfolding(largest: Callable[[], int]) -> None:
    """Let the runner of this process put no message together that has more bytes than that.

    Raises:
        ContractViolation: later, where Flower's own code fetches a message's parts.
    """
    from flwr.supercore.inflatable import inflatable_utils

    pull = inflatable_utils.__dict__["pull_objects"]

    def pulled(*arguments: Any, **named: Any) -> dict[str, bytes]:
        contents: dict[str, bytes] = pull(*arguments, **named)
        if unfolded_bytes(contents) > (most := largest()):
            raise ContractViolation(f"a message whose arrays have more than {most} bytes")
        return contents

    inflatable_utils.__dict__["pull_objects"] = pulled
