# SPDX-License-Identifier: Apache-2.0
"""The MONAI bundle of a release: the study's preprocessing, network and inference as MONAI knows them.

    python -m monai.bundle run --config_file BUNDLE/configs/inference.json --bundle_root BUNDLE \
        --dataset_dir BIDS --output_dir OUT

Where the study prepares scans by MONAI's means (voxel size, z-score, percentiles, a window), the bundle needs MONAI,
PyTorch, nibabel and fire, and nothing of FedNeuro. Bias correction, brain masks, cropping, cubic interpolation and
Nyúl's scale are FedNeuro's own; a bundle of such a study calls the installed FedNeuro, and says so.

The bundle's network is the source file that built it here (:func:`fedneuro.models.export.network_sources`).
``metadata.json`` is checked by MONAI's own ``verify_metadata`` (:func:`check_metadata`).

Reference: MONAI Bundle Specification, https://docs.monai.io/en/stable/mb_specification.html.
"""

import inspect
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from torch import nn

from ..models import bundle_apply
from ..models.export import network_sources, state_file
from ..models.spec import OUTCOMES, TaskSection
from ..privacy.errors import EnvironmentProblem, Refused
from ..privacy.study import Study

__all__ = [
    "SCHEMA_URL",
    "bundle_metadata",
    "check_metadata",
    "inference_config",
    "missing_package",
    "needs_fedneuro",
    "write_bundle",
]

SCHEMA_URL: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_TRANSFORMS: Final = "monai.transforms."
_AXES: Final = {"sagittal": 0, "coronal": 1, "axial": 2}
_MODES: Final = {"linear": "bilinear", "nearest": "nearest"}
_KEYS: Final = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
                "task", "description", "authors", "copyright", "network_data_format")  # fmt: skip
"""What MONAI's schema of 2024-07-25 asks for."""


def needs_fedneuro(study: Study) -> list[str]:
    """Keys of the study that ask for what MONAI has not; with none of them the bundle stands alone."""
    data, table = study.data, study.data.preprocessing
    wanted = {
        "data.preprocessing.mask": table.mask != "none",
        "data.preprocessing.bias_correction": table.bias_correction != "none",
        "data.preprocessing.crop": table.crop != "none",
        "data.preprocessing.clip": bool(table.clip),
        "data.preprocessing.image_interpolation": bool(data.spacing) and table.image_interpolation not in _MODES,
        "data.normalise": data.normalise not in ("zscore", "percentile", "window", "none"),
        "task.kind": study.task.kind in OUTCOMES,
    }
    return [key for key, there in wanted.items() if there]


def write_bundle(
    folder: Path, study: Study, network: nn.Module, *, metadata: Mapping[str, Any], readme: str, licence: str
) -> None:
    """Write a bundle into a new folder; ONNX is added by the caller.

    Args:
        folder: the bundle's root.
        study: what was learned.
        network: the released weights, on the CPU.
        metadata: as :func:`bundle_metadata` gives it.
        readme: ``docs/README.md``.
        licence: ``docs/license.txt``.
    """
    files: dict[str, str | bytes] = {
        "configs/metadata.json": _json(metadata),
        "configs/inference.json": _json(inference_config(study)),
        "models/model.pt": state_file(network),
        "docs/README.md": readme,
        "docs/license.txt": licence,
    }
    if not needs_fedneuro(study):
        head = "# SPDX-License-Identifier: Apache-2.0\n"
        files["scripts/__init__.py"] = head + '"""Network and inference of this bundle."""\n'
        files["scripts/apply.py"] = inspect.getsource(bundle_apply)
        files |= {f"scripts/{name}": text for name, text in network_sources(study.model).items()}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def inference_config(study: Study) -> dict[str, Any]:
    """``configs/inference.json``: overrides such as ``--dataset_dir`` come from MONAI's command line."""
    places = {"bundle_root": ".", "dataset_dir": "", "output_dir": "$@bundle_root + '/eval'"}
    if needs_fedneuro(study):
        call = {"_target_": "fedneuro.client.predict.predict_bundle", "bundle": "@bundle_root"}
        return {**places, "run": {**call, "data": "@dataset_dir", "out": "@output_dir"}}
    model, task, data = study.model, study.task, study.data
    axis = _AXES[data.slice_axis]
    common = {
        "imports": ["$import torch"],
        **places,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "modalities": list(data.modalities),
        "datalist": {"_target_": "scripts.apply.find_images", "folder": "@dataset_dir", "modalities": "@modalities"},
        "network_def": {
            "_target_": f"scripts.{model.name}.build",
            "model": {"_target_": "scripts.spec.ModelSection", **model.model_dump(mode="json")},
            "in_channels": len(data.modalities),
            "out_channels": task.channels,
        },
        "load": "$@network_def.load_state_dict(torch.load(@bundle_root + '/models/model.pt', weights_only=True))",
        "preprocessing": {"_target_": f"{_TRANSFORMS}Compose", "transforms": _preprocessing(study)},
        "dataset": {"_target_": "monai.data.Dataset", "data": "@datalist", "transform": "@preprocessing"},
    }
    # Not in "initialize": only when it runs has MONAI put the bundle's folder where Python finds "scripts".
    start = ["$@load", "$@network_def.to(@device)"]
    if task.kind == "classification":
        run: dict[str, Any] = {
            "_target_": "scripts.apply.predict_classes", "dataset": "@dataset", "network": "@network_def",
            "labels": list(task.labels), "patch": list(data.patch), "slice_axis": axis,
            "output": "$@output_dir + '/predictions.csv'", "device": "@device",
        }  # fmt: skip
        return {**common, "run": [*start, run]}
    run = {
        "_target_": "scripts.apply.predict", "dataset": "@dataset", "network": "@network_def",
        "inferer": "@inferer", "postprocessing": "@postprocessing", "device": "@device",
    }  # fmt: skip
    return {
        **common,
        "inferer": _inferer(study, axis),
        "postprocessing": {"_target_": f"{_TRANSFORMS}Compose", "transforms": _postprocessing()},
        "run": [*start, run],
    }


def _preprocessing(study: Study) -> list[dict[str, Any]]:
    """As :mod:`fedneuro.client.data.preprocess`, in MONAI's words."""
    data, model = study.data, study.model
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "reader": "NibabelReader", "ensure_channel_first": True, "image_only": True},
        {"_target_": "Orientationd", "axcodes": "RAS", "labels": None},
    ]
    if data.spacing:
        mode = _MODES[data.preprocessing.image_interpolation]
        steps.append({"_target_": "scripts.apply.VoxelSizesd"})
        steps.append({"_target_": "Spacingd", "pixdim": list(data.spacing), "mode": mode, "padding_mode": "border"})
    if data.normalise == "zscore":
        steps.append({"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True})
    elif data.normalise == "percentile":
        low, high = data.preprocessing.percentiles
        unit = {"b_min": 0.0, "b_max": 1.0, "clip": True, "channel_wise": True}
        steps.append({"_target_": "ScaleIntensityRangePercentilesd", "lower": low, "upper": high, **unit})
    elif data.normalise == "window":
        low, high = data.preprocessing.window
        unit = {"b_min": 0.0, "b_max": 1.0, "clip": True}
        steps.append({"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high, **unit})
    if study.task.kind == "segmentation" and model.dims == 2:
        sides = [1 if axis == _AXES[data.slice_axis] else model.stride for axis in range(3)]
        steps.append({"_target_": "DivisiblePadd", "k": sides, "method": "end", "mode": "constant"})
    return [_transform(step, "image") for step in steps]


def _inferer(study: Study, axis: int) -> dict[str, Any]:
    if study.model.dims == 2:
        whole = {"roi_size": [-1, -1], "sw_batch_size": 16, "overlap": 0.0}
        return {"_target_": "monai.inferers.SliceInferer", "spatial_dim": axis, **whole}
    return {
        "_target_": "monai.inferers.SlidingWindowInferer",
        "roi_size": list(study.data.patch),
        "sw_batch_size": 2,
        "overlap": study.evaluation.overlap,
        "mode": "gaussian",
    }


def _postprocessing() -> list[dict[str, Any]]:
    """Labels, brought back to the scan's own grid and saved there."""
    steps: list[dict[str, Any]] = [
        {"_target_": "AsDiscreted", "argmax": True},
        {"_target_": "Invertd", "orig_keys": "image", "transform": "@preprocessing", "nearest_interp": True},
        {"_target_": "SaveImaged", "output_dir": "@output_dir", "output_postfix": "pred", "separate_folder": False,
         "output_dtype": "$__import__('numpy').uint8", "resample": False, "print_log": False},
    ]  # fmt: skip
    return [_transform(step, "pred") for step in steps]


def _transform(step: dict[str, Any], keys: str) -> dict[str, Any]:
    """A step whose ``_target_`` is a name of MONAI's transforms, or a full path."""
    name = step["_target_"]
    return {**step, "_target_": name if "." in name else f"{_TRANSFORMS}{name}", "keys": keys}


def check_metadata(metadata: Path, schema: Path | None) -> str:
    """Let MONAI's ``verify_metadata`` judge ``metadata.json``; returns in words against what.

    Args:
        metadata: the file.
        schema: MONAI's schema, downloaded before from :data:`SCHEMA_URL`; None: what it is known to require, as MONAI's
            package does not bring its schema and a release asks nothing of the network.

    Raises:
        Refused: it does not fit.
        EnvironmentProblem: jsonschema is not installed.
    """
    try:
        import jsonschema as _  # noqa: F401 - MONAI would fail without it in words of its own
        from monai.bundle.scripts import verify_metadata
    except ImportError as error:
        raise missing_package(error) from error
    threshold = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A file that is there already is taken in place of a download.
        place = Path(folder) / "schema.json"
        if schema is None:
            place.write_text(_json({"type": "object", "required": list(_KEYS)}), encoding="utf-8")
        else:
            shutil.copyfile(schema, place)
        logging.disable(logging.INFO)  # MONAI tells each argument, and sets its own level
        try:
            verify_metadata(meta_file=str(metadata), filepath=str(place))
        except ValueError as error:
            raise Refused(f"{metadata}: MONAI's verify_metadata refuses it: {' '.join(str(error).split())}") from error
        finally:
            logging.disable(threshold)
    return f"against {schema.name}" if schema else "for the keys that MONAI's schema of 2024-07-25 requires"


def missing_package(error: ImportError) -> EnvironmentProblem:
    """One line for a package that only releases need."""
    return EnvironmentProblem(f'{error.name or error} is not installed; run: pip install "fedneuro[release]"')


def bundle_metadata(study: Study, words: Mapping[str, Any]) -> dict[str, Any]:
    """``configs/metadata.json``; ``words`` adds or replaces keys (authors, task, description, metrics, …)."""
    model, task, data = study.model, study.task, study.data
    segmentation = task.kind == "segmentation"
    names = (["background"] if segmentation else []) + _channel_names(task)
    sides: list[Any] = list(data.patch)
    if segmentation and model.dims == 2:
        sides = [f"{model.stride}*h", f"{model.stride}*w"]
    tensor = {"type": "image", "dtype": "float32", "value_range": [], "is_patch_data": model.dims == 3}
    own = needs_fedneuro(study)
    packages = {"nibabel": version("nibabel"), "fire": "0.6.0"} | ({"fedneuro": version("fedneuro")} if own else {})
    return {
        "schema": SCHEMA_URL,
        "version": "1.0.0",
        "changelog": {"1.0.0": "released from the run that manifest.json describes"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": packages,
        "name": study.study.name,
        "data_type": "nibabel",
        "image_classes": f"{len(data.modalities)} channels: {', '.join(data.modalities)}; {data.normalise}",
        "pred_classes": ", ".join(f"{i} {name}" for i, name in enumerate(names)),
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor, "format": "magnitude", "modality": "n/a", "num_channels": len(data.modalities),
                    "spatial_shape": sides, "channel_def": _numbered(data.modalities),
                },
            },
            "outputs": {
                "pred": {
                    **tensor, "type": "image" if segmentation else "probabilities",
                    "format": "labels" if segmentation else "classes", "num_channels": task.channels,
                    "spatial_shape": sides if segmentation else [], "channel_def": _numbered(names),
                },
            },
        },
        **words,
    }  # fmt: skip


def _channel_names(task: TaskSection) -> list[str]:
    if task.kind == "survival":
        return [f"logit of the hazard of {task.event} before {end:g}" for end in task.time_cuts]
    return list(task.outputs)


def _numbered(names: Any) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(names)}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
