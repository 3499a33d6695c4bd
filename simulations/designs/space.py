# SPDX-License-Identifier: Apache-2.0
"""Which settings a search tries: ``--grid`` and ``--random`` over any study key, as deterministic lists of overrides.

--grid   training.learning_rate=[1e-3, 1e-2]     every value, with other grids every combination
--random training.learning_rate=log(1e-4, 1e-1)  drawn evenly on a log scale
--random training.momentum=uniform(0, 0.9)       drawn evenly
--random training.local_steps=int(5, 50)         a whole number, both ends included
--random 'training.optimizer=["sgd", "adam"]'    one of these
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...privacy.errors import StudyError

__all__ = ["Draw", "Space", "toml_text"]

Kind = Literal["log", "uniform", "int", "choice"]
_CALL = re.compile(r"\s*(log|uniform|int)\s*\(\s*([^,()]+)\s*,\s*([^,()]+)\s*\)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one key is drawn from: ``values`` of a choice, or the two ends."""

    key: str
    kind: Kind
    values: tuple[Any, ...]

    def sample(self, random: np.random.Generator) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return int(random.integers(low, high + 1))
        if self.kind == "log":
            return round_to(math.exp(random.uniform(math.log(low), math.log(high))))
        return round_to(random.uniform(low, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All that is tried.

    Args:
        grids: key: values.
        draws: keys that are drawn.
        trials: how many draws.
        search: who draws: ``random``, or ``optuna`` by what earlier trials gave.
        seeds: repetitions of each setting with another ``study.seed``.
    """

    grids: tuple[tuple[str, tuple[Any, ...]], ...]
    draws: tuple[Draw, ...]
    trials: int
    search: Literal["random", "optuna"]
    seeds: int

    @classmethod
    def parse(cls, grid: Sequence[str], random: Sequence[str], *, trials: int, search: str, seeds: int) -> "Space":
        """From the command line.

        Raises:
            StudyError: a text that is none of the forms above, or a key that is named twice.
        """
        if search not in ("random", "optuna"):
            raise StudyError(f'--search "{search}": expected random or optuna')
        if not grid and not random:
            raise StudyError("sweep: nothing to vary; give --grid 'training.learning_rate=[1e-3, 1e-2]' or --random")
        if search == "optuna" and (grid or not random):
            raise StudyError("--search optuna: chooses what --random names; leave --grid out")
        grids = tuple((_key("--grid", text), _list("--grid", text)) for text in grid)
        draws = tuple(_draw(text) for text in random)
        keys = [key for key, _ in grids] + [draw.key for draw in draws]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise StudyError(f"sweep: {', '.join(twice)} is varied twice; name each key once")
        if "study.seed" in keys and seeds > 1:
            raise StudyError("sweep: study.seed is varied already; leave --seeds out")
        found: Literal["random", "optuna"] = "optuna" if search == "optuna" else "random"
        return cls(grids=grids, draws=draws, trials=trials, search=found, seeds=seeds)

    @property
    def keys(self) -> list[str]:
        """Every key that is varied."""
        return [key for key, _ in self.grids] + [draw.key for draw in self.draws]

    def settings(self, seed: int) -> Iterator[dict[str, Any]]:
        """Settings in order, the same for the same seed; with ``optuna`` there are none beforehand."""
        if self.search == "optuna":
            return
        random = np.random.default_rng(seed)
        drawn = [{draw.key: draw.sample(random) for draw in self.draws} for _ in range(self.trials)] or [{}]
        for values in itertools.product(*(values for _, values in self.grids)):
            for setting in drawn if self.draws else [{}]:
                yield dict(zip((key for key, _ in self.grids), values, strict=True)) | setting


def round_to(value: float, digits: int = 4) -> float:
    """``value`` with so many significant digits: settings are written down and read."""
    return float(f"{value:.{digits}g}")


def toml_text(value: Any) -> str:
    """A value as ``--set`` takes it.

    Example:
        >>> [toml_text(v) for v in (True, 0.1, "sgd", [8, 16])]
        ['true', '0.1', '"sgd"', '[8, 16]']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return repr(value)


def _key(option: str, text: str) -> str:
    key, equals, _ = (part.strip() for part in text.partition("="))
    if not equals or "." not in key:
        raise StudyError(f"{option} {text}: expected section.key=…, such as 'training.learning_rate=[1e-3, 1e-2]'")
    return key


def _list(option: str, text: str) -> tuple[Any, ...]:
    try:
        values = tomllib.loads(f"values = {text.partition('=')[2]}")["values"]
    except (tomllib.TOMLDecodeError, RecursionError):
        values = None
    if not isinstance(values, list) or not values:
        raise StudyError(f"{option} {text}: expected a list of TOML values after =, such as [1e-3, 1e-2]")
    return tuple(values)


def _draw(text: str) -> Draw:
    key, space = _key("--random", text), text.partition("=")[2]
    call = _CALL.fullmatch(space)
    if not call:
        return Draw(key=key, kind="choice", values=_list("--random", text))
    kind = call[1]
    try:
        ends = tuple((int if kind == "int" else float)(part) for part in (call[2], call[3]))
    except ValueError as error:
        raise StudyError(f"--random {text}: expected two numbers in {kind}(…, …)") from error
    if ends[0] >= ends[1] or (kind == "log" and ends[0] <= 0) or not all(map(math.isfinite, ends)):
        raise StudyError(f"--random {text}: expected {kind}(low, high) with low < high" + ", above 0" * (kind == "log"))
    return Draw(key=key, kind="log" if kind == "log" else "int" if kind == "int" else "uniform", values=ends)
