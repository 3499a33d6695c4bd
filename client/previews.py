# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the model sees: the scan, the truth and the prediction side by side, as one PNG.

For a hospital's own eyes, and for simulations, where the report shows them. They are written into the site's
folder and never sent.

Pictures follow the *radiological convention*: the front of the head is up and the patient's left is on the
right of the picture, as if one looked from the feet. Arrays are expected in RAS order, so both of the first
two axes are flipped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["render_classification", "render_maps", "render_preview"]

SIDE: Final = 256
"""Longer side of a panel in pixels."""
GAP: Final = 6
BAR: Final = 24
"""Height of the line of text under each panel and above the picture."""
INK: Final = (15, 18, 22)
PAPER: Final = (235, 238, 242)
COLOURS: Final = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
)
"""Colours of the labels 1, 2, …, told apart by colour-blind readers (Okabe and Ito, 2008)."""

GLOW: Final = (255, 120, 0)
"""Colour of the largest value of a map."""

Pixels = NDArray[np.uint8]
"""An RGB picture, shape (rows, columns, 3)."""


def render_preview(
    path: Path,
    image: NDArray[Any],
    truth: NDArray[Any],
    prediction: NDArray[Any],
    *,
    title: str = "",
    caption: str = "",
    spacing: tuple[float, ...] | None = None,
    maps: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write scan, scan with truth, and scan with prediction, of the axial slice with the most truth.

    Where the truth is empty the slice with the most prediction is shown; where both are, the middle one.

    Args:
        path: PNG to write.
        image: grey values in RAS order, shape (X, Y, Z) or (X, Y).
        truth: label per voxel, 0 is background, same shape.
        prediction: as ``truth``.
        title: line above the panels.
        caption: line below, after the names of the panels.
        spacing: voxel size in mm along the axes, for true proportions; None: square pixels.
        maps: further panels by name: values from 0 to 1, same shape, glowing over the scan.
    """
    image, truth, prediction = (np.atleast_3d(np.asarray(array)) for array in (image, truth, prediction))
    if not image.shape == truth.shape == prediction.shape:
        raise ValueError(f"image {image.shape}, truth {truth.shape} and prediction {prediction.shape} differ in shape")
    index = _telling_slice(truth, prediction)
    size = _panel_size(image.shape, spacing)
    scan = _windowed(image, index, size)
    panels = [
        ("scan", scan),
        ("truth", _outlined(scan, truth[:, :, index], size)),
        ("prediction", _outlined(scan, prediction[:, :, index], size)),
        *((name, _glowing(scan, values[:, :, index], size)) for name, values in (maps or {}).items()),
    ]
    _save(path, panels, title, caption or (f"slice {index + 1} of {image.shape[2]}" if image.shape[2] > 1 else ""))


def render_classification(
    path: Path,
    image: NDArray[Any],
    truth: str,
    prediction: str,
    probability: float,
    *,
    title: str = "",
    spacing: tuple[float, ...] | None = None,
) -> None:
    """Write the middle axial slice with the true and the predicted class below it.

    Args:
        path: PNG to write.
        image: grey values in RAS order, shape (X, Y, Z) or (X, Y).
        truth: name of the true class.
        prediction: name of the predicted class.
        probability: of the predicted class, 0 to 1.
        title: line above the picture.
        spacing: voxel size in mm along the axes; None: square pixels.
    """
    image = np.atleast_3d(np.asarray(image))
    scan = _windowed(image, image.shape[2] // 2, _panel_size(image.shape, spacing))
    verdict = "right" if truth == prediction else "wrong"
    _save(path, [(f"truth: {truth}", scan)], title, f"predicted: {prediction} ({probability:.0%}), {verdict}")


def render_maps(
    path: Path, plane: NDArray[Any], maps: Mapping[str, NDArray[Any]], *, title: str = "", caption: str = ""
) -> None:
    """Write one slice, and beside it the same with each map glowing over it.

    Args:
        path: PNG to write.
        plane: grey values, shape (X, Y).
        maps: by name: values from 0 to 1, same shape.
        title: line above the panels.
        caption: line below.
    """
    size = _panel_size(plane.shape, None)
    scan = _windowed(plane[:, :, None], 0, size)
    _save(path, [("scan", scan), *((n, _glowing(scan, values, size)) for n, values in maps.items())], title, caption)


def _telling_slice(truth: NDArray[Any], prediction: NDArray[Any]) -> int:
    """Index of the axial slice that shows most."""
    for labels in (truth, prediction):
        area = np.count_nonzero(labels, axis=(0, 1))
        if area.any():
            return int(area.argmax())
    return int(truth.shape[2] // 2)


def _panel_size(shape: tuple[int, ...], spacing: tuple[float, ...] | None) -> tuple[int, int]:
    """Columns and rows of a panel: proportions of the slice, longer side :data:`SIDE`."""
    width, height = (n * size for n, size in zip(shape[:2], spacing or (1.0, 1.0), strict=False))
    scale = SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _windowed(image: NDArray[Any], index: int, size: tuple[int, int]) -> Pixels:
    """The slice as grey RGB, from the 1st to the 99th percentile of the slice's own head."""
    plane = np.nan_to_num(np.asarray(image[:, :, index], np.float64))
    # The commonest border value is background. It is painted black even where normalisation left it at 0, the
    # mean grey of the head.
    background = np.median(np.concatenate([plane[0], plane[-1], plane[:, 0], plane[:, -1]]))
    head = plane[plane != background]
    low, high = np.percentile(head, [1, 99]) if head.size else (0.0, 1.0)
    grey = np.clip((plane - low) / max(high - low, 1e-12), 0, 1) * (plane != background)
    picture = Image.fromarray(_upright((grey * 255).astype(np.uint8))).resize(size, Image.Resampling.BICUBIC)
    return np.stack([np.asarray(picture)] * 3, axis=-1)


def _upright(plane: NDArray[Any]) -> NDArray[Any]:
    """From axes (right, anterior) to (rows down, columns to the right) in radiological convention."""
    return np.ascontiguousarray(plane.T[::-1, ::-1])


def _outlined(scan: Pixels, labels: NDArray[Any], size: tuple[int, int]) -> Pixels:
    """``scan`` with each label filled at 30 % and outlined."""
    picture = scan.astype(np.float64)
    for value in np.unique(labels[labels > 0]):
        colour = np.array(COLOURS[(int(value) - 1) % len(COLOURS)], np.float64)
        mask = Image.fromarray(_upright((labels == value).astype(np.uint8) * 255))
        inside = np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 127
        picture[inside] = 0.7 * picture[inside] + 0.3 * colour
        picture[inside & ~_eroded(inside)] = colour
    return picture.round().astype(np.uint8)


def _glowing(scan: Pixels, values: NDArray[Any], size: tuple[int, int]) -> Pixels:
    """``scan`` darkened, with a map of values from 0 to 1 over it."""
    plane = Image.fromarray((_upright(np.clip(values, 0, 1)) * 255).astype(np.uint8))
    strength = np.asarray(plane.resize(size, Image.Resampling.BILINEAR), np.float64)[..., None] / 255
    picture = scan * 0.8 * (1 - strength) + np.array(GLOW, np.float64) * strength
    return picture.round().astype(np.uint8)


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``mask`` without its outermost two pixels."""
    for _ in range(2):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _save(path: Path, panels: list[tuple[str, Pixels]], title: str, caption: str) -> None:
    """Panels side by side, a name under each, the title above, the caption below."""
    rows, columns = panels[0][1].shape[:2]
    columns_all = max(len(panels) * columns + (len(panels) - 1) * GAP, SIDE + GAP)
    top = BAR if title else 0
    sheet = Image.new("RGB", (columns_all, top + rows + BAR * (2 if caption else 1)), INK)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)

    def write(x: int, y: int, text: str) -> None:
        draw.text((x + 4, y + BAR // 2), text, fill=PAPER, font=font, anchor="lm")

    if title:
        write(0, 0, title)
    for number, (name, pixels) in enumerate(panels):
        left = number * (columns + GAP)
        sheet.paste(Image.fromarray(pixels), (left, top))
        write(left, top + rows, name)
        draw.text((left + 4, top + rows // 2), "R", fill=PAPER, font=font, anchor="lm")
        draw.text((left + columns - 4, top + rows // 2), "L", fill=PAPER, font=font, anchor="rm")
    if caption:
        write(0, top + rows + BAR, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
