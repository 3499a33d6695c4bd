# SPDX-License-Identifier: Apache-2.0
"""Secure aggregation, the server's side: relays keys and shares, adds masked vectors, takes the masks off the sum.

The steps are those of :mod:`fedneuro.privacy.secagg.participant`. Vectors are added as they arrive, so memory does
not grow with the number of sites. Below the threshold nothing is taken off: :meth:`Aggregation.finish` refuses.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import ContractViolation
from . import shamir
from .keys import mask_key, public_masking_key, self_mask_key
from .masks import add_streams
from .messages import Advert
from .participant import Terms, context_of

__all__ = ["Aggregation"]


class Aggregation:
    """One aggregation.

    Args:
        terms: what it is about.
        roster: identity of every training site.
        adverts: keys of the sites that take part.
        size: words of a vector.

    Attributes:
        context: its name, which steps 3 and 4 carry.
        needed: sites that must stay at every step.
    """

    def __init__(self, terms: Terms, roster: Mapping[str, bytes], adverts: Mapping[str, Advert], size: int) -> None:
        self.needed = terms.needed(roster)
        self._adverts = dict(sorted(adverts.items()))
        self._points = {name: point for point, name in enumerate(self._adverts, 1)}
        self.context = context_of(terms, roster, adverts)
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._total = np.zeros(size, np.uint64)
        self._arrived: list[str] = []
        self._seeds: dict[str, dict[int, bytes]] = {}
        self._keys: dict[str, dict[int, bytes]] = {}
        self._answered = 0

    @property
    def shared(self) -> list[str]:
        """Sites whose shares arrived: those that step 3 asks."""
        return sorted(self._sealed)

    @property
    def survivors(self) -> list[str]:
        """Sites whose vector arrived: those that step 4 asks, and those that the sum holds."""
        return sorted(self._arrived)

    def take_shares(self, site: str, sealed: Mapping[str, bytes]) -> None:
        """Step 2: keep what ``site`` sealed for the others.

        Raises:
            ContractViolation: it is not one for each other site.
        """
        if site not in self._adverts or set(sealed) != set(self._adverts) - {site}:
            raise ContractViolation(f"site {site} did not seal its shares for just the other sites")
        self._sealed[site] = sealed

    def sealed_for(self, site: str) -> dict[str, bytes]:
        """Step 3: what the others sealed for ``site``, by sender."""
        return {sender: sealed[site] for sender, sealed in sorted(self._sealed.items()) if sender != site}

    def fold(self, site: str, vector: NDArray[np.uint64]) -> None:
        """Step 3: add one site's masked vector.

        Raises:
            ContractViolation: another length or type, or a second vector.
        """
        if vector.dtype != np.uint64 or vector.shape != self._total.shape:
            text = f"site {site} sent {vector.dtype.name}{vector.shape}"
            raise ContractViolation(f"{text}; uint64{self._total.shape} was agreed")
        if site not in self._sealed or site in self._arrived:
            raise ContractViolation(f"site {site} sent a vector that was not asked for")
        np.add(self._total, vector, out=self._total)
        self._arrived.append(site)

    def take_unmask(self, site: str, seeds: Mapping[str, bytes], keys: Mapping[str, bytes]) -> None:
        """Step 4: keep one site's shares of the others' secrets.

        Raises:
            ContractViolation: it is not one share for each site that took part.
        """
        arrived, dropped = set(self._arrived), set(self._sealed) - set(self._arrived)
        if site not in arrived or set(seeds) != arrived or set(keys) != dropped:
            raise ContractViolation(f"site {site} did not give just the shares that were asked for")
        if any(len(part) != shamir.SHARE_BYTES for part in (*seeds.values(), *keys.values())):
            raise ContractViolation(f"site {site} gave a share of another length")
        for target, parts in ((self._seeds, seeds), (self._keys, keys)):
            for owner, part in parts.items():
                target.setdefault(owner, {})[self._points[site]] = part
        self._answered += 1

    @property
    def complete(self) -> bool:
        """Whether enough sites answered step 4."""
        return self._answered >= self.needed

    def finish(self) -> NDArray[np.uint64]:
        """Step 4: the sum of the survivors' vectors, modulo 2^64. Ends the aggregation.

        Raises:
            ContractViolation: too few shares, or shares that do not fit: nothing is told then.
        """
        if not self.complete:
            raise ContractViolation(f"{self._answered} sites gave their shares, {self.needed} are needed")
        added: list[bytes] = []
        taken = [self_mask_key(self._combine(self._seeds, name), self.context, name) for name in self.survivors]
        for name in sorted(set(self._sealed) - set(self._arrived)):
            private = self._combine(self._keys, name)
            if public_masking_key(private) != self._adverts[name].masking:
                raise ContractViolation(f"the shares of {name}'s masking key do not give that key")
            for other in self.survivors:
                key = mask_key(private, self._adverts[other].masking, self.context, name, other)
                # The survivor added this mask if its name comes first, and subtracted it otherwise.
                (taken if other < name else added).append(key)
        add_streams(self._total, added, taken)
        return self._total

    def _combine(self, parts: Mapping[str, Mapping[int, bytes]], owner: str) -> bytes:
        try:
            return shamir.combine(dict(list(parts[owner].items())[: self.needed]))
        except (KeyError, ValueError) as error:
            raise ContractViolation(f"the shares of {owner}'s secret do not give one") from error
