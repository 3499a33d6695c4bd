# SPDX-License-Identifier: Apache-2.0
"""The process that trains: ``python -I -m fedneuro.client.training_main``, started by :mod:`.training_child`.

It puts up the walls of :mod:`.sandbox` before it imports torch, then answers one request after another: the same
work as :class:`~fedneuro.client.site.Site` does in one process, to the bit. Standard input and output are the pipe to
the runner; what any library prints goes to standard error, the runner's log.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .sandbox import enter

if TYPE_CHECKING:
    from .site import Site

__all__ = ["main"]


def main() -> None:
    """Enter the sandbox, say which walls stand, and serve until the runner closes the pipe."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    start = json.loads(source.readline())
    writable = [Path(path) for path in (*start["writable"], start["scratch"])]
    os.environ["TMPDIR"] = start["scratch"]
    os.environ["CUDA_CACHE_PATH"] = str(Path(start["scratch"]) / "cuda")
    os.environ["MPLCONFIGDIR"] = str(Path(start["scratch"]) / "matplotlib")  # MONAI imports it
    readable, kept = ([Path(path) for path in start[key]] for key in ("readable", "kept"))
    walls = enter(writable, readable=readable, kept=kept, isolate=start["isolate"])
    sink.write(json.dumps({"network": walls.network, "files": walls.files, "why": walls.why}).encode() + b"\n")
    sink.flush()
    _serve(source, sink)


def _serve(source: BinaryIO, sink: BinaryIO) -> None:
    from ..models import heavy  # noqa: F401 - before anything else imports torch: it loads faster so
    from ..privacy.wire import decode_request, encode_reply
    from ..privacy.wire_bytes import read_frame, write_frame
    from .settings import read_settings
    from .site import Site

    site: Site | None = None
    while True:
        try:
            head, content = read_frame(source)
        except EOFError:
            os._exit(0)  # tearing torch down takes seconds, and nothing is left to do
        if "count" in head:
            write_frame(sink, _counted(*head["count"]))
            continue
        settings = read_settings(head["settings"])
        site = site or Site(settings)
        site.settings = settings
        try:
            if content is None:
                raise ValueError("a request without records")
            answer, records = {"ok": True}, encode_reply(site.compute(decode_request(content)))
        except Exception as error:
            answer, records = _fault(site, error), None
        write_frame(sink, answer, records)


def _counted(section: str, in_channels: int, channels: int) -> dict[str, Any]:
    """The arrays of a study's network, for the gate, which does not load PyTorch."""
    from .network_layout import count

    try:
        return {"ok": True, "layout": count(section, in_channels, channels)}
    except Exception:
        return {"ok": False}  # another process will say why


def _fault(site: "Site", error: Exception) -> dict[str, Any]:
    """An error as the runner needs it: this text stays in the hospital."""
    reason, code, text = site.explain(error)
    return {"ok": False, "reason": reason.value, "exit_code": code, "text": text}


if __name__ == "__main__":
    main()
    sys.exit(0)
