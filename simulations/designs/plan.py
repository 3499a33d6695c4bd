# SPDX-License-Identifier: Apache-2.0
"""What a design consists of: folds, the runs and scores that each needs, and where their folders are.

A *fold* is one federation: hospitals that train, hospitals or parts of them that only judge, and a seed.

    run     one fold; every hospital is judged, training hospitals on their validation patients
    loso    leave one site out: each hospital is held out once, the others train
    cv      k folds of patients within each hospital: a fold's patients are a held-out data set ``NAME.test`` of links

Below ``root``: ``runs/<fold>`` the federations, ``runs/<fold>/…`` or ``runs/local-…`` the comparators' runs,
``scores/…`` models judged at sites, ``data/…`` data sets made of links, ``cache`` preprocessed scans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...client.data.split import keyed_fraction
from ...privacy.errors import DataError, StudyError
from ...privacy.study import Study
from ..comparators import (
    Comparators,
    fine_tuned_study,
    heldout_study,
    local_study,
    open_study,
    pooled_study,
)
from .links import link_data_set, patients_of, union
from .tasks import RunTask, ScoreTask

__all__ = ["Design", "Fold", "Plan", "cv_folds", "loso_folds", "run_fold"]

Design = Literal["run", "loso", "cv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One federation of a design.

    Args:
        name: of its folder.
        seed: ``study.seed``.
        train: folders of the hospitals that train, by name.
        tests: folders that only judge, by the name that they have in the federation.
        hospital: whose patients a name in ``tests`` holds.
        judged: where comparators are judged besides; training hospitals of a plain run.
    """

    name: str
    seed: int
    train: Mapping[str, Path]
    tests: Mapping[str, Path]
    hospital: Mapping[str, str]
    judged: Mapping[str, Path] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As ``design.json`` holds it."""
        return {
            "name": self.name, "seed": self.seed, "hospital": dict(self.hospital),
            **{
                key: {name: str(path) for name, path in getattr(self, key).items()}
                for key in ("train", "tests", "judged")
            },
        }  # fmt: skip

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Fold":
        """What :meth:`json` gave."""
        folders = {
            key: {name: Path(path) for name, path in values[key].items()} for key in ("train", "tests", "judged")
        }
        return cls(name=values["name"], seed=values["seed"], hospital=dict(values["hospital"]), **folders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A design and its tasks, in three stages: runs, runs that start from a federated model, scores."""

    design: Design
    study: Study
    folds: Sequence[Fold]
    compare: Comparators
    root: Path
    out: Path

    def study_of(self, fold: Fold) -> Study:
        """The federation's study."""
        return self.study if self.design == "run" else heldout_study(self.study, list(fold.tests), seed=fold.seed)

    def federation(self, fold: Fold) -> RunTask:
        """The federation itself; a plain run lies in ``out``."""
        folder = self.out if self.design == "run" else self.root / "runs" / fold.name
        sites = {**fold.train, **fold.tests}
        return RunTask(name=fold.name, study=self.study_of(fold), sites=sites, folder=folder)

    def local(self, fold: Fold, hospital: str) -> RunTask:
        """A hospital's own model; it is the same in every fold of a seed in which the hospital trains on the same."""
        name = f"{fold.name}-local-{hospital}" if self.design == "cv" else f"local-{hospital}-seed{fold.seed}"
        study, sites = local_study(self.study_of(fold)), {hospital: fold.train[hospital]}
        return RunTask(name=name, study=study, sites=sites, folder=self.root / "runs" / name)

    def pooled(self, fold: Fold) -> RunTask:
        """The model of all training patients in one place."""
        study = pooled_study(self.study_of(fold), len(fold.train))
        name = f"{fold.name}-pooled"
        return RunTask(name=name, study=study, sites={"pooled": self.pool(fold)}, folder=self.root / "runs" / name)

    def pool(self, fold: Fold) -> Path:
        """Folder of the pooled data set."""
        return self.root / "data" / fold.name / "pooled"

    def unprotected(self, fold: Fold) -> RunTask:
        """The federation without a promise."""
        name, sites = f"{fold.name}-no-privacy", {**fold.train, **fold.tests}
        return RunTask(name=name, study=open_study(self.study_of(fold)), sites=sites, folder=self.root / "runs" / name)

    def fine_tuned(self, fold: Fold, hospital: str) -> RunTask:
        """The federated model after more training at one hospital; its federation has to be complete."""
        study = fine_tuned_study(self.study_of(fold), self.federation(fold).folder / "model.safetensors")
        name = f"{fold.name}-fine-tuned-{hospital}"
        return RunTask(
            name=name, study=study, sites={hospital: self.whole(fold)[hospital]}, folder=self.root / "runs" / name
        )

    def whole(self, fold: Fold) -> dict[str, Path]:
        """Hospitals that have a data set of their own to train on in this fold, by their own names."""
        own = {} if self.design == "cv" else {fold.hospital[name]: path for name, path in fold.tests.items()}
        return {**fold.train, **own}

    def first(self) -> list[RunTask]:
        """Runs that need nothing else: federations first, as they take longest."""
        found = [self.federation(fold) for fold in self.folds] if self.design != "run" else []
        kinds = self.compare.kinds
        for fold in self.folds:
            if "no-privacy" in kinds:
                found.append(self.unprotected(fold))
            if "pooled" in kinds:
                found.append(self.pooled(fold))
        for fold in self.folds:
            if "local" in kinds:
                found += [self.local(fold, hospital) for hospital in fold.train]
        return list({task.name: task for task in found}.values())

    def second(self) -> list[RunTask]:
        """Runs that start from a federated model that is there."""
        if "fine-tuned" not in self.compare.kinds:
            return []
        return [
            self.fine_tuned(fold, hospital)
            for fold in self.folds
            if self.federation(fold).done()
            for hospital in self.whole(fold)
        ]

    def scores(self) -> Iterator[tuple[Fold, str, ScoreTask]]:
        """Models to be judged where they did not train: fold, model's key, task."""
        for fold in self.folds:
            study, everywhere = self.study_of(fold), {**fold.tests, **fold.judged}
            if "local" in self.compare.kinds:
                for hospital in fold.train:
                    task = self.local(fold, hospital)
                    sites = {name: path for name, path in everywhere.items() if name != hospital}
                    if sites:
                        yield fold, f"local: {hospital}", self._score(fold, task.name, task.study, sites, task.folder)
            if "pooled" in self.compare.kinds and fold.tests:
                task = self.pooled(fold)
                yield fold, "pooled", self._score(fold, "pooled", task.study, fold.tests, task.folder)
            if "untrained" in self.compare.kinds:
                yield fold, "untrained", self._score(fold, "untrained", study, everywhere, None)
            if "previous" in self.compare.kinds:
                file = Path(self.compare.previous)
                yield fold, "previous", self._score(fold, "previous", study, everywhere, file)

    def _score(self, fold: Fold, name: str, study: Study, sites: Mapping[str, Path], model: Path | None) -> ScoreTask:
        folder = self.root / "scores" / fold.name / name
        source: Literal["run", "file", "start"] = "start"
        if model is not None:
            source = "file" if name == "previous" else "run"
        return ScoreTask(
            name=f"{fold.name}: {name} judged", study=study, sites=sites, folder=folder,
            source=source, model=model or Path(),
        )  # fmt: skip

    def make_data(self) -> None:
        """Make the pooled data sets of links.

        Raises:
            EnvironmentProblem, DataError: they cannot be made.
        """
        if "pooled" in self.compare.kinds:
            for fold in self.folds:
                if not self.pooled(fold).done():
                    link_data_set(self.pool(fold), union(fold.train), self.study_of(fold))


def run_fold(study: Study, sites: Mapping[str, Path]) -> Fold:
    """The one fold of a plain run."""
    heldout = {name: path for name, path in sites.items() if name in study.evaluation.heldout}
    train = {name: path for name, path in sites.items() if name not in heldout}
    return Fold(
        name="run", seed=study.study.seed, train=train, tests=heldout, hospital={n: n for n in heldout}, judged=train
    )


def loso_folds(study: Study, sites: Mapping[str, Path], seeds: int) -> list[Fold]:
    """Each site held out once, with each seed.

    Raises:
        StudyError: fewer than two sites.
    """
    if len(sites) < 2:
        raise StudyError(f"loso: {len(sites)} site; leaving one out needs at least two")
    return [
        Fold(
            name=name if seeds == 1 else f"{name}-seed{seed}",
            seed=seed,
            train={other: folder for other, folder in sites.items() if other != name},
            tests={name: path},
            hospital={name: name},
        )
        for seed in _seeds(study, seeds)
        for name, path in sites.items()
    ]


def cv_folds(study: Study, sites: Mapping[str, Path], seeds: int, *, folds: int, data: Path) -> list[Fold]:
    """Patients of each site in ``folds`` parts, each of which is judged once by a federation that trains on the others.

    The parts are even and decided by a hash of the patient's id and ``data.split_key``.

    Raises:
        DataError: a hospital has fewer patients than folds.
    """
    found = []
    for name, path in sites.items():
        if (count := len(patients_of(path))) < folds:
            raise DataError(
                f"cv: site {name} has {count} patients for {folds} folds; give fewer --folds, or a larger site"
            )
    for number in range(folds):
        train: dict[str, Path] = {}
        tests: dict[str, Path] = {}
        for name, path in sites.items():
            key = study.data.split_key
            ordered = sorted(patients_of(path), key=lambda patient: keyed_fraction(patient, key, "fold"))
            parts = [(name, path, patient) for patient in ordered]
            train[name], tests[f"{name}.test"] = (
                data / f"fold-{number}" / name,
                data / f"fold-{number}" / f"{name}.test",
            )
            link_data_set(tests[f"{name}.test"], parts[number::folds], study)
            link_data_set(train[name], [part for k, part in enumerate(parts) if k % folds != number], study)
        found += [
            Fold(
                name=f"fold-{number}" if seeds == 1 else f"fold-{number}-seed{seed}",
                seed=seed, train=train, tests=tests, hospital={f"{name}.test": name for name in sites},
            )
            for seed in _seeds(study, seeds)
        ]  # fmt: skip
    return found


def _seeds(study: Study, seeds: int) -> range:
    return range(study.study.seed, study.study.seed + seeds)
