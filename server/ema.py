# SPDX-License-Identifier: Apache-2.0
"""The average of the global model over rounds that is evaluated in its place (``training.ema``).

An exponential moving average of weights: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging",
SIAM J. Control Optim. 30(4), 1992; with warm-up as in Tan & Le 2019 (EfficientNet code), so that early rounds do not
remember the untrained model.
"""

from ..privacy.contract import Arrays

__all__ = ["average"]


def average(decay: float, number: int, old: Arrays, new: Arrays) -> Arrays:
    """The average after round ``number`` (from 1): ``old`` is that before, ``new`` the round's model.

    Args:
        decay: ``training.ema``, at least 0, below 1; the share of ``old``, smaller in the first rounds.
        number: of the round.
        old: of the same names and shapes as ``new``.
        new: the model; dtypes are its own.
    """
    decay = min(decay, number / (number + 9.0))
    return {
        name: (decay * old[name].astype("float64") + (1 - decay) * array.astype("float64")).astype(array.dtype)
        for name, array in new.items()
    }
