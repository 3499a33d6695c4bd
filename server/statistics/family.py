# SPDX-License-Identifier: Apache-2.0
"""Many tests at once: Holm's step-down adjustment, which bounds the chance of any false finding in the family."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

__all__ = ["holm"]


Key = TypeVar("Key", bound=Hashable)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values: p(i) is multiplied by m - i + 1, made monotone, and cut at 1.

    Holm (1979), Scandinavian Journal of Statistics 6(2). Valid under any dependence between the tests.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    ordered = sorted(p_values, key=lambda key: p_values[key])
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for position, key in enumerate(ordered):
        highest = max(highest, min(1.0, p_values[key] * (len(ordered) - position)))
        adjusted[key] = highest
    return {key: adjusted[key] for key in p_values}
