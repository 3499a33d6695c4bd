# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node bundle``: everything that an installation without internet needs, in one folder.

    *.whl             FedNeuro and, unless left out, every package that it needs, in the versions installed here
    requirements.txt  their exact versions, with the SHA-256 of each wheel (pip's hash-checking mode)
    sbom.cdx.json     CycloneDX 1.6: name, version, licence, package URL and SHA-256 of each
    SHA256SUMS        of all files above

    pip install --no-index --find-links DIR --require-hashes -r DIR/requirements.txt

The wheels are for this machine's Python, system and processor.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from ..privacy.errors import BadInput, EnvironmentProblem
from ..privacy.sbom import ROOT, closure, sbom

__all__ = ["closure", "make_wheelhouse", "sbom"]


def make_wheelhouse(
    out: Path, *, dependencies: bool = True, wheel: Path | None = None, pip: Sequence[str] = ()
) -> list[Path]:
    """Fill ``out``; returns its files.

    Args:
        out: a new or empty folder.
        dependencies: also those of FedNeuro: about 3 GB with CUDA.
        wheel: FedNeuro's wheel; None: built from the editable source, else fetched in the installed version.
        pip: further options for pip, such as ``--extra-index-url URL``.

    Raises:
        BadInput: ``out`` holds files, or ``wheel`` is none of FedNeuro.
        EnvironmentProblem: pip fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise BadInput(f"{out}: is not empty; give a new folder")
    needed = closure()
    own = needed.pop(ROOT)
    _own_wheel(out, own, wheel, pip)
    if dependencies:
        pins = "".join(f"{dist.name}=={dist.version}\n" for dist in needed.values())
        with tempfile.TemporaryDirectory() as folder:
            pinned = Path(folder) / "pins.txt"
            pinned.write_text(pins, encoding="utf-8")
            # "wheel", not "download": what an index has as source alone is built here, not behind the wall.
            _pip("wheel", "--no-deps", "--wheel-dir", str(out), "--requirement", str(pinned), *pip)
    wheels = sorted(out.glob("*.whl"))
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels}
    lines = []
    for path, value in hashes.items():
        name, release, _, _ = parse_wheel_filename(path.name)
        lines.append(f"{name}=={release} --hash=sha256:{value}\n")
    (out / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    text = json.dumps(sbom([own, *needed.values()], hashes), indent=1, ensure_ascii=False)
    (out / "sbom.cdx.json").write_text(text + "\n", encoding="utf-8")
    files = sorted(path for path in out.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(
        f"{hashes.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files
    )
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return [*files, out / "SHA256SUMS"]


def _own_wheel(out: Path, own: Distribution, wheel: Path | None, pip: Sequence[str]) -> None:
    if wheel is not None:
        try:
            name = parse_wheel_filename(wheel.name)[0]
            content = wheel.read_bytes()
        except (InvalidWheelFilename, OSError) as error:
            raise BadInput(f"{wheel}: is no wheel of FedNeuro that can be read") from error
        if name != ROOT:
            raise BadInput(f"{wheel}: is a wheel of {name}, not of FedNeuro")
        (out / wheel.name).write_bytes(content)
        return
    source = _editable_source(own)
    what = [str(source), "--no-build-isolation"] if source else [f"{ROOT}=={own.version}"]
    _pip("wheel", "--no-deps", "--wheel-dir", str(out), *what, *pip)


def _editable_source(own: Distribution) -> Path | None:
    try:
        info = json.loads(own.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    url = str(info.get("url", ""))
    return Path(url.removeprefix("file://")) if info.get("dir_info", {}).get("editable") else None


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        fault = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise EnvironmentProblem(f"pip {arguments[0]}: {fault[:300]}; give its options after --pip")
