# SPDX-License-Identifier: Apache-2.0
"""Model state: round trips, no aliasing, and files that are whole or absent."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedneuro.models.networks import build_network
from fedneuro.models.spec import ModelSection
from fedneuro.models.state import digest, load_arrays, load_saved, save_arrays, to_arrays


def small(seed: int = 0) -> nn.Module:
    return build_network(ModelSection(channels=(4, 8)), in_channels=1, out_channels=2, seed=seed)


def test_arrays_are_the_floating_state_in_the_networks_order() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))  # has float buffers and an integer one
    arrays = to_arrays(network)
    assert list(arrays) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays.values())


def test_arrays_share_nothing_with_the_network() -> None:
    network = small()
    arrays = to_arrays(network)
    before = digest(arrays)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert digest(arrays) == before != digest(to_arrays(network))


def test_loading_copies_from_read_only_arrays_in_place() -> None:
    source, target = small(1), small(2)
    arrays = to_arrays(source)
    for array in arrays.values():
        array.flags.writeable = False
    storage = [p.data_ptr() for p in target.parameters()]
    load_arrays(target, arrays)
    assert digest(to_arrays(target)) == digest(arrays)
    assert [p.data_ptr() for p in target.parameters()] == storage
    with torch.no_grad():
        next(target.parameters()).add_(1)
    assert digest(to_arrays(source)) == digest(arrays), "loading must not tie the network to the arrays"


def test_channels_last_networks_travel_like_others() -> None:
    plain = small()
    channels_last = small().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert digest(to_arrays(plain)) == digest(to_arrays(channels_last))
    load_arrays(channels_last, to_arrays(small(3)))
    assert digest(to_arrays(channels_last)) == digest(to_arrays(small(3)))


@pytest.mark.parametrize("fault", ["name", "missing", "shape", "dtype"])
def test_wrong_arrays_are_refused_and_nothing_is_written(fault: str) -> None:
    network = small()
    before = digest(to_arrays(network))
    arrays = to_arrays(small(1))
    last = list(arrays)[-1]
    if fault == "name":
        arrays["odd"] = arrays.pop(last)
    elif fault == "missing":
        arrays.pop(last)
    elif fault == "shape":
        arrays[last] = arrays[last][..., None]
    else:
        arrays[last] = arrays[last].astype(np.float64)
    with pytest.raises(ValueError, match="odd" if fault == "name" else last):
        load_arrays(network, arrays)
    assert digest(to_arrays(network)) == before


def test_the_digest_sees_names_dtypes_shapes_order_and_bytes() -> None:
    a = np.zeros((2, 3), np.float32)
    variants: list[dict[str, NDArray[np.generic]]] = [
        {"a": a, "b": a},
        {"b": a, "a": a},
        {"a": a, "c": a},
        {"a": a.reshape(3, 2), "b": a},
        {"a": a.astype(np.float64), "b": a},
        {"a": a.view(np.int32), "b": a},
        {"a": a + 1, "b": a},
        {"a": a},
        {},
    ]
    assert len({digest(v) for v in variants}) == len(variants)
    assert digest({"a": np.asfortranarray(a + np.arange(3))}) == digest({"a": a + np.arange(3)})
    assert len(digest({"scalar": np.array(1.0, np.float32)})) == 64


def test_a_saved_state_comes_back_with_its_order_and_metadata(tmp_path: Path) -> None:
    arrays = to_arrays(small())
    save_arrays(tmp_path / "model.safetensors", arrays, {"study_hash": "abc"})
    found, metadata = load_saved(tmp_path / "model.safetensors")
    assert list(found) == list(arrays)
    assert digest(found) == digest(arrays)
    assert metadata == {"study_hash": "abc"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_without_our_order_is_read_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"b": np.ones(2), "a": np.zeros(1)}, tmp_path / "other.safetensors")
    found, metadata = load_saved(tmp_path / "other.safetensors")
    assert list(found) == ["a", "b"]
    assert metadata == {}


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        save_arrays(tmp_path / "absent" / "model.safetensors", to_arrays(small()), {})
    assert caught.value.errno == errno.ENOENT


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_arrays(path, to_arrays(small()), {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_saved(path)
    with pytest.raises(FileNotFoundError):
        load_saved(tmp_path / "absent.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    old = to_arrays(small(0))
    save_arrays(path, old, {})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_arrays(path, to_arrays(small(1)), {})
    monkeypatch.undo()
    assert digest(load_saved(path)[0]) == digest(old)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where the test may mount one."""
    mount = shutil.which("mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_file(tiny_disk: Path) -> None:
    path = tiny_disk / "model.safetensors"
    save_arrays(path, {"a": np.ones(10_000, np.float32)}, {})
    with pytest.raises(OSError, match="No space") as caught:
        save_arrays(path, {"a": np.ones(100_000, np.float32)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert load_saved(path)[0]["a"].size == 10_000
    assert len(list(tiny_disk.iterdir())) == 1
