# SPDX-License-Identifier: Apache-2.0
"""How a hospital's scanner sees a head. Sites differ in what scanners and protocols differ in.

A style is drawn from the site's name and a seed alone, so a site is the same whatever other sites exist.
Grey levels are relative: lesions are at 0.8 to 0.9 on FLAIR. Ranges follow what FLAIR and T1w show at 1.5 and
3 T: FLAIR fluid dark, grey matter a little brighter than white, lesions brightest, fat suppressed; T1w fluid
dark, white matter bright, lesions between fluid and grey matter, scalp bright.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["MODALITIES", "SiteStyle", "generator_of", "style_of"]

LEVELS: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "FLAIR": {
        "csf": (0.10, 0.20), "gm": (0.54, 0.62), "wm": (0.44, 0.52), "bone": (0.05, 0.12),
        "scalp": (0.30, 0.66), "base": (0.20, 0.36), "lesion": (0.84, 0.96),
    },
    "T1w": {
        "csf": (0.16, 0.26), "gm": (0.50, 0.60), "wm": (0.76, 0.90), "bone": (0.10, 0.20),
        "scalp": (0.80, 1.15), "base": (0.36, 0.52), "lesion": (0.40, 0.52),
    },
    "T2w": {
        "csf": (0.95, 1.15), "gm": (0.52, 0.62), "wm": (0.36, 0.44), "bone": (0.06, 0.12),
        "scalp": (0.45, 0.80), "base": (0.20, 0.34), "lesion": (0.78, 0.92),
    },
}  # fmt: skip
"""Range over sites of each tissue's grey level, by modality."""

MODALITIES: Final = tuple(LEVELS)
"""Modalities that phantoms can be scanned in."""

SCANNERS: Final = (
    ("Borealis 1.5T", 1.5),
    ("Borealis 3T", 3.0),
    ("Meridian Vita 3T", 3.0),
    ("Corvus M15", 1.5),
    ("Halden Quad 3T", 3.0),
)
"""Invented makes and their field strength in tesla; a lower field is noisier, a higher one less uniform."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStyle:
    """One hospital's scanner, protocol and patients.

    Attributes:
        scanner: invented make and model.
        levels: grey level of each tissue and of lesions, by modality; 1 is stored as ``intensity``.
        voxel_mm: voxel size to the right, anterior and superior; slices are axial.
        orientation: axis codes of the stored array, such as ``"LPS"``.
        bias: standard deviation of the logarithm of the receive field.
        noise: standard deviation of each of the two noise channels, in grey levels.
        blur_mm: full width at half maximum of the point spread.
        lesions: mean number of lesions per patient, at least 1.
        lesion_radius_mm: median radius of a lesion; radii are kept within 6 to 20 mm.
        lesion_contrast: factor on the difference between lesion and white matter.
        missing: share of patients who lack every modality but the first.
        intensity: stored value of grey level 1.
        float_storage: 32-bit floats rather than 16-bit integers.
        mean_age: years.
        lesion_kind: ``blob``: several rounded ones, by the three keys above; ``mass``: one glioma-like mass per
            patient, its size drawn widely (:mod:`.lesions`).
    """

    scanner: str
    levels: Mapping[str, Mapping[str, float]]
    voxel_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    orientation: str = "RAS"
    bias: float = 0.1
    noise: float = 0.02
    blur_mm: float = 2.0
    lesions: float = 2.0
    lesion_radius_mm: float = 11.0
    lesion_contrast: float = 1.0
    missing: float = 0.0
    intensity: float = 1000.0
    float_storage: bool = False
    mean_age: float = 55.0
    lesion_kind: str = "blob"


def generator_of(*parts: str | int) -> np.random.Generator:
    """A generator for what ``parts`` name, such as seed, site and patient; independent of every other name."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def style_of(site: str | int, seed: int, *, resolution_mm: float = 3.0) -> SiteStyle:
    """The style of a site, drawn from its name (or number) and the seed.

    Args:
        site: name or number of the site.
        seed: seed of the federation.
        resolution_mm: voxel size in plane that sites vary around by ±5 %; slices are up to 1.4 times thicker.
    """
    generator = generator_of("style", seed, site)
    scanner, tesla = SCANNERS[generator.integers(len(SCANNERS))]
    levels = {
        modality: {name: float(generator.uniform(*span)) for name, span in table.items()}
        for modality, table in LEVELS.items()
    }
    in_plane = round(resolution_mm * float(generator.choice([0.95, 1.0, 1.0, 1.05])), 3)
    slices = round(resolution_mm * float(generator.choice([1.0, 1.0, 1.2, 1.4])), 3)
    intensity = float(np.round(np.exp(generator.uniform(np.log(150), np.log(4000)))))
    return SiteStyle(
        scanner=scanner,
        levels=levels,
        voxel_mm=(in_plane, in_plane, slices),
        orientation=str(generator.choice(["RAS", "LPS", "LAS", "LIA"], p=[0.4, 0.3, 0.2, 0.1])),
        bias=float(generator.uniform(0.08, 0.13) * (1.3 if tesla > 2 else 1.0)),
        noise=float(generator.uniform(0.012, 0.022) * (1.0 if tesla > 2 else 1.6)),
        blur_mm=float(generator.uniform(2.0, 3.6)),
        lesions=float(generator.uniform(1.5, 3.0)),
        lesion_radius_mm=float(generator.uniform(9.5, 13.0)),
        lesion_contrast=float(generator.uniform(0.85, 1.1)),
        missing=float(generator.choice([0.0, 0.0, 0.0, 0.15, 0.3])),
        intensity=intensity,
        float_storage=bool(generator.random() < 0.25),
        mean_age=float(generator.uniform(45, 65)),
    )
