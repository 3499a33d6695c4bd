# SPDX-License-Identifier: Apache-2.0
"""Invented outcomes of phantoms that depend on how much lesion a scan shows, so that there is something to learn.

Three columns are added to ``participants.tsv``; scans and masks stay as they are, byte for byte:

    score    a test score, 0 to 100: 100 less 10 for each doubling of the lesions' volume over 1 ml, noise of 5
    months   until death or the end of observation (12 to 60 months): Weibull of shape 2 (the hazard rises with time), a
             median of 30 months at 24 ml, which each doubling of the volume halves
    died     1 where death was seen, 0 where observation ended before it

A patient's outcome depends on the seed, the site's name, the patient and the mask, and on nothing else.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.errors import BadInput
from .style import generator_of

__all__ = ["COLUMNS", "add_outcomes"]

COLUMNS: Final = ("score", "months", "died")
ML: Final = 1000.0
"""mm³ per ml."""
SCORE, PER_DOUBLING, SCORE_NOISE = 100.0, 10.0, 5.0
MEDIAN_MONTHS, AT_ML, SHORTER, SHAPE = 30.0, 24.0, 0.5, 2.0
OBSERVED: Final = (12.0, 60.0)


def add_outcomes(folder: Path, *, name: str, seed: int) -> None:
    """Add the columns to a phantom site; ones that are there already are written anew, the same.

    Args:
        folder: a site that :func:`.write.write_site` wrote.
        name: of the site.
        seed: of the federation.

    Raises:
        BadInput: the folder is no phantom site.
    """
    table, described = folder / "participants.tsv", folder / "participants.json"
    try:
        rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")), delimiter="\t"))
        meanings: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
        for row in rows:
            row |= _outcome(_millilitres(folder, row["participant_id"]), name, row["participant_id"], seed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"phantoms: {folder} is no phantom site ({error}); make one with fedneuro-sim phantoms"
        ) from error
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table.write_text(text.getvalue(), encoding="utf-8")
    meanings |= {
        "score": {"Description": "invented test score, lower with larger lesions"},
        "months": {"Description": "invented time until death or the end of observation", "Units": "months"},
        "died": {"Description": "whether death was seen", "Levels": {"1": "yes", "0": "no"}},
    }
    described.write_text(json.dumps(meanings, indent=2) + "\n", encoding="utf-8")


def _outcome(millilitres: float, name: str, patient: str, seed: int) -> dict[str, str]:
    generator = generator_of("outcome", seed, name, patient)
    doublings = math.log2(max(millilitres, 0.1))
    score = float(np.clip(SCORE - PER_DOUBLING * doublings + generator.normal(0, SCORE_NOISE), 0, 100))
    median = MEDIAN_MONTHS * SHORTER ** (doublings - math.log2(AT_ML))
    death, end = median * (generator.exponential() / math.log(2)) ** (1 / SHAPE), generator.uniform(*OBSERVED)
    return {"score": f"{score:.1f}", "months": f"{min(death, end):.1f}", "died": str(int(death < end))}


def _millilitres(folder: Path, patient: str) -> float:
    """Volume of a patient's lesions."""
    import nibabel

    nib: Any = nibabel  # typed in part only
    image = nib.load(folder / "derivatives" / "manual" / patient / "anat" / f"{patient}_label-lesion_mask.nii.gz")
    return int(np.count_nonzero(np.asarray(image.dataobj))) * float(np.prod(image.header.get_zooms()[:3])) / ML
