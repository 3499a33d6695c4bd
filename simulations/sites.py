# SPDX-License-Identifier: Apache-2.0
"""The sites of a simulation: the sub-folders of one folder, each a hospital's BIDS data set."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..client.data import public_size
from ..client.settings import SiteSettings
from ..privacy.budget import Budget, site_delta
from ..privacy.contract import Role
from ..privacy.errors import DataError
from ..privacy.study import Study

__all__ = ["faults", "find_sites", "planned_settings", "site_settings"]

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def find_sites(folder: Path) -> dict[str, Path]:
    """Names and folders of the sites below ``folder``: each sub-folder with ``sub-*`` or a data set description.

    Raises:
        DataError: there is no such folder, or no site in it.
    """
    if not folder.is_dir():
        raise DataError(f"--sites {folder}: no such folder; give the folder that holds one BIDS folder per hospital")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _is_bids(path)}
    if any(folder.glob("sub-*")):
        raise DataError(
            f"--sites {folder}: is one data set (it holds sub-*), not a folder of sites; "
            f"make simulated sites of it with: fedneuro-sim split {folder} --out DIR --sites 3"
        )
    if odd := [name for name in found if not SITE_NAME.fullmatch(name)]:
        raise DataError(
            f"--sites {folder}: the name of folder {odd[0]!r} cannot be a site's; "
            "rename it: letters, digits, and - _ . inside, at most 64"
        )
    if not found:
        raise DataError(f"--sites {folder}: no sub-folder holds a BIDS data set (sub-*); expected one per hospital")
    return found


def _is_bids(path: Path) -> bool:
    return not path.name.startswith(".") and ((path / "dataset_description.json").is_file() or any(path.glob("sub-*")))


def site_settings(
    study: Study, sites: dict[str, Path], out: Path, *, cache: Path | None = None
) -> dict[str, SiteSettings]:
    """Settings of simulated nodes: roles as the study asks, states below ``out/sites``.

    The declared size is the number of patient folders rounded to five, as a hospital would declare it.
    """
    return {
        name: SiteSettings(
            name=name,
            data=path,
            state=out / "sites" / name,
            role=Role.HELDOUT if name in study.evaluation.heldout else Role.TRAIN,
            public_size=public_size(sum(1 for p in path.glob("sub-*") if p.is_dir())),
            cache=cache / name if cache else None,
        )
        for name, path in sites.items()
    }


def planned_settings(
    study: Study, sites: dict[str, Path], *, spent: Path | None = None, lifetime: float | None = None
) -> dict[str, SiteSettings]:
    """Settings of sites that are only planned with: nothing of them is written.

    Args:
        study: the study.
        sites: as :func:`find_sites` gives them.
        spent: folder of an earlier run, whose ledgers count; None: nothing was spent.
        lifetime: ε of each data set over all studies, at the δ that its public size gives; None: no bound.

    Raises:
        DataError: ``spent`` holds no run.
    """
    if spent is not None and not (spent / "sites").is_dir():
        raise DataError(f"--spent {spent}: holds no run with simulated sites; give the folder that --out named")
    settings = site_settings(study, sites, spent or Path("nowhere"))
    if lifetime is None:
        return settings
    return {
        name: replace(one, lifetime=Budget(epsilon=lifetime, delta=site_delta(0.0, one.public_size)))
        for name, one in settings.items()
    }


def faults(out: Path) -> list[dict[str, Any]]:
    """What the simulated hospitals wrote down when they last refused, with the text that a real one keeps to itself."""
    found = []
    for path in sorted((out / "sites").glob("*/last-fault.json")):
        with suppress(ValueError, OSError):  # cut short where the disk is full: then the reason code must do
            found.append({"site": path.parent.name, **json.loads(path.read_text(encoding="utf-8"))})
    return found
