# SPDX-License-Identifier: Apache-2.0
"""``[strategy]`` and ``[wire]``: what goes with what, and the one line that says so."""

from pathlib import Path
from typing import Any

import pytest

from fedneuro.privacy.errors import StudyError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import load_study

NONE: dict[str, Any] = {"mode": "none"}
LOCAL: dict[str, Any] = {"mode": "local"}
TOGETHER: dict[str, Any] = {"mode": "distributed", "delta": 1e-3}
SGD: dict[str, Any] = {"local_steps": 4, "optimizer": "sgd"}
NAMES = (
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedbn", "scaffold", "ditto",
    "trimmed_mean", "median", "krum",
)  # fmt: skip


def values_of(name: str, privacy: dict[str, Any], training: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    evaluation = {"select": "last"} if name == "ditto" else {}
    return {
        "study": {"name": "toy"}, "training": training, "privacy": privacy, "evaluation": evaluation,
        "strategy": {"name": name},
    } | more  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("up", ["float32", "float16", "bfloat16", "int8"])
def test_without_privacy_everything_goes(name: str, up: str) -> None:
    assert Study.parse(values_of(name, NONE, SGD, wire={"up": up})).wire.up == up


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ditto"])
def test_local_privacy_admits_all_that_is_post_processing(name: str) -> None:
    assert Study.parse(values_of(name, LOCAL, SGD, wire={"up": "int8"})).strategy.name == name


def refused(tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "study.toml"
    path.write_text('[study]\nname = "toy"\n[training]\nlocal_steps = 4\noptimizer = "sgd"\n[privacy]\nmode = "none"\n')
    with pytest.raises(StudyError) as caught:
        load_study(path, overrides)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", NAMES[1:])
def test_distributed_admits_the_sum_alone(tmp_path: Path, name: str) -> None:
    line = refused(
        tmp_path, f"strategy.name={name}", "privacy.mode=distributed", "privacy.delta=1e-3", "training.local_steps=1",
        "evaluation.select=last",
    )  # fmt: skip
    assert f'strategy.name = "{name}" with privacy.mode = "distributed"' in line and "use fedavg" in line


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (("strategy.name=fedprox", "training.local_steps=1"), "strategy.name", "the pull is zero"),
        (("strategy.name=scaffold", "training.optimizer=adam"), "training.optimizer", "means of plain gradients"),
        (("strategy.name=scaffold", "training.momentum=0.9"), "training.optimizer", "set optimizer"),
        (("strategy.name=scaffold", "training.schedule=cosine"), "training.schedule", "divide by the step size"),
        (
            ("strategy.name=scaffold", "training.local_steps=0", "training.local_epochs=1"),
            "training.local_steps", "the number of patients",
        ),
        (("strategy.name=fedbn", "training.trainable=head"), "strategy.name", "no normalisation is trained"),
        (
            ("strategy.name=ditto", "privacy.mode=local", "evaluation.select=last"),
            "strategy.name", "trained without noise would leave",
        ),
        (("strategy.name=ditto",), "evaluation.select", "keeps the personal model of its last round alone"),
        (("strategy.trim=0.3",), "strategy.trim", "belongs to trimmed_mean"),
        (("strategy.name=fedadagrad", "strategy.second_moment=0.5"), "strategy.second_moment", "fedadam, fedyogi"),
        (("strategy.name=krum", "strategy.min_sites=4"), "strategy.min_sites", "give at least 5"),
        (("wire.error_feedback=false",), "wire.error_feedback", "nothing is rounded"),
        (
            ("wire.up=int8", "privacy.mode=distributed", "privacy.delta=1e-3", "training.local_steps=1"),
            "wire.up", "cannot be rounded",
        ),
        (("wire.up=int4",), "wire.up", 'expected one of "float32"'),
    ],
)  # fmt: skip
def test_contradictions_are_one_line_each(tmp_path: Path, overrides: tuple[str, ...], key: str, words: str) -> None:
    line = refused(tmp_path, *overrides)
    assert key in line and words in line
