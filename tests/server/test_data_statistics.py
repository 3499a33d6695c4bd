# SPDX-License-Identifier: Apache-2.0
"""What hospitals told of their data sets, checked again at the coordinator and put side by side."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedneuro.privacy.contract import Role
from fedneuro.privacy.data_statistics import Group, LabelGroup, Quantiles, Released
from fedneuro.privacy.errors import BadInput, DataError, Refused
from fedneuro.privacy.identity import fingerprint, new_key, public_identity, public_pem
from fedneuro.privacy.site_seals import sealed_by_site
from fedneuro.server.cli import app
from fedneuro.server.consortium import Consortium
from fedneuro.server.data_statistics import beside_each_other, read_told
from fedneuro.server.registry import CertificateRecord


def told(site: str, patients: int) -> Released:
    axes = (Quantiles(p50=1.0), Quantiles(p50=1.0), Quantiles(p50=3.0))
    grey = Quantiles(p50=200.0)
    group = Group(patients=patients, grey_p5=grey, grey_p50=grey, grey_p95=grey, voxel_mm=axes, extent_mm=axes)
    label = LabelGroup(patients=patients, volume_ml=Quantiles(p50=12.0, p5=1.0, p95=80.0), share_of_voxels=Quantiles())
    return Released(
        site=site, threshold=5, patients=patients, modalities={"FLAIR": group},
        labels={"label-lesion_mask": {"1": label}},
    )  # fmt: skip


def write(folder: Path, site: str, patients: int) -> Path:
    path = folder / f"{site}.json"
    path.write_text(told(site, patients).model_dump_json(exclude_none=True))
    return path


def test_side_by_side(tmp_path: Path) -> None:
    files = [write(tmp_path, "north", 40), write(tmp_path, "south", 25)]
    words = ["data-stats", *map(str, files), "--json", str(tmp_path / "all.json")]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, Refused) and "north.json: is not signed" in str(refused.exception)
    result = CliRunner().invoke(app, [*words, "--unsigned"])
    assert result.exit_code == 0, result.output
    assert "65 patients (rounded) at 2 hospitals" in result.output
    assert "label-lesion_mask 1  north  40  12 mL  p5–p95 1–80 mL" in result.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["modalities"]["FLAIR"]["patients"] == 65
    assert found["labels"]["label-lesion_mask"]["1"]["sites"]["south"]["volume_ml"] == {"p5": 1, "p50": 12, "p95": 80}
    with pytest.raises(DataError, match="north: more than one file"):
        beside_each_other([told("north", 10), told("north", 15)])


def test_files_that_tell_too_much_or_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "north", 40)
    values = json.loads(path.read_text())
    for change in ({"patients": 3}, {"patient_ids": ["sub-1"]}, {"modalities": 1}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(DataError, match="not what a hospital may tell"):
            read_told(path, {}, unsigned=True)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(BadInput, match="over 1 MiB"):
        read_told(path, {}, unsigned=True)
    with pytest.raises(BadInput, match="cannot be read"):
        read_told(tmp_path / "none.json", {}, unsigned=True)


def test_the_consortium_knows_who_signed(tmp_path: Path, make_consortium: Callable[[Path], Consortium]) -> None:
    """The registry's key decides; a fingerprint by hand must agree with it; a hospital that was revoked is nobody."""
    consortium, key = make_consortium(tmp_path / "c"), new_key()
    end = int(time.time()) + 86400
    consortium.registry.invite("north", Role.TRAIN, "0" * 64, end)
    record = CertificateRecord(serial="1", site="north", issuer=1, not_after=end, pem="")
    consortium.registry.enrol("0" * 64, public_pem(key).decode(), 7, record)
    path = tmp_path / "north.json"
    content = told("north", 40).model_dump(mode="json", exclude_none=True)

    def sign(text: bytes) -> str:
        return key.sign(text, ec.ECDSA(hashes.SHA384())).hex()

    path.write_text(
        sealed_by_site(content, "statistics", site="north", study_hash="", sign=sign, public=key.public_key())
    )
    words, print_ = ["data-stats", str(path), "--config", str(tmp_path / "c")], fingerprint_of(key)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and f"north: signed by its node {print_[:16]}…" in result.output, result.output
    spoken = " ".join(print_[at : at + 8] for at in range(0, 64, 8)).upper()
    assert CliRunner().invoke(app, [*words, "--key", f"north={spoken}"]).exit_code == 0
    other = CliRunner().invoke(app, [*words, "--key", f"north={'0' * 64}"])
    assert isinstance(other.exception, Refused) and "one of the two is wrong" in str(other.exception)
    consortium.registry.revoke("north")
    gone = CliRunner().invoke(app, words)
    assert isinstance(gone.exception, Refused) and "no node of north is known" in str(gone.exception)


def fingerprint_of(key: ec.EllipticCurvePrivateKey) -> str:
    return fingerprint(public_identity(key.public_key()))


@pytest.mark.parametrize("key", ["north", "north=12", "=", "north=" + "g" * 64])
def test_a_fingerprint_is_64_digits(tmp_path: Path, key: str) -> None:
    result = CliRunner().invoke(app, ["data-stats", str(write(tmp_path, "north", 40)), "--unsigned", "--key", key])
    assert isinstance(result.exception, BadInput) and "expected SITE=FINGERPRINT" in str(result.exception)
