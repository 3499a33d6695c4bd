# SPDX-License-Identifier: Apache-2.0
"""What the four steps of a secure aggregation say, as plain data: see :mod:`fedneuro.privacy.secagg.participant`.

The wire knows each field (:mod:`fedneuro.privacy.wire_secure`); nothing else of the protocol leaves a site but the
masked vector itself, which is the contract's :class:`~fedneuro.privacy.contract.MaskedReply`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Advert", "KeysReply", "SecureStep", "SharesReply", "UnmaskReply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """A site's public keys for one aggregation, signed with its lasting identity.

    Attributes:
        encryption: X25519 public key under which peers seal shares, 32 bytes.
        masking: X25519 public key from which pairwise masks derive, 32 bytes.
        signature: ECDSA P-384 of study, round, site and both keys.
    """

    encryption: bytes
    masking: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureStep:
    """The part of a request that belongs to secure aggregation; each step uses the fields named beside it.

    Attributes:
        roster: *keys, shares*: public identity of every training site of the study.
        adverts: *shares*: the keys of the sites that take part.
        context: *masked, unmask*: digest of roster and adverts, 64 hexadecimal digits; ties a step to its aggregation.
        sealed: *masked*: shares that each other site sealed for this one, by sender.
        survivors: *unmask*: sites whose masked vector arrived.
    """

    roster: Mapping[str, bytes] = field(default_factory=dict)
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    context: str = ""
    sealed: Mapping[str, bytes] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysReply:
    """Step 1: a site's public keys for the round."""

    site: str
    round: int
    advert: Advert


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesReply:
    """Step 2: shares of the site's two secrets, sealed for each other site, by recipient."""

    site: str
    round: int
    sealed: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmaskReply:
    """Step 4: of each peer one share, of its self mask if its vector arrived, else of its masking key.

    ``advert``: the site's keys for the next round, which saves that round an exchange; None after the last.
    """

    site: str
    round: int
    self_shares: Mapping[str, bytes]
    key_shares: Mapping[str, bytes]
    advert: Advert | None = None
