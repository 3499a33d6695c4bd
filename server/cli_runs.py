# SPDX-License-Identifier: Apache-2.0
"""The commands of a run: ``launch``, ``runs``, ``watch``, ``stop``, ``resume``, ``logs``."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..privacy.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from .consortium import Consortium
    from .launch import Launch
    from .run_folder import RunFolder
    from .run_view import RunView

__all__ = ["register"]

Folder = Annotated[Path, typer.Option("--config", metavar="DIR", help="The consortium's folder, made by init.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run; last: the latest.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Patience = Annotated[
    float, typer.Option("--patience", min=0, help="Seconds in a round to wait for lost hospitals, until the quorum.")
]
HERE = Path()
INTERRUPTED = 130


def launch(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")],
    config: Folder = HERE,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", metavar="NAME", help="Ask this hospital alone; may repeat.")
    ] = None,
    canary: Annotated[bool, typer.Option("--canary", help="First one round of one step, to its end.")] = False,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to ask again those who did not join.")] = 60.0,
    patience: Patience = 600.0,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for the others once min_sites answered; 0: round_timeout.")
    ] = 0.0,
    hello: Annotated[
        float, typer.Option("--answer-within", min=1, help="Seconds for a hospital to check its data and answer.")
    ] = 600.0,
    initial: Annotated[
        Path | None, typer.Option("--initial", help="Model of round 0, where training.init names a source.")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the issuing key, mode 0600.")
    ] = None,
    passphrase_fd: Annotated[
        int | None, typer.Option("--passphrase-fd", help="Open file descriptor that gives the passphrase.")
    ] = None,
) -> None:
    """Sign a study, ask the hospitals, and start it.

    Exit codes: 4 the quorum does not hold, 3 all who are missing refuse by policy or budget, 5 `start` does not run.
    """
    from ..privacy.study_file import load_study
    from .consortium import Consortium
    from .launch import Launch, canary_of, choose_sites, online
    from .sealed_keys import Passphrase

    loaded, consortium = load_study(study, overrides or []), Consortium(config)
    chosen = choose_sites(loaded, consortium.registry.sites(), site or ())
    off = sorted(set(chosen) - online(consortium))
    wanted = Launch(
        consortium=consortium, study=loaded, sites=chosen, initial=initial,
        wait=wait, patience=patience, grace=grace, hello=hello,
    )  # fmt: skip
    if off:
        print(f"not online: {', '.join(off)}", flush=True)
    passphrase = Passphrase("the issuing key", "FEDNEURO_PASSPHRASE", passphrase_file, passphrase_fd)
    if canary:
        small = canary_of(loaded, time.time())
        print(f"canary: one step of study {small.hash[:12]}, another study than {loaded.hash[:12]}", flush=True)
        if loaded.privacy.mode != "none":
            print(f"  it costs every patient of a training hospital up to ε = {small.privacy.epsilon:g}", flush=True)
        _ask(wanted, wanted.prepare(passphrase, small), to_the_end=True)
    folder = wanted.prepare(passphrase)
    _ask(wanted, folder, to_the_end=False)
    print(f"watch it: fedneuro-server watch {folder.name} --config {config}")


def _ask(launch: "Launch", folder: "RunFolder", *, to_the_end: bool) -> None:
    """Submit a run, show what hospitals answer, and return when the rounds begin, or at the run's end."""
    from rich.console import Console

    from .launch import failure, follow, runs_of, submit
    from .run_view import RunFollower, list_runs
    from .watch import Screen, answers_table

    follower = RunFollower(folder)
    before = [view.name for view in list_runs(runs_of(launch.consortium)) if view.is_live]
    submit(launch.consortium, folder)
    print(f"run {folder.name}: asking {', '.join(launch.sites)}")
    if before:
        print(f"  waits its turn: {', '.join(before)} before it; one run is executed at a time", flush=True)
    begun = False

    def has_begun(_: "RunView") -> bool:
        nonlocal begun
        begun = begun or any(event.kind == "started" for event in follower.new)
        return begun and not to_the_end

    with _left_alone(folder.name), Screen(Console(stderr=True), follower) as screen:
        view = follow(follower, has_begun, screen.show)
    _wide().print(answers_table(view))
    if view.status == "complete":
        print(f"run {folder.name}: complete, {view.who}")
    elif begun and view.is_live:
        print(f"run {folder.name}: started, {view.who}, {view.rounds} rounds")
    else:
        raise failure(view)


def runs(config: Folder = HERE, json_: Json = False) -> None:
    """List the runs: status, round, who takes part."""
    from .run_view import list_runs
    from .watch import runs_table

    views = list_runs(_runs(config))
    if json_:
        print(json.dumps([view.as_json() for view in views], indent=2))
        return
    _wide().print(runs_table(views) if views else "no runs yet: fedneuro-server launch STUDY")


def watch(
    run: Run = "last",
    config: Folder = HERE,
    once: Annotated[bool, typer.Option("--once", help="Show how it is now, and end.")] = False,
    json_: Json = False,
) -> None:
    """Follow a run live: hospitals, metric, ε, faults.

    Ctrl-C ends the watching only. Exit codes: 0 complete or stopped, else as the run ended (3 refused, 4 quorum lost, 5
    its process ended).
    """
    from .launch import failure, follow
    from .run_view import RunFollower
    from .watch import Screen, render

    follower = RunFollower(_find(config, run))
    if json_:
        print(json.dumps(follower.look().as_json(), indent=2))
        return
    console = _wide()
    if once:
        console.print(render(follower.look()))
        return
    with _left_alone(follower.folder.name), Screen(console, follower) as screen:
        view = follow(follower, lambda _: False, screen.show)
    console.print(render(view))
    if view.status in ("failed", "interrupted"):
        raise failure(view)


def stop(
    run: Run = "last",
    config: Folder = HERE,
    now: Annotated[bool, typer.Option("--now", help="Do not wait until the round under way is saved.")] = False,
    within: Annotated[float, typer.Option("--within", min=0, help="Seconds to wait until it has stopped.")] = 60.0,
) -> None:
    """Stop a run after the round under way, or at once; an interrupted one is left alone by `start` from then on.

    It can be resumed. Exit code 2: it is not under way.
    """
    from .resumption import note_stop
    from .run_view import view_run

    folder = _find(config, run)
    view = view_run(folder)
    if view.status == "interrupted" and view.events:
        note_stop(folder)
        print(f"run {folder.name} was interrupted, and is left as it is; fedneuro-server resume {folder.name} goes on")
        return
    if not view.is_live:
        raise BadInput(f"run {folder.name} is not under way: it is {view.status}")
    folder.request_stop("now" if now else "round")
    if view.status == "queued":
        print(f"run {folder.name} stops as soon as it is taken up")
        return
    deadline = time.monotonic() + within
    while (view := view_run(folder)).is_live and time.monotonic() < deadline:
        time.sleep(0.25)
    if view.is_live:
        print(f"run {folder.name} stops when round {view.round} is saved; --now does not wait for that")
        return
    print(f"run {folder.name} is {view.status}; fedneuro-server resume {folder.name} goes on")
    if now and any(site.state == "training" for site in view.sites.values()):
        print("hospitals that were training finish for nothing; a resume charges their privacy ledgers again")


def resume(run: Run = "last", config: Folder = HERE, patience: Patience | None = None) -> None:
    """Go on with a run from its last saved step."""
    from dataclasses import replace

    from .launch import submit
    from .resumption import charged_again
    from .run_view import view_run

    consortium = _consortium(config)
    folder = _find(config, run)
    view = view_run(folder)
    if view.status == "complete":
        raise BadInput(f"run {folder.name} is complete; launch the study again for another run")
    if patience is not None:
        folder.write_plan(replace(folder.plan(), patience=patience))
    number, again = charged_again(folder) if view.events else (0, ())
    submit(consortium, folder)
    print(f"run {folder.name}: goes on after round {max(view.history, default=0) if view.history else 0}")
    if again:
        print(f"  round {number} is asked again: {', '.join(again)} may charge their privacy ledgers for it once more")
    print(f"watch it: fedneuro-server watch {folder.name} --config {config}")


def logs(
    run: Run = "last",
    config: Folder = HERE,
    server: Annotated[bool, typer.Option("--server", help="What the coordinator's process said, instead.")] = False,
    json_: Json = False,
) -> None:
    """Print all that happened in a run, line by line."""
    from .run_view import read_events
    from .run_words import clock, sentence

    folder = _find(config, run)
    if server:
        path = folder.path / "server.log"
        print(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "nothing yet", end="")
        return
    for number, event in read_events(folder):
        if json_:
            values = {"kind": event.kind, "round": event.round, "site": event.site, "values": dict(event.values)}
            print(json.dumps({"id": number, "at": event.at, **values, "text": sentence(event)}))
        else:
            print(f"{clock(event.at)}  {sentence(event)}")


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedneuro-server``."""
    for command in (launch, runs, watch, stop, resume, logs):
        app.command()(command)


def _wide() -> "Console":
    """Standard output; in a pipe, tables are as wide as they need."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


@contextmanager
def _left_alone(name: str) -> Iterator[None]:
    """Ctrl-C ends the looking, not the run."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"run {name} goes on; fedneuro-server stop {name} ends it", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _consortium(config: Path) -> "Consortium":
    from .consortium import Consortium

    return Consortium(config)


def _runs(config: Path) -> Path:
    return _consortium(config).folder / "runs"


def _find(config: Path, run: str) -> "RunFolder":
    from .run_folder import find_run

    return find_run(_runs(config), run)
