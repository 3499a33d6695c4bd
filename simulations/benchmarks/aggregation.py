# SPDX-License-Identifier: Apache-2.0
"""Memory and time of the coordinator with many hospitals and a large model, stock Flower's FedAvg beside it.

Two processes: the server of an arm, and one that plays all hospitals, which send back the model that they got, changed
a little. They talk over one connection of TLS 1.3 on loopback, in FedNeuro's frames. Each arm gets a server process of
its own for every number of hospitals:

    fedneuro   :func:`fedneuro.server.rounds.run_study`: checks, digests, folds, saves, as in a deployment
    move       receives and sends the same bytes and does nothing with them: what a round cannot be faster than
    stock      Flower's ``FedAvg.aggregate_train`` on the same replies, which it takes all at once

The first two take turns, round by round, so that other work on the machine meets both alike: the ratio of seconds is
the median over pairs of rounds that followed one another.

Memory is the peak resident set of the server process (VmHWM) above what it held when it was ready and had no model, in
sizes of the model. Seconds are the median over rounds; those of the processor, of the server's process alone, do not
grow on a machine that has other work. Not in these figures: the SuperLink, which is Flower's and
holds a message until it is fetched (``bench rounds`` runs a whole deployment). Stock is left out where it would need
more memory than there is.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, cast

from ...privacy.contract import HelloReply, Reply, Request, Role, TrainReply
from ...privacy.study import Study
from ...server.supervisor import ENVIRONMENT
from ..certificates import make_certificates

__all__ = ["bench_aggregation"]

SITES = (5, 20, 60)
CHANNELS = {100: (896, 1024), 20: (256, 512), 5: (128, 256)}
"""Channels of a network of roughly so many megabytes."""
STOCK_SIZES = 3.2
"""Model sizes per hospital that stock Flower was seen to need."""


def bench_aggregation(
    json_path: Path | None = None, *, sites: tuple[int, ...] = SITES, megabytes: int = 100, rounds: int = 3
) -> dict[str, Any]:
    """Run all arms for each number of hospitals; returns (and saves) the figures.

    Args:
        json_path: where to save.
        sites: numbers of hospitals.
        megabytes: of the model: 100, 20 or 5, roughly.
        rounds: per arm.
    """
    found: dict[str, Any] = {"rounds": rounds, "sites": {}}
    for count in sites:
        entry = _run_arms(("fedneuro", "move"), count, megabytes, rounds)
        if lack := _lacks_memory(count, megabytes):
            entry["stock"] = {"left_out": lack}
        else:
            entry |= _run_arms(("stock",), count, megabytes, rounds)
        for arm in entry:
            found["model_mb"] = entry[arm].pop("model_mb", found.get("model_mb"))
        pairs = zip(entry["fedneuro"]["all_rounds"], entry["move"]["all_rounds"], strict=True)
        ratios = [ours / moved for ours, moved in pairs]
        entry["seconds_ratio"], entry["all_ratios"] = median(ratios), [round(ratio, 3) for ratio in ratios]
        ours, moved = (entry[arm]["cpu_seconds_per_round"] for arm in ("fedneuro", "move"))
        entry["cpu_seconds_ratio"] = ours / moved
        found["sites"][str(count)] = entry
        if json_path:
            json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _lacks_memory(count: int, megabytes: int) -> str:
    import psutil

    needed, there = count * megabytes * STOCK_SIZES, psutil.virtual_memory().available / 1e6
    return f"would need about {needed:.0f} MB, {there:.0f} MB are free" if needed > 0.8 * there else ""


def _run_arms(arms: tuple[str, ...], count: int, megabytes: int, rounds: int) -> dict[str, Any]:
    """Figures of each arm; two arms take turns."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"]}  # as `start` sets it
    code = f"from {__name__} import serve; serve(*__import__('sys').argv[1:])"
    with ExitStack() as stack:
        servers: list[subprocess.Popen[str]] = []
        hospitals: list[subprocess.Popen[bytes]] = []
        turns = [stack.enter_context(end) for end in socket.socketpair()]
        for arm, turn in zip(arms, turns, strict=False):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fn-aggregation-"))
            files = make_certificates(Path(folder))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            arguments = [arm, str(count), str(megabytes), str(rounds), folder, str(listener.fileno())]
            arguments += [str(files.server), str(files.server_key), str(turn.fileno())]
            servers.append(
                subprocess.Popen(  # noqa: S603 - our own interpreter and code
                    [sys.executable, "-c", code, *arguments],
                    pass_fds=[listener.fileno(), turn.fileno()], stdout=subprocess.PIPE, text=True, env=env,
                )
            )  # fmt: skip
            hospitals.append(
                subprocess.Popen(  # noqa: S603 - our own interpreter and code
                    [sys.executable, "-c", code.replace("serve", "play"), address, str(files.authority)], env=env
                )
            )
            listener.close()  # hospitals of a server that ended are refused
        for end in turns:
            end.close()  # whoever waits for one that ended goes on
        texts = [process.communicate()[0] for process in servers]
        for process in hospitals:
            process.wait()
    figures: dict[str, Any] = {}
    for arm, server, text in zip(arms, servers, texts, strict=True):
        if server.returncode:
            raise RuntimeError(f"the {arm} arm with {count} sites ended with code {server.returncode}")
        figures[arm] = json.loads(text)
    return figures


# -- the hospitals ---------------------------------------------------------------------------------------------


def play(address: str, authority: str) -> None:
    """Answer for all hospitals until the server hangs up; a request's arrays are kept once, for all."""
    import numpy as np

    from ...privacy.wire import decode_request, encode_reply
    from ...privacy.wire_bytes import read_frame, write_frame

    host, port = address.split(":")
    context = ssl.create_default_context(cafile=authority)
    stream = _stream(context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host))
    request: Request | None = None
    while True:
        try:
            head, content = read_frame(stream)
        except (EOFError, OSError):
            return
        if content is not None:
            if head["first"]:
                request = decode_request(content)
            del content
            continue
        assert request is not None and request.arrays is not None  # noqa: S101 - the server asked before
        step = np.float32(1e-4 * (1 + head["site"]))
        arrays = {name: np.add(array, step, dtype=np.float32) for name, array in request.arrays.items()}
        name = f"site-{head['site']:03d}"
        write_frame(
            stream, {}, encode_reply(TrainReply(site=name, round=request.round, arrays=arrays, steps=1, seconds=0.0))
        )
        del arrays


def _stream(connection: ssl.SSLSocket) -> BinaryIO:
    return cast(BinaryIO, connection.makefile("rwb", buffering=1 << 20))


# -- the server ------------------------------------------------------------------------------------------------


class _Turns:
    """One of two servers that take turns; where the other has ended, or there is none, it goes on."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def wait(self) -> None:
        """Until the other is done."""
        self._end.recv(1)

    def done(self) -> None:
        """It is the other's turn."""
        with suppress(OSError):
            self._end.send(b".")


def serve(
    arm: str, count: str, megabytes: str, rounds: str, folder: str, descriptor: str, chain: str, key: str, turn: str
) -> None:
    """One arm; prints its figures."""
    import psutil

    from ...server import app as _  # noqa: F401 - everything that a server has loaded when it is idle
    from ...server.start import initial_arrays

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.socket(fileno=int(descriptor)) as listener:
        connection = context.wrap_socket(listener.accept()[0], server_side=True)
    study = _study(int(megabytes), int(rounds))
    initial_arrays(_study(5, 1))  # what makes networks is loaded, too
    hospitals = _Hospitals(_stream(connection), int(count))
    idle = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak since now
    busy = time.process_time()
    with socket.socket(fileno=int(turn)) as end:
        arms = {"fedneuro": _fedneuro, "move": _move, "stock": _stock}
        seconds = arms[arm](study, hospitals, Path(folder) / "out", _Turns(end))
    busy = time.process_time() - busy
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    connection.close()
    size = sum(array.nbytes for array in initial_arrays(study)["model"].values())
    figures = {
        "model_mb": size / 1e6, "seconds_per_round": median(seconds), "all_rounds": [round(s, 3) for s in seconds],
        "cpu_seconds_per_round": busy / len(seconds), "idle_mb": idle / 1e6, "peak_mb": peak / 1e6,
        "model_sizes_above_idle": (peak - idle) / size,
    }  # fmt: skip
    print(json.dumps(figures))


def _study(megabytes: int, rounds: int) -> Study:
    return Study.parse(
        {
            "study": {"name": "aggregation"},
            "data": {"patch": [16, 16]},
            "model": {"channels": list(CHANNELS[megabytes]), "residual_units": 2},
            "training": {"rounds": rounds, "local_steps": 1},
            "privacy": {"mode": "none"},
            "evaluation": {"every": 0},
        }
    )


class _Hospitals:
    """A transport over the stream: requests go out one after another, replies are fetched singly."""

    def __init__(self, stream: BinaryIO, count: int) -> None:
        self.stream, self.count = stream, count

    def sites(self) -> list[str]:
        return [f"site-{number:03d}" for number in range(self.count)]

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        from ...privacy.contract import EvaluateReply
        from ...privacy.wire import decode_reply

        del timeout
        kind = next(iter(requests.values())).kind
        if kind == "hello":
            yield from (HelloReply(site=name, role=Role.TRAIN, public_size=20) for name in requests)
        elif kind == "evaluate":
            number = next(iter(requests.values())).round
            yield from (EvaluateReply(site=name, round=number, metrics={}, seconds=0.0) for name in requests)
        else:
            self.send(next(iter(requests.values())))
            for number in range(self.count):
                yield decode_reply(self.fetch(number))

    def send(self, request: Request) -> None:
        """The same request to every hospital."""
        from ...privacy.wire import encode_request
        from ...privacy.wire_bytes import write_frame

        content = encode_request(request)
        for number in range(self.count):
            write_frame(self.stream, {"first": not number}, content)

    def fetch(self, number: int) -> Any:
        """One hospital's reply, as it came."""
        from ...privacy.wire_bytes import read_frame, write_frame

        write_frame(self.stream, {"site": number})
        return read_frame(self.stream)[1]


def _fedneuro(study: Study, hospitals: _Hospitals, out: Path, turns: _Turns) -> list[float]:
    from ...server.events import Event
    from ...server.rounds import run_study
    from ...server.store import RunStore

    def take_turns(event: Event) -> None:
        if event.kind == "round-done" and event.round < study.training.rounds:
            turns.done()
            turns.wait()

    store = RunStore.create(out, study, engine="stream")
    turns.wait()
    run_study(study, hospitals, store, take_turns)
    turns.done()
    return [record.seconds for record in store.rounds()[1:]]


def _move(study: Study, hospitals: _Hospitals, out: Path, turns: _Turns) -> list[float]:
    from ...server.start import initial_arrays

    del out
    model, seconds = initial_arrays(study)["model"], []
    turns.done()
    for number in range(1, study.training.rounds + 1):
        turns.wait()
        started = time.monotonic()
        hospitals.send(Request(kind="train", study=study, round=number, arrays=model))
        for site in range(hospitals.count):
            hospitals.fetch(site)
        seconds.append(time.monotonic() - started)
        turns.done()
    return seconds


def _stock(study: Study, hospitals: _Hospitals, out: Path, turns: _Turns) -> list[float]:
    """Flower's own strategy, given what the Grid gives it: all replies of the round."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    from ...privacy.wire import decode_reply
    from ...server.start import initial_arrays

    del out, turns
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    model, seconds, strategy = initial_arrays(study)["model"], [], FedAvg()
    for number in range(1, study.training.rounds + 1):
        started = time.monotonic()
        request = Request(kind="train", study=study, round=number, arrays=model)
        hospitals.send(request)
        replies = []
        for site in range(hospitals.count):
            reply = decode_reply(hospitals.fetch(site))
            assert isinstance(reply, TrainReply)  # noqa: S101 - nothing else is sent
            arrays = ArrayRecord({name: Array(array) for name, array in reply.arrays.items()})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 20})})
            question = Message(RecordDict(), dst_node_id=site + 1, message_type="train")
            replies.append(Message(content, reply_to=question))
            del reply, arrays
        aggregated, _ = strategy.aggregate_train(number, replies)
        assert aggregated is not None  # noqa: S101 - all answered
        model = {name: array.numpy() for name, array in aggregated.items()}
        seconds.append(time.monotonic() - started)
    return seconds
