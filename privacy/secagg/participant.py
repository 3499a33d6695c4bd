# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation, a site's side: the server learns the sum of the sites' vectors and nothing else.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
https://doi.org/10.1145/3133956.3133982, the protocol of figure 4 with signed keys. Per round, with T = H - t:

    1. *keys*    each site makes two fresh X25519 pairs, signs the public keys with its identity, sends them
    2. *shares*  the server hands all keys round; each site draws a self-mask seed, splits the seed and its
                 masking key T-of-n (Shamir) and seals one share of each for every other site
    3. *masked*  the server delivers the sealed shares; each site sends vector + self mask ± one mask per peer:
                 pairwise masks cancel in the sum
    4. *unmask*  the server names the sites whose vector arrived; each site gives, of each peer, the share of the
                 self-mask seed if it did, else that of the masking key

What is promised, against a server that follows the steps or lies about who is there, and up to t sites with it:

- A site's vector is hidden under its self mask even if every pairwise mask is known, and the other way round.
- Of one peer a site gives the share of *one* secret, once. T > (H + t) / 2 because t < H / 3, so no story told
  differently to different sites collects T shares of both.
- Keys serve one round: a masking key that was put together for a site that dropped out opens nothing else.
- Each step is taken once per set of keys, in order, with the set of peers that step 2 fixed; fewer than T peers
  is refused, and so is a peer whose key is not signed by the identity that this hospital knows.

The server can make the sum wrong or the round fail; that is not in its power to hide. State between the steps is
plain data (:meth:`Participant.dump`), so a site may be restarted, or move to another worker, half-way.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ContractViolation, Reason, Refused
from . import shamir
from .grid import check_sites
from .keys import Identity, RoundKeys, mask_key, self_mask_key, verify_advert
from .masks import add_streams
from .messages import Advert

__all__ = ["Participant", "Terms", "check_survivors", "context_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one aggregation is about; public.

    Attributes:
        study: study hash.
        round: round of the study.
        tolerate: t, sites that may drop out or collude.
        least: sites that must take part whatever t says (``strategy.min_sites``).
    """

    study: str
    round: int
    tolerate: int
    least: int = 0

    def needed(self, roster: Mapping[str, bytes]) -> int:
        """T, of this roster: sites that must stay, and shares that give a secret back.

        Raises:
            BadInput: the roster is too small.
        """
        check_sites(len(roster), self.tolerate)
        return max(len(roster) - self.tolerate, min(self.least, len(roster)))


def context_of(terms: Terms, roster: Mapping[str, bytes], adverts: Mapping[str, Advert]) -> str:
    """Digest of terms, roster and keys: 64 hexadecimal digits that name one aggregation."""
    keys = {site: [a.encryption.hex(), a.masking.hex()] for site, a in sorted(adverts.items())}
    identities = {site: identity.hex() for site, identity in sorted(roster.items())}
    text = json.dumps([asdict(terms), identities, keys], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_survivors(survivors: set[str], peers: set[str], needed: int, what: str) -> None:
    """Refuse a set of sites that is not a part of the one before it, or smaller than the threshold.

    Raises:
        ContractViolation, Refused: naming what is wrong.
    """
    if not survivors <= peers:
        raise ContractViolation(f"{what} names sites that did not take part before: {sorted(survivors - peers)[:3]}")
    if len(survivors) < needed:
        raise Refused(
            f"{what} names {len(survivors)} sites, {needed} are needed: below that one site's vector could be told",
            reason=Reason.POLICY_REFUSED,
        )


@dataclass(slots=True, kw_only=True)
class Participant:
    """One site in one aggregation.

    Steps in order: :meth:`begin`, :meth:`share`, :meth:`enter`, :meth:`mask`, :meth:`unmask`. Save :meth:`dump` before
    the answer of a step leaves (and before :meth:`mask`), so that a crash cannot make a step be taken twice.

    Raises:
        ContractViolation: each step, where it is taken out of order or names other sites, keys or rounds.
        Refused: each step, where fewer sites are named than the terms allow.
    """

    site: str
    terms: Terms
    keys: RoundKeys
    step: str = "keys"
    roster: dict[str, bytes] = field(default_factory=dict)
    adverts: dict[str, Advert] = field(default_factory=dict)
    context: str = ""
    seed: bytes = b""
    own: tuple[bytes, bytes] = (b"", b"")
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    @classmethod
    def begin(cls, site: str, terms: Terms) -> "Participant":
        """Step 1: fresh keys; sign them with :meth:`advert`."""
        return cls(site=site, terms=terms, keys=RoundKeys.fresh())

    def advert(self, identity: Identity) -> Advert:
        """The public keys of this aggregation."""
        return identity.advertise(self.terms.study, self.terms.round, self.site, self.keys)

    def share(self, roster: Mapping[str, bytes], adverts: Mapping[str, Advert]) -> dict[str, bytes]:
        """Step 2: check everyone's keys; split the two secrets and seal a share of each for every other site.

        Args:
            roster: identity of every training site, checked by the caller against those that the hospital knows.
            adverts: keys of the sites that take part, this one's own among them.
        """
        self._expect("keys", "shares")
        needed = self.terms.needed(roster)
        check_survivors(set(adverts), set(roster), needed, "the list of keys")
        mine = adverts.get(self.site)
        if mine is None or (mine.encryption, mine.masking) != self.keys.public:
            raise ContractViolation("the list of keys does not hold the key that this site gave for the round")
        for name, advert in adverts.items():
            verify_advert(advert, roster[name], self.terms.study, self.terms.round, name)
        if len({a.masking for a in adverts.values()} | {a.encryption for a in adverts.values()}) != 2 * len(adverts):
            raise ContractViolation("the list of keys holds one key twice")
        self.roster, self.adverts = dict(sorted(roster.items())), dict(sorted(adverts.items()))
        self.context = context_of(self.terms, self.roster, self.adverts)
        self.seed, self.step = os.urandom(32), "shares"
        points = range(1, len(self.adverts) + 1)
        parts = list(
            zip(shamir.share(self.seed, needed, points), shamir.share(self.keys.masking, needed, points), strict=True)
        )
        sealed = {}
        for (name, advert), pair in zip(self.adverts.items(), parts, strict=True):
            if name == self.site:
                self.own = pair
            else:
                sealed[name] = self.keys.seal(advert, b"".join(pair), self.context, self.site, name)
        return sealed

    def enter(self, context: str, sealed: Mapping[str, bytes]) -> None:
        """Step 3, first half: take the peers' shares; from here on the site counts as one that may drop out."""
        self._expect("shares", "masked", context)
        check_survivors({*sealed, self.site}, set(self.adverts), self.terms.needed(self.roster), "the list of shares")
        if self.site in sealed:
            raise ContractViolation("the list of shares holds one from this site itself")
        shares = {self.site: self.own}
        for name, content in sealed.items():
            opened = self.keys.open(self.adverts[name], content, self.context, name, self.site)
            if len(opened) != 2 * shamir.SHARE_BYTES:
                raise ContractViolation(f"the shares of {name} are of another length")
            shares[name] = (opened[: shamir.SHARE_BYTES], opened[shamir.SHARE_BYTES :])
        self.shares, self.step = dict(sorted(shares.items())), "masked"

    def mask(self, vector: NDArray[np.uint64]) -> None:
        """Step 3, second half: lay the self mask and one mask per peer over ``vector``, in place. Once.

        Not kept by :meth:`dump`: the vector leaves in the same breath, or never.
        """
        if self.step != "masked" or not self.seed:
            raise ContractViolation("a vector is masked once per round, after the shares have come")
        added, taken = [self_mask_key(self.seed, self.context, self.site)], list[bytes]()
        for name in self.shares:
            if name != self.site:
                key = mask_key(self.keys.masking, self.adverts[name].masking, self.context, self.site, name)
                (added if self.site < name else taken).append(key)
        self.seed = b""
        add_streams(vector, added, taken)

    def unmask(self, context: str, survivors: set[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Step 4: shares of self-mask seeds of the survivors, and of masking keys of those who dropped out.

        Secrets are forgotten; nothing can be asked of this aggregation again.
        """
        self._expect("masked", "unmask", context)
        check_survivors(survivors, set(self.shares), self.terms.needed(self.roster), "the list of survivors")
        if self.site not in survivors:
            raise ContractViolation("the list of survivors leaves out this site, which is asked")
        seeds = {name: pair[0] for name, pair in self.shares.items() if name in survivors}
        keys = {name: pair[1] for name, pair in self.shares.items() if name not in survivors}
        self.step, self.keys, self.seed, self.own, self.shares = "done", RoundKeys(b"", b""), b"", (b"", b""), {}
        return seeds, keys

    def _expect(self, before: str, step: str, context: str | None = None) -> None:
        if self.step != before:
            raise ContractViolation(
                f"step {step} of round {self.terms.round} comes after step {self.step}; each is taken once, in order",
                reason=Reason.OUT_OF_STEP,
            )
        if context is not None and context != self.context:
            raise ContractViolation(
                f"step {step} belongs to another aggregation than this site's", reason=Reason.OUT_OF_STEP
            )

    # -- between the steps -----------------------------------------------------------------------------

    def dump(self) -> str:
        """Everything as JSON. Secret: keep it where only the site reads, and overwrite it at each step."""
        values = {
            "site": self.site, "terms": asdict(self.terms), "step": self.step, "context": self.context,
            # From step 3 on the site's own secrets are needed in memory alone: a second vector cannot be masked.
            "keys": ["", ""] if self.step == "masked" else [self.keys.encryption.hex(), self.keys.masking.hex()],
            "seed": self.seed.hex() if self.step == "shares" else "",
            "own": [part.hex() for part in self.own],
            "roster": {name: identity.hex() for name, identity in self.roster.items()},
            "adverts": {n: [a.encryption.hex(), a.masking.hex(), a.signature.hex()] for n, a in self.adverts.items()},
            "shares": {name: [part.hex() for part in pair] for name, pair in self.shares.items()},
        }  # fmt: skip
        return json.dumps(values)

    @classmethod
    def load(cls, text: str) -> "Participant":
        """Undo :meth:`dump`.

        Raises:
            ContractViolation: the text is not a saved state.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            pairs = {n: (bytes.fromhex(a), bytes.fromhex(b)) for n, (a, b) in values["shares"].items()}
            adverts = {n: _advert(*parts) for n, parts in values["adverts"].items()}
            first, second = (bytes.fromhex(part) for part in values["keys"])
            own_seed, own_key = (bytes.fromhex(part) for part in values["own"])
            return cls(
                site=values["site"],
                terms=Terms(**values["terms"]),
                keys=RoundKeys(first, second),
                step=values["step"],
                roster={name: bytes.fromhex(identity) for name, identity in values["roster"].items()},
                adverts=adverts,
                context=values["context"],
                seed=bytes.fromhex(values["seed"]),
                own=(own_seed, own_key),
                shares=pairs,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ContractViolation(
                "the saved state of the aggregation cannot be read; the round begins anew", reason=Reason.OUT_OF_STEP
            ) from error


def _advert(encryption: str, masking: str, signature: str) -> Advert:
    return Advert(
        encryption=bytes.fromhex(encryption), masking=bytes.fromhex(masking), signature=bytes.fromhex(signature)
    )
