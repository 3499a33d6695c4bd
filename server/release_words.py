# SPDX-License-Identifier: Apache-2.0
"""The two short texts that lie in a release: how to check the pack, and how to run its bundle."""

from collections.abc import Sequence

from ..models.spec import OUTCOMES
from ..privacy.study import Study

__all__ = ["bundle_readme", "pack_readme"]


def pack_readme(study: Study, bundle: str, own: bool, to_write: int) -> str:
    """``README.md`` of the pack.

    Args:
        study: what was learned.
        bundle: the bundle's folder in the pack.
        own: whether the bundle needs FedNeuro.
        to_write: places in the model card that a person must fill in.
    """
    alone = "needs FedNeuro" if own else "needs MONAI alone"
    return f"""\
# {study.study.name}

| | |
|---|---|
| `MODEL_CARD.md` | read this first; {to_write} places are marked TO WRITE and wait for a person |
| `manifest.json`, `results.json`, `report.html` | evidence: study, code, participation, ε beside scores |
| `model.safetensors` | the weights |
| `{bundle}` | MONAI bundle; {alone}. `docs/README.md` in it says how to run it |
| `sbom.cdx.json` | CycloneDX bill of materials of the machine that made this release |
| `release.json`, `SHA256SUMS` | digests of all files, signed |

Check it, without any network, before you use it, with the public key that the coordinator told you on another way:

    fedneuro-server verify . --key PUB
    sha256sum --check SHA256SUMS          # the files alone, without who signed them

On a hospital's own scans; predictions stay there, on each scan's own grid:

    fedneuro-node predict . --key PUB --data BIDS --out FOLDER

Files are checked as they were signed: write into a copy of the model card, and sign the copy yourself.
"""


def bundle_readme(study: Study, own: Sequence[str], notice: str) -> str:
    """``docs/README.md`` of the bundle.

    Args:
        study: what was learned.
        own: keys of the study that need FedNeuro; empty: the bundle stands alone.
        notice: that it is no medical device.
    """
    needs = "`pip install monai nibabel fire`"
    if own:
        needs = f"the same version of FedNeuro, as {', '.join(own)} is not in MONAI, and `pip install fire`"
    result = "label maps `*_pred.nii.gz` on each scan's own grid"
    if study.task.kind == "classification":
        result = "`predictions.csv`, one row of probabilities per scan"
    elif study.task.kind in OUTCOMES:
        result = f"`predictions.tsv`, one row per scan: {study.task.target} {study.task.unit}".rstrip()
    files = json_list(["/path/" + name + ".nii.gz" for name in study.data.modalities])
    single = f"""
One scan that is not in BIDS, one file per channel in this order: `--datalist "[{{'image': {files}}}]"`.
"""
    return f"""\
# {study.study.name}

{notice}

{study.study.description}

Input: {", ".join(study.data.modalities)}, one NIfTI file each, on one grid. Output: {result}.
Preprocessing is in `configs/inference.json`, the same as at every hospital of the study. Needs {needs}.

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir BIDS --output_dir OUT
{"" if own else single}
`models/model.pt` is a state dictionary that `torch.load(…, weights_only=True)` reads; `models/model.onnx`, where it is
there, the same network from preprocessed crops to logits, input `image`, output `logits`.
"""


def json_list(names: Sequence[str]) -> str:
    """A list as MONAI's command line takes it."""
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
