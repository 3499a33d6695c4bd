# SPDX-License-Identifier: Apache-2.0
"""Image-quality metrics as MRIQC defines them, with a two-class split in place of a tissue segmentation.

Foreground is what lies above Otsu's threshold; inside it, a second threshold splits darker from brighter tissue.
The numbers compare images of one data set with each other; they are not MRIQC's own values.

Reference: Esteban et al., MRIQC, PLoS ONE 2017;12:e0184661; Otsu, IEEE Trans SMC 1979;9:62-66.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["otsu", "quality_metrics"]

Greys = NDArray[np.float32]
BINS = 128


def otsu(values: NDArray[np.floating]) -> float:
    """Threshold that parts the values best into two classes; values of one kind give that value.

    Args:
        values: any shape, finite.
    """
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts, edges = np.histogram(values, BINS, (low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[int(np.nanargmax(between[:-1])) + 1])


def quality_metrics(image: Greys, foreground: NDArray[np.bool_]) -> dict[str, float]:
    """SNR, CNR, FBER and EFC of one image.

    Args:
        image: finite grey values, (X, Y, Z).
        foreground: the head, same shape.

    Returns:
        ``snr`` mean over deviation within the brighter tissue; ``cnr`` difference of the two tissues over their
        noise and the air's; ``fber`` energy in the foreground over that in the air, as log10; ``efc`` entropy of
        the grey values, 0 (one bright voxel) to 1 (even): blur and ghosts raise it.
    """
    inside, outside = image[foreground].astype(np.float64), image[~foreground].astype(np.float64)
    if inside.size < 2 or inside.max() <= inside.min():
        return {}
    limit = otsu(inside)
    bright, dark = inside[inside >= limit], inside[inside < limit]
    air = outside.std() if outside.size else 0.0
    noise = float(np.sqrt(bright.var() + dark.var() + air**2)) if dark.size else 0.0
    energy = float(np.median(outside**2)) if outside.size else 0.0
    magnitude = np.abs(image.astype(np.float64)).ravel()
    peak = float(np.sqrt((magnitude**2).sum()))
    share = magnitude[magnitude > 0] / peak
    most = np.sqrt(magnitude.size) * np.log(np.sqrt(magnitude.size))
    return {
        "snr": float(bright.mean() / max(bright.std(), 1e-12)),
        "cnr": float((bright.mean() - dark.mean()) / noise) if noise > 0 else 0.0,
        "fber": float(np.log10(np.median(inside**2) / energy))
        if min(energy, float(np.median(inside**2))) > 0
        else float("nan"),
        "efc": float(-(share * np.log(share)).sum() / most),
    }
