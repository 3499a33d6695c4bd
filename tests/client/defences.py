# SPDX-License-Identifier: Apache-2.0
"""Every defence of a node against its coordinator, and how to switch it off, to see that its test fails then.

    python -m tests.client.defences            each of them, in a copy of the source; 5 minutes
    python -m tests.client.defences NAME …     some
    python -m tests.client.defences --table    the rows of docs/threats.md

How that is done: ``tests/switched_off.py``. ``test_defences.py`` keeps list, source and document together.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.switched_off import forked, main, table

__all__ = ["DEFENCES", "Defence", "rows"]

H, R, B = "test_hostile.py::", "test_runner.py::", "test_message_bounds.py::"
L, V, S = "test_lost_tasks.py::", "test_revocations.py::", "test_site.py::"


@dataclass(frozen=True, slots=True)
class Defence:
    """One defence.

    Attributes:
        attack: what the coordinator tries.
        stops: what stops it, and where.
        tests: in tests/client; at least one fails without it.
        changes: file, text that stands there once, and what stands there without the defence.
    """

    attack: str
    stops: str
    tests: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]


def _off(file: str, old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return ((file, old, new),)


_MODEL = (H + "test_model_that_is_not_the_agreed_one",)
_MEMORY = (H + "test_a_model_that_memorised_an_input",)

DEFENCES: dict[str, Defence] = {
    # -- code
    "bundle-hash": Defence(
        "bundle with its own `fedneuro/client/app.py`, or a `sitecustomize`",
        "only the bundle with the one hash is served (`client/runner.py`)",
        (R + "test_another_bundle_is_refused_before_the_site_hears_of_it", H + "test_a_bundle_of_another_hash"),
        _off("client/runner.py", "if bundle != self._bundle:", "if False:"),
    ),
    "bundle-unpacked": Defence(
        "the same",
        "no bundle is ever unpacked or imported (`client/runner.py`, in place of Flower's executor)",
        (R + "test_another_bundle_is_refused_before_the_site_hears_of_it",),
        _off(
            "client/runner.py",
            "                reply = self._reply(message, bundle.hash_str)\n",
            "                from flwr.cli.install import install_from_fab\n"
            "                install_from_fab(bundle.content, skip_prompt=True)\n"
            "                reply = self._reply(message, bundle.hash_str)\n",
        ),
    ),
    "bundle-opened": Defence(
        "bundle that is a zip bomb",
        "the SuperNode reads no other bundle's settings (`client/supernode.py`)",
        (R + "test_a_bundle_that_is_not_ours_is_never_opened",),
        _off("client/supernode.py", " if hashlib.sha256(content).hexdigest() == bundle else {}", ""),
    ),
    "unpickling": Defence(
        "pickle in a record",
        "arrays are bytes with a layout; nothing that unpickles is imported (`privacy/wire.py`)",
        (H + "test_pickle_in_a_record",),
        _off(
            "privacy/wire.py",
            "    sizes = [math.prod(shape) * np",
            "    import io\n    np.load(io.BytesIO(state.data), allow_pickle=True)\n    sizes = [math.prod(shape) * np",
        ),
    ),
    # -- studies
    "study-approved": Defence(
        "unknown study; study changed after approval; ε raised in mid-run",
        "approved by hash: one changed digit is another study (`client/policy_rules.py`)",
        (H + "test_unknown_study", H + "test_study_changed_after_approval"),
        _off(
            "client/policy_rules.py",
            '    return False, f"study {short} ({case.study.study.name}) is not approved',
            '    return True, f"study {short} ({case.study.study.name}) is not approved',
        ),
    ),
    "study-hash": Defence(
        "another study under an approved hash",
        "the hash is computed from what came (`privacy/study.py`)",
        (H + "test_a_study_that_lies_about_its_hash",),
        _off("privacy/study.py", "if hashlib.sha256(canonical).hexdigest() != expected_hash:", "if False:"),
    ),
    "signature": Defence(
        "signature of another study, or by another key",
        "Ed25519 over the study's hash (`client/policy_rules.py`)",
        (H + "test_signature_of_another_study_or_key",),
        _off("client/policy_rules.py", "        verify_study(study, case.signature, rule.coordinator)", "        pass"),
    ),
    "epsilon-limit": Defence(
        "a study that asks for more ε than the policy permits, approved by mistake",
        "`privacy.max_epsilon_study` (`client/policy_rules.py`)",
        (H + "test_approved_by_hash_but_beyond_the_policy",),
        _off(
            "client/policy_rules.py", 'return asked <= limit, f"ε of the study', 'return True, f"ε of the study'
        ),
    ),
    "role-asked": Defence(
        "role switched from `heldout` to `train`",
        "the study's role is the node's (`client/gate.py`)",
        (H + "test_role_switched_from_heldout_to_train", S + "test_entry_gate_refuses"),
        _off("client/gate.py", "    if heldout is not (settings.role is Role.HELDOUT):", "    if False:"),
    ),
    "role-granted": Defence(
        "the same, and somebody changed the node's settings",
        "`grant.roles` (`client/policy_rules.py`)",
        (H + "test_role_switched_from_heldout_to_train",),
        _off("client/policy_rules.py", "return asked in policy.grant.roles, ", "return True, "),
    ),
    # -- privacy
    "unknown-keys": Defence(
        "noise lowered, or any other setting sent, through the message or run config",
        "a key that was not agreed refuses the message; run config is not read (`privacy/wire_fields.py`)",
        (H + "test_noise_lowered_through_the_message",),
        _off("privacy/wire_fields.py", "        if self._values or self._records != records:", "        if False:"),
    ),
    "noise-floor": Defence(
        "a study with little noise",
        "`privacy.min_noise_multiplier` (`client/policy_rules.py`)",
        (H + "test_noise_below_the_hospitals_least",),
        _off("client/policy_rules.py", "return sigma >= least, ", "return True, "),
    ),
    "dataset-budget": Defence(
        "two studies drain one budget at once",
        "the ledger adds up all studies of the data set (`client/gatekeeper.py`, `privacy/ledger.py`)",
        (H + "test_two_studies_drain_one_budget_at_once",),
        _off(
            "client/gatekeeper.py",
            "        return replace(settings, lifetime=Budget(epsilon=limit, "
            "delta=site_delta(0.0, settings.public_size)))",
            "        return settings",
        ),
    ),
    "ledger-lock": Defence(
        "the same, in the same moment",
        "one writer at a time (`privacy/ledger.py`)",
        (H + "test_two_studies_drain_one_budget_at_once",),
        (
            ("privacy/ledger.py", "with self._anchors.locked():\n", "if True:\n"),
            ("privacy/ledger.py", 'database.execute("BEGIN IMMEDIATE")', 'database.execute("BEGIN")'),
        ),
    ),
    "replay-retries": Defence(
        "round replayed",
        "the last round may be repeated `limits.max_retries` times, charged each time (`client/round_guard.py`)",
        (H + "test_round_replayed",),
        _off("client/round_guard.py", "if number == last and answered.attempts > max_retries:", "if False:"),
    ),
    "replay-model": Defence(
        "round replayed with another model",
        "the last round is repeated for the same model only (`client/round_guard.py`)",
        (H + "test_round_replayed",),
        _off("client/round_guard.py", "if number == last and model != answered.model:", "if False:"),
    ),
    "rollback": Defence(
        "round number rolled back",
        "an older round is refused; remembered on disk (`client/round_guard.py`)",
        (H + "test_round_rolled_back",),
        _off("client/round_guard.py", "elif number < last:", "elif False:"),
    ),
    "evaluate-oracle": Defence(
        "exact metrics of many models of one's choice",
        "one model per round is evaluated (`client/round_guard.py`)",
        (H + "test_one_round_evaluated_with_many_models",),
        _off("client/round_guard.py", "if answered.evaluated.setdefault(key, judged) != judged:", "if False:"),
    ),
    # -- arrays and metrics
    "arrays-in": Defence(
        "extra array; array of another name, shape or type; NaN, 1e30",
        "the arrays are the agreed network's (`client/session.py`)",
        _MODEL,
        _off("client/session.py", "        check_arrays(arrays, self.shapes)", "        pass"),
    ),
    "arrays-names": Defence(
        "extra array, or one of another name, either way",
        "names and their order (`privacy/contract.py`)",
        (*_MODEL, *_MEMORY),
        _off("privacy/contract.py", "    if list(arrays) != list(expected):", "    if False:"),
    ),
    "arrays-shape": Defence(
        "array of another shape",
        "shapes and types (`privacy/contract.py`)",
        _MODEL,
        _off(
            "privacy/contract.py", "if tuple(array.shape) != tuple(shape) or array.dtype.name != dtype:", "if False:"
        ),
    ),
    "arrays-finite": Defence(
        "NaN, infinity, 1e30",
        "finite and bounded (`privacy/contract.py`)",
        (*_MODEL, *_MEMORY),
        _off("privacy/contract.py", "if not (low >= -MAX_ABSOLUTE and high <= MAX_ABSOLUTE):", "if False:"),
    ),
    "reply-arrays": Defence(
        "model that memorises an input into a parameter's name",
        "the reply holds the agreed arrays only (`client/gate.py`)",
        _MEMORY,
        _off("client/gate.py", "check_arrays(reply.arrays, reply_shapes(study, shapes_of(request.arrays)))", "pass"),
    ),
    "reply-metrics": Defence(
        "the same into a metric; extra metric asked for",
        "the reply holds metrics of the study only (`client/gate.py`)",
        _MEMORY,
        _off("client/gate.py", "if extra := set(reply.metrics) - allowed:", "if extra := set():"),
    ),
    "reply-small": Defence(
        "a metric over one patient",
        "metrics over few patients stay (`client/gate.py`)",
        _MEMORY,
        _off("client/gate.py", "        if small:", "        if False:"),
    ),
    "reply-loss": Defence(
        "the exact loss of a private study",
        "is not noised, so it stays (`client/gate.py`)",
        (*_MEMORY, S + "test_exit_gate_keeps_the_loss_of_a_private_study"),
        _off("client/gate.py", 'if study.privacy.mode != "none" and reply.loss is not None:', "if False:"),
    ),
    "reply-epsilon": Defence(
        "an answer for which the ledger stands beyond the policy",
        "looked at again on the way out (`client/gatekeeper.py`)",
        _MEMORY,
        _off("client/gatekeeper.py", "if not reply.epsilon <= limit * (1 + 1e-6):", "if False:"),
    ),
    "reply-noise": Defence(
        "an answer with less noise than the policy wants",
        "looked at again on the way out (`client/gatekeeper.py`)",
        _MEMORY,
        _off(
            "client/gatekeeper.py",
            "if sigma is None or not sigma >= policy.privacy.min_noise_multiplier:",
            "if False:",
        ),
    ),
    "metrics-permitted": Defence(
        "a metric that the hospital does not permit",
        "`reply.metrics` (`client/policy_rules.py`)",
        (H + "test_metrics_that_the_hospital_does_not_permit",),
        _off("client/policy_rules.py", 'return not extra, f"metrics', 'return True, f"metrics'),
    ),
    "metrics-exact": Defence(
        "exact metrics where the hospital wants noise",
        "`reply.exact_metrics` (`client/policy_rules.py`)",
        (H + "test_metrics_that_the_hospital_does_not_permit",),
        _off("client/policy_rules.py", "return noised or policy.reply.exact_metrics, ", "return True, "),
    ),
    # -- memory
    "size-claims": Defence(
        "array of 2 GB, claimed",
        "claims are compared with the bytes that came before anything is made (`privacy/wire.py`)",
        (H + "test_two_gigabytes_are_claimed",),
        _off(
            "privacy/wire.py",
            "    if state.stype != _STYPE or state.dtype",
            "    np.ones(min(total, 10**8), np.uint8)\n    if state.stype != _STYPE or state.dtype",
        ),
    ),
    "message-bytes": Defence(
        "array of 2 GB, sent",
        "a message may have four times `model.max_bytes`; the rest is not fetched (`client/message_bounds.py`)",
        (B + "test_a_message_beyond_the_policy_is_not_fetched_to_its_end",),
        _off("client/message_bounds.py", "if self._size > (most := self._largest()):", "if (most := 0):"),
    ),
    "message-parts": Defence(
        "message of a million parts",
        "at most 8192 (`client/message_bounds.py`)",
        (B + "test_a_message_of_too_many_parts",),
        _off("client/message_bounds.py", "if _more_parts(tree, MOST_PARTS) < 0:", "if False:"),
    ),
    "array-unfolding": Defence(
        "array that names one part a million times",
        "counted before it is put together (`client/message_bounds.py`)",
        (B + "test_an_array_that_names_one_part_again_and_again",),
        _off("client/message_bounds.py", "if unfolded_bytes(contents) > (most := largest()):", "if (most := 0):"),
    ),
    "frame-overlap": Defence(
        "frame whose arrays overlap",
        "lengths are whole, and within what came (`privacy/wire_bytes.py`)",
        (H + "test_a_frame_whose_arrays_are_each_other",),
        _off("privacy/wire_bytes.py", "if type(size) is not int or not 0 <= size <= len(body) - offset:", "if False:"),
    ),
    "unpacking": Defence(
        "gzip or zip bomb in a message",
        "nothing is ever unpacked (`privacy/wire.py`)",
        (H + "test_gzip_and_zip_bombs",),
        _off(
            "privacy/wire.py",
            "    sizes = [math.prod(shape) * np",
            "    import zlib\n    from contextlib import suppress\n    with suppress(zlib.error):\n"
            "        zlib.decompress(state.data)\n    sizes = [math.prod(shape) * np",
        ),
    ),
    "http-gzip": Defence(
        "gzip bomb as an HTTP answer",
        "a compressed answer is refused (`client/message_bounds.py`)",
        (B + "test_a_compressed_answer_is_not_unpacked",),
        _off(
            "client/message_bounds.py",
            'if response.headers.get("content-encoding", "identity") != "identity":',
            "if False:",
        ),
    ),
    "http-length": Defence(
        "HTTP answer without end",
        "at most 32 MiB are read (`client/message_bounds.py`)",
        (B + "test_a_long_answer_is_not_read_to_its_end",),
        _off("client/message_bounds.py", "if size > LARGEST_ANSWER:", "if False:"),
    ),
    "http-redirect": Defence(
        "HTTP redirect to a machine inside the hospital",
        "none is followed (`client/message_bounds.py`)",
        (B + "test_a_redirect_leads_nowhere",),
        _off("client/message_bounds.py", "self._client.follow_redirects = False", "pass"),
    ),
    "record-study": Defence(
        "oversized record: a study of a megabyte",
        "at most 256 KiB (`privacy/wire.py`)",
        (H + "test_a_study_that_is_too_long_is_not_read",),
        _off("privacy/wire.py", "    if len(study_bytes) > MAX_STUDY_BYTES:", "    if False:"),
    ),
    "record-lists": Defence(
        "oversized record: ten thousand long names",
        "short texts, short lists (`privacy/wire_fields.py`)",
        (H + "test_lists_that_are_too_long",),
        _off("privacy/wire_fields.py", "        if wrong or len(values) > limit:", "        if False:"),
    ),
    "digest": Defence(
        "arrays that are not those whose digest the audit log writes down",
        "the digest is computed from what came (`privacy/wire.py`)",
        (H + "test_oversized_records",),
        _off("privacy/wire.py", "    if digest(arrays) != expected:", "    if False:"),
    ),
    "model-size": Defence(
        "network that fills the memory",
        "`model.max_parameters`, counted without building it (`client/policy_rules.py`)",
        (H + "test_a_network_that_would_fill_the_memory",),
        _off(
            "client/policy_rules.py", 'count <= limit, f"{count:,} parameters', 'True, f"{count:,} parameters'
        ),
    ),
    # -- the node's life
    "unreadable-logged": Defence(
        "message that cannot be put together",
        "the runner lives, and writes it down (`client/runner.py`)",
        (B + "test_a_message_that_cannot_be_put_together",),
        _off("client/runner.py", "                self._site.turn_away(\"\", known)", "                pass"),
    ),
    "unreadable-answered": Defence(
        "the same",
        "every message is answered; Flower would wait for ever (`client/lost_tasks.py`)",
        (L + "test_a_task_that_was_given_up_is_answered", B + "test_a_message_that_cannot_be_put_together"),
        _off("client/lost_tasks.py", "if finished and sub_status == SubStatus.FAILED:", "if False:"),
    ),
    "runner-missed": Defence(
        "message that kills the runner",
        "it is missed at once, and the message answered (`client/lost_tasks.py`)",
        (L + "test_a_killed_runner_is_missed_at_once",),
        _off("client/lost_tasks.py", "            self._state.expire_claims()", "            pass"),
    ),
    "half-answer": Defence(
        "the same, while it hands its answer over",
        "half an answer is thrown away (`client/lost_tasks.py`)",
        (L + "test_half_an_answer_is_thrown_away",),
        _off("client/lost_tasks.py", "if is_reply and self._half_replies():", "if False:"),
    ),
    "flood": Defence(
        "flood of 1,000 tasks",
        "`limits.max_requests_per_hour`; each refusal is in the log (`client/gatekeeper.py`)",
        (H + "test_a_flood_of_a_thousand_tasks",),
        _off("client/gatekeeper.py", "if len(self._asked) >= limit:", "if False:"),
    ),
    "flood-of-parts": Defence(
        "the same, of messages that build on a model which the node does not have",
        "they are logged and counted like any other (`client/site.py`)",
        (H + "test_a_flood_that_builds_on_models_that_are_not_here",),
        _off("client/site.py", "            self._keeper.turn_away_part(request, error.reason)\n", ""),
    ),
    # -- what leaves
    "log-first": Defence(
        "an answer that the log could not take (disk full)",
        "the entry is on disk before anything leaves (`client/gatekeeper.py`)",
        (H + "test_nothing_leaves_where_the_log_cannot_be_written",),
        _off(
            "client/gatekeeper.py",
            '        self._append("out", **self._about(request), answer=type(reply).__name__, **fields)',
            "        with suppress(OSError):\n"
            '            self._append("out", **self._about(request), answer=type(reply).__name__, **fields)',
        ),
    ),
    "policy-now": Defence(
        "a long round, in which the hospital takes its approval back",
        "the policy as it is then judges the answer (`client/gatekeeper.py`)",
        (H + "test_approval_taken_back_during_a_round_holds_the_answer_back",),
        _off(
            "client/gatekeeper.py",
            "            self._permitted(policy, request)\n            reply = self._within",
            "            reply = self._within",
        ),
    ),
    "reason-code": Defence(
        "an error that tells paths, names or values",
        "a reason code leaves and nothing else (`client/app.py`)",
        (H + "test_a_violation_in_the_codec_is_a_reason_code", R + "test_of_an_unexpected_error_only_a_code_leaves"),
        _off("client/app.py", "RAISED_EXCEPTION, reason.value), reply_to", "RAISED_EXCEPTION, str(error)), reply_to"),
    ),
    # -- who it is
    "revoked-tls": Defence(
        "coordinator with a revoked certificate",
        "the chain is compared with the root's list before the first byte (`client/revocations.py`)",
        (V + "test_a_stolen_issuing_key_is_refused_once_the_root_took_it_back",),
        _off(
            "client/revocations.py",
            "if certificate.issuer == self._issuer and certificate.serial_number in self._serials:",
            "if False:",
        ),
    ),
    "revoked-grpc": Defence(
        "the same at enrolment and renewal",
        "so is gRPC's (`client/enrolment.py`)",
        (V + "test_neither_is_a_certificate_renewed_there",),
        _off("client/enrolment.py", "    if revoked is not None:", "    if False:"),
    ),
    "revoked-between": Defence(
        "the same, from between hospital and coordinator",
        "gRPC trusts the certificate that was compared, and no other (`client/enrolment.py`)",
        (V + "test_who_stands_between_cannot_show_one_certificate_and_use_another",),
        _off("client/enrolment.py", "            vouches = seen_certificate(", "            seen_certificate("),
    ),
}  # fmt: skip


def rows() -> Iterator[str]:
    """The table of docs/threats.md."""
    cells = {name: (found.attack, found.stops) for name, found in DEFENCES.items()}
    return table(("it tries", "what stops it", "test (`tests/client/`)"), cells, DEFENCES)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print("\n".join(rows()))
    else:
        sys.exit(main(sys.argv[1:], DEFENCES, "client", forked))
