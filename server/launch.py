# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server launch``: from a study file to a run that hospitals have agreed to.

    1. the study is read and checked; the hospitals to ask are taken from the consortium's state store
    2. its canonical form is signed with the coordinator's key; both are written into the run's folder
    3. the run is submitted to the SuperLink of the running ``start``, whose runner executes :mod:`.app`
    4. that asks every hospital whether it joins; what each answered is read from the run's saved events
    5. the rounds begin where the study's quorum rule holds, else the run ends there, and everybody is named

``--canary`` does all of this first with one round of one step, to its end.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

import httpx
from pydantic import ValidationError

from ..privacy import errors
from ..privacy.contract import Role
from ..privacy.errors import BadInput, EnvironmentProblem, FedNeuroError, StateError, StudyError
from ..privacy.identity import replace_file
from ..privacy.signing import sign_study
from ..privacy.study import Study
from .consortium import Consortium
from .control import Control
from .registry import SiteRecord
from .run_folder import Plan, RunFolder, new_run, run_folders
from .run_key import vouch_for_run
from .run_view import RunFollower, RunView, view_run
from .run_words import clock
from .saved_study import OLDER, read_saved
from .sealed_keys import Passphrase

__all__ = ["Launch", "canary_of", "choose_sites", "failure", "follow", "online", "refuse_older", "runs_of", "submit"]

CANARY_EPSILON = 0.1
"""What the one step of a canary may cost a patient; the update is nearly all noise then, which suits a trial."""
LOOK_SECONDS = 0.25
TAKEN_UP_SECONDS = 10.0


def runs_of(consortium: Consortium) -> Path:
    """Folder of the consortium's runs."""
    return consortium.folder / "runs"


def choose_sites(study: Study, known: Sequence[SiteRecord], only: Sequence[str] = ()) -> tuple[str, ...]:
    """Whom to ask: hospitals enrolled to train, and those that the study names as held-out.

    Args:
        study: the study.
        known: the consortium's sites.
        only: ask these alone, if given.

    Raises:
        StudyError: nobody is enrolled, a name is unknown or has the other role, or nobody is left to train.
    """
    enrolled = {site.name: site for site in known if site.state == "enrolled"}
    if not enrolled:
        raise StudyError("no hospital is enrolled yet; invite one: fedneuro-server invite SITE --role train")
    heldout = study.evaluation.heldout
    names = ", ".join(enrolled)
    for what, wanted in (("evaluation.heldout", heldout), ("--site", only)):
        if unknown := [name for name in wanted if name not in enrolled]:
            raise StudyError(f"{what} names {', '.join(unknown)}; enrolled are {names}")
    if wrong := [name for name in heldout if enrolled[name].role is not Role.HELDOUT]:
        text = f"evaluation.heldout names {', '.join(wrong)}, enrolled to train"
        raise StudyError(f"{text}; invite it again with --role heldout, or leave it out of the study")
    chosen = set(only) or {name for name, site in enrolled.items() if site.role is Role.TRAIN} | set(heldout)
    if judge := sorted(name for name in chosen - set(heldout) if enrolled[name].role is Role.HELDOUT):
        raise StudyError(f"--site names {', '.join(judge)}, enrolled as heldout; name it in evaluation.heldout, too")
    if missing := sorted(set(heldout) - chosen):
        raise StudyError(f"evaluation.heldout names {', '.join(missing)}, --site does not; name it there, too")
    if not chosen - set(heldout):
        raise StudyError(f"no hospital is left to train; enrolled are {names}")
    return tuple(sorted(chosen))


def canary_of(study: Study, at: float) -> Study:
    """The same study with one round of one step: another study, with a hash of its own.

    Under privacy the step costs every patient of a training hospital at most ε = 0.1 (:data:`CANARY_EPSILON`).
    Hospitals answer a round of a study once, so each canary says when it was made (``at``, seconds since 1970).

    Raises:
        StudyError: the study cannot be cut down so far.
    """
    values = study.model_dump(mode="json")
    values["study"] |= {"name": f"{study.study.name[:57]}-canary"}
    values["study"] |= {"description": f"One step of study {study.hash[:12]}, before the study itself. {clock(at)} UTC"}
    steps = 2 if study.strategy.name == "fedprox" else 1  # its pull acts from the second step on
    values["training"] |= {"rounds": 1, "local_epochs": 0, "local_steps": steps}
    values["evaluation"] |= {"every": 0, "previews": 0}
    for key in ("epsilon", "metrics_epsilon"):
        values["privacy"][key] = min(CANARY_EPSILON, values["privacy"][key])
    try:
        return Study.parse(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"]
        raise StudyError(f"--canary: the study cannot be cut to one step ({fault}); launch it without") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What ``launch`` was asked to do. Seconds as in :class:`~fedneuro.server.run_folder.Plan`."""

    consortium: Consortium
    study: Study
    sites: tuple[str, ...]
    initial: Path | None = None
    wait: float = 60.0
    patience: float = 600.0
    grace: float = 0.0
    hello: float = 600.0

    def prepare(self, passphrase: Passphrase, study: Study | None = None) -> RunFolder:
        """Sign the study, or the canary ``study`` in its place, and make the run's folder.

        Raises:
            BadInput: the passphrase is wrong.
            StudyError: the study needs a model to start from, and none or another one is given.
            StateError: hospitals have trained in this study before, and answer no round again.
        """
        from ..privacy.study_words import describe

        chosen = study or self.study
        self._refuse_again(chosen)
        initial = read_initial(chosen, self.initial)
        key = self.consortium.unlock_study_key(passphrase)
        signature = sign_study(chosen, key)
        folder = new_run(runs_of(self.consortium), chosen.study.name)
        vouch_for_run(folder.path, chosen.hash, key)  # the run ends without a person, and signs its manifest
        folder.study.write_bytes(chosen.canonical)
        folder.study.with_suffix(".sig").write_text(signature.hex() + "\n", encoding="ascii")
        (folder.path / "study.toml").write_text(describe(chosen), encoding="utf-8")
        if initial is not None:
            replace_file(folder.initial, initial)
        plan = Plan(
            sites=self.sites, wait=self.wait, patience=self.patience, grace=self.grace, hello=self.hello,
            launched=time.time(), canary=study is not None,
        )  # fmt: skip
        folder.write_plan(plan)
        return folder

    def _refuse_again(self, study: Study) -> None:
        for folder in run_folders(runs_of(self.consortium)):
            if not folder.study.is_file() or folder.study.read_bytes() != study.canonical:
                continue
            view = view_run(folder)
            if max(view.history, default=0) > 0:
                text = f"study {study.hash[:12]} was trained before, as run {view.name} ({view.status}), and hospitals "
                again = "" if view.status == "complete" else f"fedneuro-server resume {view.name} goes on; "
                remedy = "to train anew, change study.seed or study.description"
                raise StateError(f"{text}answer a round once; {again}{remedy}")


def read_initial(study: Study, given: Path | None) -> bytes | None:
    """The file of the model of round 0, or None where the study starts from an untrained network.

    Raises:
        StudyError: none is given though the study needs one, or the other way round, or it is not the one named.
    """
    init = study.training.init
    path = given or (Path(init.path) if init.path else None)
    if not init.source:
        if given is not None:
            raise StudyError(f'--initial {given}: training.init.from = ""; name a source in the study, or leave it out')
        return None
    if path is None:
        where = "OUT/state/initial.safetensors of a simulation with this study"
        raise StudyError(f'training.init.from = "{init.source}": give its file: --initial FILE ({where})')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudyError(f"--initial {path}: cannot be read ({error.strerror})") from error
    if init.sha256 and (found := hashlib.sha256(content).hexdigest()) != init.sha256:
        raise StudyError(f"--initial {path}: has SHA-256 {found[:12]}, the study names {init.sha256[:12]}")
    return content


def online(consortium: Consortium) -> set[str]:
    """Hospitals that are online now.

    Raises:
        EnvironmentProblem: ``start`` is not running.
    """
    with _control(consortium) as control:
        return control.online()


def submit(consortium: Consortium, folder: RunFolder) -> None:
    """Hand the run to the SuperLink of the running ``start``.

    Raises:
        EnvironmentProblem: ``start`` is not running, or the SuperLink refuses.
        StateError: a process executes the run already.
    """
    from .bundle import bundle

    if folder.is_held:
        raise StateError(f"run {folder.name} is under way; fedneuro-server watch {folder.name} shows it")
    refuse_older(folder)
    with _control(consortium) as control:
        folder.clear_stop()
        settings = {"study": str(folder.study), "out": str(folder.path)}
        at = time.time()  # before a process can take it up
        folder.note_submission(control.start_run(bundle(), settings), at)


def refuse_older(folder: RunFolder) -> None:
    """Refuse to go on with a run whose study's text is of another version.

    Raises:
        StateError: it is.
    """
    with suppress(OSError):
        content = folder.study.read_bytes()
        if read_saved(content, hashlib.sha256(content).hexdigest())[1]:
            raise StateError(f"run {folder.name}: {OLDER}")


@contextmanager
def _control(consortium: Consortium) -> Iterator[Control]:
    address, authority = f"127.0.0.1:{consortium.settings.ports.superlink}", consortium.folder / "ca" / "root.crt"
    with closing(Control(address, authority)) as control:
        if not control.is_healthy():
            text = f"consortium {consortium.name} is not running"
            raise EnvironmentProblem(f"{text}; run fedneuro-server start --config {consortium.folder}")
        try:
            yield control
        except httpx.HTTPError as error:
            raise EnvironmentProblem(f"the SuperLink of {consortium.name} does not answer: {error}") from error


def follow(
    follower: RunFollower, until: Callable[[RunView], bool], tell: Callable[[RunView], None], seconds: float = inf
) -> RunView:
    """Look at a run until ``until`` holds for it, or it is live no longer, or ``seconds`` are over.

    ``tell`` is given every view; ``follower.new`` has the events that came with it. An interrupted run is given some
    seconds, in which a running ``start`` takes it up again.
    """
    deadline, dead_since = time.monotonic() + seconds, inf
    while True:
        view = follower.look()
        tell(view)
        now = time.monotonic()
        dead_since = min(dead_since, now) if view.status == "interrupted" else inf
        is_over = not view.is_live and (view.status != "interrupted" or now > dead_since + TAKEN_UP_SECONDS)
        if until(view) or is_over or now > deadline:
            return view
        time.sleep(LOOK_SECONDS)


def failure(view: RunView) -> FedNeuroError:
    """The error with which a run ended, with what to do about it."""
    kind = getattr(errors, view.error, None)
    remedy = f"fedneuro-server logs {view.name} tells more; fedneuro-server resume {view.name} tries again"
    if view.status == "interrupted":
        return EnvironmentProblem(f"run {view.name}: its process ended without a word; {remedy}")
    if view.status == "stopped":
        return BadInput(f"run {view.name} was stopped; fedneuro-server resume {view.name} goes on")
    if not (isinstance(kind, type) and issubclass(kind, FedNeuroError)):
        kind = EnvironmentProblem
    text = view.message.removeprefix("failed: ")
    if any(site.reason == errors.Reason.STUDY_NOT_APPROVED.value for site in view.sites.values()):
        remedy = f"they approve it with fedneuro-node approve ({view.folder / 'study.toml'}); then resume {view.name}"
    found: FedNeuroError = kind(f"run {view.name}: {text}; {remedy}")
    return found
