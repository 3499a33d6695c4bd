# SPDX-License-Identifier: Apache-2.0
"""The standard scale of Nyúl's method, learned from public scans or phantoms, to be written into a study file.

It must not be learned from the patients of the study: it goes to every hospital as part of the study, without noise. So
there is no way to compute it over hospitals, and a private study cannot have one that saw its patients.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..client.data.bids import find_patients, find_scans
from ..client.data.intensity import landmarks_of, standard_scale
from ..client.data.preprocess import prepare
from ..privacy.errors import DataError
from ..privacy.study_file import load_study

__all__ = ["learn_landmarks"]


def learn_landmarks(root: Path, study_file: Path, overrides: Sequence[str] = ()) -> tuple[list[float], list[int]]:
    """Landmarks for ``data.preprocessing.landmarks``, under the study's other preprocessing.

    Args:
        root: BIDS folder of public scans.
        study_file: its modalities, mask, bias correction and resampling are used.
        overrides: of its keys.

    Returns:
        Eleven numbers for each modality, one after another, and of how many scans each modality's were learned.

    Raises:
        DataError: a scan that cannot be used, or a modality that no patient has.
    """
    study = load_study(study_file, [*overrides, 'data.normalise="none"', "data.preprocessing.landmarks=[]"])
    table, modalities = study.data.preprocessing, study.data.modalities
    brain = table.mask_name if table.mask == "supplied" else None
    marks: list[list[NDArray[np.float64]]] = [[] for _ in modalities]
    for patient in find_patients(root):
        for files in find_scans(root, patient, modalities, None, brain):
            image = prepare(files, study).image.numpy()
            for channel, path in enumerate(files.images):
                if path is not None:  # outside of the foreground all is 0, with a mask and without
                    marks[channel].append(landmarks_of(image[channel], image[channel] != 0))
    scale: list[float] = []
    for name, scans in zip(modalities, marks, strict=True):
        try:
            scale += standard_scale(scans)
        except ValueError as error:
            raise DataError(f"{root}: {name}: {error}; expected public scans of every modality of the study") from error
    return scale, [len(scans) for scans in marks]
