# SPDX-License-Identifier: Apache-2.0
"""A network's state as named arrays: what travels between hospital and coordinator, and what is saved.

State means every floating-point parameter and buffer, in the network's own order, as float arrays. Files are
safetensors (never pickle: reading one runs no code), written so that a crash or a full disk leaves either the
old file or the new one, complete.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # what only reads and writes arrays (the hospital's runner) does without torch
    from torch import Tensor, nn

__all__ = ["Arrays", "digest", "load_arrays", "load_saved", "save_arrays", "to_arrays"]

Arrays = Mapping[str, NDArray[np.generic]]
"""Named arrays, in the network's own order."""

_ORDER = "fedneuro.order"  # safetensors sorts by name; this entry keeps the network's order.


def to_arrays(network: "nn.Module") -> dict[str, NDArray[np.generic]]:
    """The state of ``network`` as C-contiguous arrays in main memory that share nothing with it."""
    import torch

    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()
        for name, tensor in _floating(network).items()
    }


def load_arrays(network: "nn.Module", arrays: Arrays) -> None:
    """Write ``arrays`` into ``network``, in place; the network shares nothing with them. Read-only arrays will do.

    Raises:
        ValueError: names, shapes or dtypes are not those of the network; nothing has been written then.
    """
    import torch

    targets = _floating(network)
    if set(targets) != set(arrays):
        odd = sorted(set(targets) ^ set(arrays))
        raise ValueError(f"the arrays are not this network's: {len(odd)} names differ, such as {odd[:3]}")
    for name, target in targets.items():
        array = arrays[name]
        wanted = str(target.dtype).removeprefix("torch.")
        if array.shape != tuple(target.shape) or array.dtype.name != wanted:
            raise ValueError(
                f"array {name} is {array.dtype.name}{array.shape}; the network has {wanted}{tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            if target.device.type == "cpu":
                # numpy copies from read-only memory without a detour; torch.from_numpy would warn.
                np.copyto(target.detach().numpy(), arrays[name])
            else:
                target.copy_(torch.from_numpy(np.array(arrays[name])))


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order: 64 hexadecimal digits."""
    state = hashlib.sha256()
    for name, array in arrays.items():
        header = json.dumps([name, array.dtype.str, list(array.shape)], separators=(",", ":")).encode()
        state.update(len(header).to_bytes(8, "little") + header)
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def save_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically: either the old file or the whole new one is there afterwards.

    Raises:
        OSError: no space, no permission, no folder; no partial file is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    order = json.dumps(list(arrays), separators=(",", ":"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        save_file(contiguous, temporary, {**metadata, _ORDER: order})
        _sync(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        # safetensors keeps the number of the system's error in its text alone.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # so that the renaming survives a power cut, too


def load_saved(path: Path) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    """Arrays, in the order in which they were saved, and metadata of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path.stat()  # safe_open gives FileNotFoundError no file name
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            names = json.loads(metadata.pop(_ORDER, "null")) or sorted(file.keys())
            return {name: file.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _floating(network: "nn.Module") -> "dict[str, Tensor]":
    """Floating-point parameters and buffers, by name, in the network's order; they alias the network."""
    return {n: t for n, t in network.state_dict(keep_vars=True).items() if t.is_floating_point()}


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
