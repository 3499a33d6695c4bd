# SPDX-License-Identifier: Apache-2.0
"""A trained network in the forms that others read: PyTorch state, ONNX, and the source that builds it elsewhere.

ONNX is written by PyTorch's TorchScript exporter: on torch 2.13 it gives the same numbers as the newer one
(largest difference of logits 4e-6 on the U-Nets and ResNets here), twenty times as fast, and needs the package ``onnx``
alone. It is then run by onnxruntime beside PyTorch, on inputs of several sizes; the difference is part of the result.

Reference: ONNX 1.16, https://onnx.ai/onnx; opset :data:`OPSET`.
"""

import inspect
import io
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from .networks import BUILDERS
from .spec import ModelSection

__all__ = ["OPSET", "export_onnx", "network_sources", "onnx_difference", "state_file"]

OPSET: Final = 17
_STAND_IN: Final = '''\
# SPDX-License-Identifier: Apache-2.0
"""What the network is built from: the [model] section of the study."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSection:
    """As in FedNeuro, without its checks."""

    name: str
    dims: int
    channels: tuple
    residual_units: int
    depth: int
    norm: str
    dropout: float
'''


def network_sources(model: ModelSection) -> dict[str, str]:
    """Python modules that build the network with MONAI and PyTorch alone, by file name.

    ``NETWORK.py`` is the module of :mod:`fedneuro.models.networks` that built it here, word for word but for one
    import; ``spec.py`` stands in for that import. Modules beside it that it imports come along as they are.
    ``NETWORK.build(ModelSection(…), in_channels, out_channels)``.
    """
    module = sys.modules[BUILDERS[model.name].__module__]
    source, ours = inspect.getsource(module), "from ..spec import ModelSection"
    if source.count(ours) != 1:
        raise ValueError(f"{module.__name__} imports more of FedNeuro than its section")
    files = {f"{model.name}.py": source.replace(ours, "from .spec import ModelSection"), "spec.py": _STAND_IN}
    for name in re.findall(r"^from \.(\w+) import", source, re.MULTILINE):
        part = inspect.getsource(import_module(f".{name}", module.__package__))
        if re.search(r"^(from \.|import fedneuro|from fedneuro)", part, re.MULTILINE):
            raise ValueError(f"{module.__package__}.{name} imports more of FedNeuro, which a bundle does not hold")
        files[f"{name}.py"] = part
    return files


def state_file(network: nn.Module) -> bytes:
    """The state dictionary as ``torch.save`` writes it; ``torch.load(…, weights_only=True)`` reads it."""
    content = io.BytesIO()
    torch.save(dict(network.state_dict()), content)
    return content.getvalue()


def export_onnx(network: nn.Module, path: Path, example: torch.Tensor, *, free: Sequence[int]) -> None:
    """Write ``path``: input ``image``, output ``logits``.

    Args:
        network: on the CPU, in evaluation mode.
        path: new file.
        example: ``(B, C, *spatial)``, float32.
        free: axes of the input that may have any length; for a unet those of the output, too.

    Raises:
        ModuleNotFoundError: the package ``onnx`` is not installed.
    """
    onnx: Any = import_module("onnx")
    axes = {axis: f"axis{axis}" for axis in free}
    out = axes if len(network(example).shape) == example.ndim else {0: "axis0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter tells of its age, and of constants that tracing folds
        torch.onnx.export(
            network,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": axes, "logits": out},
        )
    onnx.checker.check_model(str(path), full_check=True)


def onnx_difference(path: Path, network: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of logits between onnxruntime and PyTorch, over ``inputs``.

    Raises:
        ModuleNotFoundError: the package ``onnxruntime`` is not installed.
    """
    onnxruntime: Any = import_module("onnxruntime")
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in inputs:
        with torch.inference_mode():
            wanted = network(batch).numpy()
        found = session.run(None, {"image": batch.numpy()})[0]
        worst = max(worst, float(np.abs(found - wanted).max()))
    return worst
