# SPDX-License-Identifier: Apache-2.0
"""The three commands as a person meets them: help, and wrong input as one clear line with its exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bids import FAULTS, make_study, write_site

BIN = Path(sys.executable).parent
STUDIES = Path(__file__).parents[1] / "simulations/studies"
DEMO = str(STUDIES / "demo.toml")


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("name", ["fedneuro-sim", "fedneuro-node", "fedneuro-server"])
def test_help_is_a_first_page(name: str) -> None:
    done = call(name, "--help")
    assert done.returncode == 0 and "Commands" in done.stdout and len(done.stdout.splitlines()) < 60


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("fedneuro-sim", "check", "{tmp}/absent.toml"), 2, "absent.toml"),
        (("fedneuro-sim", "check", DEMO, "--set", "training.learning_rte=1"), 2, "did you mean learning_rate"),
        (("fedneuro-sim", "check", DEMO, "--set", "privacy.sample_rate=2"), 2, "at most 1"),
        (("fedneuro-sim", "check", DEMO, "--set", "model.dims=3"), 2, "data.patch"),
        (("fedneuro-sim", "run", DEMO, "--sites", "{tmp}/absent", "--out", "{tmp}/o"), 2, "no such folder"),
        (
            ("fedneuro-sim", "run", DEMO, "--sites", "{tmp}", "--out", "{tmp}/o"),
            2,
            "no sub-folder holds a BIDS data set",
        ),
        (
            ("fedneuro-sim", "run", DEMO, "--sites", "{tmp}", "--out", "{tmp}/o", "--engine", "mpi"),
            2,
            "inprocess or ray",
        ),
        (("fedneuro-sim", "phantoms", "--out", DEMO + "/o"), 2, "demo.toml is a file, not a folder"),
        (("fedneuro-sim", "loso", DEMO, "--sites", "{tmp}", "--out", DEMO), 2, "is a file, not a folder"),
        (("fedneuro-sim", "report", "{tmp}"), 2, "holds no run"),
        (("fedneuro-server", "report", "{tmp}"), 2, "holds no run"),
        (("fedneuro-server", "check", "{tmp}"), 2, "{tmp}"),
        (("fedneuro-node", "run", "--config", "{tmp}/node.toml"), 2, "node.toml"),
        (("fedneuro-node", "check", "{tmp}/absent", "--study", DEMO), 2, "absent"),
        (("fedneuro-sim", "split", "{tmp}", "--out", "{tmp}/o"), 2, "{tmp}"),
        (("fedneuro-sim", "import-jpg", "{tmp}", "--out", "{tmp}/o"), 2, "index.csv"),
    ],
)
def test_wrong_input_is_one_line_and_its_exit_code(
    tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    done = call(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == code, done.stderr
    assert says.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_all_faults_of_a_data_set_are_told_at_once(tmp_path: Path) -> None:
    write_site(tmp_path / "sites/north", shape=(18, 18, 4))
    write_site(tmp_path / "sites/south", shape=(18, 18, 4))
    for site, fault in (("north", "mask-shape"), ("south", "image-nan")):
        FAULTS[fault](tmp_path / "sites" / site)
    study = tmp_path / "study.toml"
    from fedneuro.privacy.study_file import describe

    study.write_text(describe(make_study()))
    done = call("fedneuro-sim", "run", str(study), "--sites", str(tmp_path / "sites"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "north" in done.stderr and "south" in done.stderr and "Traceback" not in done.stderr


def test_node_check(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", shape=(18, 18, 4))
    study = tmp_path / "study.toml"
    from fedneuro.privacy.study_file import describe

    study.write_text(describe(make_study()))
    fits = call("fedneuro-node", "check", str(site), "--study", str(study))
    assert fits.returncode == 0 and "4 patients fit the study" in fits.stdout
    FAULTS["image-4d"](site)
    faulty = call("fedneuro-node", "check", str(site), "--study", str(study))
    assert faulty.returncode == 2 and "sub-P001" in faulty.stderr
