# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node doctor``: what could keep this node from working, each with what was seen and what to do.

A check is a function of the node's settings and gives findings. None changes anything but a probe file in the state
folder, and none sends anything but a connection to the coordinator's address (:mod:`.doctor_network`). One that
fails unexpectedly is a finding too.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..privacy.errors import FedNeuroError
from .node_settings import NodeSettings

__all__ = ["Finding", "Verdict", "examine", "fail", "passed", "warn"]

Verdict = Literal["pass", "warn", "fail"]
MIN_DISK_GIB, MIN_MEMORY_GIB = 5.0, 8.0
GIB = 2**30
DOORS = ("/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock")
"""Who may write there has the machine, also from within the walls around training: files stay files there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def passed(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding(check, "pass", seen)


def warn(check: str, seen: str, remedy: str) -> Finding:
    """The node works, but less well or less safely."""
    return Finding(check, "warn", seen, remedy)


def fail(check: str, seen: str, remedy: str) -> Finding:
    """The node cannot work like this."""
    return Finding(check, "fail", seen, remedy)


Check = Callable[[NodeSettings], Iterator[Finding]]


def examine(settings: NodeSettings) -> Iterator[Finding]:
    """All findings, in the order in which things depend on one another."""
    from .doctor_network import network_checks

    for check in (*_CHECKS, *network_checks()):
        try:
            yield from check(settings)
        except FedNeuroError as error:
            yield fail(_name(check), str(error), "see the text")
        except Exception as error:
            yield fail(_name(check), f"{type(error).__name__}: {error}", "report this as a bug")


def _name(check: Check) -> str:
    return getattr(check, "__name__", "check").strip("_").replace("_", " ")


def _versions(settings: NodeSettings) -> Iterator[Finding]:
    from importlib.metadata import version

    from ..privacy.bundle import bundle, bundle_hash

    seen = f"fedneuro {version('fedneuro')}, flwr {version('flwr')}, torch {version('torch')}, "
    seen += f"Python {platform.python_version()}"
    if bundle_hash(bundle()) == settings.runner.bundle:
        yield passed("versions", f"{seen}: the coordinator's")
    else:
        remedy = "install the version that the coordinator names, then: fedneuro-node renew"
        yield fail("versions", f"{seen}: the coordinator's app bundle is of others", remedy)


def _code(settings: NodeSettings) -> Iterator[Finding]:
    from .integrity import check_integrity

    found = check_integrity()
    if found.faults:
        yield fail("installed code", "; ".join(found.faults[:3]), "install FedNeuro again from a source you trust")
    elif not found.proven:
        remedy = "install a wheel (docs/hospital.md) and set runner.require_record = true"
        make = fail if settings.runner.require_record else warn
        yield make("installed code", found.note, remedy)
    else:
        yield passed("installed code", "every file is the one that was installed")


def _user(_: NodeSettings) -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield warn("user", "root", "run the node as a user of its own: fedneuro-node unit systemd")
    elif doors := [path for path in DOORS if os.access(path, os.W_OK)]:
        seen = f"uid {os.geteuid()}, who may use {doors[0]}"
        yield warn("user", seen, "take the node's user out of that group: whoever takes training over has the machine")
    else:
        yield passed("user", f"uid {os.geteuid()}")


def _sandbox(settings: NodeSettings) -> Iterator[Finding]:
    from .run_folder import RunFolder
    from .sandbox import probe

    folder = RunFolder(Path(settings.site.state))
    folder.make()
    if settings.sandbox.isolation == "off":
        yield warn("sandbox", "switched off", 'set sandbox.isolation = "auto" in node.toml')
        return
    walls = probe(folder.scratch, Path(settings.site.data))
    if walls.complete:
        yield passed("sandbox", "training has no network, and only its state is writable: tried")
        return
    seen = f"network {'closed' if walls.network else 'OPEN'}, files {'read-only' if walls.files else 'WRITABLE'}"
    remedy = "allow unprivileged user namespaces: sysctl user.max_user_namespaces > 0; on Ubuntu 24.04 "
    remedy += "kernel.apparmor_restrict_unprivileged_userns=0 or a profile; in a container see fedneuro-node unit"
    make = fail if settings.sandbox.isolation == "required" else warn
    yield make("sandbox", f"{seen} ({walls.why})", remedy)


def _memory(_: NodeSettings) -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    seen = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < MIN_MEMORY_GIB * GIB:
        yield warn("memory", seen, f"3D studies need about {MIN_MEMORY_GIB:.0f} GiB free")
    else:
        yield passed("memory", seen)


def _disk(settings: NodeSettings) -> Iterator[Finding]:
    state = Path(settings.site.state)
    cache = Path(settings.site.cache or state / "cache")
    for name, folder in (("state", state), ("cache", cache)):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        seen = f"{name} folder {folder}: {free:.1f} GiB free"
        if not os.access(there, os.W_OK):
            yield fail("disk", f"{folder} cannot be written", "give the node's user write permission")
        elif free < MIN_DISK_GIB:
            yield warn(
                "disk", seen, f"at least {MIN_DISK_GIB:.0f} GiB; preprocessed scans take about the size of the data"
            )
        else:
            yield passed("disk", seen)


def _gpu(settings: NodeSettings) -> Iterator[Finding]:
    from .manners import gpu_neighbours, query_gpus

    program = shutil.which("nvidia-smi")
    import torch

    if not torch.cuda.is_available():
        if program:
            remedy = "torch sees no GPU: install a driver for CUDA " + str(torch.version.cuda)
            yield warn("GPU", "nvidia-smi is there, torch has no CUDA", f"{remedy}, or a torch with CUDA")
        else:
            yield warn("GPU", "none", "2D studies run on processors; 3D studies are slow there")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    seen = f"{', '.join(names)}; CUDA {torch.version.cuda}; {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    others = gpu_neighbours(query_gpus(), {os.getpid()})
    if others and not settings.sandbox.yield_gpu:
        yield warn("GPU", f"{seen}; {len(others)} other processes", "sandbox.yield_gpu = true lets them go first")
    else:
        yield passed("GPU", seen)


def _data(settings: NodeSettings) -> Iterator[Finding]:
    folder = Path(settings.site.data)
    patients = sorted(path for path in folder.glob("sub-*") if path.is_dir())
    if not patients:
        yield fail("data", f"{folder} holds no patient (sub-*)", "give a BIDS folder as site.data")
        return
    scans = list(patients[0].rglob("*.nii*")) + list(patients[-1].rglob("*.nii*"))
    unreadable = [path for path in scans if not os.access(path, os.R_OK)]
    if unreadable:
        yield fail("data", f"{unreadable[0]} cannot be read", "give the node's user read permission")
        return
    seen = f"{len(patients)} patients in {folder}"
    if os.geteuid() and os.access(folder, os.W_OK):
        yield warn("data", f"{seen}, writable", "mount it read-only, or take the node's user its write permission")
    else:
        yield passed("data", seen)


def _ledger(settings: NodeSettings) -> Iterator[Finding]:
    from ..privacy.ledger import Ledger
    from .ledger_witness import check_witness

    site = settings.site_settings()
    try:
        entries = Ledger(site.ledger, site.name).entries() if site.ledger.exists() else []
        check_witness(site, entries)
    except FedNeuroError as error:
        yield fail("privacy ledger", str(error), "nothing private is trained before; see docs/hospital.md, Back up")
        return
    yield passed(
        "privacy ledger", f"{len(entries)} entries, whole, as the audit log has them" if entries else "none yet"
    )


def _audit(settings: NodeSettings) -> Iterator[Finding]:
    from .audit_chain import Signer, verify_log

    site = settings.site_settings()
    if not site.audit.exists():
        yield passed("audit log", "none yet")
        return
    try:
        entries = verify_log(site.audit, Signer(Path(settings.superlink.key)).public)
    except FedNeuroError as error:
        yield fail("audit log", str(error), "keep the file for the data-protection officer, and ask why")
        return
    yield passed("audit log", f"{len(entries)} entries, whole and signed")


def _policy(settings: NodeSettings) -> Iterator[Finding]:
    from .policy import load_policy

    if settings.study.policy is None:
        yield warn("policy", "a list of approved studies only", 'write policy = "policy.toml" under [study]')
        return
    policy = load_policy(Path(settings.study.policy))
    count = len(policy.studies.approved)
    if count or policy.studies.rules:
        yield passed("policy", f"{count} studies approved by hash, {len(policy.studies.rules)} rules")
    else:
        yield warn("policy", "no study is approved", "fedneuro-node approve STUDY --config node.toml")


def _certificate(settings: NodeSettings) -> Iterator[Finding]:
    from datetime import UTC, datetime

    from cryptography import x509

    if settings.superlink.certificate is None:
        yield warn(
            "certificate", "none: the coordinator knows this node by its key only", "fedneuro-node enrol INVITATION"
        )
        return
    leaf = x509.load_pem_x509_certificate(Path(settings.superlink.certificate).read_bytes())
    days = (leaf.not_valid_after_utc - datetime.now(UTC)).days
    seen = f"valid until {leaf.not_valid_after_utc:%Y-%m-%d}"
    if days < 0:
        yield fail(
            "certificate", f"expired on {leaf.not_valid_after_utc:%Y-%m-%d}", "ask the coordinator for an invitation"
        )
    elif days < 30:
        yield warn("certificate", seen, "fedneuro-node renew, then restart the node")
    else:
        yield passed("certificate", seen)


def _port(settings: NodeSettings) -> Iterator[Finding]:
    from ..privacy.processes import claim_port
    from .run_folder import RunFolder

    port = settings.runner.port
    if RunFolder(Path(settings.site.state)).is_held("node"):
        yield passed("local port", f"{port} of 127.0.0.1 is the running node's")
        return
    claim_port(port)
    yield passed("local port", f"{port} of 127.0.0.1 is free")


_CHECKS: tuple[Check, ...] = (
    _versions, _code, _user, _sandbox, _memory, _disk, _gpu, _data, _policy, _ledger, _audit, _certificate, _port,
)  # fmt: skip
