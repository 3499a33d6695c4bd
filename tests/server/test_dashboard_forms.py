# SPDX-License-Identifier: Apache-2.0
"""The dashboard's forms: who may invite, launch and release in a browser, what they are told, and what they are not."""

import io
import re
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedneuro.privacy.contract import Role
from fedneuro.privacy.enrolment import read_invitation, token_hash
from fedneuro.privacy.errors import StateError
from fedneuro.privacy.study_words import describe
from fedneuro.server.consortium import Consortium
from fedneuro.server.dashboard.app import create_app
from fedneuro.server.dashboard.home import Home
from fedneuro.server.dashboard.jobs import Jobs
from fedneuro.server.dashboard.pack import tar_of
from fedneuro.server.dashboard.security import PASSWORD_FILE, Door, Password
from fedneuro.server.dashboard.serve import LOOPBACK
from fedneuro.server.events import Event
from fedneuro.server.registry import CertificateRecord
from tests.server.conftest import PASSPHRASE
from tests.server.staged import DAY, Staged, enrolled
from tests.server.test_dashboard import EVIL, SITES, Page, page
from tests.server.test_rounds import study_of

WRONG = "not the passphrase"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it asks for the successor of httpx
    from fastapi.testclient import TestClient


@pytest.fixture
def consortium(tmp_path: Path, make_consortium: Callable[[Path], Consortium]) -> Consortium:
    return make_consortium(tmp_path / "c")


@pytest.fixture
def dashboard(consortium: Consortium) -> Iterator[Callable[[], TestClient]]:
    """Gives browsers of one dashboard."""
    home, jobs = Home(consortium.folder), Jobs()
    app = create_app(home, Door(Password(consortium.folder / PASSWORD_FILE)), LOOPBACK, jobs)
    yield lambda: TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    jobs.close()
    home.close()


def post(client: TestClient, path: str, form: str = "", **fields: str) -> tuple[int, str]:
    """Fill in the form on the page ``form``; the code, and where it leads or what it says."""
    token = page(client, form or path).token
    answer = client.post(path, data={"token": token, **fields})
    return answer.status_code, answer.headers.get("location") or Page(answer.text).text


def test_an_invitation_is_for_the_session_that_made_it(
    consortium: Consortium, dashboard: Callable[[], TestClient]
) -> None:
    client, other = dashboard(), dashboard()
    assert client.post("/invite", data={"site": "north", "role": "train", "expires": "7d"}).status_code == 403
    wanted = {"role": "heldout", "expires": "7d", "passphrase": PASSPHRASE}
    for fields, said in (
        ({"site": "north", "passphrase": ""}, "give the passphrase"),
        ({"site": "north", "passphrase": WRONG}, "wrong passphrase for the issuing key"),
        ({"site": "../north"}, "letters, digits"),
        ({"site": EVIL}, "letters, digits"),
        ({"site": "north", "role": "both"}, "choose whether the hospital trains"),
        ({"site": "north", "expires": "99d"}, "at most 60d"),
    ):
        code, text = post(client, "/invite", **{**wanted, **fields})
        assert code == 400 and said in text and PASSPHRASE not in text
    assert consortium.registry.sites() == [] and not list((consortium.folder / "invitations").iterdir())
    assert post(client, "/invite", site=" north ", **wanted) == (303, "/invitations/north")
    own, seen = page(client, "/invitations/north"), page(other, "/invitations/north")
    made = read_invitation(consortium.folder / "invitations" / "north.json")
    assert made.fingerprint[:32] in own.text and "svg" in {tag for tag, _ in own.tags}
    assert "made elsewhere" in seen.text and "svg" not in {tag for tag, _ in seen.tags}
    assert client.get("/invitations/north/file").json()["token"] == made.token
    assert other.get("/invitations/north/file").status_code == 404 and made.token not in other.get("/").text
    assert client.get("/invitations/south").status_code == client.get("/invitations/..%2fx/file").status_code == 404
    assert (consortium.folder / "invitations" / "north.png").stat().st_mode & 0o077 == 0
    assert "north invited as heldout" in page(other, "/events").text

    certificate = CertificateRecord(serial="1", site="north", issuer=1, not_after=int(time.time()) + DAY, pem="")
    consortium.registry.enrol(token_hash(made.token), "key", 7, certificate)
    for browser in (client, other):
        assert "has enrolled" in page(browser, "/invitations/north").text
    assert client.get("/invitations/north/file").status_code == 404


def test_guessing_the_passphrase_is_locked_out(consortium: Consortium, dashboard: Callable[[], TestClient]) -> None:
    client, wanted = dashboard(), {"site": "north", "role": "train", "expires": "1d"}
    codes = [post(client, "/invite", **wanted, passphrase=f"guess {number}")[0] for number in range(5)]
    assert codes == [400, 400, 400, 400, 429]
    code, text = post(client, "/invite", **wanted, passphrase=PASSPHRASE)
    assert code == 429 and "too many failed attempts" in text and consortium.registry.sites() == []


def test_a_study_is_shown_before_it_is_signed(consortium: Consortium, dashboard: Callable[[], TestClient]) -> None:
    study = study_of(privacy={"mode": "local", "epsilon": 8.0}, evaluation={"heldout": ["HT"]})
    client, text = dashboard(), describe(study)
    code, said = post(client, "/launch", study="[study\nname=", do="check")
    assert code == 400 and "study:1" in said
    code, said = post(client, "/launch", study=f"</textarea>{EVIL}", do="check")
    assert code == 400 and "</textarea>" in said
    code, said = post(client, "/launch", study=re.sub(r"rounds = \d+", "rounds = 0", text), do="check")
    assert code == 400 and "training.rounds = 0" in said and "[training]" in said
    code, said = post(client, "/launch", study=text, do="check")
    assert code == 200 and study.hash in said and "no hospital is enrolled yet" in said and "Sign and" not in said
    enrolled(consortium, "HT", Role.HELDOUT)
    enrolled(consortium, "CS")
    code, said = post(client, "/launch", study=text, do="check")
    assert code == 200 and said.index("HT held out") < said.index("CS trains") and "ε at most 8" in said
    assert "up to ε = 0.1" in said and "Sign and launch" in said and "min_sites" in said
    code, said = post(client, "/launch", study=text, do="launch", seen="0" * 64, passphrase=PASSPHRASE)
    assert code == 400 and "was changed since it was shown" in said and study.hash in said
    code, said = post(client, "/launch", study=text, do="launch", seen=study.hash, passphrase=WRONG)
    assert code == 400 and "wrong passphrase" in said and study.hash in said
    code, said = post(client, "/launch", study=text, do="launch", seen=study.hash, passphrase=PASSPHRASE)
    assert code == 503 and "consortium test is not running; run fedneuro-server start" in said
    assert not (consortium.folder / "runs").exists()
    token = page(client, "/launch").token
    assert client.post("/launch", data={"token": token, "study": "x" * 300_000}).status_code == 400
    assert client.post("/launch", data={"study": text, "do": "launch", "passphrase": PASSPHRASE}).status_code == 403


def test_what_can_be_made_of_a_run(consortium: Consortium, dashboard: Callable[[], TestClient]) -> None:
    run = Staged(consortium.folder / "runs", SITES)
    client, name = dashboard(), run.folder.name
    where = f"/runs/{name}"
    with run.folder.hold():
        run.begin()
        run.round(1)
        assert "Write report" not in page(client, where).text
        assert post(client, f"{where}/report", where)[0] == 409
    assert "Write report" in page(client, where).text and "Release" not in page(client, where).text
    code, said = post(client, f"{where}/release", where, passphrase=PASSPHRASE)
    assert code == 409 and "only a complete run can be released" in said
    run.tell(Event(kind="finished", values={"selected_round": 1}))
    assert "Release …" in page(client, where).text and client.get(f"{where}/release.tar").status_code == 404
    code, said = post(client, f"{where}/release", where, passphrase=WRONG)
    assert code == 400 and "wrong passphrase" in said
    code, said = post(client, f"{where}/release", where, passphrase=PASSPHRASE, authors="a\x07b")
    assert code == 400 and "printable" in said
    (consortium.folder / "releases" / name).mkdir(parents=True)
    (consortium.folder / "releases" / name / "release.json").write_text("{}")
    assert "made and signed" in page(client, where).text
    code, said = post(client, f"{where}/release", "/invite", passphrase=PASSPHRASE)
    assert code == 409 and "is there already" in said
    with tarfile.open(fileobj=io.BytesIO(client.get(f"{where}/release.tar").content)) as pack:
        assert pack.getnames() == [f"{name}/release.json"]


def test_work_in_a_process_of_its_own(tmp_path: Path) -> None:
    jobs = Jobs()
    jobs.start("report", "t-1", ["report", str(tmp_path / "nothing")], "secret")
    job = jobs.find("report", "t-1")
    assert job is not None and job.running
    with pytest.raises(StateError, match="the report of run t-1 is being made"):
        jobs.start("release", "t-2", [])
    deadline = time.monotonic() + 30
    while (job := jobs.find("report", "t-1")) and job.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job is not None and not job.running and "nothing" in job.fault and "\n" not in job.fault
    jobs.close()


def test_a_folder_as_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    for name, content in {"a": b"", "b/c": b"x" * 512, f"b/{'d' * 150}": b"y" * 2_000_001}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("/etc/passwd")
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar_of(folder)))) as pack:
        pack.extractall(tmp_path / "out", filter="data")
    found = {
        path.relative_to(tmp_path / "out" / "pack").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == {"a", "b/c", f"b/{'d' * 150}"}
    assert (tmp_path / "out" / "pack" / "b" / ("d" * 150)).read_bytes() == b"y" * 2_000_001
