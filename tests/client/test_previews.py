# SPDX-License-Identifier: Apache-2.0
"""Preview pictures: the telling slice, radiological orientation, outlines where the labels are."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedneuro.client.previews import BAR, COLOURS, GAP, SIDE, render_classification, render_preview

SHAPE = (40, 40, 7)


def _head() -> NDArray[np.float32]:
    x, y = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    disc = ((x - 20) ** 2 + (y - 20) ** 2 < 15**2).astype(np.float32)
    return np.repeat((disc * 100)[:, :, None], 7, axis=2)


def _panels(path: Path, top: int = 0) -> list[NDArray[np.int64]]:
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return [sheet[top : top + SIDE, i * (SIDE + GAP) : i * (SIDE + GAP) + SIDE] for i in range(3)]


def _coloured(panel: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(panel.max(-1) - panel.min(-1) > 20)


def test_anterior_is_up_and_the_patients_left_on_the_right(tmp_path: Path) -> None:
    """In RAS order x grows to the patient's right and y to the front: a mask at small x, large y is left, anterior."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[10:14, 26:30, 5] = 1
    render_preview(tmp_path / "a.png", _head(), truth, np.zeros(SHAPE, np.uint8))
    scan, marked, predicted = _panels(tmp_path / "a.png")
    rows, columns = np.nonzero(_coloured(marked))
    assert rows.max() < SIDE / 2 < columns.min()
    assert rows.mean() == pytest.approx((40 - 28) / 40 * SIDE, abs=3)
    assert columns.mean() == pytest.approx((40 - 12) / 40 * SIDE, abs=3)
    assert not _coloured(scan).any() and not _coloured(predicted).any()
    assert tuple(marked[rows.min(), int(columns.mean())]) == COLOURS[0]


def test_the_slice_with_most_truth_is_shown_else_the_one_with_most_prediction(tmp_path: Path) -> None:
    truth, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    prediction[15:25, 15:25, 1] = 1
    truth[18:20, 18:20, 3] = 1
    truth[16:24, 16:24, 4] = 1
    render_preview(tmp_path / "truth.png", _head(), truth, prediction)
    _, marked, predicted = _panels(tmp_path / "truth.png")
    assert _coloured(marked).sum() == pytest.approx((8 / 40 * SIDE) ** 2, rel=0.1)
    assert not _coloured(predicted).any()
    render_preview(tmp_path / "none.png", _head(), np.zeros(SHAPE, np.uint8), prediction)
    assert _coloured(_panels(tmp_path / "none.png")[2]).sum() > 0


def test_each_label_has_its_colour(tmp_path: Path) -> None:
    truth = np.zeros(SHAPE, np.int64)
    truth[10:18, 10:18, 3], truth[22:30, 22:30, 3] = 1, 2
    render_preview(tmp_path / "a.png", _head(), truth, truth)
    found = {tuple(pixel) for pixel in _panels(tmp_path / "a.png")[2].reshape(-1, 3)}
    assert {COLOURS[0], COLOURS[1]} <= found and COLOURS[2] not in found


def test_grey_values_span_the_window_whatever_the_scale(tmp_path: Path) -> None:
    """A z-scored scan looks like the stored one, its background shifted with the head or left at 0."""
    head = _head() * (1 + (np.arange(40)[:, None, None] / 40) ** 2)
    scored = (head - head[head > 0].mean()) / 13
    for name, values in (("stored", head), ("shifted", scored), ("zero", np.where(head > 0, scored, 0))):
        render_preview(tmp_path / f"{name}.png", values, np.zeros(SHAPE), np.zeros(SHAPE))
    stored, shifted, zero = (_panels(tmp_path / f"{name}.png")[0] for name in ("stored", "shifted", "zero"))
    assert np.abs(stored - shifted).max() <= 2 and np.abs(stored - zero).max() <= 2
    assert stored.max() >= 250 and stored[:20, 40:-40].max() == 0


def test_a_slice_a_title_and_true_proportions(tmp_path: Path) -> None:
    image = _head()[:, :20, 0]
    render_preview(tmp_path / "a.png", image, image > 0, image > 0, title="sub-001", spacing=(1.0, 2.0))
    # 40 × 1 mm by 20 × 2 mm is square again; one bar above and one below.
    assert Image.open(tmp_path / "a.png").size == (3 * SIDE + 2 * GAP, SIDE + 2 * BAR)
    render_preview(tmp_path / "flat.png", np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((8, 8)))
    assert not _panels(tmp_path / "flat.png")[0][100:120, 100:120].any()


def test_bad_values_do_not_stop_a_preview(tmp_path: Path) -> None:
    image = _head()
    image[20, 20] = np.nan
    render_preview(tmp_path / "a.png", image, np.zeros(SHAPE), np.zeros(SHAPE))
    assert _panels(tmp_path / "a.png")[0].max() > 200


def test_shapes_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        render_preview(tmp_path / "a.png", _head(), np.zeros((40, 40, 6)), np.zeros(SHAPE))


def test_classification_shows_one_panel_and_the_verdict(tmp_path: Path) -> None:
    render_classification(tmp_path / "right.png", _head(), "glioma", "glioma", 0.91)
    render_classification(tmp_path / "wrong.png", _head(), "glioma", "meningioma", 0.91)
    right, wrong = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("right", "wrong"))
    assert right.shape[0] == wrong.shape[0] == SIDE + 2 * BAR
    assert right.shape[1] < 2 * SIDE
    assert np.array_equal(right[:SIDE], wrong[:SIDE]) and not np.array_equal(right[-BAR:], wrong[-BAR:])
