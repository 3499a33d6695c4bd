# SPDX-License-Identifier: Apache-2.0
"""The study's keys reach the engine of private training, and what it notices stays in the site's log."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedneuro.client.optimizers import optimizer_for
from fedneuro.client.session import Session
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.models.optimizers import NoisedAdam
from fedneuro.privacy.contract import Request, Role, TrainReply
from fedneuro.privacy.dpsgd import Loop
from fedneuro.privacy.errors import StudyError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import load_study
from fedneuro.server.rounds import initial_arrays
from tests.bids import make_study, write_site


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    write_site(tmp_path / "north", patients=6, shape=(18, 18, 4))
    return SiteSettings(
        name="north", data=tmp_path / "north", state=tmp_path / "state", role=Role.TRAIN, public_size=10
    )


def private_study(*, training: dict[str, Any] | None = None, **privacy: Any) -> Study:
    return make_study(
        training={"local_steps": 2, "local_epochs": 0, **(training or {})},
        privacy={"mode": "local", "delta": 1e-2, "sample_rate": 1.0, "crops_per_patient": 2, **privacy},
    )


def train(settings: SiteSettings, study: Study) -> TrainReply:
    reply = Site(settings).handle(Request(kind="train", study=study, round=1, arrays=initial_arrays(study)["model"]))
    assert isinstance(reply, TrainReply), (reply, (settings.state / "last-fault.json").read_text())
    return reply


@pytest.mark.parametrize("mode", ["none", "local"])
def test_frozen_parameters_do_not_leave(settings: SiteSettings, mode: str) -> None:
    study = private_study(training={"trainable": "head"}, mode=mode)
    before, after = initial_arrays(study)["model"], train(settings, study).arrays
    assert list(after) == list(before)[-2:]
    assert not [name for name in after if np.array_equal(before[name], after[name])]


def test_the_log_says_how_gradients_are_computed(settings: SiteSettings) -> None:
    train(settings, private_study())
    text = (settings.state / "site.log").read_text()
    assert "gradients of patients: loop: about " in text and "not worth a trial" in text


def test_patients_who_are_not_finite_are_in_the_log_alone(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: Loop, images: torch.Tensor, labels: torch.Tensor) -> Any:
        found, losses = plain(self, images, labels)
        return [None if g is None else g * torch.nan for g in found], losses

    study = private_study()
    site = Site(settings)
    assert not hasattr(site.handle(Request(kind="hello", study=study, round=0)), "reason")  # the proof comes first
    plain = Loop.gradients
    monkeypatch.setattr(Loop, "gradients", poisoned)
    reply = site.handle(Request(kind="train", study=study, round=1, arrays=initial_arrays(study)["model"]))
    assert isinstance(reply, TrainReply)
    assert "times a patient's gradient was not finite: counted as 0" in (settings.state / "site.log").read_text()
    assert all(np.isfinite(array).all() for array in reply.arrays.values())


def test_adam_is_told_the_noise(settings: SiteSettings) -> None:
    """Deviation σC over the public number of patients in a step: 1 x 10 x 0.8."""
    study = private_study(training={"optimizer": "adam"}, clip=0.5)
    session = Session(settings, study)
    optimizer = optimizer_for(session, 1)
    assert isinstance(optimizer, NoisedAdam)
    from fedneuro.client.private_training import private_steps

    _, sigma = private_steps(session, 1, optimizer)
    share = 1 - study.evaluation.validation_fraction
    assert optimizer.noise_std == pytest.approx(sigma * 0.5 / (10 * share))
    assert isinstance(optimizer_for(Session(settings, make_study(training={"optimizer": "adam"})), 1), torch.optim.Adam)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (['privacy.engine="vmap"', "privacy.physical_batch=2"], "physical_batch = 2 with engine = .vmap."),
        (['privacy.engine="opacus"', 'training.precision="bfloat16"'], "engine = .opacus. with training.precision"),
        (['training.trainable="encoder"'], "trainable"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, overrides: list[str], text: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text('[study]\nname = "toy"\n[training]\nlocal_steps = 1\n')
    with pytest.raises(StudyError, match=text):
        load_study(path, overrides)
    load_study(path, ['privacy.engine="opacus"', 'training.trainable="decoder"'])
