# SPDX-License-Identifier: Apache-2.0
"""TensorBoard: one folder of event files per run (``tensorboard --logdir DIR``).

Written with ``tensorboardX``, which needs neither TensorFlow nor TensorBoard. A run that is taken up again after
``start`` was restarted is written anew from its first round, as event files cannot be corrected.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...privacy.study import Study
from ..run_view import RunView

__all__ = ["TensorboardSink"]


class TensorboardSink:
    """Writes below one folder.

    Args:
        folder: made if need be.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._folder, self._make = folder, SummaryWriter
        self._writers: dict[str, Any] = {}

    def begin(self, view: RunView, study: Study) -> int:
        """An empty folder, but where this process goes on with one."""
        if view.name not in self._writers:
            folder = self._folder / view.name
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            writer = self._writers[view.name] = self._make(str(folder), flush_secs=5)
            writer.add_text("study", f"{study.study.name}, hash {study.hash}")
        return -1

    def round(self, run: str, number: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, number)
        self._writers[run].flush()

    def end(self, view: RunView, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Final values; TensorBoard has no place for files."""
        del files
        self.round(view.name, view.selected_round or view.round, values)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
