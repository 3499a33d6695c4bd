# SPDX-License-Identifier: Apache-2.0
"""Every defence of a coordinator's doors, and how to switch it off, to see that its test fails then.

    python -m tests.server.defences            each of them, in a copy of the source; 15 minutes, real processes
    python -m tests.server.defences NAME …     some
    python -m tests.server.defences --table    the rows of docs/threats.md

How that is done: ``tests/switched_off.py``; the node's are ``tests/client/defences.py``. ``test_defences.py`` keeps
list, source and document together.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.switched_off import anew, main, table

__all__ = ["DEFENCES", "Defence", "rows"]


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

    @property
    def changes(self) -> tuple[tuple[str, str, str], ...]:
        """The change, as one of several."""
        return (self.change,)


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
        "Flower's node authentication is on (`server/superlink.py`)", "401", _ACCESS, (SIEGE,),
        ("server/superlink.py", '"--enable-supernode-auth", ', ""),
    ),
    "paths": Defence(
        "● Control and Runtime from outside; paths around the guard",
        "ten Fleet paths, and nothing else (`server/guard.py`)", "403", _ACCESS, (_PATHS,),
        ("server/guard.py", "location / {{ return 403; }}", "location / {{ proxy_pass https://superlink; }}"),
    ),
    "runner-secret": Defence(
        "● Runtime, from this machine, without the runner's secret",
        "tasks are given out for the secret only (`server/superlink.py`)", "401", "logs/superlink.log",
        (START + "the_superlink_itself_gives_no_task_away",),
        ("server/superlink.py", ', "--superexec-auth-secret-file", str(secret)]', "]"),
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
    "taken-back": Defence(
        "a certificate of an issuing key that the root took back",
        "its pair goes with the key; the root's list has the key (`server/registry.py`)", "400, 403",
        f"{_ACCESS}, event `taken-back`", (STORE + "rotation_keeps_what_was_signed_unless_it_is_taken_back",),
        ("server/registry.py", "certificates.c.issuer.in_(issuers) & certificates.c.revoked.is_(None)", "sa.false()"),
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
    cells = {name: (found.attack, found.stops, found.answer, found.seen) for name, found in DEFENCES.items()}
    head = ("somebody tries", "what stops it", "answer", "seen in", "test (`tests/server/`)")
    return table(head, cells, DEFENCES)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print("\n".join(rows()))
    else:
        sys.exit(main(sys.argv[1:], DEFENCES, "server", anew))
