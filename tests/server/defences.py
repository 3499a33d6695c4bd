# SPDX-License-Identifier: Apache-2.0
"""Every defence of a coordinator's doors, and how to switch it off, to see that its test fails then.

    python -m tests.server.defences            each of them, in a copy of the source; 15 minutes, real processes
    python -m tests.server.defences NAME …     some
    python -m tests.server.defences --table    the rows of docs/threats.md

``test_defences.py`` keeps list, source and document together; ``tests/client/defences.py`` are the node's.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.client.defences import _FINDER, _ROOMS, ROOT

__all__ = ["DEFENCES", "ROOT", "Defence", "rows"]


@dataclass(frozen=True, slots=True)
class Defence:
    """One defence.

    Attributes:
        attack: what somebody tries; with a dot where it is also tried during a study.
        stops: what stops it, and where.
        answer: what is answered.
        seen: where the coordinator sees it.
        tests: in tests/server; at least one fails without it.
        change: file, text that stands there once, and what stands there without the defence.
    """

    attack: str
    stops: str
    answer: str
    seen: str
    tests: tuple[str, ...]
    change: tuple[str, str, str]


START, STORE, WEB = "test_coordinator_start.py::test_", "test_consortium.py::test_", "test_dashboard.py::test_"
SIEGE = "test_launch.py::test_a_study_goes_on_while_everybody_attacks"
_OUTSIDE = START + "without_a_certificate_of_ours_there_is_no_way_in"
_PATHS = START + "a_hospital_reaches_the_fleet_paths_and_nothing_else"
_NOTHING = START + "what_enrolment_refuses_changes_nothing"
_PAIRS = STORE + "only_pairs_that_hold_are_bound_and_all_others_are_on_the_list"
_HOSTS, _FORMS = WEB + "only_this_machines_names", WEB + "a_form_counts_only_from_our_own_page"
_ACCESS, _LOG = "guard/access.log", "`start`'s log"

DEFENCES: dict[str, Defence] = {
    # -- the guard
    "client-certificates": Defence(
        "● no certificate; another authority's; one that has expired",
        "nginx asks for one of ours in every handshake (`server/guard.py`)", "400", _ACCESS, (_OUTSIDE,),
        ("server/guard.py", "ssl_verify_client on;", "ssl_verify_client optional_no_ca;"),
    ),
    "pairs": Defence(
        "● a certificate of ours that was never written down; another hospital's Flower key; a signature seen before",
        "certificate and key must be a pair that enrolment wrote down (`server/guard.py`)", "403", _ACCESS,
        (_OUTSIDE, START + "a_signature_helps_nobody_but_its_maker"),
        ("server/guard.py", "if ($bound = 0) {{ return 403; }}", ""),
    ),
    "node-authentication": Defence(
        "● another hospital's node, with one's own signature",
        "Flower's node authentication is on (`server/supervisor.py`)", "401", _ACCESS, (SIEGE,),
        ("server/supervisor.py", ', "--enable-supernode-auth"]', "]"),
    ),
    "paths": Defence(
        "● Control and Runtime from outside; paths around the guard",
        "ten Fleet paths, and nothing else (`server/guard.py`)", "403", _ACCESS, (_PATHS,),
        ("server/guard.py", "location / {{ return 403; }}", "location / {{ proxy_pass https://superlink; }}"),
    ),
    "runner-secret": Defence(
        "● Runtime, from this machine, without the runner's secret",
        "tasks are given out for the secret only (`server/supervisor.py`)", "401", "logs/superlink.log",
        (START + "the_superlink_itself_gives_no_task_away",),
        ("server/supervisor.py", ', "--superexec-auth-secret-file", str(self._secret)]', "]"),
    ),
    "request-size": Defence(
        "● an oversized request", "`guard.max_request_mib` (`server/guard.py`)", "413", _ACCESS, (_PATHS,),
        ("server/guard.py", "client_max_body_size {size}m;", "client_max_body_size 0;"),
    ),
    "request-time": Defence(
        "● slow clients: half a handshake, half a request",
        "10 s for a header, 15 s for a body; meanwhile nothing of Flower is held (`server/guard.py`)", "hung up",
        _ACCESS, (START + "a_client_that_sends_slowly_is_hung_up_on",),
        ("server/guard.py", "client_header_timeout 10s;", "client_header_timeout 3600s;"),
    ),
    # -- revocation: three, each of them enough
    "revoked-pairs": Defence(
        "● a revoked certificate", "has no pair (`server/guard.py`)", "403", f"{_ACCESS}, event `revoked`", (_PAIRS,),
        ("server/guard.py", "if record.revoked is None and", "if"),
    ),
    "revoked-list": Defence(
        "the same", "is on the signed list that nginx reads (`server/consortium.py`)", "400", _ACCESS, (_PAIRS,),
        ("server/consortium.py", "if record.revoked is not None and record.issuer in revoked:", "if False:"),
    ),
    "revoked-node": Defence(
        "the same", "its node is unregistered at once, also in a round (`server/supervisor.py`)", "401", _LOG,
        (START + "from_invitation_to_a_node_at_work_and_out_again",),
        ("server/supervisor.py", "                        self.control.unregister(site.node_id)\n",
         "                        pass\n"),
    ),
    # -- enrolment
    "token-used": Defence(
        "● a token that was used", "one transaction uses it up (`server/registry.py`)", "PERMISSION_DENIED", _LOG,
        (STORE + "a_token_is_good_for_one_of_two_who_use_it_at_once",),
        ("server/registry.py", "free = (invitations.c.token_hash == token_hash) & invitations.c.used.is_(None)",
         "free = invitations.c.token_hash == token_hash"),
    ),
    "token-expired": Defence(
        "a token after its day", "it expires (`server/registry.py`)", "PERMISSION_DENIED", _LOG, (_NOTHING,),
        ("server/registry.py", "or row.expires <= time.time() or", "or"),
    ),
    "token-site": Defence(
        "another site's token", "it is for one site (`server/registry.py`)", "PERMISSION_DENIED", _LOG, (_NOTHING,),
        ("server/registry.py", "row.expires <= time.time() or row.site != site:", "row.expires <= time.time():"),
    ),
    "lockout": Defence(
        "● guessing tokens", "five failures lock an address out for 15 minutes (`server/limits.py`)",
        "RESOURCE_EXHAUSTED", f"{_LOG}, event `locked-out`",
        (START + "guessing_is_locked_out_also_for_the_right_token",),
        ("server/limits.py", "            if len(caller.failures) < self._limits[1]:\n", "            if True:\n"),
    ),
    "site-names": Defence(
        "● a path as a site's name", "one pattern for names (`privacy/identity.py`)", "INVALID_ARGUMENT; exit code 2",
        _LOG, (STORE + "a_sites_name_is_never_a_path",),
        ("server/invitations.py", "if re.fullmatch(SITE_NAME, site) is None:", "if False:"),
    ),
    "certificate-name": Defence(
        "● a certificate for another's name, also at renewal", "the request must ask for its site's name "
        "(`server/authority.py`)", "INVALID_ARGUMENT", _LOG, (_NOTHING, SIEGE),
        ("server/authority.py", "if attributes != [(NameOID.COMMON_NAME, site)]:", "if False:"),
    ),
    "certificate-rights": Defence(
        "a certificate with other rights", "no extension is granted (`server/authority.py`)", "INVALID_ARGUMENT", _LOG,
        (_NOTHING,), ("server/authority.py", "    if extensions:\n", "    if False:\n"),
    ),
    "call-size": Defence(
        "● an oversized call", "gRPC reads 32 KiB (`server/enrolment_service.py`)", "RESOURCE_EXHAUSTED", "–",
        (_NOTHING,),
        ("server/enrolment_service.py", '("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)',
         '("grpc.max_receive_message_length", -1)'),
    ),
    "renewal-tls": Defence(
        "renewal without a certificate", "mTLS (`server/enrolment_service.py`)", "no handshake", "–",
        (START + "renewal_needs_a_client_certificate",),
        ("server/enrolment_service.py", "trusted, require_client_auth=True)", "trusted, require_client_auth=False)"),
    ),
    "renewal-revoked": Defence(
        "renewal with a revoked certificate", "it is looked up (`server/enrolment.py`)", "PERMISSION_DENIED", _LOG,
        (START + "from_invitation_to_a_node_at_work_and_out_again",),
        ("server/enrolment.py", "            and record.revoked is None\n", ""),
    ),
    # -- the dashboard
    "escaping": Defence(
        "script in a site's name, a metric, an error", "templates escape everything (`server/dashboard/pages.py`)",
        "shown as text", "–", (WEB + "hostile_names_are_shown_not_run",),
        ("server/dashboard/pages.py", "autoescape=True,", "autoescape=False,"),
    ),
    "form-token": Defence(
        "a form of another site (CSRF)", "token of the session (`server/dashboard/security.py`)", "403", "–", (_FORMS,),
        ("server/dashboard/security.py",
         'if not hmac.compare_digest(wanted.encode(), form.get("token", "").encode()):', "if False:"),
    ),
    "form-origin": Defence(
        "the same, with the token", "Origin and Sec-Fetch-Site (`server/dashboard/security.py`)", "403", "–", (_FORMS,),
        ("server/dashboard/security.py", 'if where not in ("same-origin", "none"):', "if False:"),
    ),
    "frames": Defence(
        "the page in a frame (clickjacking)", "X-Frame-Options, `frame-ancestors 'none'` "
        "(`server/dashboard/security.py`)", "not shown", "–", (_HOSTS,),
        ("server/dashboard/security.py", '    "x-frame-options": "DENY",\n', ""),
    ),
    "host": Defence(
        "another name for this machine (DNS rebinding)", "the Host header (`server/dashboard/security.py`)", "421",
        "–", (_HOSTS,),
        ("server/dashboard/security.py", "if len(called) != 1 or _name(called[0]) not in self._hosts:", "if False:"),
    ),
}  # fmt: skip


def rows() -> Iterator[str]:
    """The table of docs/threats.md."""
    yield "| somebody tries | what stops it | answer | seen in | test (`tests/server/`) |"
    yield "|---|---|---|---|---|"
    for found in DEFENCES.values():
        tests = ", ".join(f"`{name.replace('.py::test_', ': ').removeprefix('test_')}`" for name in found.tests)
        yield f"| {found.attack} | {found.stops} | {found.answer} | {found.seen} | {tests} |"


def _fails_without(name: str, copy: Path) -> str:
    """Switch one defence off in ``copy``, run its tests, put it back; what failed."""
    found = DEFENCES[name]
    file, old, new = found.change
    text = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:warnings"]
    done = subprocess.run(
        [*command, *(f"tests/server/{test}" for test in found.tests)],
        cwd=copy, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(copy / "finder"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    (copy / file).write_text(text, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    return ", ".join(failed) if done.returncode == 1 else "" if done.returncode == 0 else done.stdout + done.stderr


def main(names: Sequence[str]) -> int:
    """Try the defences of these names, or all; 0 where each of them is needed."""
    useless = 0
    with tempfile.TemporaryDirectory(prefix="fn-defences-") as folder:
        copy = Path(folder)
        for room in (*_ROOMS, "tests"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
        (copy / "finder").mkdir()
        (copy / "finder" / "sitecustomize.py").write_text(_FINDER.format(root=str(copy), rooms=_ROOMS))
        for name in names or DEFENCES:
            failed = _fails_without(name, copy)
            print(f"{name}: {failed or 'NOTHING FAILS'}", flush=True)
            useless += not failed
    return bool(useless)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print("\n".join(rows()))
    else:
        sys.exit(main(sys.argv[1:]))
