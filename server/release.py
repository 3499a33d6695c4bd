# SPDX-License-Identifier: Apache-2.0
"""From a finished run to a pack that can be handed on: model, MONAI bundle, ONNX, card, evidence, all signed.

.. code-block:: text

    PACK/README.md, MODEL_CARD.md, LICENSE.txt
    PACK/manifest.json, results.json, report.html     evidence; the report without pictures of patients
    PACK/model.safetensors
    PACK/bundle/NAME/                                  the MONAI bundle, with models/model.pt and models/model.onnx
    PACK/sbom.cdx.json                                 CycloneDX: what is installed here
    PACK/SHA256SUMS, release.json                      digests of all, signed

Steps: 1 the run is verified as anyone would verify it; 2 everything is made in a folder beside PACK; 3 ONNX is run
beside PyTorch and MONAI judges the metadata; 4 manifest and release are signed; 5 the pack is verified as who receives
it will, and only then gets its name. So a pack that is there is whole.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ..models.export import OPSET, export_onnx, onnx_difference
from ..models.state import save_arrays
from ..privacy.errors import Refused
from ..privacy.folders import require_empty
from ..privacy.manifest import MANIFEST, MODEL, PURPOSE, Manifest, file_digest, require
from ..privacy.release_pack import PURPOSE as RELEASE_PURPOSE
from ..privacy.release_pack import RELEASE, SUMS, Release, Released, open_released, sums_text, verify_release
from ..privacy.sbom import closure, sbom
from ..privacy.seals import Signer, write_sealed
from ..privacy.study import Study
from .release_bundle import bundle_metadata, check_metadata, missing_package, needs_fedneuro, write_bundle
from .release_card import NOT_A_DEVICE, TO_WRITE, model_card, privacy_words
from .release_words import bundle_readme, pack_readme
from .report import write_report

__all__ = ["MAX_DIFFERENCE", "ReleaseOptions", "make_release"]

MAX_DIFFERENCE: Final = 1e-3
"""Largest difference of a logit between ONNX and PyTorch, relative to the largest logit (or 1), that is released."""
_SEED: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOptions:
    """What a person decides.

    Args:
        authors: for the bundle's metadata; empty: marked to be written.
        licence: text of the licence of the weights; empty: marked to be written.
        onnx: whether ONNX is written, which needs the packages of ``fedneuro[release]``.
        schema: MONAI's metadata schema, if it was downloaded.
    """

    authors: str = ""
    licence: str = ""
    onnx: bool = True
    schema: Path | None = None


def make_release(run: Path, out: Path, signer: Signer, options: ReleaseOptions) -> Release:
    """Make the pack of the finished run in ``run``.

    Args:
        run: the run's folder.
        out: a new or empty folder.
        signer: signs manifest and release.
        options: see :class:`ReleaseOptions`.

    Raises:
        BadInput: ``run`` holds no manifest.
        StateError: ``out`` holds files.
        Refused: the run is not as it was signed, not finished, or ONNX computes something else.
        EnvironmentProblem: a package that only releases need is missing.
    """
    require_empty(out)
    released = open_released(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        release = _Making(released, temporary, signer, options).make()
        require(temporary, verify_release(temporary)[2])
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a pack is made to be handed on
        temporary.replace(out)  # also in place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return release


class _Making:
    """Steps 2 to 4."""

    def __init__(self, released: Released, folder: Path, signer: Signer, options: ReleaseOptions) -> None:
        self.released, self.folder, self.signer, self.options = released, folder, signer, options
        self.study, self.manifest = released.study, released.manifest
        self.results: dict[str, Any] = json.loads((released.folder / "results.json").read_bytes())
        self.bundle = f"bundle/{self.study.study.name}"
        self.checks: dict[str, str] = {}

    def make(self) -> Release:
        network = self.released.network()
        self._evidence()
        self._bundle(network)
        size = sum(parameter.numel() for parameter in network.parameters())
        facts = {
            "study hash": f"`{self.manifest.study.hash}`",
            "parameters": f"{size:,}",
            "model digest": f"`{self._digest}` (round {self.results['selected_round']})",
            "ONNX": self.checks["onnx"],
            "software": ", ".join(f"{name} {version(name)}" for name in ("fedneuro", "torch", "monai")),
        }
        card = model_card(self.results, self.study, facts)
        to_write = card.count(TO_WRITE)
        missing = {"authors (--authors)": self.options.authors, "licence (--license)": self.options.licence}
        also = "".join(f", {what}" for what, given in missing.items() if not given)
        self.checks["card"] = f"{to_write} places of the model card wait for a person, marked TO WRITE{also}"
        self._write("MODEL_CARD.md", card)
        self._write("LICENSE.txt", self._licence)
        self._write("README.md", pack_readme(self.study, self.bundle, bool(needs_fedneuro(self.study)), to_write))
        parts = list(closure().values())
        self._write("sbom.cdx.json", json.dumps(sbom(parts, {}), indent=1, ensure_ascii=False) + "\n")
        return self._sign()

    @property
    def _digest(self) -> str:
        assert self.manifest.model is not None  # noqa: S101 - open_released looked
        return self.manifest.model.digest

    @property
    def _licence(self) -> str:
        return self.options.licence or f"{TO_WRITE}: the licence of the weights; the code is Apache-2.0.\n"

    def _evidence(self) -> None:
        """Results as they are; the report again, as that of a simulation shows scans of its patients."""
        for name in set(self.manifest.files) - {MODEL, "report.html"}:
            shutil.copyfile(self.released.folder / name, self.folder / name)
        write_report(self.results, self.folder / "report.html")
        metadata = {
            "study_hash": self.manifest.study.hash,
            "round": str(self.results["selected_round"]),
            "digest": self._digest,
        }
        save_arrays(self.folder / MODEL, self.released.arrays, metadata)

    def _bundle(self, network: nn.Module) -> None:
        """Step 3."""
        folder, study = self.folder / self.bundle, self.study
        words = {
            "task": f"{study.task.kind}: {', '.join(study.task.outputs)}",
            "description": study.study.description or f"{study.study.name}, learned across hospitals with FedNeuro",
            "authors": self.options.authors or TO_WRITE.strip("*"),
            "copyright": self.options.authors or TO_WRITE.strip("*"),
            "intended_use": NOT_A_DEVICE,
            "data_source": f"{len(self.results['sites'])} hospitals; the data stay there",
            "eval_metrics": _held_out_means(self.results),
            "privacy": privacy_words(self.results["privacy"]),
            "study_hash": self.manifest.study.hash,
            "model_digest": self._digest,
        }
        metadata = bundle_metadata(study, words)
        readme = bundle_readme(study, needs_fedneuro(study), NOT_A_DEVICE)
        write_bundle(folder, study, network, metadata=metadata, readme=readme, licence=self._licence)
        self.checks["metadata"] = "MONAI verify_metadata passed " + check_metadata(
            folder / "configs" / "metadata.json", self.options.schema
        )
        self.checks["onnx"] = self._onnx(network, folder / "models" / "model.onnx")

    def _onnx(self, network: nn.Module, path: Path) -> str:
        if not self.options.onnx:
            return "left out (--no-onnx)"
        inputs = _inputs(self.study)
        free = (0, 2, 3) if self.study.task.kind == "segmentation" and self.study.model.dims == 2 else (0,)
        try:
            export_onnx(network, path, inputs[0], free=free)
            found = onnx_difference(path, network, inputs)
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        with torch.inference_mode():
            largest = max(1.0, *(float(network(batch).abs().max()) for batch in inputs))
        if not found <= MAX_DIFFERENCE * largest:
            raise Refused(f"ONNX and PyTorch differ by {found:.1e} in a logit; expected at most {MAX_DIFFERENCE:g}")
        return f"onnxruntime equals PyTorch to {found:.1e} in every logit of {len(inputs)} inputs (opset {OPSET})"

    def _sign(self) -> Release:
        """Step 4."""
        made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        files = {name: file_digest(self.folder / name) for name in self.manifest.files}
        manifest = self.manifest.model_copy(update={"files": files})
        _seal_manifest(self.folder / MANIFEST, manifest, self.signer)
        sums = {name: file_digest(self.folder / name) for name in _names(self.folder)}
        self._write(SUMS, sums_text(sums))
        release = Release(
            format="fedneuro-release-1",
            made=made,
            study_hash=self.manifest.study.hash,
            model=self._digest,
            bundle=self.bundle,
            checks=self.checks,
            files=sums,
        )
        content = release.model_dump(mode="json")
        write_sealed(self.folder / RELEASE, RELEASE_PURPOSE, self.manifest.study.hash, content, self.signer)
        return release

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")


def _seal_manifest(path: Path, manifest: Manifest, signer: Signer) -> None:
    write_sealed(path, PURPOSE, manifest.study.hash, manifest.model_dump(mode="json"), signer)


def _names(folder: Path) -> Iterable[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _inputs(study: Study) -> list[torch.Tensor]:
    """Random inputs of the sizes that the network meets, and one of another."""
    generator = torch.Generator().manual_seed(_SEED)
    patch, channels = study.data.patch, len(study.data.modalities)
    shapes = [(1, channels, *patch), (2, channels, *patch)]
    if study.task.kind == "segmentation" and study.model.dims == 2:
        shapes.append((1, channels, patch[0] + study.model.stride, patch[1]))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _held_out_means(results: dict[str, Any]) -> dict[str, Any]:
    """Means by metric and held-out hospital."""
    found: dict[str, dict[str, float]] = {}
    for name, site in results["sites"].items():
        if site["role"] == "heldout":
            for metric, value in site["metrics"].items():
                if isinstance(value, dict) and isinstance(value.get("mean"), float):
                    found.setdefault(metric, {})[name] = value["mean"]
    return found
