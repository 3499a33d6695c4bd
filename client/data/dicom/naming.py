# SPDX-License-Identifier: Apache-2.0
"""Proposes a BIDS name for a series from its headers: rules in order, the first that fits decides.

What the sequence does counts before what somebody typed: diffusion weighting, an angiogram or a time series is told
by its parameters where the headers have them; the description decides between the rest; echo and repetition time
speak where it is silent. Staff correct the proposal in the mapping file; a series that no rule fits is skipped
until they name it.

Reference: BIDS 1.10, MRI appendix; times after the ranges of clinical protocols at 1.5 and 3 T.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .series import Series

__all__ = ["VOLUMES_IN_TIME", "Name", "propose"]

VOLUMES_IN_TIME: Final = ("bold", "dwi")
"""Suffixes of series that hold several volumes."""


@dataclass(frozen=True, slots=True)
class Name:
    """Where a series goes: ``DATATYPE/sub-…_ses-…_[ENTITIES_]SUFFIX.nii.gz``; no suffix: nobody can tell."""

    datatype: str = ""
    entities: str = ""
    suffix: str = ""
    why: str = "no rule fits; fill in datatype and suffix in the mapping file"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the rules look at."""

    text: str  # description and protocol, lower case
    sequence: frozenset[str]
    types: frozenset[str]
    volumes: int
    echo: float | None  # ms
    repetition: float | None  # ms
    inversion: float | None  # ms
    diffusion: bool

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.text) is not None

    def times(self, echo: tuple[float, float], repetition: tuple[float, float]) -> bool:
        return (
            self.echo is not None
            and self.repetition is not None
            and echo[0] <= self.echo <= echo[1]
            and repetition[0] <= self.repetition <= repetition[1]
        )


_WORD: Final = r"(?<![a-z0-9]){}(?![a-z0-9])"


def _w(*words: str) -> str:
    return "|".join(_WORD.format(word) for word in words)


_RULES: Final[tuple[tuple[Callable[[_Seen], bool], Name], ...]] = (
    (lambda s: s.says(_w("b0 ?(map|ns)?", "field.?map", "gre.?field.?mapping")) and not s.diffusion
        and not s.says(_w("dti", "dwi")), Name("fmap", "", "fieldmap", "description names a field map")),
    (lambda s: s.diffusion or s.says(_w("dti", "dwi", "hardi", "diffusion", r"diff\w*")),
        Name("dwi", "", "dwi", "diffusion weighting in header or description")),
    (lambda s: s.says(_w("fmri", "bold", r"rest\d*", "task") + "|fmri") or ("EP" in s.sequence and s.volumes > 1),
        Name("func", "task-unknown", "bold", "echo-planar time series")),
    (lambda s: s.says(_w("tof", "mra", "angio", "inflow")), Name("anat", "", "angio", "description: angiogram")),
    (lambda s: s.says(_w("swi", "swan", "venobold", "suscept\\w*")), Name("anat", "", "swi", "description")),
    (lambda s: s.says("flair|dark.?fluid|" + _w("tirm")) or (
        s.inversion is not None and 1500 <= s.inversion <= 3000 and s.times((60, 500), (4000, 20000))),
        Name("anat", "", "FLAIR", "description, or long echo with an inversion time that nulls fluid")),
    (lambda s: s.says(r"t2 ?\*|t2.?star|" + _w("hemo", "medic")), Name("anat", "", "T2starw", "description")),
    (lambda s: s.says(r"mp.?rage|bravo|ir.?spgr|fspgr|" + _w(r"t1\w*", "tfl", "vibe")),
        Name("anat", "", "T1w", "description")),
    (lambda s: s.says(_w(r"t2\w*", "cube", "space", "vista")), Name("anat", "", "T2w", "description")),
    (lambda s: s.says(_w("pd", "pdw", "proton")), Name("anat", "", "PDw", "description")),
    (lambda s: s.times((0, 30), (0, 1200)), Name("anat", "", "T1w", "short echo and repetition time")),
    (lambda s: s.times((60, 200), (2000, 20000)), Name("anat", "", "T2w", "long echo and repetition time")),
    (lambda s: s.times((0, 40), (1800, 20000)), Name("anat", "", "PDw", "short echo, long repetition time")),
)  # fmt: skip
_CONTRAST: Final = re.compile(
    _w("post", "gd", r"gado\w*", r"contrast", "km", r"c\+", "ce", "dotarem", "multihance") + r"|\+ ?c(?![a-z])|t1post"
)


def propose(series: Series, volumes: int) -> Name:
    """The name that the headers suggest.

    Args:
        series: an image series.
        volumes: volumes at each place, from its geometry.
    """
    first = series.first
    text = f"{first.text('SeriesDescription')} {first.text('ProtocolName')}".lower().replace("_", " ")
    if first.text("Modality") == "CT":
        entities = "ce-contrast" if first.text("ContrastBolusAgent") else ""
        return Name("anat", entities, "CT", "modality in the header")
    seen = _Seen(
        text=text,
        sequence=frozenset(first.text("ScanningSequence").upper().split("\\")),
        types=frozenset(first.text("ImageType").upper().split("\\")),
        volumes=volumes,
        echo=first.number("EchoTime"),
        repetition=first.number("RepetitionTime"),
        inversion=first.number("InversionTime"),
        diffusion=any((i.number("DiffusionBValue") or 0) > 0 for i in series.instances)
        or "DIFFUSION" in first.text("ImageType").upper(),
    )
    name = next((name for fits, name in _RULES if fits(seen)), Name())
    agent = first.text("ContrastBolusAgent").lower() not in ("", "none", "no", "n/a")
    if name.datatype == "anat" and name.suffix == "T1w" and (agent or _CONTRAST.search(text)):
        return Name("anat", "ce-gadolinium", "T1w", f"{name.why}; contrast agent in header or description")
    return name
