# SPDX-License-Identifier: Apache-2.0
"""Outcomes of a cohort: the concordance of predicted and observed survival, and the error of a predicted number.

References: Harrell et al. 1982 (concordance index); Harrell et al. 1996 (ties).
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["c_index", "mean_absolute_error"]


def c_index(risk: NDArray[np.floating], time: NDArray[np.floating], event: NDArray[np.generic]) -> float | None:
    """Harrell's concordance index: of two patients, does the one with the higher risk have the event first?

    A pair counts where one patient is known to have had the event before the other: the earlier time is an event, or
    both times are equal and only one is an event (the other was free of it then). Equal risks count one half.

    Args:
        risk: ``(N,)``, higher is worse, any scale.
        time: ``(N,)``, until the event or the end of observation, any unit.
        event: ``(N,)``, true where the event was seen, false where observation ended without it.

    Returns:
        In [0, 1], 0.5 is guessing; None where no pair counts.
    """
    seen = np.asarray(event).astype(np.bool_)
    concordant, pairs = 0.0, 0
    for i in np.flatnonzero(seen):
        later = (time > time[i]) | ((time == time[i]) & ~seen)
        pairs += int(np.count_nonzero(later))
        concordant += np.count_nonzero(risk[later] < risk[i]) + 0.5 * np.count_nonzero(risk[later] == risk[i])
    return float(concordant / pairs) if pairs else None


def mean_absolute_error(predicted: NDArray[np.floating], observed: NDArray[np.floating]) -> float | None:
    """Mean of |predicted - observed| over patients, in the unit of the outcome; None for no patient.

    Args:
        predicted: ``(N,)``.
        observed: ``(N,)``.
    """
    return float(np.mean(np.abs(predicted - observed))) if len(observed) else None
