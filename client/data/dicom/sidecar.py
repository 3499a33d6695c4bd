# SPDX-License-Identifier: Apache-2.0
"""What may be carried over from a DICOM header: a short list of technical values, as BIDS names them.

A list of what is permitted, not of what is forbidden: a tag that nobody thought of stays behind. Free text is
cleaned of every identifying value of its series, word by word. Private tags are never read.
"""

import re
from typing import Any, Final

from .convert import Converted
from .headers import identifying_values
from .series import Series

__all__ = ["free_text", "side_car"]

_NUMBERS: Final = {
    # DICOM keyword: BIDS name, factor to the unit of BIDS
    "MagneticFieldStrength": ("MagneticFieldStrength", 1.0),
    "EchoTime": ("EchoTime", 1e-3),
    "RepetitionTime": ("RepetitionTime", 1e-3),
    "InversionTime": ("InversionTime", 1e-3),
    "FlipAngle": ("FlipAngle", 1.0),
    "SliceThickness": ("SliceThickness", 1.0),
}
_MAKERS: Final = ("Siemens", "GE", "Philips", "Canon", "Toshiba", "Hitachi", "United Imaging", "Bruker")


def side_car(series: Series, volume: Converted) -> dict[str, Any]:
    """Content of the JSON file beside an image."""
    first = series.first
    values: dict[str, Any] = {"Modality": first.text("Modality"), "Manufacturer": _maker(first.text("Manufacturer"))}
    model = free_text(first.text("ManufacturerModelName"), series)
    if model:
        values["ManufacturersModelName"] = model
    for keyword, (name, factor) in _NUMBERS.items():
        number = first.number(keyword)
        if number is not None:
            values[name] = round(number * factor, 9)
    if volume.map_hz:
        values["Units"] = "Hz"
    if volume.tilt:
        values["Straightened"] = f"gantry tilt of {volume.tilt:.1f} degrees; linear interpolation within slices"
    values["ContrastAgent"] = bool(first.text("ContrastBolusAgent"))
    values["ConversionSoftware"] = "FedNeuro, dcm2niix"
    return values


def _maker(text: str) -> str:
    return next((maker for maker in _MAKERS if re.search(rf"\b{maker}\b", text, re.IGNORECASE)), "other")


def free_text(text: str, series: Series) -> str:
    """Text that somebody typed, without control characters and without any identifying value of the series."""
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())[:80]
    for value in sorted(identifying_values(series.first, parts=True), key=len, reverse=True):
        text = re.sub(re.escape(value), "[removed]", text, flags=re.IGNORECASE)
    return text
