# SPDX-License-Identifier: Apache-2.0
"""What a released MONAI bundle does with its network; a copy of this file lies in the bundle as ``scripts/apply.py``.

It needs MONAI, PyTorch and nibabel, and nothing of FedNeuro, so that a bundle runs where FedNeuro is not installed.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.transform import MapTransform
from torch.nn import functional as F

__all__ = ["VoxelSizesd", "find_images", "predict", "predict_classes"]


class VoxelSizesd(MapTransform, InvertibleTransform):
    """Keep of an image's affine the voxel sizes alone, so that it is resampled along its own axes, as in training.

    MONAI's ``Spacingd`` straightens a grid whose axes are not quite perpendicular; the study's hospitals did not.
    """

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Replace the affine; the inverse puts it back."""
        found, record = dict(data), getattr(self, "push_transform")  # noqa: B009 - MONAI gives it no types
        for key in self.key_iterator(found):
            image = found[key]
            record(image, extra_info={"affine": image.affine.tolist()})
            sizes = image.affine[:3, :3].norm(dim=0)
            image.affine = torch.diag(torch.cat([sizes, torch.ones(1, dtype=sizes.dtype)]))
        return found

    def inverse(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Put the affine back."""
        found = dict(data)
        for key in self.key_iterator(found):
            kept = self.pop_transform(found[key])["extra_info"]["affine"]
            found[key].affine = torch.tensor(kept, dtype=torch.float64)
        return found


def find_images(folder: str, modalities: Sequence[str]) -> list[dict[str, list[str]]]:
    """Scans of a BIDS folder, one file per modality, in the study's order; or one NIfTI file, for one modality.

    Args:
        folder: holds ``sub-*/[ses-*/]anat``; or a NIfTI file.
        modalities: entities and suffix, such as ``ce-gadolinium_T1w``.

    Raises:
        ValueError: no scan has all modalities.
    """
    if Path(folder).is_file() and len(modalities) == 1:
        return [{"image": [folder]}]
    first, *others = (re.compile(rf"_{re.escape(name)}\.nii(\.gz)?$") for name in modalities)
    found = []
    for path in sorted(Path(folder).glob("sub-*/**/anat/*.nii*")):
        stem = first.sub("", path.name)
        # Entities other than where the scan belongs would name another modality: T1w is not ce-gadolinium_T1w.
        if stem == path.name or set(re.findall(r"([a-z]+)-", stem)) - {"sub", "ses", "acq", "run"}:
            continue
        rest = [[p for p in path.parent.iterdir() if o.sub("", p.name) == stem != p.name] for o in others]
        if all(len(files) == 1 for files in rest):
            found.append({"image": [str(path), *(str(files[0]) for files in rest)]})
    if not found:
        raise ValueError(f"{folder}: no scan with all of {', '.join(modalities)} in sub-*/anat")
    return found


def predict(
    dataset: Iterable[Mapping[str, Any]],
    network: torch.nn.Module,
    inferer: Callable[..., torch.Tensor],
    postprocessing: Callable[[dict[str, Any]], Any],
    device: torch.device,
) -> int:
    """Segment every scan; ``postprocessing`` brings it back to the scan's own grid and saves it. Returns how many."""
    network.eval()
    count = 0
    with torch.inference_mode():
        for sample in dataset:
            logits = inferer(sample["image"][None].to(device), network)[0]
            postprocessing({**sample, "pred": logits.cpu()})
            count += 1
    return count


def predict_classes(
    dataset: Iterable[Mapping[str, Any]],
    network: torch.nn.Module,
    labels: Sequence[str],
    patch: Sequence[int],
    slice_axis: int,
    output: str,
    device: torch.device,
    at_once: int = 16,
) -> list[dict[str, Any]]:
    """Class probabilities of every scan, the mean over its slices where the network is 2D.

    Args:
        dataset: of samples with ``image`` ``(C, X, Y, Z)``.
        network: to logits ``(B, classes)``.
        labels: names of the classes.
        patch: sides of the network's input.
        slice_axis: across which slices are taken, 0 to 2; not used in 3D.
        output: a CSV file, written with one row per scan.
        device: of the network.
        at_once: slices in a batch.
    """
    network.eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for sample in dataset:
            image = torch.as_tensor(sample["image"])
            name = str(getattr(sample["image"], "meta", {}).get("filename_or_obj", len(rows)))
            batch = image[None] if len(patch) == 3 else image.movedim(slice_axis + 1, 0)
            batch = _fit(batch, patch)
            parts = [network(batch[i : i + at_once].to(device)).softmax(1).cpu() for i in range(0, len(batch), at_once)]
            mean = torch.cat(parts).double().mean(0).tolist()
            rows.append({"image": Path(name).name, **dict(zip(labels, mean, strict=True))})
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with Path(output).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["image", *labels])
        table.writeheader()
        table.writerows(rows)
    print(json.dumps(rows, indent=1))
    return rows


def _fit(batch: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """Centre-crop and zero-pad the sides of ``(N, C, *spatial)`` to ``patch``."""
    for axis, size in enumerate(patch, start=2):
        have = batch.shape[axis]
        if have > size:
            batch = batch.narrow(axis, (have - size) // 2, size)
    pads: list[int] = []
    for axis in range(len(patch) - 1, -1, -1):
        missing = patch[axis] - batch.shape[axis + 2]
        pads += [missing // 2, missing - missing // 2]
    return F.pad(batch, pads)
