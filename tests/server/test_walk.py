# SPDX-License-Identifier: Apache-2.0
"""The whole way in a browser, over real processes: invite, enrol, launch, watch, report, release.

``fedneuro-server start`` behind its guard, two hospitals with ``fedneuro-node``, and a Chromium whose mouse and keys
do what a coordinator does (:mod:`tests.server.chromium`). ``FEDNEURO_SCREENSHOTS=DIR`` keeps pictures of every page,
for a desk and a phone, light and dark.
"""

import os
import shutil
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
from tests.server.chromium import Chromium, find_chromium
from tests.server.conftest import PASSPHRASE, free_ports

pytestmark = pytest.mark.walk

BIN = Path(sys.executable).parent
ROUNDS = 4
SITES = {"judge": "heldout", "north": "train"}
SHOTS = os.environ.get("FEDNEURO_SCREENSHOTS", "")
SCREENS = {"desk": (1280, 800, False), "phone": (390, 844, True)}


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
    if shutil.which("nginx") is None:
        text = "nginx is not installed (apt-get install nginx-light): the guard cannot be tried"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    made = make_consortium(tmp_path / "c")
    env = {**os.environ, "FEDNEURO_PASSPHRASE": PASSPHRASE}
    with started([BIN / "fedneuro-server", "start", "--config", made.folder], tmp_path / "start.log", env) as process:
        assert process.stdout is not None and "is up" in process.stdout.readline(), (tmp_path / "start.log").read_text()
        yield made


@contextmanager
def started(command: list[Any], log: Path, env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A command that runs until it is told to stop."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class Walk:
    """What a coordinator sees and does."""

    def __init__(self, browser: Chromium, address: str) -> None:
        self.browser, self.address, self.shots = browser, address, 0

    def open(self, path: str) -> None:
        self.browser.open(self.address + path)

    def sees(self, text: str, seconds: float = 30.0) -> float:
        return self.browser.wait(f"document.body?.innerText.includes({text!r})", seconds)

    def shoot(self, what: str) -> None:
        """Pictures, if they are wanted."""
        if not SHOTS:
            return
        self.shots += 1
        for name, (width, height, mobile) in SCREENS.items():
            for dark in (False, True):
                self.browser.screen(width, height, mobile=mobile, dark=dark)
                wide = self.browser.value("document.documentElement.scrollWidth > innerWidth")
                assert not wide, f"{what} is wider than a {name}"
                folder = Path(SHOTS)
                folder.mkdir(parents=True, exist_ok=True)
                self.browser.shoot(folder / f"{self.shots:02}-{what}-{name}-{'dark' if dark else 'light'}.png")
        self.browser.screen(1280, 800)

    def invite(self, site: str, role: str, downloads: Path) -> Path:
        """Invite ``site``, and save its file."""
        self.open("")
        self.browser.click("#to-invite")
        self.sees("Its name in this consortium")
        self.browser.type("#site", site)
        self.browser.click(f"input[value={role}]")
        self.browser.type("#passphrase", PASSPHRASE)
        self.browser.press("Enter", 13, "\r")
        self.sees("Compare by telephone")
        self.browser.click("#file")
        path = downloads / f"{site}.json"
        wait_for(f"{path.name} is saved", path.is_file)
        return path

    def watch(self, last: int) -> dict[str, float]:
        """When the page of the run first said so, until it says ``complete``: {"round 2 of 4": seconds since 1970}."""
        head = "document.querySelector('#head .status')?.innerText"
        seen: dict[str, float] = {}
        wanted = time.monotonic() + 120
        while "complete" not in seen:
            text = str(self.browser.value(head))
            for name in ("complete", *(f"round {number} of {last}" for number in range(1, last + 1))):
                if name in text:
                    seen.setdefault(name, time.time())
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
        browser = stack.enter_context(Chromium(tmp_path / "profile"))
        browser.screen(1280, 800)
        browser.save_downloads(downloads)
        walk = Walk(browser, address)
        walk.open("")
        walk.sees("No hospital yet")
        browser.wait("performance.getEntriesByName('first-contentful-paint').length === 1")
        assert browser.value("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 1000
        walk.shoot("empty")

        # 1. Both are invited; a wrong passphrase lets nobody in.
        walk.open("invite")
        walk.shoot("invite")
        browser.type("#site", "north")
        browser.type("#passphrase", "not the passphrase")
        browser.click("#invite")
        walk.sees("wrong passphrase for the issuing key")
        assert browser.value("document.getElementById('site').value") == "north"
        assert browser.value("document.getElementById('passphrase').value") == "" and not consortium.registry.sites()
        walk.shoot("invite-wrong")
        files = {site: walk.invite(site, role, downloads) for site, role in SITES.items()}
        browser.click("#code summary")
        browser.wait("document.querySelector('#code svg').clientWidth > 200")
        walk.shoot("invited")
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
            stack.enter_context(started([BIN / "fedneuro-node", "start", "--config", node / "node.toml"], node / "log"))
        walk.sees("has enrolled", 2.0)
        walk.open("")
        walk.sees("2 of 2 hospitals online", 120.0)
        walk.shoot("online")

        # 3. The study is shown, and launched.
        browser.click("#to-launch")
        browser.type("#study", written.replace("rounds = 4", "rounds = 0"))
        browser.click("#check")
        walk.sees("training.rounds = 0")
        walk.shoot("launch-fault")
        browser.type("#study", written)
        browser.click("#check")
        walk.sees("Will be asked whether they join")
        walk.shoot("launch")
        browser.type("#passphrase", PASSPHRASE)
        browser.click("#launch")
        browser.wait("location.pathname === '/runs/walk-1'")

        # 4. Its rounds are watched.
        seen = walk.watch(ROUNDS)
        events = [event for _, event in read_events(find_run(consortium.folder / "runs", "walk-1"))]
        began = {f"round {e.round} of {ROUNDS}": e.at for e in events if e.kind == "round-started"}
        began["complete"] = next(e.at for e in events if e.kind == "finished")
        lags = {name: seen[name] - at for name, at in began.items() if name in seen}
        print("seconds behind:", {name: round(lag, 2) for name, lag in lags.items()})
        assert set(seen) == set(began) and max(lags.values()) < 2.0, (seen, began)
        walk.sees("Privacy spent by round")
        walk.shoot("complete")

        # 5. The report; the release, in the page and as a file that anyone can check.
        browser.click("a[href$='report.html']")
        browser.wait("location.pathname.endsWith('report.html') && document.querySelectorAll('svg').length > 0")
        walk.open("runs/walk-1")
        browser.click("#releasing summary")
        browser.type("#authors", "The walkers")
        browser.type("#release-passphrase", PASSPHRASE)
        browser.click("#make-release")
        walk.sees("The release is being made")
        walk.shoot("releasing")
        walk.sees("made and signed", 120.0)
        walk.shoot("released")
        browser.click("#pack")
        wait_for("the release is saved", (downloads / "walk-1.tar").is_file)
        with tarfile.open(downloads / "walk-1.tar") as pack:
            pack.extractall(tmp_path / "received", filter="data")
        said = call(server_cli.app, "verify", tmp_path / "received" / "walk-1", "--key", consortium.study_key)
        assert (
            "verified: " in said
            and "The walkers"
            in (tmp_path / "received" / "walk-1" / "bundle" / "walk" / "configs" / "metadata.json").read_text()
        )
        for path in ("studies", "events", "runs", "runs/walk-1/events"):
            walk.open(path)
            walk.shoot(path.replace("/", "-"))
        assert all("400 (Bad Request)" in fault for fault in browser.faults), browser.faults  # the two wrong forms
        metrics = {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{address}metrics").text)
            for sample in family.samples
        }
        assert metrics["fedneuro_superlink_up",] == 1 and metrics["fedneuro_site_online", "train", "north"] == 1
        assert metrics["fedneuro_run_status", "walk-1", "complete"] == 1
