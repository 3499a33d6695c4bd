# SPDX-License-Identifier: Apache-2.0
"""The dashboard: who may see it, what it says, that nothing in it can be made to run, and that it is live."""

import re
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import BadInput, EnvironmentProblem, Refused
from fedneuro.server import cli
from fedneuro.server.cli_consortium import _beside
from fedneuro.server.consortium import Consortium
from fedneuro.server.dashboard import security
from fedneuro.server.dashboard.app import create_app
from fedneuro.server.dashboard.home import Home
from fedneuro.server.dashboard.jobs import Jobs
from fedneuro.server.dashboard.security import PASSWORD_FILE, Door, Password
from fedneuro.server.dashboard.serve import LOOPBACK, check_open, serve
from fedneuro.server.events import Event
from fedneuro.server.limits import Doorkeeper
from fedneuro.server.run_folder import Plan, RunFolder
from fedneuro.server.sealed_keys import Passphrase
from fedneuro.server.supervisor import serve as supervise
from tests.finished_run import finished_run
from tests.server.browser import PHONE, Browser, find_chromium
from tests.server.conftest import free_ports
from tests.server.staged import Staged, enrolled
from tests.server.test_consortium import Claim
from tests.server.test_rounds import Sites, study_of
from tests.server.test_run_view import execute, launched

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it asks for the successor of httpx
    from fastapi.testclient import TestClient

EVIL = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>"
SITES = {"HT": "heldout", "CS": "train", "DU": "train"}
PRIVATE: dict[str, dict[str, object]] = {"privacy": {"mode": "local", "epsilon": 8.0}}
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Visible text and tags of a page in which nothing can run but our own script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(html)
        for tag, attributes in self.tags:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
            assert tag != "script" or attributes == {"src": "/static/dashboard.js", "defer": None}
            assert tag not in ("style", "iframe", "object", "embed", "img", "base")
            for name in ("href", "src", "action"):
                assert str(attributes.get(name, "/")).startswith(("/", "#")), "it leaves the page"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    @property
    def token(self) -> str:
        return next(str(a["value"]) for tag, a in self.tags if tag == "input" and a.get("name") == "token")


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_SCRYPT_N", 2**14)


@pytest.fixture
def consortium(tmp_path: Path, make_consortium: Callable[[Path], Consortium]) -> Consortium:
    return make_consortium(tmp_path / "c")


@pytest.fixture
def browse() -> Iterator[Callable[..., TestClient]]:
    """A browser of the dashboard of a folder."""
    opened: list[Home] = []

    def browse(folder: Path, **options: Any) -> TestClient:
        opened.append(home := Home(folder))
        door = Door(Password(folder / PASSWORD_FILE), **options)
        app = create_app(home, door, LOOPBACK, Jobs())
        return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)

    yield browse
    for home in opened:
        home.close()


def page(client: TestClient, path: str, code: int = 200) -> Page:
    response = client.get(path)
    assert response.status_code == code, response.text
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and response.headers["x-frame-options"] == "DENY"
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
    return Page(response.text)


# -- what it says ------------------------------------------------------------------------------------------


def test_a_consortium_at_a_glance(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    enrolled(consortium, "CS")
    enrolled(consortium, "DU", days=9)
    enrolled(consortium, "HT", Role.HELDOUT, days=-1)
    consortium.registry.invite("new", Role.TRAIN, "h" * 64, int(time.time()) + 99)
    client = browse(consortium.folder)
    text, deadline = page(client, "/").text, time.monotonic() + 10
    while "is not running" not in text:  # it is asked beside the page
        assert time.monotonic() < deadline
        text = page(client, "/").text
    assert "3 hospitals enrolled" in text and "1 invited, not enrolled yet" in text
    assert "The coordinator is not running" in text and text.count("not known") == 3
    assert "Certificates end soon or have ended: HT, DU" in text
    assert (
        text.index("HT held out") < text.index("DU not known") < text.index("CS not known") < text.index("new invited")
    )
    assert re.search(r"ended \d{4}-\d\d-\d\d", text) and "9 days left" in text and "issuing 1" in text
    assert "No study was launched yet" in page(client, "/studies").text and "No run yet" in page(client, "/runs").text
    events = page(client, "/events").text
    assert events.index("DU enrolled") < events.index("CS enrolled") < events.index("created test")
    assert "there is no such page" in page(client, "/nothing", 404).text
    assert "there is no run 'x'" in page(client, "/runs/x", 404).text


def test_a_run_as_it_goes(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    run = Staged(consortium.folder / "runs", {**SITES, "EX": "train"}, **PRIVATE, strategy={"min_sites": 1})
    client, path = browse(consortium.folder), f"/runs/{run.folder.name}"
    assert "queued" in page(client, path).text
    with run.folder.hold():
        run.begin(EX="study-not-approved")
        run.round(1)
        run.round(2, DU="timeout")
        run.start_round(3)
        run.train(3, "CS")
        seen = page(client, path)
        text = seen.text
        assert "running round 3 of 8" in text and "1 of 3 have trained in this round" in text
        assert "2 of 4 sites, EX missing since the start, DU missing since round 2" in text
        assert "missing since round 2: timeout (the hospital did not answer in time)" in text
        table = text[text.index("last heard") : text.index("Curves")]
        assert re.findall(r"\b(HT|CS|DU|EX)\b", table) == ["HT", "DU", "EX", "CS"]
        assert text.index("Hospitals that never train") < text.index("0.60 Dice") < text.index("Curves")
        assert "0.60 Dice 95 % interval 0.54–0.66 ε ≤ 2.70, δ = 0.001 per patient" in text
        assert "Dice by round" in text and "Privacy spent by round" in text and "Training loss" not in text
        meters = {a["aria-label"]: a["value"] for tag, a in seen.tags if tag == "meter"}
        assert meters["CS: ε 2.70 of 8"] == "2.7" and "2.70 of 8" in text
        assert "round 3: CS trained in 2.0 s, ε 2.700 so far" in text
        studies = page(client, "/studies").text
        assert "3 of 4 hospitals join" in studies and "EX refuses: study-not-approved" in studies
        assert "HT held out joins, 40 patients declared" in studies and "local, ε at most 8 per patient" in studies
        again = client.get(path)
        assert client.get(path, headers={"If-None-Match": again.headers["etag"]}).status_code == 304
    assert "interrupted" in page(client, path).text and "had not finished" not in page(client, path).text
    assert "queued" not in page(client, "/").text and "interrupted" in page(client, "/runs").text


def test_a_real_run_and_its_files(tmp_path: Path, browse: Callable[..., TestClient]) -> None:
    study = study_of()
    execute(launched(tmp_path / "runs", study), Sites())
    client = browse(tmp_path / "runs")
    assert client.get("/").headers["location"] == "/runs"
    text = page(client, "/runs/t-1").text
    assert "complete round 3 of 3" in text and "round 3 selected" in text and "makes no privacy promise" in text
    assert "Training loss by round" in text and "0.50 Dice" in text and "Resume" not in text and "Stop" not in text
    alone = browse(finished_run(tmp_path / "alone", study, finish=True))
    assert alone.get("/").headers["location"] == "/runs/alone"
    text = page(alone, "/runs/alone").text
    assert "Report" in text and "Manifest" in text
    report = alone.get("/runs/alone/files/report.html")
    assert report.status_code == 200 and report.headers["content-security-policy"].startswith("sandbox; default-src")
    assert alone.get("/runs/alone/files/manifest.json").json()["content"]["format"] == "fedneuro-manifest-1"
    for name in ("model.safetensors", "state%2frun.db", "..%2f..%2fpasswd", "nothing.html"):
        assert alone.get(f"/runs/alone/files/{name}").status_code == 404
    for name in ("..", "%2e%2e", "..%2falone", "alone%00"):
        assert alone.get(f"/runs/{name}").status_code in (303, 404)  # 303: the client itself resolves ..


def test_a_run_that_cannot_be_read_hides_no_other(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    runs = consortium.folder / "runs"
    bad, good = Staged(runs, SITES), Staged(runs, SITES)

    with sqlite3.connect(bad.folder.path / "state" / "run.db") as database:
        database.execute("UPDATE run SET schema_version = 99")
    client = browse(consortium.folder)
    for path in ("/", "/runs", "/studies", "/metrics"):
        assert client.get(path).status_code == 200
    assert good.folder.name in page(client, "/runs").text
    page(client, f"/runs/{bad.folder.name}")


def test_fifty_sites(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    sites = {f"hospital-{number:02}": "heldout" if number in (7, 33) else "train" for number in range(50)}
    for name, role in sites.items():
        enrolled(consortium, name, Role(role))
    run = Staged(consortium.folder / "runs", sites, **PRIVATE, strategy={"min_sites": 10})
    client = browse(consortium.folder)
    with run.folder.hold():
        run.begin()
        run.round(1)
        run.round(2, **{"hospital-20": "timeout"})
        began = time.monotonic()
        seen = page(client, f"/runs/{run.folder.name}")
        assert time.monotonic() - began < 2.0
    table = seen.text[seen.text.index("last heard") : seen.text.index("Curves")]
    rows = re.findall(r"hospital-\d\d", table)
    assert rows[:3] == ["hospital-07", "hospital-33", "hospital-20"] and sorted(rows) == sorted(sites)
    assert len([tag for tag, _ in seen.tags if tag == "meter"]) == 48
    assert page(client, "/").text.count("last contact") == 50


def test_metrics_for_prometheus(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    enrolled(consortium, "CS")
    run = Staged(consortium.folder / "runs", {**SITES, EVIL + "\n\\": "train"}, **PRIVATE, strategy={"min_sites": 1})
    with run.folder.hold():
        run.begin()
        run.round(1)
        answer = browse(consortium.folder).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    name = run.folder.name
    assert found["fedneuro_run_status", name, "running"] == 1 and found["fedneuro_run_status", name, "failed"] == 0
    assert found["fedneuro_run_round", name] == 1 and found["fedneuro_run_rounds", name] == 8
    assert found["fedneuro_run_site_epsilon", name, "CS"] == 0.9 and found["fedneuro_run_epsilon_budget", name] == 8
    assert found["fedneuro_run_site_metric", "dice", "heldout", name, "HT"] == pytest.approx(0.5)
    assert found["fedneuro_run_site_missing", name, EVIL + "\n\\"] == 0
    assert found["fedneuro_superlink_up",] == 0 and found["fedneuro_sites", "enrolled"] == 1
    assert found["fedneuro_site_certificate_end_seconds", "CS"] > time.time()


# -- who may see and do what -------------------------------------------------------------------------------


def test_hostile_names_are_shown_not_run(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    enrolled(consortium, EVIL[:60])
    consortium.registry.note("restarted", EVIL[:60], EVIL)
    description: dict[str, dict[str, object]] = {"study": {"name": "t", "description": EVIL}}
    run = Staged(consortium.folder / "runs", {EVIL: "heldout", "&lt;b&gt;" + EVIL: "train"}, **description)
    with run.folder.hold():
        run.begin()
        run.round(1)
        run.round(2)
        metrics = {"metrics": {EVIL: 0.5}}
        run.tell(
            Event(kind="refused", round=2, site=EVIL, values={"reason": EVIL, "during": EVIL}),
            Event(kind="evaluated", round=2, site=EVIL + "2", values=metrics),
            Event(kind="failed", values={"error": EVIL, "message": EVIL}),
        )
        client, name = browse(consortium.folder), run.folder.name
        for path in ("/", "/studies", "/runs", "/events", f"/runs/{name}", f"/runs/{name}/events"):
            seen = page(client, path)  # which looks for anything that could run
            assert "<img src=x onerror=alert(1)" in seen.text, path
        page(client, "/runs/%3Cscript%3Ealert(1)%3C/script%3E", 404)
        assert "'<script>alert(1)'" in page(client, "/runs/%3Cscript%3Ealert(1)", 404).text


def test_only_this_machines_names(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    client = browse(consortium.folder)
    for host in ("127.0.0.1:8450", "localhost", "LOCALHOST:9", "[::1]:8450"):
        assert client.get("/", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8450", "", "127.0.0.2", "[::1"):
        answer = client.get("/", headers={"host": host})
        assert answer.status_code == 421 and "x-frame-options" in answer.headers and "set-cookie" not in answer.headers


def test_a_form_counts_only_from_our_own_page(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    run = Staged(consortium.folder / "runs", SITES)
    client, name = browse(consortium.folder), run.folder.name
    stop = f"/runs/{name}/stop"

    def asked() -> str | None:
        return run.folder.stop_requested

    with run.folder.hold():
        run.begin()
        cookie = client.get(f"/runs/{name}").headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        token = page(client, f"/runs/{name}").token
        other = page(browse(consortium.folder), f"/runs/{name}").token
        own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
        for fields, headers in (
            ({"when": "now"}, own),
            ({"token": ""}, own),
            ({"token": other}, own),
            ({"token": token}, {"origin": "http://evil.example"}),
            ({"token": token}, {"origin": "null"}),
            ({"token": token}, {"origin": "http://127.0.0.1:81"}),
            ({"token": token}, {"sec-fetch-site": "cross-site"}),
            ({"token": token}, {"sec-fetch-site": "same-site"}),
        ):
            assert client.post(stop, data=fields, headers=headers).status_code == 403 and asked() is None
        assert client.post(stop, json={"token": token}).status_code == 400
        assert client.post(stop, data={"token": token, "x": "y" * 9000}).status_code == 400
        assert client.get(stop).status_code == 405 and asked() is None
        bare = browse(consortium.folder)  # without a session
        assert bare.post(stop, data={"token": token}).status_code == 403 and asked() is None
        done = client.post(stop, data={"token": token, "when": "round"}, headers=own)
        assert done.status_code == 303 and asked() == "round"
        assert "Stops when this round is saved" in page(client, f"/runs/{name}").text
        assert f"stop-asked run {name}, after its round, from the dashboard" in page(client, "/events").text
        assert client.post(stop, data={"token": token, "when": "now"}, headers=own).status_code == 303
        assert asked() == "now"
    answer = client.post(stop, data={"token": token})
    assert answer.status_code == 409 and "is not under way: it is interrupted" in answer.text
    assert "Resume" in page(client, f"/runs/{name}").text
    answer = client.post(f"/runs/{name}/resume", data={"token": token})
    assert answer.status_code == 503 and "consortium test is not running" in answer.text


def test_a_password_where_one_is_set(consortium: Consortium, browse: Callable[..., TestClient]) -> None:
    run = Staged(consortium.folder / "runs", SITES)
    path = consortium.folder / PASSWORD_FILE
    Password(path).set("correct horse")
    assert path.stat().st_mode & 0o077 == 0 and b"correct" not in path.read_bytes()
    client = browse(consortium.folder, doorkeeper=Doorkeeper(calls=100, failures=3))
    pages = ("/", "/runs", "/studies", "/events", f"/runs/{run.folder.name}", f"/runs/{run.folder.name}/files/x")
    for closed in pages:
        answer = client.get(closed)
        assert answer.status_code == 303 and answer.headers["location"] == "/login" and "t-1" not in answer.text
    assert client.get("/static/dashboard.css").status_code == 200
    form = page(client, "/login")
    assert "test" not in form.text  # the consortium's name is for those who are inside
    before = client.cookies["fedneuro"]
    assert client.post("/login", data={"password": "correct horse"}).status_code == 403  # no token
    assert client.post("/runs/t-1/stop", data={"token": form.token}).headers["location"] == "/login"
    wrong = client.post("/login", data={"token": form.token, "password": "battery"})
    assert wrong.status_code == 403 and "the password is wrong" in wrong.text
    right = client.post("/login", data={"token": form.token, "password": "correct horse"})
    assert right.status_code == 303 and client.cookies["fedneuro"] != before
    assert "HttpOnly" in right.headers["set-cookie"] and "SameSite=strict" in right.headers["set-cookie"]
    inside = page(client, "/")
    assert "Log out" in inside.text and client.get("/login").status_code == 303
    client.post("/logout", data={"token": inside.token})
    assert client.get("/").status_code == 303
    assert client.get("/metrics").status_code == 401 and client.get("/metrics", auth=("x", "no")).status_code == 401
    assert client.get("/metrics", auth=("x", "correct horse")).status_code == 200
    form = page(client, "/login")
    locked = client.post("/login", data={"token": form.token, "password": "again"})
    assert locked.status_code == 429
    assert client.post("/login", data={"token": form.token, "password": "correct horse"}).status_code == 429
    path.chmod(0o644)
    other = browse(consortium.folder)
    answer = other.post("/login", data={"token": page(other, "/login").token, "password": "correct horse"})
    assert answer.status_code == 400 and "can be read by others" in answer.text


def test_beyond_this_machine(consortium: Consortium, browse: Callable[..., TestClient], tmp_path: Path) -> None:
    assert check_open("127.0.0.1", consortium, consortium.folder) is False
    with pytest.raises(Refused, match="reaches beyond this machine: set a password first: fedneuro-server dashboard"):
        check_open("0.0.0.0", consortium, consortium.folder)  # noqa: S104
    with pytest.raises(BadInput, match="is not an IP address"):
        check_open("1.2.3.400", consortium, consortium.folder)
    with pytest.raises(BadInput, match="only a consortium has a certificate"):
        check_open("192.0.2.1", None, tmp_path)
    closed = browse(consortium.folder, required=True, secure=True)
    assert closed.get("/").headers["location"] == "/login"
    cookie = closed.get("/login").headers["set-cookie"]
    assert cookie.startswith("__Host-fedneuro=") and "Secure" in cookie


def test_the_command(consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDNEURO_DASHBOARD_PASSPHRASE", "correct horse battery")
    done = CliRunner().invoke(cli.app, ["dashboard", "--config", str(consortium.folder), "--set-password"])
    assert done.exit_code == 0 and "holds the password's hash" in done.stdout
    Password(consortium.folder / PASSWORD_FILE).check("correct horse battery")
    with pytest.raises(Refused, match="wrong"):
        Password(consortium.folder / PASSWORD_FILE).check("correct horse")
    with pytest.raises(BadInput, match=r"is neither a consortium \(server.toml\) nor a run"):
        serve(tmp_path / "nothing")
    (port,) = free_ports(1)
    with Claim(port), pytest.raises(EnvironmentProblem, match=f"port {port} of 127.0.0.1 is in use"):
        serve(consortium.folder, port=port)


def test_two_consortia_on_one_machine(consortium: Consortium, passphrase: Passphrase) -> None:
    ports = consortium.settings.ports.guard, consortium.settings.dashboard.port
    with (
        Claim(ports[1]),
        pytest.raises(EnvironmentProblem, match=rf"port {ports[1]} .* in use .*\[dashboard\] in "),
    ):
        supervise(consortium, consortium.unlock(passphrase), lambda _: None, dashboard=True)
    assert _beside(8443, 8000) == 8450 and _beside(9443, 8000) == 9450  # a second one has a port of its own
    assert _beside(7993, 8000) == 8001 and _beside(65533, 8000) == 65532


# -- in a browser ------------------------------------------------------------------------------------------


def test_a_browser_sees_it_live(consortium: Consortium, tmp_path: Path) -> None:
    find_chromium()
    sites = {f"hospital-{number:02}": "heldout" if number == 7 else "train" for number in range(50)}
    for name, role in sites.items():
        enrolled(consortium, name, Role(role))
    run = Staged(consortium.folder / "runs", sites, **PRIVATE, strategy={"min_sites": 10})
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).parent / "fedneuro-server"), "dashboard", "--home", str(consortium.folder)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/"
        with run.folder.hold(), Browser(phone=True) as browser:
            run.begin()
            run.round(1)
            run.start_round(2)
            done = RunFolder(finished_run(consortium.folder / "runs" / "done-1", study_of()))
            done.write_plan(Plan(launched=time.time() - 99))
            browser.open(address)
            browser.open(address + "runs/done-1/files/report.html")
            assert browser.value("document.querySelectorAll('svg').length") and browser.value("origin") == "null"
            for path in ("", "studies", "runs", "events", "runs/done-1", f"runs/{run.folder.name}"):
                browser.open(address + path)
                assert not browser.is_too_wide(PHONE[0]), f"/{path} is wider than a phone"
            browser.first_paint()
            # By keyboard: to the button that opens the choice of how to stop.
            browser.tab_through("a run under way")
            browser.tab_to("#stop summary")
            browser.press("Enter")
            assert browser.value("document.getElementById('stop').open")
            run.train(2, "hospital-00")
            row = "[...document.querySelectorAll('#sites tr')].find(r => r.innerText.includes('hospital-00'))"
            assert browser.wait(f"{row}.innerText.includes('trained')") < 2.0
            assert browser.value(
                "document.getElementById('stop').open && document.activeElement.localName == 'summary'"
            )
            browser.tab_to("#stop-now")
            browser.press("Enter")
            browser.wait("document.body.innerText.includes('Stops now.')")
            assert run.folder.stop_requested == "now"
            assert browser.faults == []
            server.send_signal(signal.SIGTERM)
            server.wait(20)
            browser.wait("!document.getElementById('link').hidden")
    finally:
        server.kill()
        server.wait(20)
    assert "Traceback" not in (tmp_path / "log").read_text()
