# SPDX-License-Identifier: Apache-2.0
"""A consortium on disk: keys that stay sealed, certificates as the standard wants them, invitations, bad input."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.verification import PolicyBuilder, Store

from fedneuro.privacy.contract import Role
from fedneuro.privacy.enrolment import encode, read_invitation, token_hash
from fedneuro.privacy.errors import BadInput, EnvironmentProblem, FedNeuroError, Refused, StateError
from fedneuro.privacy.identity import fingerprint, new_key, public_pem
from fedneuro.privacy.processes import claim_port
from fedneuro.server import sealed_keys
from fedneuro.server.authority import Authority, serial_text
from fedneuro.server.consortium import ROOT_KEY, Consortium, create_consortium
from fedneuro.server.guard import bindings, publish
from fedneuro.server.invitations import MAX_LIFETIME, invite, lifetime, write_qr
from fedneuro.server.limits import MAX_ADDRESSES, Doorkeeper, TooMany, peer_address
from fedneuro.server.registry import CertificateRecord, Registry
from fedneuro.server.registry_tables import metadata
from fedneuro.server.sealed_keys import Passphrase, open_key, seal_key
from fedneuro.server.supervisor import serve

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[[Path], Consortium]) -> Consortium:
    return make_consortium(tmp_path_factory.mktemp("consortium") / "c")


def enrolled(consortium: Consortium, passphrase: Passphrase, site: str) -> x509.Certificate:
    """A certificate for ``site``, without a SuperLink."""
    issuer = consortium.unlock(passphrase)
    invitation, _ = invite(consortium, site, Role.TRAIN, HOUR)
    certificate = issuer.current.site(new_key().public_key(), site)
    record = issuer.record(certificate, site)
    consortium.registry.enrol(token_hash(invitation.token), public_pem(new_key()).decode(), 7, record)
    return certificate


# -- certificates ------------------------------------------------------------------------------------------


def test_an_independent_verifier_accepts_the_chains(consortium: Consortium, passphrase: Passphrase) -> None:
    """The path validation of ``cryptography`` (RFC 5280 with the profile of the CA/Browser Forum)."""
    server = x509.load_pem_x509_certificates((consortium.folder / "tls" / "server.crt").read_bytes())
    policy = PolicyBuilder().store(Store([consortium.root]))
    verified = policy.build_server_verifier(x509.DNSName("localhost")).verify(server[0], server[1:])
    assert [fingerprint(part) for part in verified] == [fingerprint(part) for part in (*server, consortium.root)]
    for name in ("coordinator.example.org", "north"):
        with pytest.raises(x509.verification.VerificationError):
            policy.build_server_verifier(x509.DNSName(name)).verify(server[0], server[1:])
    site = consortium.unlock(passphrase).current.site(new_key().public_key(), "north")
    with pytest.raises(x509.verification.VerificationError):  # a hospital cannot pose as the server
        policy.build_server_verifier(x509.DNSName("north")).verify(site, server[1:])


def test_a_certificate_does_not_outlive_its_issuer() -> None:
    root = Authority.root("short", path_length=0, lifetime=HOUR)
    leaf = root.site(new_key().public_key(), "north")
    assert leaf.not_valid_after_utc <= root.certificate.not_valid_after_utc


def test_serial_numbers_are_written_as_nginx_writes_them() -> None:
    root = Authority.root("serials", path_length=0)
    seen = {serial_text(root.site(new_key().public_key(), "north")) for _ in range(20)}
    assert len(seen) == 20 and all(len(text) % 2 == 0 and text == text.upper() for text in seen)


def test_only_pairs_that_hold_are_bound_and_all_others_are_on_the_list(
    consortium: Consortium, passphrase: Passphrase
) -> None:
    stays, goes = (enrolled(consortium, passphrase, name) for name in ("stays", "goes"))
    consortium.registry.revoke("goes")
    publish(consortium, consortium.unlock(passphrase))
    moved, again = (enrolled(consortium, passphrase, "moves") for _ in range(2))  # its first certificate ended
    text = bindings(consortium)
    assert serial_text(stays) in text and serial_text(goes) not in text
    assert serial_text(again) in text and serial_text(moved) not in text
    issuing = next(consortium.issuing())[1]
    content = (consortium.folder / "guard" / "revoked.pem").read_bytes()
    lists = [
        x509.load_pem_x509_crl(part + b"-----END X509 CRL-----\n")
        for part in content.split(b"-----END X509 CRL-----\n")[:-1]
    ]
    assert [found.issuer for found in lists] == [issuing.subject, consortium.root.subject]
    key = issuing.public_key()
    assert lists[0].is_signature_valid(key)  # type: ignore[arg-type]
    assert lists[0].get_revoked_certificate_by_serial_number(goes.serial_number) is not None
    assert lists[0].get_revoked_certificate_by_serial_number(stays.serial_number) is None
    with pytest.raises(BadInput, match=r"there is no site 'nobody'; known: .*stays"):
        consortium.registry.revoke("nobody")


def test_rotation_keeps_what_was_signed_unless_it_is_taken_back(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], passphrase: Passphrase, root_passphrase: Passphrase
) -> None:
    made = make_consortium(tmp_path / "c")
    root_key = tmp_path / "c.root.json"
    first = enrolled(made, passphrase, "north")
    server = (made.folder / "tls" / "server.crt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed_keys, "_SCRYPT_N", 2**14)
        assert made.replace_issuing(root_key, root_passphrase, passphrase, take_back=False) == 2
        issuer = made.unlock(passphrase)
        assert sorted(issuer.authorities) == [1, 2] and issuer.number == 2
        first.verify_directly_issued_by(issuer.authorities[1].certificate)
        made.renew_server(issuer)
        assert (made.folder / "tls" / "server.crt").read_bytes() != server
        assert made.replace_issuing(root_key, root_passphrase, passphrase, take_back=True) == 3
    (site,), (record,) = made.registry.sites(), made.registry.certificates()
    assert site.expires == 0 and record.revoked is not None and serial_text(first) not in bindings(made)
    assert sorted(made.unlock(passphrase).authorities) == [3]
    other = make_consortium(tmp_path / "other")
    with pytest.raises(BadInput, match="root key of another consortium"):
        other.replace_issuing(root_key, root_passphrase, passphrase, take_back=False)
    with pytest.raises(EnvironmentProblem, match=r"lost.json: the root key is not there; bring the file back"):
        made.replace_issuing(tmp_path / "lost.json", root_passphrase, passphrase, take_back=False)


# -- keys at rest ------------------------------------------------------------------------------------------


def test_keys_are_sealed_and_a_changed_file_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passphrase: Passphrase
) -> None:
    monkeypatch.setattr(sealed_keys, "_SCRYPT_N", 2**14)
    key, path = new_key(), tmp_path / "key.json"
    seal_key(path, key, "a key", passphrase.get())
    opened = open_key(path, passphrase)
    assert isinstance(opened, EllipticCurvePrivateKey) and opened.private_numbers() == key.private_numbers()
    assert path.stat().st_mode & 0o077 == 0
    good = json.loads(path.read_text())
    flipped = base64.b64encode(
        bytes([base64.b64decode(good["ciphertext"])[0] ^ 1]) + base64.b64decode(good["ciphertext"])[1:]
    )
    for change in ({"holds": "another key"}, {"ciphertext": flipped.decode()}, {"n": 2**15}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(BadInput, match="wrong passphrase for the issuing key, or the file was changed"):
            open_key(path, passphrase)
    path.write_text(json.dumps({**good, "n": 2}))  # a cost of nothing is not obeyed
    with pytest.raises(BadInput, match="is not a key"):
        open_key(path, passphrase)
    path.chmod(0o640)
    with pytest.raises(BadInput, match="can be read by others"):
        open_key(path, passphrase)


def test_no_private_key_lies_open_but_the_servers(consortium: Consortium) -> None:
    found = [path for path in consortium.folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert [path.name for path in found] == ["server.key"]


def test_where_a_passphrase_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    with pytest.raises(BadInput, match=r"no passphrase for x: set SOME_VARIABLE, give --passphrase-file"):
        Passphrase("x", "SOME_VARIABLE").get()
    monkeypatch.setenv("SOME_VARIABLE", "short")
    with pytest.raises(BadInput, match="too short: at least 12"):
        Passphrase("x", "SOME_VARIABLE").get(new=True)
    reading, writing = os.pipe()
    os.write(writing, b"from a descriptor\n")
    os.close(writing)
    given = Passphrase("x", "SOME_VARIABLE", descriptor=reading)
    assert given.get() == given.get() == "from a descriptor", "for as many keys as it opens"
    os.close(reading)
    path = tmp_path / "passphrase"
    path.write_text("from a file\n")
    path.chmod(0o644)
    with pytest.raises(BadInput, match="can be read by others"):
        Passphrase("x", "SOME_VARIABLE", path).get()


# -- state store -------------------------------------------------------------------------------------------


def test_the_steps_of_the_schema_lead_to_the_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    Registry(url).close()
    Registry(url).close()  # opened again: nothing to do
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_token_is_good_for_one_of_two_who_use_it_at_once(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'state.db'}")
    one_of_four_enrols(registry)
    registry.close()


def one_of_four_enrols(registry: Registry) -> None:
    """Four use one token in the same moment."""
    registry.invite("race", Role.TRAIN, "0" * 64, int(time.time()) + 60)
    outcomes: list[str] = []
    start = threading.Barrier(4)

    def use(number: int) -> None:
        record = CertificateRecord(f"{number:02}", "race", 1, int(time.time()) + 60, "pem")
        start.wait()
        try:
            registry.enrol("0" * 64, "key", number, record)
            outcomes.append("enrolled")
        except Refused:
            outcomes.append("refused")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["enrolled", "refused", "refused", "refused"]
    assert len(registry.certificates()) == 1


@pytest.mark.parametrize(
    ("url", "kind", "says"),
    [
        ("nonsense", BadInput, "is not a database URL; write sqlite:///"),
        ("mysql://u@h/d", BadInput, "'mysql' is not supported"),
        ("sqlite://", BadInput, "names no file, and would forget all sites"),
        ("postgresql+psycopg2://u:secret@127.0.0.1/d", EnvironmentProblem, "needs the driver psycopg2"),
        ("sqlite:////nowhere/at/all/state.db", EnvironmentProblem, "cannot be opened.*correct the URL"),
    ],
)
def test_a_wrong_database_is_one_line_without_its_password(url: str, kind: type[FedNeuroError], says: str) -> None:
    with pytest.raises(kind, match=says) as refused:
        Registry(url)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


# -- invitations -------------------------------------------------------------------------------------------


def test_an_invitation_is_kept_as_a_hash(consortium: Consortium, tmp_path: Path) -> None:
    invitation, path = invite(consortium, "kept", Role.HELDOUT, HOUR)
    assert read_invitation(path) == invitation and invitation.role is Role.HELDOUT
    assert path.stat().st_mode & 0o077 == 0
    text = write_qr(invitation, tmp_path / "code.png")
    assert (tmp_path / "code.png").read_bytes().startswith(b"\x89PNG") and len(text.splitlines()) > 40
    stored = [p for p in consortium.folder.glob("state.db*") if invitation.token.encode() in p.read_bytes()]
    assert stored == []
    again, _ = invite(consortium, "kept", Role.HELDOUT, HOUR)
    with pytest.raises(Refused):  # the later one replaces the earlier
        consortium.registry.invited(token_hash(invitation.token), "kept")
    assert consortium.registry.invited(token_hash(again.token), "kept") is Role.HELDOUT


@pytest.mark.parametrize("name", ["../north", "a/b", ".hidden", "", "a\nb", "x" * 65, "a b", "-rf", "nörd", "a\0"])
def test_a_sites_name_is_never_a_path(consortium: Consortium, name: str) -> None:
    before = sorted(consortium.folder.rglob("*"))
    with pytest.raises(BadInput, match="letters, digits"):
        invite(consortium, name, Role.TRAIN, HOUR)
    assert sorted(consortium.folder.rglob("*")) == before


def test_names_that_differ_in_capitals_only_are_one(consortium: Consortium) -> None:
    invite(consortium, "Capital", Role.TRAIN, HOUR)
    with pytest.raises(Refused, match="differs in capitals only"):
        invite(consortium, "capital", Role.TRAIN, HOUR)


def test_lifetimes() -> None:
    assert [lifetime(text) for text in ("30m", "12h", "7d")] == [timedelta(minutes=30), HOUR * 12, timedelta(days=7)]
    for text in ("", "7", "0d", "-1d", "7 d", "9999d", f"{MAX_LIFETIME.days + 1}d"):
        with pytest.raises(BadInput, match="write a number and m, h or d"):
            lifetime(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expires": 1}, "expired on 1970-01-01"),
        ({"fingerprint": "0" * 64}, "the file was changed"),
        ({"authority": "AAAA"}, "not a certificate"),
        ({"site": "../up"}, "is not an invitation"),
        ({"more": 1}, "is not an invitation"),
        ({"token": "short"}, "is not an invitation"),
    ],
)
def test_a_wrong_invitation_is_refused_before_anything_is_sent(
    consortium: Consortium, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    invitation, _ = invite(consortium, "changed", Role.TRAIN, HOUR)
    path = tmp_path / "invitation.json"
    path.write_text(json.dumps({**json.loads(encode(invitation)), **change}))
    with pytest.raises(BadInput, match=says):
        read_invitation(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="is not an invitation"):
        read_invitation(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_invitation(tmp_path / "absent.json")


# -- limits ------------------------------------------------------------------------------------------------


def test_the_doorkeeper_counts_each_address_for_itself() -> None:
    clock = [0.0]
    door = Doorkeeper(calls=3, failures=2, window=60, lockout=900, clock=lambda: clock[0])
    for _ in range(3):
        door.admit("a")
    with pytest.raises(TooMany, match="at most 3 in 60 s"):
        door.admit("a")
    door.admit("b")
    clock[0] = 60.0
    door.admit("a")
    assert [door.failed("b"), door.failed("b")] == [False, True]
    clock[0] = 959.0
    with pytest.raises(TooMany, match="wait 1 s"):
        door.admit("b")
    clock[0] = 960.0
    door.admit("b")
    assert door.failed("b") is False  # an old failure is forgotten


def test_the_doorkeepers_memory_is_bounded() -> None:
    door = Doorkeeper(calls=1)
    for number in range(MAX_ADDRESSES + 50):
        door.admit(str(number))
    assert len(door._callers) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:4711", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3::9%5D:80", "2001:db8:1:2::/64"),
        ("unix:/x", "unix:/x"),
    ],
)
def test_peer_addresses(peer: str, address: str) -> None:
    assert peer_address(peer) == address


# -- what is refused ---------------------------------------------------------------------------------------


def test_start_refuses_what_is_not_safe(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], passphrase: Passphrase
) -> None:
    made = make_consortium(tmp_path / "c")
    made.check_secure()
    kept = made.folder / ROOT_KEY
    kept.write_text("{}")
    with pytest.raises(Refused, match="the root key is still on this machine"):
        made.check_secure()
    kept.unlink()
    (made.folder / "tls" / "server.key").chmod(0o644)
    with pytest.raises(BadInput, match=r"server.key: can be read by others"):
        made.check_secure()
    (made.folder / "tls" / "server.key").chmod(0o600)
    issuer = made.unlock(passphrase)
    with Claim(made.settings.ports.renewal), pytest.raises(EnvironmentProblem, match="is in use"):
        serve(made, issuer, lambda _: None)
    for name, remedy in (
        ("tls/server.key", "rotate makes a new one"),
        ("study.json", "make a new consortium"),
        ("ca/issuing-1.json", "rotate --root-key FILE --take-back, and invite"),
    ):
        (made.folder / name).rename(tmp_path / "away")
        with pytest.raises(EnvironmentProblem, match=rf"{name}: is not there; bring it back.*{remedy}"):
            made.check_secure()
        (tmp_path / "away").rename(made.folder / name)
    (made.folder / "ca" / "issuing-1.json").unlink()
    with pytest.raises(EnvironmentProblem, match=r"issuing-1.json: the issuing key is not there.*--take-back"):
        made.unlock(passphrase)
    made.folder.chmod(0o755)
    with pytest.raises(Refused, match="run chmod 700"):
        Consortium(made.folder)


def test_a_consortium_is_made_once(consortium: Consortium, passphrase: Passphrase) -> None:
    with pytest.raises(StateError, match="is not an empty folder"):
        create_consortium(consortium.folder, consortium.settings, passphrase, passphrase)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[superlink]\ninsecure = true", "superlink is not a known key"),
        ("[ports]\ngaurd = 1", "did you mean guard"),
        ("[ports]\nguard = 8000", "the four ports must differ"),
        ('[server]\nhost = "a b"', "server.host"),
        ("[", "is not TOML"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "server.toml").write_text(
        '[consortium]\nname = "x"\n' + ("" if "server" in line else '[server]\nhost = "h"\n') + line
    )
    with pytest.raises(BadInput, match=says) as refused:
        Consortium(tmp_path)
    assert "\n" not in str(refused.value).removeprefix("x")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("start", "--config", "{tmp}"), 2, "fedneuro-server init NAME"),
        (("init", "x", "--out", "{tmp}/new", "--host", "a b"), 2, "server.host"),
        (("init", "x", "--out", "{tmp}/new"), 2, "no passphrase for the root key: set FEDNEURO_ROOT_PASSPHRASE"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path: Path, words: tuple[str, ...], code: int, says: str) -> None:
    command = [str(Path(sys.executable).parent / "fedneuro-server"), *(word.format(tmp=tmp_path) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == code and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "new").exists()


def test_a_program_is_asked_to_end_when_its_parent_is_killed(tmp_path: Path) -> None:
    """nginx has workers that only it can end: SIGTERM, where our own processes get SIGKILL."""
    script = f"trap 'touch {tmp_path}/asked; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    code = (
        "import sys, time; from pathlib import Path; from fedneuro.privacy.processes import Processes\n"
        "Processes(Path(sys.argv[1]), {}).start_program('p', ['bash', '-c', sys.argv[2]]); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), script])
    wait_for(tmp_path / "up")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "asked")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path.name
        time.sleep(0.02)


class Claim:
    """A port that somebody else listens on."""

    def __init__(self, port: int) -> None:
        self.port = claim_port(port)

    def __enter__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", self.port))

    def __exit__(self, *_: object) -> None:
        self.socket.close()
