# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node approve``, ``revoke-approval`` and ``policy``: what the hospital permits, in its own words."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..privacy.errors import BadInput, Refused

if TYPE_CHECKING:
    from ..privacy.study import Study
    from .policy_rules import Verdict
    from .settings import SiteSettings

__all__ = ["Signature", "add_commands", "read_signature", "read_study"]

Config = Annotated[Path, typer.Option("--config", help="The node's settings (node.toml).")]
StudyFile = Annotated[Path, typer.Argument(help="Study file (TOML), or the study.json that a coordinator sent.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
]
Signature = Annotated[
    Path | None, typer.Option("--signature", help="The coordinator's signature (STUDY.sig), for rules that need one.")
]

policy_app = typer.Typer(help="Explain the hospital's policy.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to ``fedneuro-node``."""
    app.command()(approve)
    app.command(name="revoke-approval")(revoke_approval)
    app.add_typer(policy_app, name="policy")


def approve(
    study: StudyFile,
    config: Config,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a study in plain words with its privacy cost, ask, and approve it. Exit code 3: the policy forbids it."""
    from . import policy_edit
    from .gatekeeper import audit_log
    from .policy import load_policy
    from .policy_rules import Case, judge
    from .study_summary import summary

    site, path = _site(config)
    loaded = read_study(study, overrides)
    for line in summary(loaded, site):
        print(line)
    verdicts = [v for v in judge(load_policy(path), Case(study=loaded, site=site)) if v.rule != "studies"]
    if failed := [v for v in verdicts if not v.passed]:
        print()
        _show(failed)
        raise Refused(f"{path}: {failed[0].rule} forbids the study: {failed[0].text}; nothing was approved")
    print(f"Policy     every other rule of {path} permits it")
    if not yes and not typer.confirm("Approve this study?"):
        print("not approved; nothing was changed")
        raise typer.Exit(3)
    audit_log(site).append("approve", study=loaded.hash, name=loaded.study.name)
    done = policy_edit.approve(path, loaded.hash)
    print(f"approved: {loaded.hash}" if done else "it was approved before; nothing was changed")


def revoke_approval(
    study: Annotated[str, typer.Argument(help="Study file, or the study's hash.")], config: Config
) -> None:
    """Take a study's approval back: from the next message on; the answer of a round under way is held back too."""
    from . import policy_edit
    from .gatekeeper import audit_log

    site, path = _site(config)
    study_hash = study if re.fullmatch(r"[0-9a-f]{64}", study) else read_study(Path(study), None).hash
    if not policy_edit.revoke(path, study_hash):
        raise BadInput(f"{path}: study {study_hash[:12]} is not approved by its hash; nothing was changed")
    audit_log(site).append("revoke-approval", study=study_hash)
    print(f"approval taken back: {study_hash}")


@policy_app.command()
def explain(study: StudyFile, config: Config, overrides: Overrides = None, signature: Signature = None) -> None:
    """Print every rule with pass or fail, and which one decides. Exit code 3 if the study is refused."""
    from .policy import load_policy
    from .policy_rules import Case, judge

    site, path = _site(config)
    loaded, policy = read_study(study, overrides), load_policy(path)
    signed = read_signature(signature) if signature else b""
    verdicts = judge(policy, Case(study=loaded, site=site, signature=signed))
    _show(verdicts)
    limits = policy.limits
    print(
        f"at each message: {len(policy.windows)} time windows, {limits.max_requests_per_hour} requests per hour, "
        f"{limits.max_hours:g} hours of computing per study, {limits.max_retries} retries of the last round"
    )
    if failed := [v for v in verdicts if not v.passed]:
        raise Refused(f"refused by {failed[0].rule} ({failed[0].reason.value}): {failed[0].text}")
    print(f"permitted: {verdicts[0].text}")


@policy_app.command(name="forget-rounds")
def forget_rounds(
    study: Annotated[str, typer.Argument(help="Study file, or the study's hash.")], config: Config
) -> None:
    """Let a study begin anew here, by agreement with its coordinator. The privacy ledger forgets nothing."""
    from .gatekeeper import audit_log
    from .round_guard import RoundGuard

    site, _ = _site(config)
    study_hash = study if re.fullmatch(r"[0-9a-f]{64}", study) else read_study(Path(study), None).hash
    answered = RoundGuard(site.state).forget(study_hash)
    audit_log(site).append("forget-rounds", study=study_hash, round=answered.round)
    print(f"study {study_hash[:12]} may begin anew; the last round that was trained was {answered.round}")


def _site(config: Path) -> "tuple[SiteSettings, Path]":
    from .node_settings import load_node_settings

    site = load_node_settings(config).site_settings()
    if site.policy is None:
        raise BadInput(f'{config}: names no policy; write policy = "policy.toml" under [study]')
    return site, site.policy


def read_study(path: Path, overrides: list[str] | None) -> "Study":
    """A study from its file (TOML), or from the canonical form that a coordinator sent (``.json``).

    Raises:
        BadInput: it cannot be read, or is no study.
    """
    import hashlib

    from ..privacy.errors import ContractViolation
    from ..privacy.study import Study
    from ..privacy.study_file import load_study

    if path.suffix != ".json":
        return load_study(path, overrides or [])
    if overrides:
        raise BadInput(f"--set does not suit {path}: it is a coordinator's study, and another digit is another study")
    try:
        content = path.read_bytes()
        return Study.from_canonical(content, hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise BadInput(f"{path}: the study cannot be read ({error.strerror})") from error
    except ContractViolation as error:
        raise BadInput(f"{path}: {error}") from error


def read_signature(path: Path) -> bytes:
    """The coordinator's signature in a file.

    Raises:
        BadInput: there is none.
    """
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--signature {path}: is not a signature (128 hexadecimal digits)") from error


def _show(verdicts: "list[Verdict]") -> None:
    decided = False
    for verdict in verdicts:
        mark = "pass" if verdict.passed else "fail" if decided else "FAIL"
        decided = decided or not verdict.passed
        print(f"{mark}  {verdict.rule:<29} {verdict.text}")
