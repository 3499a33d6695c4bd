# SPDX-License-Identifier: Apache-2.0
"""The walls around the process that trains: no network, nothing writable but its own state, no rights to regain them.

What reads the coordinator's numbers (torch, MONAI, CUDA) runs in a child of the runner. Before it imports any
of them it enters, by system calls alone (no helper program, no root):

    1. a network namespace of its own, without any interface that is up: nothing can leave, not even to 127.0.0.1
    2. a mount namespace in which everything is read-only but ``writable`` (state and cache): the data set too; and in
       which the machine's services are gone from /run (docker, D-Bus, login sessions): a socket there is no network
    3. no capability that could undo 1 and 2, and ``no_new_privs``
    4. the kernel kills it when the runner dies, and chooses it first when memory runs out

An ordinary user needs an unprivileged user namespace for 1 and 2, which some distributions forbid (Ubuntu 24.04:
``kernel.apparmor_restrict_unprivileged_userns``). Then the child runs without those walls, and says so: the
:class:`Walls` go into ``fedneuro-node status`` and ``doctor``; ``[sandbox] isolation = "required"`` refuses to serve.

See namespaces(7), user_namespaces(7), mount_setattr(2), capabilities(7).
"""

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Walls", "enter", "probe"]

_NEWNS, _NEWIPC, _NEWUSER, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAP_VERSION_3 = 0x20080522
_SERVICES = Path("/run")
_USED = ("media", "mount", "nvidia")
"""What stays of it, by how the name begins: disks, and the GPU's driver."""
_KEPT_BY_ROOT = 0b1111
"""CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: root reads the data set of another user without them not."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Walls:
    """Which walls stand.

    Args:
        network: the process has no network.
        files: it may write to its state and cache only.
        why: why a wall is missing; empty if both stand.
    """

    network: bool
    files: bool
    why: str = ""

    @property
    def complete(self) -> bool:
        """Both walls stand."""
        return self.network and self.files


def enter(
    writable: Sequence[Path], *, readable: Sequence[Path] = (), kept: Sequence[Path] = (), isolate: bool = True
) -> Walls:
    """Put up the walls around this process, for good. Call it before a second thread exists.

    Args:
        writable: existing folders that stay writable.
        readable: what must stay visible, were it in /run.
        kept: files within ``writable`` that are read-only all the same, where they exist.
        isolate: False leaves out steps 1 and 2 (``[sandbox] isolation = "off"``).
    """
    parent = os.getppid()
    walls = (
        _namespaces(writable, readable, kept)
        if isolate
        else Walls(network=False, files=False, why="switched off in node.toml")
    )
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the runner died before the kernel knew
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    return walls


def probe(writable: Path, data: Path, seconds: float = 30.0) -> Walls:
    """Whether the walls can be put up here, found out by a process that tries to get over them.

    Args:
        writable: an existing folder.
        data: an existing folder outside of it.
        seconds: patience.
    """
    command = [sys.executable, "-I", "-m", __name__, str(writable), str(data)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=True)  # noqa: S603 - our own command
        return Walls(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        return Walls(network=False, files=False, why=f"the trial process failed: {error}")


def _namespaces(writable: Sequence[Path], readable: Sequence[Path], kept: Sequence[Path]) -> Walls:
    """Steps 1 and 2."""
    if sys.platform != "linux":
        return Walls(network=False, files=False, why="needs Linux")
    uid, gid, cwd = os.getuid(), os.getgid(), Path.cwd()
    flags = _NEWNET | _NEWNS | _NEWIPC
    try:
        try:
            _call(_libc.unshare, flags)  # root, and services that were given CAP_SYS_ADMIN
        except PermissionError:
            _call(_libc.unshare, flags | _NEWUSER)
            _map_user(uid, gid)
    except OSError as error:
        return Walls(network=False, files=False, why=f"the kernel forbids namespaces ({error.strerror})")
    network = [name for _, name in socket.if_nameindex()] == ["lo"]
    try:
        _make_read_only(writable, kept)
        _hide_services([path.resolve() for path in (*writable, *readable, cwd)])
        os.chdir(cwd)  # the old one leads through the old mount
    except OSError as error:
        return Walls(network=network, files=False, why=f"the kernel forbids mounts ({error.strerror})")
    return Walls(network=network, files=True, why="" if network else "the network namespace is not empty")


def _map_user(uid: int, gid: int) -> None:
    """The same user inside as outside."""
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")


def _make_read_only(writable: Sequence[Path], kept: Sequence[Path]) -> None:
    _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    paths = [os.fsencode(path.resolve()) for path in writable]
    for path in paths:
        _mount(path, path, None, _MS_BIND | _MS_REC, None)
    with suppress(OSError):  # a shared memory of its own; the machine's becomes read-only below
        _mount(b"tmpfs", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=1777")
        paths.append(b"/dev/shm")
    for file in kept:
        if file.exists():  # a mount of its own, which stays read-only below
            name = os.fsencode(file.resolve())
            _mount(name, name, None, _MS_BIND, None)
    _mount_attributes(b"/", _AT_RECURSIVE, add=_MS_RDONLY)
    for path in paths:
        _mount_attributes(path, 0, remove=_MS_RDONLY)


def _hide_services(needed: Sequence[Path]) -> None:
    """Cover every folder and socket of /run with nothing, but those on the way to ``needed`` and the :data:`_USED`.

    Raises:
        OSError: one that this process may use cannot be covered.
    """
    if not _SERVICES.is_dir():
        return
    for entry in sorted(_SERVICES.resolve().iterdir()):
        if entry.name.startswith(_USED) or any(entry in (path, *path.parents) for path in needed):
            continue
        name, is_folder = os.fsencode(entry), entry.is_dir()
        if entry.is_symlink() or not (is_folder or entry.is_socket()):
            continue
        try:
            if is_folder:
                _mount(b"tmpfs", name, b"tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, b"size=4k")
            else:
                _mount(b"/dev/null", name, None, _MS_BIND, None)
        except OSError:
            if os.access(entry, os.X_OK if is_folder else os.W_OK):
                raise


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
    _call(_libc.mount, source, target, kind, ctypes.c_ulong(flags), data)


def _mount_attributes(path: bytes, flags: int, *, add: int = 0, remove: int = 0) -> None:
    attributes = struct.pack("QQQQ", add, remove, 0, 0)
    _call(
        _libc.syscall,
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        path,
        ctypes.c_uint(flags),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def _drop_capabilities() -> None:
    """Step 3; fails silently where there was none to drop."""
    kept = _KEPT_BY_ROOT if os.geteuid() == 0 else 0
    for capability in range(64):
        if not kept >> capability & 1:
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("Ii", _CAP_VERSION_3, 0)
    with suppress(OSError):
        _call(_libc.capset, header, struct.pack("IIIIII", kept, kept, 0, 0, 0, 0))


def _call(function: "ctypes._FuncPointer", *arguments: object) -> None:
    """A system call.

    Raises:
        OSError: it failed.
    """
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _try_to_escape(writable: Path, data: Path) -> Walls:
    """What :func:`probe` runs: enter, then try what must not be possible."""
    with socket.create_server(("127.0.0.1", 0)) as outside:  # made before the walls: it belongs to the machine
        walls = enter([writable])
        with suppress(OSError), socket.create_connection(outside.getsockname(), timeout=1):
            return Walls(network=False, files=walls.files, why=walls.why or "127.0.0.1 can still be reached")
    with suppress(OSError):
        (writable / ".sandbox-probe").write_bytes(b"x")
        (writable / ".sandbox-probe").unlink()
        try:
            (data / ".sandbox-probe").touch()
        except OSError:
            return walls
        (data / ".sandbox-probe").unlink()
        return Walls(network=walls.network, files=False, why=walls.why or f"{data} is still writable")
    return Walls(network=walls.network, files=False, why=f"{writable} cannot be written")


if __name__ == "__main__":
    print(json.dumps(asdict(_try_to_escape(Path(sys.argv[1]), Path(sys.argv[2])))))
