# SPDX-License-Identifier: Apache-2.0
"""Whether a reply answers what was asked, and who has been missing since when."""

from collections.abc import Iterable, Mapping

from ..privacy.contract import (
    EvaluateReply,
    HelloReply,
    KeysReply,
    Kind,
    MaskedReply,
    Refusal,
    Reply,
    SharesReply,
    TrainReply,
    UnmaskReply,
)
from ..privacy.errors import Reason
from .store import SiteRecord

__all__ = ["answers", "missing_since", "note_states"]

_REPLIES: Mapping[Kind, type] = {
    "train": TrainReply, "evaluate": EvaluateReply,
    "keys": KeysReply, "shares": SharesReply, "masked": MaskedReply, "unmask": UnmaskReply,
}  # fmt: skip


def answers(reply: Reply, kind: Kind, number: int) -> bool:
    """Whether ``reply`` is one to a request of this kind for this round; a refusal always is."""
    if isinstance(reply, Refusal):
        return True
    if isinstance(reply, HelloReply):
        return kind == "hello" and reply.public_size >= 1
    return isinstance(reply, _REPLIES.get(kind, ())) and reply.round == number


def note_states(
    sites: Mapping[str, SiteRecord], number: int, asked: Iterable[str], refusals: Mapping[str, Reason]
) -> None:
    """Write into each asked site's record whether it answered in round ``number``, or since when it has not."""
    for name in asked:
        if name not in refusals:
            sites[name].state = "answered"
        elif not sites[name].state.startswith("missing since"):
            sites[name].state = f"missing since round {number}: {refusals[name].value}"


def missing_since(sites: Mapping[str, SiteRecord]) -> dict[str, int]:
    """Sites that are missing, and since which round."""
    words = {name: site.state.split() for name, site in sites.items()}
    return {name: int(w[3].rstrip(":")) for name, w in words.items() if w[:2] == ["missing", "since"]}
