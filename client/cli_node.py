# SPDX-License-Identifier: Apache-2.0
"""The life cycle of a node on the command line: init, start, stop, status, pause, resume, leave, doctor, and more."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..privacy.errors import BadInput, EnvironmentProblem

if TYPE_CHECKING:
    from .node_settings import NodeSettings

__all__ = ["add_commands"]

Config = Annotated[Path, typer.Option("--config", help="The node's settings (node.toml).")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
NODE_TOML = Path("node.toml")


def add_commands(app: typer.Typer) -> None:
    """Add the commands to ``fedneuro-node``."""
    for command in (init, start, stop, status, pause, resume, leave, doctor, identity, unit, rehearse, bundle):
        app.command()(command)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the node; made if it is not there.")],
    name: Annotated[str | None, typer.Option("--name", help="The site's name, as in the invitation.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="train, or heldout: judges, never trains.")] = None,
    public_size: Annotated[int | None, typer.Option("--public-size", help="Patients, rounded.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="BIDS folder of the data set.")] = None,
    state: Annotated[str, typer.Option("--state", help="Folder of ledger and logs; must be backed up.")] = "state",
    cache: Annotated[str | None, typer.Option("--cache", help="Folder of preprocessed scans.")] = None,
    dataset: Annotated[str, typer.Option("--dataset", help="Name in the privacy ledger; default: NAME.")] = "",
    epsilon: Annotated[float, typer.Option("--epsilon", help="What all studies together may spend.")] = 10.0,
    port: Annotated[int, typer.Option("--port", help="On 127.0.0.1, between two processes.")] = 9094,
    require_record: Annotated[
        bool, typer.Option("--require-record", help="Refuse an installation that cannot be proven.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace node.toml and policy.toml (kept as .before).")
    ] = False,
) -> None:
    """Write node.toml and policy.toml, asking for what is not given. Exit code 2: a file is there, or a wrong value."""
    from ..privacy.contract import Role
    from .node_init import Answers, init_node

    if yes and (
        missing := [o for o, v in (("--name", name), ("--data", data), ("--public-size", public_size)) if not v]
    ):
        raise BadInput(f"--yes asks nothing, so {missing[0]} must be given")
    name = name or typer.prompt("Name of the site, as in the invitation")
    data = data or Path(typer.prompt("BIDS folder of the data set"))
    public_size = public_size or typer.prompt("Number of patients, rounded, as you want it to be known", type=int)
    role = role or ("train" if yes else typer.prompt("Role: train, or heldout", default="train"))
    if role not in tuple(Role):
        raise BadInput(f'--role {role}: expected "train" or "heldout"')
    answers = Answers(
        name=str(name),
        role=Role(role),
        public_size=int(public_size or 0),
        data=data,
        state=state,
        cache=cache,
        dataset=dataset,
        epsilon=epsilon,
        port=port,
        require_record=require_record,
    )
    for path in init_node(folder, answers, force=force):
        print(f"wrote {path}")
    print(f"next: fedneuro-node enrol INVITATION --config {folder / 'node.toml'}, then fedneuro-node doctor")


def start(config: Config = NODE_TOML) -> None:
    """Run the node until it is stopped: SuperNode and runner, started again when they fail."""
    from .node import serve_node

    serve_node(_settings(config), config)


def stop(
    config: Config = NODE_TOML,
    now: Annotated[bool, typer.Option("--now", help="Abandon the round under way.")] = False,
    within: Annotated[float, typer.Option("--within", min=0, help="Seconds to finish the round.")] = 600.0,
) -> None:
    """Stop the node: it finishes the task in hand, but takes no longer than --within. Exit code 2: none runs."""
    from .node_control import stop_node

    print(stop_node(_settings(config), now=now, within=within))


def status(config: Config = NODE_TOML, as_json: Json = False) -> None:
    """Show whether the node runs, since when, its last message, its sandbox and what is wrong. Exit code 5: stopped."""
    from .node_control import node_status, status_lines

    found = node_status(_settings(config))
    print(json.dumps(found, indent=1) if as_json else "\n".join(status_lines(found)))
    if not found["running"]:
        raise typer.Exit(EnvironmentProblem.exit_code)


def pause(config: Config = NODE_TOML, why: Annotated[str, typer.Option("--why", help="For status.")] = "") -> None:
    """Hold training at once, in the middle of a step, and take no new task; also after a restart."""
    from .run_folder import RunFolder

    RunFolder(Path(_settings(config).site.state)).pause(why)
    print("paused; fedneuro-node resume goes on where it stopped")


def resume(config: Config = NODE_TOML) -> None:
    """Go on after pause."""
    from .run_folder import RunFolder

    there = RunFolder(Path(_settings(config).site.state)).resume()
    print("goes on" if there else "it was not paused")


def leave(config: Config = NODE_TOML, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Leave the consortium: put keys and certificates away. Ledger, audit log and data stay."""
    from .gatekeeper import audit_log
    from .node_control import leave as put_away
    from .run_folder import RunFolder

    settings = _settings(config)
    folder = RunFolder(Path(settings.site.state))
    if folder.is_held("node") or folder.is_held("runner"):
        raise BadInput("the node still runs; fedneuro-node stop ends it")
    if not yes and not typer.confirm(
        f"Put the keys of {settings.site.name} away? It can then join by a new invitation only"
    ):
        raise typer.Exit(3)
    audit_log(settings.site_settings()).append("leave")
    archive, kept = put_away(settings)
    print(f"keys and certificates are in {archive}; the audit log needs node.key there to be verified")
    for line in kept:
        print(f"stays: {line}")
    print("ask the coordinator to revoke this node's certificate (fedneuro-server revoke)")


def doctor(
    config: Config = NODE_TOML,
    as_json: Json = False,
    ports: Annotated[bool, typer.Option("--ports", help="Print the sheet for the firewall ticket only.")] = False,
) -> None:
    """Check everything that could keep the node from working. Exit code 5: something fails."""
    from .doctor import examine
    from .doctor_network import port_sheet

    settings = _settings(config)
    if ports:
        print(port_sheet(settings))
        return
    findings = []
    for finding in examine(settings):
        findings.append(finding)
        if not as_json:
            print(f"{finding.verdict.upper():<5} {finding.check:<15} {finding.seen}", flush=True)
            if finding.remedy:
                print(f"{'':<21} → {finding.remedy}")
    verdicts = [finding.verdict for finding in findings]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False))
    else:
        counts = f"{verdicts.count('pass')} passed, {verdicts.count('warn')} warnings, {verdicts.count('fail')} failed"
        print(counts)
    if "fail" in verdicts:
        raise typer.Exit(EnvironmentProblem.exit_code)


def identity(config: Config = NODE_TOML, as_json: Json = False) -> None:
    """Print by what other hospitals know this node: the fingerprint of its public key, for their node.toml."""
    from ..privacy.identity import fingerprint
    from ..privacy.secagg.keys import Identity

    settings = _settings(config)
    key = fingerprint(Identity.at(Path(settings.superlink.key)).public)
    if as_json:
        print(json.dumps({"name": settings.site.name, "key": key}))
        return
    print("# Compare the key by telephone, eight digits at a time:")
    print("# " + " ".join(key[at : at + 8] for at in range(0, len(key), 8)))
    print("# Mode distributed: each other hospital adds this to its node.toml.")
    print(f'[[peer]]\nname = "{settings.site.name}"\nkey = "{key}"')


def unit(
    kind: Annotated[Literal["systemd", "compose", "apptainer"], typer.Argument(help="Which service file.")],
    config: Config = NODE_TOML,
) -> None:
    """Print a hardened service file for this node."""
    from .units import unit_text

    print(unit_text(kind, _settings(config), config), end="")


def rehearse(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")],
    config: Config = NODE_TOML,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may repeat.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=10)] = 1,
    patients: Annotated[int, typer.Option("--patients", min=2, max=100)] = 2,
) -> None:
    """Run a study's first round on two patients. Nothing leaves, and no privacy budget of theirs is spent."""
    from ..privacy.study_file import load_study
    from .canary import rehearse as run

    loaded, settings = load_study(study, overrides or []), _settings(config)
    print("rehearsal: no connection is made, and nothing is kept", flush=True)
    done = run(settings, loaded, rounds=rounds, patients=patients, tell=lambda line: print(line, flush=True))
    walls = done.walls
    if walls and not walls.complete:
        print(f"warning: training is not walled in: {walls.why}; see fedneuro-node doctor")
    print(f"{loaded.study.name} ({loaded.hash[:12]}) runs here; to permit it: fedneuro-node approve {study}")


def bundle(
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    no_deps: Annotated[bool, typer.Option("--no-deps", help="FedNeuro's own wheel only.")] = False,
    wheel: Annotated[Path | None, typer.Option("--wheel", help="FedNeuro's wheel, if you have it.")] = None,
    pip: Annotated[
        list[str] | None, typer.Option("--pip", help="A further option for pip, such as --extra-index-url=URL.")
    ] = None,
) -> None:
    """Make a wheelhouse with checksums and a CycloneDX SBOM, for an installation without internet."""
    from .air_gap import make_wheelhouse

    files = make_wheelhouse(out, dependencies=not no_deps, wheel=wheel, pip=pip or ())
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{out}: {len(files)} files, {size:.0f} MiB; check with: sha256sum --check SHA256SUMS")


def _settings(config: Path) -> "NodeSettings":
    from .node_settings import load_node_settings
    from .toml_file import parse_toml

    try:
        return load_node_settings(config)
    except BadInput:
        try:
            values = parse_toml(config.read_bytes(), config)
        except (OSError, BadInput):
            values = {"superlink": {}}
        if "superlink" not in values:
            raise BadInput(f"{config}: this node is in no consortium yet; fedneuro-node enrol INVITATION") from None
        raise
