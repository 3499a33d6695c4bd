# SPDX-License-Identifier: Apache-2.0
"""The model of round 0: an untrained network, or what the study's ``[training.init]`` starts from.

The coordinator makes no public start itself: whoever creates the run hands it over
(:meth:`fedneuro.server.store.RunStore.create`), the run keeps it, and only its names, shapes and dtypes are checked
here. A simulation pre-trains on phantoms or reads the checkpoint; a deployment is given the file.
"""

import gc

from ..models.networks import build_network
from ..models.state import to_arrays
from ..privacy.contract import Arrays, check_arrays, payload_bytes, shapes_of
from ..privacy.errors import ContractViolation, StudyError
from ..privacy.study import Study
from .store import RunStore

__all__ = ["initial_arrays", "start_arrays"]

LARGE = 10_000_000
"""Bytes of a model that are worth a look for garbage, which takes a few tenths of a second."""


def initial_arrays(study: Study) -> dict[str, Arrays]:
    """The untrained model of a study as group ``model``: CPU, seeded by ``study.seed``."""
    network = build_network(
        study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=study.study.seed
    )
    arrays = to_arrays(network)
    del network
    if payload_bytes(arrays) > LARGE:
        gc.collect()  # MONAI's networks are held by a function that refers to itself, for the length of a study else
    return {"model": arrays}


def start_arrays(study: Study, store: RunStore) -> dict[str, Arrays]:
    """The model of round 0: what the run was created with (``[training.init]``), else :func:`initial_arrays`.

    Raises:
        StudyError: the run has no initial model though the study names one, or one of another network.
    """
    untrained, given, source = initial_arrays(study), store.initial(), study.training.init.source
    if not source and given is None:
        return untrained
    if not source or given is None:
        found = "none was given" if source else "one was given"
        raise StudyError(f'{store.out}: training.init.from = "{source}", but {found} when the run was made; start anew')
    try:
        check_arrays(given, shapes_of(untrained["model"]))
    except ContractViolation as error:
        raise StudyError(f"training.init: the initial model is not of this study's network: {error}") from error
    return {"model": given}
