# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server data-stats``: what hospitals released of their data sets, verified and put together."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..privacy.errors import BadInput, Refused

__all__ = ["register"]


def data_stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Made by fedneuro-node data stats --release.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="DIR", help="The consortium's folder, which knows every hospital's node."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", metavar="SITE=FINGERPRINT", help="A node's key, as the hospital tells it; may repeat."),
    ] = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="Study file: each file must be for this study, by its rules.")
    ] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Take files that nobody signed, too; whose they are you must know.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Verify what hospitals told of their data sets, and show it put together. Exit code 3: a file is not theirs."""
    from ..privacy.noised_statistics import Noised
    from ..privacy.study_file import load_study
    from .data_statistics import added_up, beside_each_other, check_study, dumped, noised_rows, read_told, rows

    known = _known(config, key or [])
    told = [read_told(path, known, unsigned=unsigned) for path in files]
    if study is not None:
        loaded = load_study(study)
        for file in told:
            check_study(file, loaded)
    contents = [file.content for file in told]
    plain, noised = [f for f in contents if not isinstance(f, Noised)], [f for f in contents if isinstance(f, Noised)]
    found: dict[str, Any] = {
        "files": [{"site": f.content.site, "digest": f.digest, "signed_by": f.key or None} for f in told]
    }
    if plain:
        found |= beside_each_other(plain)
        for line in rows(plain):
            print("  ".join(line))
        print(f"{found['patients']} patients (rounded) at {len(plain)} hospitals")
    if noised:
        found["noised"] = added_up(noised)
        for line in noised_rows(found["noised"]):
            print("  ".join(filter(None, line)))
        for name, site in found["noised"]["sites"].items():
            cost = f"ε = {site['epsilon']:g} at δ = {site['delta']:g}"
            print(f"{name}: public size {site['patients']}, cost {cost}, noise ±{site['noise']:.1f} patients per count")
    for file in told:
        who = f"signed by its node {file.key[:16]}…" if file.key else "NOT SIGNED: nobody can say whose it is"
        print(f"{file.content.site}: {who}; check sum {file.digest[:16]}…, as in its audit log")
    if json_out:
        json_out.write_text(dumped(found), encoding="utf-8")


def _known(config: Path | None, keys: Sequence[str]) -> dict[str, str]:
    """Fingerprint of each hospital's node: of the consortium's registry, and as given by hand."""
    found: dict[str, str] = {}
    if config is None and Path("server.toml").is_file():
        config = Path()
    if config is not None:
        from .consortium import Consortium
        from .roster import key_fingerprint

        sites = Consortium(config).registry.sites()
        found = {site.name: key_fingerprint(site.node_key) for site in sites if site.state == "enrolled"}
    for text in keys:
        site, _, fingerprint = text.partition("=")
        fingerprint = fingerprint.replace(" ", "").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
            raise BadInput(
                f"--key {text[:80]}: expected SITE=FINGERPRINT, 64 hexadecimal digits, as fedneuro-node identity "
                "prints at the hospital"
            )
        if found.get(site, fingerprint) != fingerprint:
            raise Refused(f"--key {site}: the consortium knows {site} by {found[site][:16]}…; one of the two is wrong")
        found[site] = fingerprint
    return found


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("data-stats")(data_stats)
