# SPDX-License-Identifier: Apache-2.0
"""Which arrays travel: a function of the study alone, so that both sides, and both gates, know it beforehand.

    down, *train*      the model; with scaffold also ``control/<name>``, the coordinator's control variate
    up, *train*        the arrays that the study trains (``training.trainable``), less those that stay at the site
                       (fedbn: normalisations), in the form of ``wire.up`` (:mod:`.wire_numbers`)
    down, *evaluate*   the model

Whatever else a site has, of its model or of its method's memory, matches no agreed name and stays.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..models.spec import ModelSection, Trainable
from .contract import Arrays, Shapes, check_arrays, shapes_of
from .study import Study
from .wire_numbers import decode, encoded_shapes

__all__ = ["CONTROL", "control_of", "model_of", "read_reply", "reply_shapes", "stays", "uplink_names"]

CONTROL: Final = "control/"
"""Before the name of an array: the coordinator's control variate of it."""


def model_of(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
    """The global model in what came down."""
    return {name: array for name, array in arrays.items() if not name.startswith(CONTROL)}


def control_of(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
    """The control variate in what came down, by the model's names; empty but for scaffold."""
    return {name.removeprefix(CONTROL): array for name, array in arrays.items() if name.startswith(CONTROL)}


def stays(study: Study) -> frozenset[str]:
    """Arrays of the model that each training site has of its own, and that never leave it."""
    return _parts(*_key(study))[1] if study.strategy.name == "fedbn" else frozenset()


def uplink_names(study: Study) -> frozenset[str] | None:
    """Arrays of the model that come up from a site that trained; None: all of them."""
    if study.training.trainable == "all" and study.strategy.name != "fedbn":
        return None  # known without a network, in processes that load no torch
    return _parts(*_key(study))[0] - stays(study)


def reply_shapes(study: Study, down: Shapes) -> Shapes:
    """What a *train* reply holds, to a request that held arrays of shapes ``down``."""
    names = uplink_names(study)
    chosen = {
        name: shape for name, shape in down.items() if not name.startswith(CONTROL) and (names is None or name in names)
    }
    return encoded_shapes(chosen, study.wire.up)


def read_reply(study: Study, model: Arrays, arrays: Arrays) -> Arrays:
    """The arrays of a *train* reply as weights, under the model's names.

    Args:
        study: the study.
        model: the whole global model that went out.
        arrays: what came back.

    Raises:
        ContractViolation: they are not exactly what was agreed, or give a weight that is not finite or bounded.
    """
    check_arrays(arrays, reply_shapes(study, shapes_of(model)))
    if study.wire.up == "float32":
        return arrays
    changes = decode(arrays, study.wire.up)
    weights = {name: np.add(np.asarray(model[name], np.float32), change) for name, change in changes.items()}
    check_arrays(weights, {name: shape for name, shape in shapes_of(model).items() if name in weights})
    return weights


def _key(study: Study) -> tuple[str, int, int, Trainable]:
    return study.model.model_dump_json(), len(study.data.modalities), study.task.channels, study.training.trainable


@lru_cache(maxsize=16)
def _parts(section: str, in_channels: int, channels: int, which: Trainable) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the trained parameters, and of those of normalisations; nothing of the network's size is allocated."""
    import torch

    from ..models.networks import BUILDERS
    from ..models.trainable import choose_trainable, normalisations

    model = ModelSection.model_validate_json(section)
    with torch.device("meta"):
        network = BUILDERS[model.name](model, in_channels, channels)
    return frozenset(choose_trainable(network, which)), frozenset(normalisations(network))
