# SPDX-License-Identifier: Apache-2.0
"""Arrays of a study that belong to the site and live on between rounds: what a strategy remembers here.

Control variates (scaffold), the personal model (ditto), normalisations (fedbn), what rounding left over (error
feedback). As with the optimiser's state (:mod:`.optimizers`), each is written to the site's folder under the number of
its round, whole or not at all. A round that is asked for again starts from the round before, so it gives the same
bits; a node that was restarted, and another worker of a simulation, find what they need. None of it is ever in a reply.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.state import load_saved, save_arrays
from ..privacy.contract import Arrays
from .session import Session

__all__ = ["SiteState"]


class SiteState:
    """One kind of them.

    Args:
        session: the study at this site.
        kind: word in the files' names.
        every_round: keep all rounds, for small arrays that a final evaluation may ask for; else the last two.
    """

    def __init__(self, session: Session, kind: str, *, every_round: bool = False) -> None:
        self._session, self._kind, self._every = session, kind, every_round

    def before(self, number: int) -> dict[str, NDArray[np.generic]]:
        """As it stood when round ``number`` (from 1) began; empty at first, when what an older run left is removed."""
        if number == 1:
            for path in self._files():
                path.unlink()
        return self.after(number - 1)

    def after(self, number: int) -> dict[str, NDArray[np.generic]]:
        """As it stood after round ``number``, or after the last one before it in which this site took part."""
        earlier = [path for path in self._files() if path <= self._file(number)]
        return load_saved(earlier[-1])[0] if earlier else {}

    def save(self, number: int, arrays: Arrays) -> None:
        """Keep it as of round ``number``, on disk when this returns."""
        folder = self._session.folder
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(self._file(number), arrays, {"study_hash": self._session.study.hash, "round": str(number)})
        if not self._every:
            self._file(number - 2).unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._session.folder.glob(f"{self._kind}-*.safetensors"))

    def _file(self, number: int) -> Path:
        return self._session.folder / f"{self._kind}-{number:05d}.safetensors"
