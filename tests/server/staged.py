# SPDX-License-Identifier: Apache-2.0
"""A consortium and its runs as they lie on disk, for what looks at them: real state, no training."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fedneuro.privacy.contract import Role
from fedneuro.privacy.study import Study
from fedneuro.server.consortium import Consortium
from fedneuro.server.events import Event
from fedneuro.server.registry import CertificateRecord
from fedneuro.server.run_folder import Plan, RunFolder, new_run
from fedneuro.server.store import RoundRecord, RunStore
from tests.server.test_rounds import study_of

__all__ = ["DAY", "Staged", "enrolled"]

DAY = 86400


def enrolled(consortium: Consortium, name: str, role: Role = Role.TRAIN, days: int = 150) -> None:
    """A site with a certificate that ends in so many days."""
    token, registry = f"hash of {name}"[:64], consortium.registry
    registry.invite(name, role, token, int(time.time()) + DAY)
    end = int(time.time()) + days * DAY + 60
    certificate = CertificateRecord(serial=f"{abs(hash(name)):x}", site=name, issuer=1, not_after=end, pem="")
    registry.enrol(token, "key", 7, certificate)


class Staged:
    """A run that does what it is told.

    Args:
        runs: folder of runs.
        sites: name and role of each.
        sections: of the study.
    """

    def __init__(self, runs: Path, sites: dict[str, str], **sections: dict[str, object]) -> None:
        heldout = [name for name, role in sites.items() if role == "heldout" and name.replace("-", "").isalnum()]
        sections.setdefault("training", {"rounds": 8, "local_steps": 1})
        self.study: Study = study_of(**sections, evaluation={"heldout": heldout, "metrics": ["dice"]})
        self.folder: RunFolder = new_run(runs, self.study.study.name)
        self.folder.study.write_bytes(self.study.canonical)
        now = time.time()
        self.folder.write_plan(Plan(sites=tuple(sites), launched=now, submitted=now))
        self.sites = sites
        self._away: set[str] = set()
        self._private = self.study.privacy.mode != "none"
        with closing(RunStore.create(self.folder.path, self.study, engine="test")):
            pass

    def tell(self, *events: Event) -> None:
        """Save events."""
        with closing(RunStore.load(self.folder.path)) as store:
            for event in events:
                store.record(event)

    def begin(self, **refusals: str) -> None:
        """All join but those that refuse; the rounds start."""
        self._away = set(refusals)
        there = {name: role for name, role in self.sites.items() if name not in refusals}
        self.tell(
            *(
                Event(kind="refused", site=name, values={"reason": reason, "during": "hello"})
                for name, reason in refusals.items()
            ),
            *(
                Event(kind="joined", site=name, values={"role": role, "public_size": 40})
                for name, role in there.items()
            ),
            Event(kind="started", values={"sites": there, "rounds": 8, "first_round": 1}),
        )

    def start_round(self, number: int) -> None:
        """A round begins."""
        self.tell(Event(kind="round-started", round=number))

    def train(self, number: int, name: str) -> None:
        """A site answers."""
        self.tell(self._trained(number, name))

    def round(self, number: int, **refusals: str) -> None:
        """A whole round; ``refusals`` by site with their reason."""
        training = [name for name, role in self.sites.items() if role == "train" and name not in self._away]
        there = [name for name in training if name not in refusals]
        refused = [
            Event(kind="refused", round=number, site=name, values={"reason": reason, "during": "train"})
            for name, reason in refusals.items()
        ]
        start = Event(kind="round-started", round=number)
        self.tell(start, *refused, *(self._trained(number, name) for name in there))
        train = {name: self._answer(number) | {"steps": 1, "noise_multiplier": 1.0, "attempt": 1} for name in there}
        record = RoundRecord(round=number, seconds=3.0, train=train, refusals=refusals)
        judged = []
        for position, name in enumerate(name for name in self.sites if name not in {*refusals, *self._away}):
            score = 0.8 - 0.6 / (number + 1) - 0.01 * position
            record.metrics[name] = {"dice": {"mean": score, "ci95": [score - 0.06, score + 0.06], "n": 12}}
            values = {"metrics": {"dice": score}, "intervals": {"dice": [score - 0.06, score + 0.06]}}
            judged.append(Event(kind="evaluated", round=number, site=name, values=values))
        with closing(RunStore.load(self.folder.path)) as store:
            store.save_round(record, {"model": {"w": np.zeros(1, np.float32)}})
            store.save_evaluation(record)
        missing = dict.fromkeys(refusals, number)
        values = {"seconds": 3.0, "sites": len(train), "asked": len(training), "missing": missing}
        self.tell(*judged, Event(kind="round-done", round=number, values=values))

    def _answer(self, number: int) -> dict[str, Any]:
        loss, epsilon = (None, 0.9 * number) if self._private else (1.5 / (number + 1), None)
        return {"loss": loss, "epsilon": epsilon, "seconds": 2.0}

    def _trained(self, number: int, name: str) -> Event:
        return Event(kind="trained", round=number, site=name, values=self._answer(number))
