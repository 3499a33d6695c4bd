# SPDX-License-Identifier: Apache-2.0
"""The coordinator's side of Flower: one study, over the nodes that are registered, to its end.

A run is given two paths on the coordinator's own machine: ``study`` (the canonical study as JSON, written by
:mod:`fedneuro.server.launch` or a rehearsal) and ``out`` (where the run is saved, with how it was launched and the wish
to stop: :mod:`fedneuro.server.run_folder`). Started again with the same two, it goes on from the last saved step.
The rounds themselves are :func:`fedneuro.server.rounds.run_study`.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..models.state import load_saved
from ..privacy.errors import ContractViolation, FedNeuroError, StudyError
from ..privacy.study import Study
from .conduct import Conduct
from .events import Event, ignore
from .flower_transport import FlowerTransport
from .outcome import write_outcome
from .rounds import run_study
from .run_folder import RunFolder, Stopped
from .store import RunStore
from .study_signature import signed

__all__ = ["app", "conduct_of", "execute", "open_store", "read_study"]

ENGINE = "deployment"
_log = logging.getLogger("fedneuro.run")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run's configuration names."""
    path = Path(str(context.run_config["study"]))
    execute(grid, path, RunFolder(Path(str(context.run_config["out"]))))


def execute(grid: Grid, path: Path, folder: RunFolder) -> None:
    """Run the study in the file ``path`` in ``folder``, to its end, or until somebody stops it.

    Raises:
        StateError: another process executes this run, or the folder holds another study's.
        FedNeuroError: as the run ended.
    """
    study = read_study(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    conduct = conduct_of(folder)
    transport = FlowerTransport(grid, check=folder.check, cut=lambda: conduct.cut)
    with _log_to(folder.path / "server.log"), folder.hold(), closing(open_store(folder, study)) as store:
        try:
            run_study(study, signed(transport, path), store, ignore, conduct)
            if folder.plan().launched:  # who rehearses writes the outcome, with the pictures that only a rehearsal has
                write_outcome(folder.path)
        except Stopped as stop:
            rounds = store.rounds()
            store.record(Event(kind="stopped", round=rounds[-1].round if rounds else 0, values={"when": stop.when}))
            folder.clear_stop()
        except FedNeuroError as error:
            _log.error("%s: %s", type(error).__name__, error)
            raise
        except Exception:
            _log.exception("this is a bug; please report it")
            raise


def conduct_of(folder: RunFolder) -> Conduct:
    """How the run was launched, as the rounds need it."""
    plan = folder.plan()
    return Conduct(
        sites=plan.sites,
        wait=plan.wait,
        patience=plan.patience,
        grace=plan.grace or inf,
        hello=plan.hello or inf,
        check=folder.check,
        check_between=folder.check_between,
    )


def read_study(path: Path) -> Study:
    """The study in a file of its canonical form.

    Raises:
        StudyError: the file cannot be read, or is not a study in canonical form.
    """
    try:
        content = path.read_bytes()
        return Study.from_canonical(content, hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); submit the run again") from error
    except ContractViolation as error:
        raise StudyError(f"{path}: {error}; submit the run again") from error


def open_store(folder: RunFolder, study: Study) -> RunStore:
    """The run in ``folder``: gone on with where there is one, begun otherwise.

    Raises:
        StateError: the folder holds another study's run.
        StudyError: the model of round 0 that was given cannot be read.
    """
    if (folder.path / "state" / "run.db").is_file():
        return RunStore.resume(folder.path, study, engine=ENGINE)
    if not folder.initial.is_file():
        return RunStore.create(folder.path, study, engine=ENGINE)
    try:
        initial, _ = load_saved(folder.initial)
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder.initial}: cannot be read as a model; launch the study again") from error
    return RunStore.create(folder.path, study, engine=ENGINE, initial=initial)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Also write what this process logs to the run's own file."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
