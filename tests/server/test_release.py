# SPDX-License-Identifier: Apache-2.0
"""The release pack: whole, signed, safe to show; its MONAI bundle predicts without FedNeuro what FedNeuro predicts."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fedneuro.client.predict import predict
from fedneuro.privacy.errors import BadInput, Refused
from fedneuro.privacy.manifest import Finding, verify_manifest
from fedneuro.privacy.release_pack import open_released, verify_release
from fedneuro.privacy.seals import Signer, public_key
from fedneuro.privacy.signing import public_text
from fedneuro.server import release
from fedneuro.server.cli import app
from fedneuro.server.consortium import Consortium
from fedneuro.server.launch import Launch
from fedneuro.server.release import ReleaseOptions, make_release
from fedneuro.server.release_bundle import check_metadata, inference_config, needs_fedneuro
from fedneuro.server.release_card import TO_WRITE, model_card, privacy_words
from fedneuro.server.sealed_keys import Passphrase
from tests.bids import make_study, write_site
from tests.finished_run import finished_run
from tests.server.conftest import PASSPHRASE

_NIB: Any = nibabel
KEY = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
WITHOUT_ONNX = ReleaseOptions(onnx=False, authors="The consortium")
OBLIQUE = np.array([[-1.2, 0.1, 0.0, 10.0], [0.1, 1.1, 0.0, -20.0], [0.0, 0.0, 2.5, 3.0], [0, 0, 0, 1.0]])
HELDOUT = {"heldout": ["west"]}
STUDIES = {
    "slices": make_study(
        study={"name": "slices", "description": "Lesions <script>alert(1)</script> | on FLAIR"},
        data={"modalities": ["FLAIR", "ce-gadolinium_T1w"], "slice_axis": "coronal"},
        training={"rounds": 2, "local_epochs": 0, "local_steps": 1},
        privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5},
        evaluation=HELDOUT,
    ),
    "volumes": make_study(
        study={"name": "volumes"},
        data={"patch": [16, 16, 8], "spacing": [1.5, 1.5, 1.5], "normalise": "percentile"},
        model={"dims": 3},
        evaluation=HELDOUT,
    ),
    "classes": make_study(
        study={"name": "classes"},
        task={"kind": "classification", "labels": ["a", "b"], "target": "kind"},
        data={"patch": [40, 41]},
        model={"name": "resnet", "channels": [4, 4, 4, 4], "norm": "group"},
        training={"loss": "cross_entropy"},
        evaluation=HELDOUT,
    ),
}
RUN_BUNDLES = """
import json, sys
sys.modules["fedneuro"] = None  # as where it is not installed
from monai.bundle import run
for root, data, out in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
    run(config_file=root + "/configs/inference.json", bundle_root=root, dataset_dir=data, output_dir=out)
"""


def failed(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.verdict == "FAIL"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, study in STUDIES.items():
        finished_run(folder / name, study)
    return folder


@pytest.fixture(scope="module")
def packs(runs: Path) -> Path:
    """A pack of each study, signed, without ONNX."""
    for name in STUDIES:
        make_release(runs / name, runs / f"pack-{name}", Signer(KEY), WITHOUT_ONNX)
    return runs


@pytest.fixture
def pack(packs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packs / "pack-slices", tmp_path / "pack"))


def test_the_pack_is_whole_and_signed(pack: Path) -> None:
    made, manifest, findings = verify_release(pack, key=public_text(KEY))
    assert failed(findings) == [] and made is not None and manifest is not None
    assert {"MODEL_CARD.md", "model.safetensors", "report.html", "sbom.cdx.json", "manifest.json"} <= set(made.files)
    assert open_released(pack, key=public_text(KEY)).study == STUDIES["slices"]
    assert failed(verify_release(pack, key="0" * 64)[2]) == ["release signature"]
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=pack, check=False, timeout=60)
    assert sums.returncode == 0
    state = torch.load(pack / "bundle/slices/models/model.pt", weights_only=True)
    assert list(state) == list(open_released(pack).arrays)
    bill = json.loads((pack / "sbom.cdx.json").read_text())
    assert bill["metadata"]["component"]["name"] == "fedneuro" and len(bill["components"]) > 20


def test_any_file_that_was_changed_added_or_taken_away_is_found(pack: Path) -> None:
    names = sorted(path for path in pack.rglob("*") if path.is_file())
    assert len(names) > 12
    for path in names:
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1} if content else set():
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert failed(verify_release(pack)[2]), (path, place)
        path.unlink()
        if path.name == "release.json":
            with pytest.raises(BadInput):
                verify_release(pack)
        else:
            assert failed(verify_release(pack)[2]), path
        path.write_bytes(content)
    assert failed(verify_release(pack)[2]) == []
    (pack / "bundle/slices/scripts/extra.py").write_text("print('hello')")
    assert failed(verify_release(pack)[2]) == ["bundle/slices/scripts/extra.py"]
    (pack / "bundle/slices/scripts/extra.py").unlink()
    (pack / "link").symlink_to("/etc/hostname")
    assert failed(verify_release(pack)[2]) == ["link"]


def test_a_manifest_of_another_signer_does_not_pass_in_a_pack(pack: Path, runs: Path) -> None:
    """Somebody who cannot sign puts a sound manifest of their own there."""
    shutil.copyfile(runs / "slices" / "manifest.json", pack / "manifest.json")
    assert failed(verify_release(pack)[2]) == ["manifest.json", "signature"]


def test_bundles_predict_what_fedneuro_predicts_where_it_is_not_installed(packs: Path, tmp_path: Path) -> None:
    sites = {
        "slices": write_site(
            tmp_path / "slices", patients=2, shape=(21, 7, 18), modalities=("FLAIR", "ce-gadolinium_T1w"),
            affine=OBLIQUE,
        ),
        "volumes": write_site(tmp_path / "volumes", patients=2, shape=(22, 20, 10), affine=OBLIQUE),
        "classes": write_site(
            tmp_path / "classes", patients=2, shape=(33, 46, 3), mask=None, classes=("a", "b"), affine=OBLIQUE
        ),
    }  # fmt: skip
    # Another modality beside the study's must not be taken for it.
    (scan,) = (sites["slices"] / "sub-P001/anat").glob("*_FLAIR.nii.gz")
    shutil.copyfile(scan, scan.with_name("sub-P001_ce-gadolinium_FLAIR.nii.gz"))
    jobs = [
        (str(packs / f"pack-{name}" / "bundle" / name), str(site), str(tmp_path / f"monai-{name}"))
        for name, site in sites.items()
    ]
    command = [sys.executable, "-W", "ignore", "-c", RUN_BUNDLES, json.dumps(jobs)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("slices", "volumes"):
        out = tmp_path / f"ours-{name}"
        for row in predict(open_released(packs / f"pack-{name}"), sites[name], out, tell=lambda _: None):
            ours = _NIB.load(out / row.file)
            theirs = _NIB.load(tmp_path / f"monai-{name}" / f"{row.scan}_FLAIR_pred.nii.gz")
            assert np.allclose(theirs.affine, ours.affine, atol=1e-4)
            mine, other = np.asarray(ours.dataobj), np.asarray(theirs.dataobj).reshape(ours.shape)
            # Logits differ in the last digits, so a voxel in a thousand may lie on the other side.
            assert np.count_nonzero(mine != other) <= mine.size / 1000 and 0 < mine.sum() < mine.size
    rows = predict(open_released(packs / "pack-classes"), sites["classes"], tmp_path / "ours", tell=lambda _: None)
    theirs = list(csv.DictReader((tmp_path / "monai-classes/predictions.csv").open()))
    for row, found in zip(rows, theirs, strict=True):
        assert [float(found[label]) for label in ("a", "b")] == pytest.approx(list(row.values.values()), abs=1e-4)


def test_what_monai_lacks_calls_fedneuro_and_says_so(tmp_path: Path) -> None:
    study = make_study(data={"preprocessing": {"mask": "head", "crop": "foreground"}}, evaluation=HELDOUT)
    assert needs_fedneuro(study) == ["data.preprocessing.mask", "data.preprocessing.crop"]
    make_release(finished_run(tmp_path / "run", study), tmp_path / "pack", Signer(KEY), WITHOUT_ONNX)
    bundle = tmp_path / "pack/bundle/toy"
    config = json.loads((bundle / "configs/inference.json").read_text())
    data = write_site(tmp_path / "bids", patients=1)
    assert config["run"]["_target_"] == "fedneuro.client.predict.predict_bundle"
    from fedneuro.client.predict import predict_bundle

    predict_bundle(str(bundle), str(data), str(tmp_path / "out"))
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 1
    assert "fedneuro" in json.loads((bundle / "configs/metadata.json").read_text())["required_packages_version"]
    assert "data.preprocessing.mask" in (bundle / "docs/README.md").read_text() and not (bundle / "scripts").exists()


def test_metadata_is_judged_by_monai(packs: Path, tmp_path: Path) -> None:
    source = packs / "pack-volumes/bundle/volumes/configs/metadata.json"
    assert "requires" in check_metadata(source, None)
    values = json.loads(source.read_text())
    assert values["network_data_format"]["inputs"]["image"]["spatial_shape"] == [16, 16, 8]
    (tmp_path / "metadata.json").write_text(json.dumps({k: v for k, v in values.items() if k != "authors"}))
    with pytest.raises(Refused, match="authors"):
        check_metadata(tmp_path / "metadata.json", None)
    (tmp_path / "schema.json").write_text(json.dumps({"properties": {"version": {"type": "integer"}}}))
    with pytest.raises(Refused, match="schema"):
        check_metadata(source, tmp_path / "schema.json")


def test_the_card_puts_held_out_hospitals_first_and_epsilon_beside_the_score(packs: Path) -> None:
    card = (packs / "pack-slices/MODEL_CARD.md").read_text()
    results = card[card.index("## Results") : card.index("## Privacy")]
    assert results.index("west (held out)") < results.index("north (training)")
    (north,) = (line for line in results.splitlines() if line.startswith("| north"))
    assert "0.200 [0.000, 0.300], n = 10" in north and "ε = 3.00, δ = 0.01 per patient" in north
    (west,) = (line for line in results.splitlines() if line.startswith("| west"))
    assert "ε ≤ 3.00, δ = 0.01 per patient" in west, "it owes to the hospitals that trained"
    assert "Not a medical device" in card and "unit: the patient" in card and "south: " not in card.split("##")[0]
    assert "<script>" not in card and card.count(TO_WRITE) >= 8
    assert json.loads((packs / "pack-slices/release.json").read_text())["content"]["checks"]["card"].startswith(
        str(card.count(TO_WRITE))
    )
    for name in ("volumes", "classes"):
        assert "No differential privacy" in (packs / f"pack-{name}/MODEL_CARD.md").read_text()


def test_the_promise_is_rounded_up() -> None:
    spent = {"mode": "local", "unit": "patient", "epsilon": {"a": 7.991, "b": 2.0}, "delta": 1e-3, "accountant": "PLD"}
    assert "largest ε = 8.00 at δ = 0.001" in privacy_words(spent)


def test_texts_from_elsewhere_make_no_markup() -> None:
    study = STUDIES["slices"]
    results = {
        "selected_round": 1, "engine": "inprocess", "select": {"metric": "dice"},
        "privacy": {"mode": "none", "epsilon": {}, "not_covered": []},
        "sites": {"x": {"role": "train", "public_size": 3, "metrics": {}, "state": "<img src=x> | a\n# b"}},
    }  # fmt: skip
    card = model_card(results, study, {})
    assert "<img" not in card and "\n# b" not in card and "No hospital returned a metric" in card


def test_pictures_of_a_simulations_patients_stay_out(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "slices", run)
    from fedneuro.server.manifest import write_manifest
    from fedneuro.server.report import write_report

    picture = tmp_path / "1.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    results = json.loads((run / "results.json").read_text())
    write_report(results, run / "report.html", previews={"west": [{"file": picture, "caption": "sub-P001"}]})
    write_manifest(run, results)
    assert "sub-P001" in (run / "report.html").read_text()
    make_release(run, tmp_path / "pack", Signer(KEY), WITHOUT_ONNX)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "pack").rglob("*") if path.is_file())
    assert b"sub-P001" not in everything and b"data:image/png" not in everything


def test_what_is_not_released(runs: Path, tmp_path: Path) -> None:
    out, half = tmp_path / "pack", finished_run(tmp_path / "half", STUDIES["slices"], finish=False)
    with pytest.raises(Refused, match="not finished"):
        make_release(half, out, Signer(KEY), WITHOUT_ONNX)
    run = tmp_path / "run"
    shutil.copytree(runs / "slices", run)
    (run / "results.json").write_text("{}")
    with pytest.raises(Refused, match=r"results\.json"):
        make_release(run, out, Signer(KEY), WITHOUT_ONNX)
    with pytest.raises(BadInput, match="not an empty folder"):
        make_release(runs / "slices", run, Signer(KEY), WITHOUT_ONNX)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "run"]


@pytest.mark.skipif(not (find_spec("onnx") and find_spec("onnxruntime")), reason="needs onnx and onnxruntime")
def test_onnx_equals_pytorch_or_is_not_released(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STUDIES:
        made = make_release(runs / name, tmp_path / name, Signer(KEY), ReleaseOptions())
        assert "onnxruntime equals PyTorch" in made.checks["onnx"] and f"bundle/{name}/models/model.onnx" in made.files
    monkeypatch.setattr(release, "MAX_DIFFERENCE", 1e-12)
    with pytest.raises(Refused, match="ONNX and PyTorch differ"):
        make_release(runs / "slices", tmp_path / "other", Signer(KEY), ReleaseOptions())
    assert not (tmp_path / "other").exists()


def test_the_command(runs: Path, tmp_path: Path) -> None:
    """Signed with the run's own key, as a researcher does it; checked in a process of its own."""
    done = CliRunner().invoke(
        app, ["release", str(runs / "slices"), "--out", str(tmp_path / "pack"), "--no-onnx", "--authors", "We"]
    )
    assert done.exit_code == 0, done.output
    assert "verify_metadata passed" in done.stdout and "TO WRITE" in done.stdout
    command = [str(Path(sys.executable).parent / "fedneuro-server"), "verify", str(tmp_path / "pack")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert checked.returncode == 0 and "ok   files" in checked.stdout
    nowhere = CliRunner().invoke(app, ["release", str(tmp_path / "absent"), "--out", str(tmp_path / "other")])
    assert isinstance(nowhere.exception, BadInput) and "neither a release nor a run" in str(nowhere.exception)


def test_a_consortiums_run_is_released_by_its_name_with_its_key(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], passphrase: Passphrase
) -> None:
    """Launching vouches for the run's key, so the run's own manifest and the release both verify against study.pub."""
    consortium, study = make_consortium(tmp_path / "consortium"), STUDIES["slices"]
    folder = Launch(consortium=consortium, study=study, sites=("north", "south", "west")).prepare(passphrase)
    finished_run(folder.path, study)
    manifest, findings = verify_manifest(folder.path / "manifest.json", key=consortium.study_key)
    assert failed(findings) == [] and manifest is not None and manifest.study.signature
    (tmp_path / "words").write_text(PASSPHRASE)
    (tmp_path / "words").chmod(0o600)
    words = ["release", folder.name, "--out", str(tmp_path / "pack"), "--config", str(consortium.folder), "--no-onnx"]
    done = CliRunner().invoke(app, [*words, "--passphrase-file", str(tmp_path / "words")])
    assert done.exit_code == 0, done.output
    assert failed(verify_release(tmp_path / "pack", key=public_key(str(consortium.folder / "study.pub")))[2]) == []


def test_slices_are_padded_in_their_own_plane_only() -> None:
    """Coronal slices: sides along left-right and foot-head are halved by the network, the number of slices is not."""
    config = inference_config(STUDIES["slices"])
    (pad,) = (step for step in config["preprocessing"]["transforms"] if step["_target_"].endswith("DivisiblePadd"))
    assert pad["k"] == [2, 1, 2] and config["inferer"]["spatial_dim"] == 1
