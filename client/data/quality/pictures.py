# SPDX-License-Identifier: Apache-2.0
"""Orthogonal views of one scan with its masks outlined, as a PNG in memory, for the page of the check.

Radiological convention: the patient's left is on the right of axial and coronal views; sagittal views look to the left
of the picture. Drawn in true proportions by the header's voxel sizes.
"""

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ....privacy.errors import DataError
from ..nifti import Volume, read_volume
from .files import Scan

__all__ = ["views_of"]

SIDE: Final = 150
BAR: Final = 18
COLOURS: Final = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0))
MOST_IMAGES: Final = 4
_MARKS: Final = (("P", "A"), ("R", "L"), ("R", "L"))  # left and right of sagittal, coronal, axial views


def views_of(scan: Scan) -> bytes:
    """A row of three views for each image, or nothing where no image can be read."""
    rows = []
    masks = [volume for file in scan.masks if (volume := _read(file.path)) is not None]
    for file in scan.images[:MOST_IMAGES]:
        image = _read(file.path)
        if image is not None:
            same = [mask.data for mask in masks if mask.data.shape == image.data.shape]
            rows.append((file.what, _row(image, same)))
    if not rows:
        return b""
    sheet = Image.new("RGB", (3 * SIDE, len(rows) * (SIDE + BAR)), (15, 18, 22))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (what, panels) in enumerate(rows):
        top = number * (SIDE + BAR)
        draw.text((4, top + BAR // 2), what, fill=(235, 238, 242), font=font, anchor="lm")
        for place, panel in enumerate(panels):
            left = place * SIDE
            sheet.paste(panel, (left + (SIDE - panel.width) // 2, top + BAR + (SIDE - panel.height) // 2))
            for x, mark, anchor in ((left + 3, _MARKS[place][0], "lm"), (left + SIDE - 3, _MARKS[place][1], "rm")):
                draw.text((x, top + BAR + SIDE // 2), mark, fill=(160, 168, 178), font=font, anchor=anchor)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _read(path: Any) -> Volume | None:
    try:
        return read_volume(path)
    except DataError:
        return None


def _row(image: Volume, masks: list[NDArray[np.float32]]) -> list[Image.Image]:
    data = np.nan_to_num(image.data)
    labels = np.zeros(data.shape, np.int32)
    for number, mask in enumerate(masks):
        labels = np.where(mask > 0.5, np.rint(np.nan_to_num(mask)).astype(np.int32) + number, labels)
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    low, high = np.percentile(data, [1, 99.5])
    grey = np.clip((data - low) / max(float(high - low), 1e-12), 0, 1)
    panels = []
    for axis in range(3):
        area = (labels > 0).sum(axis=tuple(a for a in range(3) if a != axis))
        index = int(area.argmax()) if area.any() else data.shape[axis] // 2
        across, up = (a for a in range(3) if a != axis)
        plane, drawn = (np.take(array, index, axis=axis).T[::-1] for array in (grey, labels))
        if axis:  # left of the patient to the right of the picture
            plane, drawn = plane[:, ::-1], drawn[:, ::-1]
        width, height = data.shape[across] * sizes[across], data.shape[up] * sizes[up]
        scale = (SIDE - 4) / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        panels.append(_panel(plane, drawn, size))
    return panels


def _panel(plane: NDArray[Any], drawn: NDArray[Any], size: tuple[int, int]) -> Image.Image:
    grey = Image.fromarray((plane * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    pixels = np.stack([np.asarray(grey)] * 3, axis=-1).copy()
    for value in np.unique(drawn[drawn > 0]):
        shape = Image.fromarray((drawn == value).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        inside = np.asarray(shape) > 127
        wide = np.pad(inside, 1)
        core = inside & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
        pixels[inside & ~core] = COLOURS[(int(value) - 1) % len(COLOURS)]
    return Image.fromarray(pixels)
