# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node audit``: prove, export and sum up the audit log. All of it works offline, on a copy."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..privacy.errors import BadInput

__all__ = ["app"]

app = typer.Typer(help="Prove, export and sum up the audit log.", no_args_is_help=True)

Log = Annotated[Path, typer.Argument(help="The log, state/audit.jsonl; its head audit.head lies beside it.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write to this file instead of the screen.")]


@app.command()
def verify(
    log: Log,
    public_key: Annotated[Path, typer.Option("--public-key", help="The node's public key, PEM or OpenSSH.")],
    expect: Annotated[
        str | None, typer.Option("--expect", metavar="N:HASH", help="An entry that was noted elsewhere before.")
    ] = None,
) -> None:
    """Prove that the log is whole: chain, signatures and end. Exit code 3 if it is not."""
    from .audit_chain import load_public_key, verify_log

    entries = verify_log(log, load_public_key(public_key), expect=_expected(expect))
    last = entries[-1]
    signed = sum(entry["kind"] == "checkpoint" for entry in entries)
    repairs = [entry["n"] for entry in entries if entry["kind"] == "repair"]
    print(f"{log}: {len(entries)} entries of hospital {entries[0]['site']}, {signed} checkpoints and the head signed")
    if repairs:
        print(f"a line that was cut short was taken out before entry {', '.join(map(str, repairs))}")
    print(f"to note elsewhere, for the next time: --expect {last['n']}:{last['hash'][:16]}")


def _expected(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    number, _, start = text.partition(":")
    if not number.isdigit() or not int(number) or len(start) < 8:
        raise BadInput(
            f"--expect {text}: give the number of an entry and at least eight digits of its hash, as 12:9f2c…"
        )
    return int(number), start


@app.command()
def export(
    log: Log,
    form: Annotated[Literal["csv", "json"], typer.Option("--format", help="csv or json.")] = "csv",
    out: Out = None,
) -> None:
    """Print every entry, for the data-protection officer. The chain is checked first."""
    from .audit_chain import verify_log
    from .audit_views import to_csv, to_json

    entries = verify_log(log, None)
    _write(to_csv(entries) if form == "csv" else to_json(entries), out)


@app.command()
def egress(
    log: Log,
    form: Annotated[Literal["text", "html"], typer.Option("--format", help="text or html.")] = "text",
    out: Out = None,
) -> None:
    """Print what left the hospital, on one page. The chain is checked first."""
    from .audit_chain import verify_log
    from .audit_views import egress_html, egress_text

    entries = verify_log(log, None)
    show = egress_html if form == "html" else egress_text
    _write(show(entries, str(entries[0]["site"])), out)


@app.command(name="accept-ledger")
def accept_ledger(
    config: Annotated[Path, typer.Option("--config", help="The node's settings (node.toml).")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Declare that the privacy ledger counts as it now stands, after an inquiry; the log keeps who it contradicts."""
    from .gatekeeper import audit_log
    from .ledger_witness import accept_ledger as accept
    from .node_settings import load_node_settings

    settings = load_node_settings(config).site_settings()
    text = f"Let {settings.ledger} count as it stands? What it forgot must be taken off [budget] epsilon first"
    if not yes and not typer.confirm(text):
        print("nothing was changed")
        raise typer.Exit(3)
    before, now = accept(settings, audit_log(settings))
    told = f"entry {before[0]}, {before[1][:16]}" if before else "nothing"
    print(f"the audit log said {told}; it now says entry {now[0]}, {now[1][:16]}")


@app.command(name="public-key")
def public_key(config: Annotated[Path, typer.Option("--config", help="The node's settings (node.toml).")]) -> None:
    """Print the public key that proves the log's signatures."""
    from .audit_chain import Signer
    from .node_settings import load_node_settings

    print(Signer(Path(load_node_settings(config).superlink.key)).public_pem, end="")


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"wrote {out}")
