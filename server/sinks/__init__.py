# SPDX-License-Identifier: Apache-2.0
"""Sinks: other programs that a coordinator's runs are shown in, beside the dashboard. MLflow and TensorBoard.

They are settings of the coordinator (``[sinks]`` in ``server.toml``), not of a study, so no study's hash depends on
them. What they get is what hospitals released and the run saved: :mod:`.feed` reads it from disk, in a process of its
own, so a tracking server that is slow or away holds no round up, and gets what it missed when it is back.

Names of values, the held-out hospitals first in a list that is sorted by name:

    heldout/SITE/METRIC   mean over the patients of a hospital that never trains
    loss/SITE             training loss, where the study lets it out
    privacy/SITE/epsilon  ε per patient so far
    round/seconds, round/sites
    train/SITE/METRIC     mean over the validation patients of a hospital that trains
    final/…               of the selected round, from the final evaluation
"""

from .feed import Feed, Sink, need_packages, open_sinks

__all__ = ["Feed", "Sink", "need_packages", "open_sinks"]
