# SPDX-License-Identifier: Apache-2.0
"""Seconds of one aggregation with and without masks: ten hospitals, five million parameters, in one process.

Both arms round to the grid, draw the noise, and pass every vector through the wire's records (digest included);
they differ in keys, sealed shares, masks and unmasking alone. So the ratio is what secrecy from the coordinator
costs where the gradient is free; a round that trains costs more, and the ratio falls. The hospitals are stepped in
turn, so the seconds are those of all of them together. A third arm loses three hospitals after the shares went
round, the worst step: the coordinator then makes their masks itself.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...privacy.contract import MaskedReply
from ...privacy.noise import SecureRandom
from ...privacy.secagg.aggregator import Aggregation
from ...privacy.secagg.grid import Grid, SiteSum
from ...privacy.secagg.keys import Identity
from ...privacy.secagg.participant import Participant, Terms
from ...privacy.wire import decode_reply, encode_reply

__all__ = ["bench_secagg"]

STUDY = "0" * 64


def bench_secagg(
    json_path: Path | None = None, *, sites: int = 10, parameters: int = 5_000_000, repeats: int = 3
) -> dict[str, Any]:
    """Measure the arms in turn, ``repeats`` times, and return (and save) the medians.

    Args:
        json_path: where to save the figures.
        sites: hospitals, at least 4.
        parameters: words of a vector.
        repeats: rounds of each arm; the order alternates.
    """
    tolerate = (sites - 1) // 3
    bench = _Bench([f"hospital-{i:02d}" for i in range(sites)], tolerate, parameters)
    bench.masked(1, [])  # warms up: tables, imports
    arms: dict[str, list[float]] = {"unmasked": [], "masked": [], "masked_with_dropouts": []}
    for number in range(2, 2 + repeats):
        arms["unmasked"].append(bench.unmasked())
        arms["masked"].append(bench.masked(number, []))
        arms["masked_with_dropouts"].append(bench.masked(number, bench.names[:tolerate]))
    found: dict[str, Any] = {"hospitals": sites, "parameters": parameters, "dropouts": tolerate}
    found |= {f"{name}_seconds": round(median(seconds), 3) for name, seconds in arms.items()}
    found["masked_over_unmasked"] = round(found["masked_seconds"] / found["unmasked_seconds"], 3)
    found["dropouts_over_unmasked"] = round(found["masked_with_dropouts_seconds"] / found["unmasked_seconds"], 3)
    found["largest_error_in_grid_steps"] = bench.error
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


class _Bench:
    def __init__(self, names: list[str], tolerate: int, size: int) -> None:
        self.names, self._tolerate, self._size = names, tolerate, size
        self._identities = {name: Identity.fresh() for name in names}
        self._grid = Grid(clip=1.0, noise_multiplier=1.0, size=size, sites=len(names), tolerate=tolerate)
        rng = np.random.default_rng(0)
        self._gradient = (rng.standard_normal(size, np.float32) / np.float32(1.01 * size**0.5)).astype(np.float32)
        self.error = 0

    def unmasked(self) -> float:
        """Round, noise, wire, sum."""
        started = time.perf_counter()
        total = np.zeros(self._size, np.uint64)
        for name in self.names:
            total += _through_the_wire(name, 1, self._vector())
        self._grid.read(total)
        return time.perf_counter() - started

    def masked(self, number: int, dropped: list[str]) -> float:
        """The same under masks; ``dropped`` vanish before their vector is sent."""
        plain = np.zeros(self._size, np.uint64)
        started = time.perf_counter()
        terms = Terms(study=STUDY, round=number, tolerate=self._tolerate)
        roster = {name: identity.public for name, identity in self._identities.items()}
        parts = {name: Participant.begin(name, terms) for name in self.names}
        adverts = {name: part.advert(self._identities[name]) for name, part in parts.items()}
        aggregation = Aggregation(terms, roster, adverts, self._size)
        for name, part in parts.items():
            aggregation.take_shares(name, part.share(roster, adverts))
        aside = 0.0
        for name in [name for name in self.names if name not in dropped]:
            parts[name].enter(aggregation.context, aggregation.sealed_for(name))
            vector = self._vector()
            aside -= time.perf_counter()
            plain += vector  # for the check alone, so its time does not count
            aside += time.perf_counter()
            parts[name].mask(vector)
            aggregation.fold(name, _through_the_wire(name, number, vector))
        survivors = set(aggregation.survivors)
        for name in survivors:
            aggregation.take_unmask(name, *parts[name].unmask(aggregation.context, survivors))
        total = aggregation.finish()
        self._grid.read(total)
        seconds = time.perf_counter() - started - aside
        self.error = max(self.error, int(np.abs((total - plain).view(np.int64)).max()))
        return seconds

    def _vector(self) -> NDArray[np.uint64]:
        total = SiteSum(self._grid)
        total.add(self._gradient)
        return total.noised(SecureRandom())


def _through_the_wire(name: str, number: int, vector: NDArray[np.uint64]) -> NDArray[np.uint64]:
    reply = MaskedReply(site=name, round=number, vector=vector, seconds=0.0, epsilon=0.0, noise_multiplier=1.0)
    return cast(MaskedReply, decode_reply(encode_reply(reply))).vector
