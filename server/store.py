# SPDX-License-Identifier: Apache-2.0
"""The saved state of a run: everything that is needed to resume it, or to write its report after a crash.

``OUT/state/run.db`` is SQLite (WAL, ``synchronous=FULL``); ``OUT/state/round-0007.safetensors`` holds the
arrays of a round: the global model, the model that is evaluated where it differs (average over rounds), and
what the strategy keeps. A file is written beside its final name, flushed, renamed, and only then named in
the database with its digest, so whatever moment the process dies, the database names whole files only.
Old rounds are pruned: the last two and the selected one stay.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sql
import sqlalchemy.event
import sqlalchemy.exc
from numpy.typing import NDArray

from ..models.state import digest, load_saved, save_arrays
from ..privacy.contract import Arrays
from ..privacy.errors import EnvironmentProblem, StateError
from ..privacy.study import Study
from .events import Event
from .paged import Paged, page
from .saved_study import OLDER, read_saved

__all__ = ["RoundRecord", "RunStore", "SiteRecord"]

SCHEMA_VERSION = 1
INITIAL = "initial.safetensors"
_metadata = sql.MetaData()
_run = sql.Table(
    "run",
    _metadata,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("schema_version", sql.Integer, nullable=False),
    sql.Column("study_hash", sql.String(64), nullable=False),
    sql.Column("study", sql.LargeBinary, nullable=False),
    sql.Column("engine", sql.String(32), nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("sites", sql.JSON, nullable=False),
    sql.Column("comparators", sql.JSON, nullable=False),
    sql.Column("final", sql.JSON),
)
_rounds = sql.Table(
    "rounds",
    _metadata,
    sql.Column("round", sql.Integer, primary_key=True),
    sql.Column("record", sql.JSON, nullable=False),
    sql.Column("file", sql.String(64), nullable=False),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("evaluated", sql.Boolean, nullable=False),
)
_events = sql.Table(
    "events",
    _metadata,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("kind", sql.String(32), nullable=False),
    sql.Column("round", sql.Integer, nullable=False),
    sql.Column("site", sql.String(64), nullable=False),
    sql.Column("values", sql.JSON, nullable=False),
)


@dataclass(slots=True, kw_only=True)
class RoundRecord:
    """What is remembered of one round; round 0 is the untrained model. Bytes count arrays, not envelopes."""

    round: int
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    train: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class SiteRecord:
    """A site as it joined."""

    role: str
    public_size: int
    versions: dict[str, str] = field(default_factory=dict)
    state: str = "answered"


class RunStore:
    """Open with :meth:`create`, :meth:`resume` or :meth:`load`.

    Args:
        out: the run's output folder.
        study: the study that runs.
        engine: name of the engine, for the record.
        older: whether the study's text is of another version, so that the run can be read, and no more.
    """

    def __init__(self, out: Path, study: Study, engine: str, *, older: bool = False) -> None:
        self.out = out
        self.study = study
        self.older = older
        self.engine = engine
        self.folder = out / "state"
        self._db = _database(self.folder / "run.db")
        self._paged: Paged | None = None

    @classmethod
    def create(
        cls,
        out: Path,
        study: Study,
        *,
        engine: str,
        overwrite: bool = False,
        comparators: Mapping[str, Any] | None = None,
        initial: Arrays | None = None,
    ) -> "RunStore":
        """Start a new run in ``out``.

        ``initial`` is the model of round 0 where the study does not start from an untrained network
        (``[training.init]``); it is kept with the run, so every engine and every resume starts from the same.

        ``comparators`` are results of other runs on the same patients, as ``{name: {"title": …, "sites": {…}}}``,
        that the report shows beside this one.

        Raises:
            StateError: ``out`` already holds a run with a saved round and ``overwrite`` is False.
            EnvironmentProblem: the folder cannot be written.
        """
        cls.refuse_to_replace(out, overwrite=overwrite)
        path = out / "state" / "run.db"
        with _disk(out):
            path.parent.mkdir(parents=True, exist_ok=True)
            for old_file in path.parent.iterdir():
                if old_file.is_file():
                    old_file.unlink()
            store = cls(out, study, engine)
            _metadata.create_all(store._db)
            if initial is not None:
                metadata = {"study_hash": study.hash, "digest": digest(initial)}
                save_arrays(store.folder / INITIAL, initial, metadata)
            store._execute(
                _run.insert().values(
                    id=1, schema_version=SCHEMA_VERSION, study_hash=study.hash, study=study.canonical,
                    engine=engine, status="running", sites={}, comparators=dict(comparators or {}),
                )
            )  # fmt: skip
        return store

    @classmethod
    def refuse_to_replace(cls, out: Path, *, overwrite: bool) -> None:
        """What :meth:`create` looks at first, for callers with work to do before.

        Raises:
            StateError: ``out`` already holds a run with a saved round and ``overwrite`` is False.
        """
        path = out / "state" / "run.db"
        if path.exists() and not overwrite and (old := cls.load(out)).rounds():
            done = old.rounds()[-1].round
            old.close()
            if old.status == "complete":
                raise StateError(f"{out}: holds a finished run; give another --out, or --overwrite to replace it")
            raise StateError(
                f"{out}: holds an unfinished run (round {done} of {old.study.training.rounds} is saved); "
                "add --resume to go on, --overwrite to start anew, or give another --out"
            )

    @classmethod
    def resume(cls, out: Path, study: Study, *, engine: str) -> "RunStore":
        """Go on with the unfinished run in ``out``.

        Raises:
            StateError: there is none, or it belongs to another study.
        """
        store = cls.load(out)
        if store.older:
            raise StateError(f"{out}: {OLDER}")
        if store.study.hash != study.hash:
            raise StateError(
                f"{out}: holds a run of study {store.study.hash[:12]}, not {study.hash[:12]}: "
                "give the study file and --set values that it was started with, or another --out"
            )
        store.engine = engine
        store._execute(_run.update().values(engine=engine))
        return store

    @classmethod
    def load(cls, out: Path) -> "RunStore":
        """Open a run as it is, to read it, also one of an older study text (``older``).

        Raises:
            StateError: ``out`` holds no run, or one of another version.
        """
        path = out / "state" / "run.db"
        if not path.is_file():
            raise StateError(f"{out}: holds no run (no state/run.db); give the folder that --out named")
        db = _database(path)
        try:
            with db.connect() as connection:
                row = connection.execute(sql.select(_run)).one()
        except sqlalchemy.exc.SQLAlchemyError as error:
            text = f"cannot be read as a run ({type(error).__name__}); start anew with --overwrite"
            raise StateError(f"{path}: {text}") from error
        finally:
            db.dispose()
        if row.schema_version != SCHEMA_VERSION:
            version = f"schema {row.schema_version}, not {SCHEMA_VERSION}"
            raise StateError(f"{path}: written by another version of FedNeuro ({version})")
        try:
            study, older = read_saved(row.study, row.study_hash)
        except StateError as error:
            raise StateError(f"{path}: {error}") from error
        return cls(out, study, row.engine, older=older)

    # -- the run ---------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """``running`` (also after a crash) or ``complete``."""
        return str(self._value(_run.c.status))

    def set_sites(self, sites: Mapping[str, SiteRecord]) -> None:
        """Remember who joined, or a site's new state."""
        self._execute(_run.update().values(sites={name: asdict(site) for name, site in sites.items()}))

    def sites(self) -> dict[str, SiteRecord]:
        """Sites as they joined."""
        return {name: SiteRecord(**values) for name, values in self._value(_run.c.sites).items()}

    def finish(self, final: Mapping[str, Any]) -> None:
        """Close the run with the final evaluation (``selected_round``, ``metrics``)."""
        self._execute(_run.update().values(status="complete", final=dict(final)))

    def final(self) -> dict[str, Any] | None:
        """What :meth:`finish` was given, or None."""
        value = self._value(_run.c.final)
        return None if value is None else dict(value)

    def comparators(self) -> dict[str, Any]:
        """Other runs to show beside this one, as given to :meth:`create`."""
        return dict(self._value(_run.c.comparators))

    def initial(self) -> dict[str, NDArray[Any]] | None:
        """The model of round 0 that :meth:`create` was given, or None.

        Raises:
            StateError: its file was changed or cannot be read.
        """
        path = self.folder / INITIAL
        if not path.is_file():
            return None
        try:
            arrays, metadata = load_saved(path)
        except (OSError, ValueError) as error:
            raise StateError(f"{path}: cannot be read ({type(error).__name__}); start anew with --overwrite") from error
        if digest(arrays) != metadata.get("digest"):
            raise StateError(f"{path}: was changed since it was saved; start anew with --overwrite")
        return arrays

    # -- rounds ----------------------------------------------------------------------------------------

    def save_round(self, record: RoundRecord, groups: Mapping[str, Arrays]) -> Mapping[str, Arrays]:
        """Save a round's arrays (by group: ``model``, ``evaluated``, ``strategy.*``), before it is evaluated.

        Returns the same arrays to go on with; large ones lie in the saved file (:mod:`.paged`).
        """
        name = f"round-{record.round:04d}.safetensors"
        arrays = {f"{group}/{key}": array for group, members in groups.items() for key, array in members.items()}
        with _disk(self.out):
            checksum = digest(arrays)
            save_arrays(self.folder / name, arrays, {"study_hash": self.study.hash, "round": str(record.round)})
        values = {"record": asdict(record), "file": name, "digest": checksum, "evaluated": False}
        with self._begin() as connection:
            connection.execute(_rounds.delete().where(_rounds.c.round >= record.round))
            connection.execute(_rounds.insert().values(round=record.round, **values))
        self._paged = page(self.folder / name, groups)
        return self._paged.groups if self._paged else groups

    def let_go(self) -> None:
        """Give back the memory of what :meth:`save_round` returned; whoever needs it reads it again."""
        if self._paged:
            self._paged.let_go()

    def save_evaluation(self, record: RoundRecord) -> None:
        """Complete a saved round with its metrics."""
        self._execute(
            _rounds.update().where(_rounds.c.round == record.round).values(record=asdict(record), evaluated=True)
        )

    def rounds(self) -> list[RoundRecord]:
        """All saved rounds, in order."""
        with self._db.connect() as connection:
            rows = connection.execute(sql.select(_rounds.c.record).order_by(_rounds.c.round)).scalars()
            return [RoundRecord(**row) for row in rows]

    def is_evaluated(self, number: int) -> bool:
        """Whether :meth:`save_evaluation` was called for the round."""
        return bool(self._value(_rounds.c.evaluated, _rounds.c.round == number))

    def groups(self, number: int) -> dict[str, dict[str, NDArray[Any]]]:
        """Arrays of a saved round by group.

        Raises:
            StateError: the file is missing or was changed since it was saved.
        """
        with self._db.connect() as connection:
            row = connection.execute(sql.select(_rounds).where(_rounds.c.round == number)).one()
        path = self.folder / row.file
        try:
            arrays, _ = load_saved(path)
        except Exception as error:  # safetensors raises its own class on a broken file
            raise StateError(f"{path}: cannot be read ({type(error).__name__}); start anew with --overwrite") from error
        if digest(arrays) != row.digest:
            raise StateError(f"{path}: was changed since it was saved; start anew with --overwrite")
        groups: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in arrays.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = array
        return groups

    def forget_round(self, number: int) -> None:
        """Take back a saved round, and those after it: the arrays are not whole, so the run goes on from before."""
        with self._begin() as connection:
            connection.execute(_rounds.delete().where(_rounds.c.round >= number))

    def prune(self, selected: int) -> None:
        """Delete the arrays of rounds that neither a resume nor the result needs."""
        with self._db.connect() as connection:
            rows = connection.execute(sql.select(_rounds.c.round, _rounds.c.file).order_by(_rounds.c.round)).all()
        for row in rows[:-2]:
            if row.round != selected:
                (self.folder / row.file).unlink(missing_ok=True)

    # -- events ----------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """Append an event with the present time; an observer."""
        values = {**event.values, "at": round(time.time(), 3)}
        self._execute(_events.insert().values(kind=event.kind, round=event.round, site=event.site, values=values))

    def events(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """Events with a number above ``after``, with their numbers."""
        with self._db.connect() as connection:
            rows = connection.execute(sql.select(_events).where(_events.c.id > after).order_by(_events.c.id)).all()
        for row in rows:
            values = dict(row[4])
            at = values.pop("at", 0.0)  # runs of older versions have none
            yield row.id, Event(kind=row.kind, round=row.round, site=row.site, values=values, at=at)

    def close(self) -> None:
        """Release the database."""
        self._db.dispose()

    def _value(self, column: sql.Column[Any], *where: sql.ColumnElement[bool]) -> Any:
        with self._db.connect() as connection:
            return connection.execute(sql.select(column).where(*where)).scalar_one()

    def _execute(self, statement: sql.Executable) -> None:
        with self._begin() as connection:
            connection.execute(statement)

    @contextmanager
    def _begin(self) -> Iterator[sql.Connection]:
        with _disk(self.out), self._db.begin() as connection:
            yield connection


def _database(path: Path) -> sql.Engine:
    engine = sql.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @sqlalchemy.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except (OSError, sqlalchemy.exc.OperationalError) as error:
        cause = error if isinstance(error, OSError) else error.orig
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(cause)
        remedy = "what was saved before is whole: free space or fix the folder, then add --resume"
        raise EnvironmentProblem(f"{out}: cannot save the run ({text}); {remedy}") from error


def dumps(values: Mapping[str, Any]) -> str:
    """JSON for people: indented, UTF-8, without NaN."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
