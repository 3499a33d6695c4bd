# SPDX-License-Identifier: Apache-2.0
"""What can go wrong around a node, done to it on purpose: a link that breaks, a disk that fills, a clock that jumps.

Each says in words why it cannot be done on this machine, and does nothing then.
"""

import mmap
import os
import shutil
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["Clock", "SmallDisk", "TcpLink"]


class TcpLink:
    """Forwards a port of 127.0.0.1 to another one, until it is cut.

    Args:
        target: the other port.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._flows, self._refuses = threading.Event(), threading.Event()
        self._flows.set()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, silent: bool) -> None:
        """Break the link: connections end and new ones are refused; or, ``silent``, nothing arrives any more."""
        self._flows.clear()
        if not silent:
            self._refuses.set()
            for connection in list(self._sockets):
                _end(connection)

    def mend(self) -> None:
        """The link is there again; what was under way on a silent one goes on."""
        self._refuses.clear()
        self._flows.set()

    def close(self) -> None:
        """End it for good."""
        self.cut(silent=False)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        if self._refuses.is_set():
            _end(near)
            return
        self._flows.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            _end(near)
            return
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.add(one)
        threading.Thread(target=self._pump, args=(near, far), daemon=True).start()
        self._pump(far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                if self._refuses.is_set():
                    break
                sink.sendall(data)
        for one in (source, sink):
            _end(one)
            self._sockets.discard(one)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class SmallDisk:
    """A file system of its own below ``folder``, which can be filled; needs root.

    Args:
        folder: becomes its mount point.
        mib: its size.
    """

    def __init__(self, folder: Path, mib: int = 96) -> None:
        self.folder, self.why = folder, ""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
            self.why = done.stderr.strip()[:200]
        except OSError as error:
            self.why = str(error)

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.folder / ".filler").open("wb", buffering=0) as file, suppress(OSError):
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        """Give the space back."""
        (self.folder / ".filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount; its content is gone."""
        if not self.why:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)  # noqa: S603, S607


_SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *offset;
__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("FEDNEURO_CLOCK");
  int file = path ? open(path, O_RDONLY) : -1;
  void *page = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
  if (file >= 0) close(file);
  if (page != MAP_FAILED) offset = page;
}
int clock_gettime(clockid_t id, struct timespec *at) {
  int result = syscall(SYS_clock_gettime, id, at);
  if (!result && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += *offset;
  return result;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


class Clock:
    """A wall clock for chosen processes that can be stepped while they run: some lines of C that the loader puts first.

    Args:
        folder: for the library and the file that holds the offset.
    """

    def __init__(self, folder: Path) -> None:
        self.why, self.env = "", dict[str, str]()
        compiler = shutil.which("cc")
        if compiler is None:
            self.why = "there is no C compiler (cc)"
            return
        source, library, self._path = folder / "clock.c", folder / "clock.so", folder / "clock.offset"
        source.write_text(_SHIM, encoding="ascii")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        if done.returncode:
            self.why = f"the C compiler fails: {done.stderr.strip()[:200]}"
            return
        self._path.write_bytes(bytes(mmap.PAGESIZE))
        before = os.environ.get("LD_PRELOAD", "")
        self.env = {"LD_PRELOAD": f"{library} {before}".strip(), "FEDNEURO_CLOCK": str(self._path)}

    def step(self, seconds: int) -> None:
        """From now on the processes' clock differs so much from the machine's."""
        with self._path.open("r+b") as file:
            file.write(struct.pack("q", seconds))
