# SPDX-License-Identifier: Apache-2.0
"""What this site has answered of a study: against rounds that are replayed or rolled back, and for hours of computing.

A coordinator that may ask for a round as often as it likes gets as many answers about the same patients; one that goes
back to an old round gets them for models of its choice. So, for each study:

    train      a round above the last one is new. The last one may be repeated for the *same* model (a coordinator that
               crashed between the reply and its save, and was resumed), at most ``max_retries`` times; the privacy
               ledger charges each time. An older round, or the last one for another model, is refused.
    evaluate   one model per round, and one, at one threshold, for the final evaluation; asked again, it costs time but
               tells nothing new.
    other      steps of a secure aggregation belong to the last round or a newer one.

It is written to disk before any training, in ``state/<study>/answered.json``.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..privacy.contract import Request
from ..privacy.errors import BadInput, Reason
from .policy import Denied

__all__ = ["Answered", "RoundGuard"]


@dataclass(slots=True)
class Answered:
    """What was answered of one study.

    Attributes:
        round: last round that was trained; 0: none.
        model: digest of the model that it started from.
        attempts: how often.
        evaluated: digest of the model that was evaluated, by round and ``final``.
        seconds: of computing, over all messages.
    """

    round: int = 0
    model: str = ""
    attempts: int = 0
    evaluated: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class RoundGuard:
    """The answered rounds of one site, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, request: Request, model: str, max_retries: int) -> Answered:
        """Note that ``request`` will be answered; on disk when this returns.

        Args:
            request: the request.
            model: digest of its arrays, or empty.
            max_retries: how often the last round may be repeated.

        Returns:
            What was answered before, for :meth:`undo` where a reason code leaves instead of an answer.

        Raises:
            Denied: it was answered before; reason ``round-replayed``.
            BadInput: the file cannot be read; nothing may be answered.
        """
        if request.kind == "hello":
            return self.read(request.study.hash)
        with self._changing(request.study.hash) as answered:
            before = replace(answered, evaluated=dict(answered.evaluated))
            number, last = request.round, answered.round
            if request.kind == "evaluate":
                key = f"{number} final" if request.final else str(number)
                # With another threshold for each repetition one could read off every patient's probability.
                judged = model if request.threshold is None else f"{model} at {request.threshold:g}"
                if answered.evaluated.setdefault(key, judged) != judged:
                    raise self._replayed(f"another model was evaluated for round {number}")
            elif number < last:
                raise self._replayed(f"round {number} was asked for, round {last} was trained")
            elif request.kind in ("train", "masked"):
                if number == last and model != answered.model:
                    raise self._replayed(f"round {number} was trained from another model")
                if number == last and answered.attempts > max_retries:
                    raise self._replayed(f"round {number} was trained {answered.attempts} times (limits.max_retries)")
                answered.attempts = answered.attempts + 1 if number == last else 1
                answered.round, answered.model = number, model
        return before

    def undo(self, study_hash: str, before: Answered) -> None:
        """Go back to ``before``: of the request, only a reason code left. The hours of computing stay."""
        with self._changing(study_hash) as answered:
            answered.round, answered.model, answered.attempts = before.round, before.model, before.attempts
            answered.evaluated = before.evaluated

    def spend(self, study_hash: str, seconds: float) -> None:
        """Add ``seconds`` of computing for a study."""
        with self._changing(study_hash, durable=False) as answered:
            answered.seconds += seconds

    def read(self, study_hash: str) -> Answered:
        """What was answered of a study.

        Raises:
            BadInput: the file is not as it was written.
        """
        path = self._path(study_hash)
        try:
            return Answered(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return Answered()
        except (ValueError, TypeError) as error:
            raise BadInput(
                f"{path}: is not as it was written; put it back, or let the study begin anew with "
                "fedneuro-node policy forget-rounds"
            ) from error

    def forget(self, study_hash: str) -> Answered:
        """Let a study begin anew, at the hospital's wish; returns what was forgotten. The ledger forgets nothing."""
        with self._held(study_hash):
            answered = Answered()
            try:
                answered = self.read(study_hash)
            except BadInput:
                answered = Answered(round=-1)
            self._path(study_hash).unlink(missing_ok=True)
        return answered

    def _replayed(self, why: str) -> Denied:
        text = f"{why}; if the coordinator begins the study anew by agreement, run fedneuro-node policy forget-rounds"
        return Denied("limits.max_retries", text, reason=Reason.ROUND_REPLAYED)

    def _path(self, study_hash: str) -> Path:
        return self._folder / study_hash[:16] / "answered.json"

    @contextmanager
    def _held(self, study_hash: str) -> Iterator[None]:
        folder = self._path(study_hash).parent
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "answered.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _changing(self, study_hash: str, *, durable: bool = True) -> Iterator[Answered]:
        """Read, let the caller change it, write it back as a whole; not written where the caller raises."""
        with self._held(study_hash):
            answered = self.read(study_hash)
            before = json.dumps(asdict(answered))
            yield answered
            after = json.dumps(asdict(answered))
            if after == before:
                return
            path = self._path(study_hash)
            temporary = path.with_suffix(".new")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(after)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
