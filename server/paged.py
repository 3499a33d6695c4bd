# SPDX-License-Identifier: Apache-2.0
"""A round's arrays in their saved file instead of in memory: read where they are touched, let go of between replies.

While replies are folded, a coordinator needs the model that it sent only where a site has to be asked again. The file
of the round is there already, so a large model is mapped from it (mmap(2), read only), and its pages are given back
after each reply (``MADV_DONTNEED``): what is left in memory is the running sum and one reply. The
values are the same bits.

The file is safetensors: eight bytes with the length of a header in JSON, the header, then each array's bytes
(https://huggingface.co/docs/safetensors). It was written whole before it is mapped, and is never changed in place.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..privacy.contract import Arrays, payload_bytes

__all__ = ["Paged", "page"]

LARGE = 10_000_000
"""Bytes of arrays from which on it is worth a mapping."""


class Paged:
    """The arrays of one file.

    Args:
        path: a safetensors file.
        like: groups of arrays that were saved in it under ``group/name``: their order, shapes and dtypes.

    Attributes:
        groups: the same arrays, read only.
    """

    def __init__(self, path: Path, like: Mapping[str, Arrays]) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (size,) = struct.unpack("<Q", self._map[:8])
        header = json.loads(self._map[8 : 8 + size])
        self.groups: dict[str, dict[str, NDArray[Any]]] = {
            group: {name: self._view(array, 8 + size, header[f"{group}/{name}"]) for name, array in members.items()}
            for group, members in like.items()
        }

    def let_go(self) -> None:
        """Give the pages back; the next touch reads them again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _view(self, array: NDArray[Any], start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
        first, last = entry["data_offsets"]
        if last - first != array.nbytes:
            raise ValueError(f"the file holds {last - first} bytes where {array.nbytes} were saved")
        if not array.nbytes:
            return array
        return np.frombuffer(self._map, array.dtype, array.size, start + first).reshape(array.shape)


def page(path: Path, groups: Mapping[str, Arrays]) -> Paged | None:
    """Large ``groups`` that were just saved in ``path``, mapped; None where they are small."""
    if sum(payload_bytes(members) for members in groups.values()) < LARGE:
        return None
    return Paged(path, groups)
