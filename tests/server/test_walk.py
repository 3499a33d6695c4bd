# SPDX-License-Identifier: Apache-2.0
"""The whole way in a browser, over real processes: invite, enrol, launch, watch, report, release.

``fedneuro-server start`` behind its guard, two hospitals with ``fedneuro-node``, and a Chromium whose mouse and keys
do what a coordinator does (:mod:`tests.server.browser`); the run is in TensorBoard and MLflow while it goes on.
Every page is looked at for who cannot see, uses no mouse or has a small screen. ``FEDNEURO_SCREENSHOTS=DIR`` keeps
pictures of every page, for a desk and a phone, light and dark.
"""

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from fedneuro.client import cli as node_cli
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_words import describe
from fedneuro.server import cli as server_cli
from fedneuro.server.consortium import Consortium
from fedneuro.server.run_folder import find_run
from fedneuro.server.run_view import read_events
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from tests.bids import make_study
from tests.needs import need_nginx
from tests.server.browser import DESK, PHONE, Browser, find_chromium
from tests.server.conftest import PASSPHRASE, coordinator_up, free_ports
from tests.server.test_sinks import scalars

pytestmark = pytest.mark.walk

BIN = Path(sys.executable).parent
ROUNDS = 4
JUDGED = "heldout/judge/dice"
BEHIND_SECONDS = 2.0
SITES = {"judge": "heldout", "north": "train"}
SHOTS = os.environ.get("FEDNEURO_SCREENSHOTS", "")


def study() -> Study:
    """Rounds long enough to be watched."""
    return make_study(
        study={"name": "walk", "description": "Lesions, learned while a browser looks on"},
        training={"rounds": ROUNDS, "local_steps": 30, "local_epochs": 0, "batch_size": 4, "device": "cpu"},
        privacy={"mode": "local", "epsilon": 8.0},
        evaluation={"heldout": ["judge"], "metrics": ["dice"], "every": 1, "bootstrap": 100, "previews": 0},
    )


@pytest.fixture
def consortium(tmp_path: Path, make_consortium: Callable[[Path], Consortium]) -> Iterator[Consortium]:
    """A running one, with its dashboard."""
    find_chromium()
    need_nginx()
    made = make_consortium(tmp_path / "c")
    settings = made.folder / "server.toml"
    text = settings.read_text()
    for name, where in {"mlflow": "mlruns", "tensorboard": "tensorboard"}.items():
        assert f'{name} = ""' in text
        text = text.replace(f'{name} = ""', f'{name} = "{where}"')
    settings.write_text(text)
    with coordinator_up(Consortium(made.folder)):
        yield made


@contextmanager
def node_up(folder: Path) -> Iterator[None]:
    """``fedneuro-node start``, until it is told to stop."""
    with (folder / "log").open("w") as errors:
        command = [str(BIN / "fedneuro-node"), "start", "--config", str(folder / "node.toml")]
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class Walk:
    """What a coordinator sees and does."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address, self.shots = browser, address, 0
        self.paints: dict[str, float] = {}

    def open(self, path: str) -> None:
        """Open a page; its first content is seen within a second."""
        self.browser.open(self.address + path)
        self.paints[path] = self.browser.first_paint()

    def sees(self, text: str, seconds: float = 30.0) -> float:
        return self.browser.wait(f"document.body?.innerText.includes({text!r})", seconds)

    def look_at(self, what: str, *, inspect: bool = True) -> None:
        """Everybody can use the page; pictures of it, if they are wanted. ``inspect``: it stays so for a while."""
        if inspect:
            self.browser.inspect(what)
        if not SHOTS:
            return
        self.shots += 1
        for name, size in (("desk", DESK), ("phone", PHONE)):
            for dark in (False, True):
                self.browser.screen(size, dark=dark)
                folder = Path(SHOTS)
                folder.mkdir(parents=True, exist_ok=True)
                self.browser.shoot(folder / f"{self.shots:02}-{what}-{name}-{'dark' if dark else 'light'}.png")
        self.browser.screen(DESK)

    def invite(self, site: str, role: str) -> Path:
        """Invite ``site``, and save its file."""
        self.open("")
        self.browser.click("#to-invite")
        self.sees("Its name in this consortium")
        self.browser.type("#site", site)
        self.browser.click(f"input[value={role}]")
        self.browser.type("#passphrase", PASSPHRASE)
        self.browser.press("Enter")
        self.sees("Compare by telephone")
        path = self.browser.save("#file")
        assert path.name == f"{site}.json"
        return path

    def watch(self, last: int, beside: dict[str, Callable[[], object]]) -> dict[str, float]:
        """When the page of the run first said so, until it says ``complete``: {"round 2 of 4": seconds since 1970}.

        And when what is looked for ``beside`` it was first there.
        """
        head = "document.querySelector('#head .status')?.innerText"
        seen: dict[str, float] = {}
        wanted = time.monotonic() + 120
        while "complete" not in seen:
            text = str(self.browser.value(head))
            for name in ("complete", *(f"round {number} of {last}" for number in range(1, last + 1))):
                if name in text:
                    seen.setdefault(name, time.time())
            for name, is_there in beside.items():
                if name not in seen and is_there():
                    seen[name] = time.time()
            assert time.monotonic() < wanted, (text, seen)
            time.sleep(0.02)
        return seen


def wait_for(what: str, done: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def trust(policy: Path, key: str, site: str) -> None:
    """Approve in a policy what the coordinator signs; ``approve`` would compute the price of the study each time."""
    rule = f'\n[[studies.rules]]\ncoordinator = "{key}"\ntasks = ["segmentation"]\ndatasets = ["{site}"]\n'
    text = policy.read_text()
    assert "\n[grant]" in text
    policy.write_text(text.replace("\n[grant]", f'{rule}modes = ["local"]\n\n[grant]'))


def call(app: Any, *words: object) -> str:
    """One of our commands, as it is typed."""
    done = CliRunner().invoke(app, [str(word) for word in words], standalone_mode=False)
    assert done.exit_code == 0 and not done.exception, (words, done.output, done.exception)
    return done.output


def test_a_consortium_in_a_browser(consortium: Consortium, tmp_path: Path) -> None:
    address, downloads = f"http://127.0.0.1:{consortium.settings.dashboard.port}/", tmp_path / "downloads"
    downloads.mkdir()
    written = describe(study())
    with ExitStack() as stack:
        browser = stack.enter_context(Browser(downloads=downloads))
        walk = Walk(browser, address)
        walk.open("")
        walk.sees("No hospital yet")
        walk.look_at("empty")

        # 1. Both are invited; a wrong passphrase lets nobody in.
        walk.open("invite")
        walk.look_at("invite")
        browser.type("#site", "north")
        browser.type("#passphrase", "not the passphrase")
        browser.click("#invite")
        walk.sees("wrong passphrase for the issuing key")
        assert browser.value("document.getElementById('site').value") == "north"
        assert browser.value("document.getElementById('passphrase').value") == "" and not consortium.registry.sites()
        walk.look_at("invite-wrong")
        files = {site: walk.invite(site, role) for site, role in SITES.items()}
        browser.click("#code summary")
        browser.wait("document.querySelector('#code svg').clientWidth > 200")
        walk.look_at("invited")
        fingerprint = str(browser.value("document.getElementById('fingerprint').innerText"))

        # 2. They enrol, trust what the coordinator signs, and start their nodes; the page says so.
        for (site, role), port in zip(SITES.items(), free_ports(2), strict=True):
            write_tiny_site(tmp_path / "data" / site, seed=len(site))
            node = tmp_path / site
            call(node_cli.app, "init", node, "--name", site, "--role", role, "--public-size", 10,
                 "--data", tmp_path / "data" / site, "--port", port, "--yes")  # fmt: skip
            trust(node / "policy.toml", consortium.study_key, site)
            said = call(node_cli.app, "enrol", files[site], "--config", node / "node.toml")
            assert fingerprint in said
            stack.enter_context(node_up(node))
        walk.sees("has enrolled", 2.0)
        walk.open("")
        walk.sees("2 of 2 hospitals online", 120.0)
        walk.look_at("online")

        # 3. The study is shown, and launched.
        browser.click("#to-launch")
        browser.type("#study", written.replace("rounds = 4", "rounds = 0"))
        browser.click("#check")
        walk.sees("training.rounds = 0")
        walk.look_at("launch-fault")
        browser.type("#study", written)
        browser.click("#check")
        walk.sees("Will be asked whether they join")
        walk.look_at("launch")
        browser.type("#passphrase", PASSPHRASE)
        browser.click("#launch")
        browser.wait("location.pathname === '/runs/walk-1'")

        # 4. Its rounds are watched.
        sunk = consortium.folder / "tensorboard" / "walk-1", consortium.folder / "mlruns"
        sinks: dict[str, Callable[[], object]] = {
            "TensorBoard": lambda: sunk[0].is_dir() and scalars(sunk[0]).get(JUDGED),
            "MLflow": lambda: next(sunk[1].glob(f"*/*/metrics/{JUDGED}"), None),
        }
        seen = walk.watch(ROUNDS, sinks)
        events = [event for _, event in read_events(find_run(consortium.folder / "runs", "walk-1"))]
        began = {f"round {e.round} of {ROUNDS}": e.at for e in events if e.kind == "round-started"}
        began["complete"] = next(e.at for e in events if e.kind == "finished")
        lags = {name: seen[name] - at for name, at in began.items() if name in seen}
        print("seconds behind:", {name: round(lag, 2) for name, lag in lags.items()})
        assert set(seen) == {*began, *sinks} and max(lags.values()) < BEHIND_SECONDS, (seen, began)
        assert max(seen[name] for name in sinks) < seen["complete"], "they are told while the run goes on"
        walk.sees("Privacy spent by round")
        walk.sees("95 % interval")
        assert "per patient" in str(browser.value("document.querySelector('#judges .heldout').innerText"))
        walk.look_at("complete")

        # 5. The report; the release, in the page and as a file that anyone can check.
        browser.click("a[href$='report.html']")
        browser.page.wait_for_url("**/report.html")
        assert browser.value("document.querySelectorAll('svg').length") > 0
        walk.open("runs/walk-1")
        browser.click("#releasing summary")
        browser.type("#authors", "The walkers")
        browser.type("#release-passphrase", PASSPHRASE)
        browser.click("#make-release")
        walk.sees("The release is being made")
        walk.look_at("releasing", inspect=False)
        walk.sees("made and signed", 120.0)
        walk.look_at("released")
        with tarfile.open(browser.save("#pack")) as pack:
            pack.extractall(tmp_path / "received", filter="data")
        said = call(server_cli.app, "verify", tmp_path / "received" / "walk-1", "--key", consortium.study_key)
        assert (
            "verified: " in said
            and "The walkers"
            in (tmp_path / "received" / "walk-1" / "bundle" / "walk" / "configs" / "metadata.json").read_text()
        )
        for path in ("studies", "events", "runs", "runs/walk-1/events"):
            walk.open(path)
            walk.look_at(path.replace("/", "-"))
        assert all("400 (Bad Request)" in fault for fault in browser.faults), browser.faults  # the two wrong forms
        print("first paint:", {path: round(seconds, 2) for path, seconds in walk.paints.items()})
        wait_for("TensorBoard has the end", lambda: f"final/{JUDGED}" in scalars(sunk[0]))
        wait_for("MLflow has the end", lambda: next(sunk[1].glob("*/*/artifacts/report.html"), None))
        metrics = {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{address}metrics").text)
            for sample in family.samples
        }
        assert metrics["fedneuro_superlink_up",] == 1 and metrics["fedneuro_site_online", "train", "north"] == 1
        assert metrics["fedneuro_run_status", "walk-1", "complete"] == 1
