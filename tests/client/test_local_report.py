# SPDX-License-Identifier: Apache-2.0
"""The site's own report: it says what may not leave, and whether its maps can be believed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedneuro.client.explain import Forgetful, attention, grad_cam, sanity, sanity_words, uncertainty
from fedneuro.client.inference import label_probabilities
from fedneuro.client.session import Session
from fedneuro.client.site import Site
from fedneuro.privacy.contract import Arrays, EvaluateReply, Request
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_reply
from fedneuro.server.rounds import initial_arrays
from tests.bids import write_site
from tests.client.test_evaluation import (
    break_image,
    classifying_site,
    classifying_study,
    describe_patients,
    heldout_study,
    settings_of,
)

STATES = {"worst": 2, "explain": True}


def report_of(tmp_path: Path, study: Study, arrays: Arrays | None = None) -> tuple[str, EvaluateReply]:
    settings = settings_of(tmp_path)
    arrays = arrays or initial_arrays(study)["model"]
    reply = Site(settings).handle(Request(kind="evaluate", study=study, round=0, arrays=arrays, final=True))
    assert isinstance(reply, EvaluateReply)
    path = settings.state / "site-report.html"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "not written" not in (
        (settings.state / "site.log").read_text() if (settings.state / "site.log").exists() else ""
    )
    return path.read_text(encoding="utf-8"), reply


def test_the_report_of_a_segmentation(tmp_path: Path) -> None:
    root = write_site(tmp_path / "north", patients=6, shape=(20, 18, 4))
    describe_patients(root, {f"sub-P{i:03d}": ("50", "F" if i < 6 else "M") for i in range(1, 7)}, {})
    break_image(root, "sub-P004")
    study = heldout_study(
        data={"normalise": "none"}, evaluation={**STATES, "strata": ["sex"], "metrics": ["dice", "hd95"]}
    )
    page, reply = report_of(tmp_path, study)
    assert "This page stays at the hospital" in page and "1 of 6 patients" in page
    assert "sub-P004" in page and "not a finite number" in page
    assert "sex: F 5, M 1" in page and "dice:sex:M" in page, "true counts, and groups that may not leave"
    patients = re.findall(r'<section class="patient"><h3>(sub-\w+)</h3>', page)
    assert len(patients) == 2 and patients[0] == "sub-P004", "the failure first, then the worst"
    assert page.count("data:image/png;base64,") == 1 and "mean uncertainty in the marked region" in page
    assert "Do the maps depend on the model?" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    sent = str(dict(encode_reply(reply)["reply"]))
    assert "sub-P" not in sent and "dice:sex:M" not in sent


def test_the_report_of_a_classification(tmp_path: Path) -> None:
    classifying_site(tmp_path, patients=4)
    page, _ = report_of(tmp_path, classifying_study(**STATES, metrics=["accuracy", "sensitivity"]))
    assert "Grad-CAM glows" in page and page.count("data:image/png;base64,") == 2
    assert "to which the model gives" in page and "threshold 0.50" in page


def test_no_report_and_no_maps_where_the_study_says_so(tmp_path: Path) -> None:
    write_site(tmp_path / "north", patients=3, shape=(18, 18, 4))
    page, _ = report_of(tmp_path, heldout_study(evaluation={"worst": 1, "explain": False}))
    assert "uncertainty" not in page and "Do the maps" not in page and page.count("data:image/png") == 1
    settings = settings_of(tmp_path, state=tmp_path / "none")
    study = heldout_study()
    Site(settings).handle(
        Request(kind="evaluate", study=study, round=0, arrays=initial_arrays(study)["model"], final=True)
    )
    assert not (settings.state / "site-report.html").exists()


# -- maps -----------------------------------------------------------------------------------------------------


def test_uncertainty_by_hand(tmp_path: Path) -> None:
    """Four mirrored views, averaged; the entropy of the mean over that of a coin. It mirrors as the scan does."""
    write_site(tmp_path / "north", patients=1, shape=(18, 16, 3))
    session = Session(settings_of(tmp_path), heldout_study())
    session.network.eval()
    image = session.data.scans("sub-P001")[0].image
    found = uncertainty(session, image)
    with torch.inference_mode():
        views = [label_probabilities(session, image.flip(a)).flip(a) for a in ([1], [2], [1, 2])]
        mean = torch.stack([label_probabilities(session, image), *views]).mean(0).double()
    expected = -(mean * mean.log()).sum(0) / np.log(2)
    assert np.allclose(found, expected.numpy(), atol=1e-5) and found.shape == (18, 16, 3)
    assert np.allclose(uncertainty(session, image.flip(1)), found[::-1], atol=1e-5)


def test_grad_cam_glows_where_the_evidence_is(tmp_path: Path) -> None:
    """All weights positive: what is bright speaks for whatever class is asked about."""
    classifying_site(tmp_path, patients=2)
    session = Session(settings_of(tmp_path), classifying_study())
    with torch.no_grad():
        for parameter in session.network.parameters():
            parameter.abs_()
    session.network.eval()
    image = torch.zeros(1, 40, 40, 2)
    image[0, 4:14, 4:14] = 5.0
    seen = attention(session, image, occlude=True)
    for name, values in seen.maps.items():
        assert values.shape == (40, 40) and values.min() >= 0 and values.max() == pytest.approx(1), name
    cam = seen.maps["Grad-CAM"]
    assert cam[:20, :20].mean() > 1.5 * cam[20:, 20:].mean()
    before = {name: value.clone() for name, value in session.network.state_dict().items()}
    grad_cam(session, seen.view, seen.label)
    assert all(torch.equal(value, before[name]) for name, value in session.network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in session.network.modules())


def test_the_sanity_check_tells_a_map_of_the_model_from_one_of_the_scan(tmp_path: Path) -> None:
    write_site(tmp_path / "north", patients=1, shape=(24, 24, 3))
    session = Session(settings_of(tmp_path), heldout_study())
    session.network.eval()
    image = session.data.scans("sub-P001")[0].image
    plane = image[0, :, :, 1].numpy()
    head, everything = sanity(session, lambda _: np.abs(plane), plane)
    assert head == everything == pytest.approx(1.0), "an edge detector: the same whatever the model"
    words = sanity_words([(head, everything)])
    assert words.startswith("Do not read these maps")
    rng = np.random.default_rng(0)

    def noise(judged: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return rng.random(plane.shape).astype(np.float32) if isinstance(judged, Forgetful) else np.abs(plane)

    assert sanity_words([sanity(session, noise, plane)]).startswith("The maps depend on what the model learned")
    assert sanity(session, lambda _: np.ones_like(plane), plane) == (0.0, 0.0) and sanity_words([]) == ""
    own = sanity(session, lambda judged: uncertainty(judged, image)[..., 1], plane)
    assert all(-1 <= value < 1 for value in own), "other networks are unsure elsewhere"
