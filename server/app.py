# SPDX-License-Identifier: Apache-2.0
"""The coordinator's side of Flower: one study, over the nodes that are registered, to its end.

A run is given two paths on the coordinator's own machine: ``study`` (the canonical study as JSON, written by
:mod:`fedneuro.server.study_file` or a rehearsal) and ``out`` (where the run is saved). Started again with the same two,
it goes on from the last saved step. The rounds themselves are :func:`fedneuro.server.rounds.run_study`.
"""

import hashlib
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..privacy.errors import ContractViolation, StudyError
from ..privacy.study import Study
from .events import ignore
from .flower_transport import FlowerTransport
from .rounds import run_study
from .store import RunStore
from .study_signature import signed

__all__ = ["app", "open_store", "read_study"]

ENGINE = "deployment"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run's configuration names."""
    path = Path(str(context.run_config["study"]))
    study = read_study(path)
    with closing(open_store(Path(str(context.run_config["out"])), study)) as store:
        run_study(study, signed(FlowerTransport(grid), path), store, ignore)


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


def open_store(out: Path, study: Study) -> RunStore:
    """The run in ``out``: gone on with where there is one, begun otherwise.

    Raises:
        StateError: ``out`` holds another study's run.
    """
    if (out / "state" / "run.db").is_file():
        return RunStore.resume(out, study, engine=ENGINE)
    return RunStore.create(out, study, engine=ENGINE)
