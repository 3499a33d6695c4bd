# SPDX-License-Identifier: Apache-2.0
"""Service files for the node, hardened: ``fedneuro-node unit systemd|compose|apptainer`` prints one.

All three: an ordinary user, a read-only system, the data set read-only, no new privileges, no incoming port. The
walls around training (:mod:`.sandbox`) need user namespaces, which the files leave possible.
"""

import getpass
import os
import sys
from pathlib import Path

from ..privacy.service_file import HARDENED
from .node_settings import NodeSettings

__all__ = ["unit_text"]

_SYSTEMD = """\
# /etc/systemd/system/fedneuro-node.service
#   sudo cp fedneuro-node.service /etc/systemd/system/ && sudo systemctl enable --now fedneuro-node
[Unit]
Description=FedNeuro node of {site}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
ExecStart={program} start --config {config}
Restart=always
RestartSec=2
# SIGTERM abandons the round and tells the coordinator; "fedneuro-node stop" before it finishes the round.
KillMode=mixed
TimeoutStopSec=30
# A training process that takes too much is ended alone; the node answers and lives on.
OOMPolicy=continue

{hardened}ReadOnlyPaths={data}
ReadWritePaths={writable}
SystemCallFilter=@system-service @mount
# The walls around training: a user, a network and a mount namespace of its own.
RestrictNamespaces=user net mnt ipc

[Install]
WantedBy=multi-user.target
"""

_COMPOSE = """\
# compose.yaml, for docker compose and podman-compose. No port is published: the node only calls out.
services:
  node:
    image: fedneuro-node:{version}   # built from the wheelhouse: see docs/hospital.md
    command: ["fedneuro-node", "start", "--config", "{config}"]
    user: "{uid}:{gid}"
    restart: always
    init: true
    read_only: true
    stop_grace_period: 30s
    cap_drop: [ALL]
    security_opt:
      - no-new-privileges:true
      - seccomp:unconfined          # the walls around training need unshare(2) and mount(2), which the default forbids
      - apparmor:unconfined
    tmpfs: ["/tmp:mode=1777,size=1g"]
    shm_size: 1g
    environment: {{HOME: /tmp, HTTPS_PROXY: "${{HTTPS_PROXY:-}}"}}
    volumes:
      - {folder}:{folder}:ro
{writable}      - {data}:{data}:ro
    # With an NVIDIA GPU, and the NVIDIA container toolkit:
    # deploy: {{resources: {{reservations: {{devices: [{{driver: nvidia, count: 1, capabilities: [gpu]}}]}}}}}}
"""

_APPTAINER = """\
# fedneuro-node.def, for Apptainer (Singularity), without root and without a daemon. In the folder of the wheelhouse:
#   apptainer build fedneuro-node.sif fedneuro-node.def
#   apptainer run --containall --no-home {gpu} \\
#     --bind {data}:{data}:ro --bind {folder}:{folder}:ro {binds} \\
#     fedneuro-node.sif start --config {config}
Bootstrap: docker
From: python:{python_version}-slim

%files
    . /wheelhouse

%post
    cd /wheelhouse && sha256sum --check --quiet SHA256SUMS
    python -m pip install --no-cache-dir --no-index --find-links /wheelhouse fedneuro=={version}
    rm -rf /wheelhouse

%runscript
    exec fedneuro-node "$@"
"""


def unit_text(kind: str, settings: NodeSettings, config: Path) -> str:
    """The service file of ``kind``: ``systemd``, ``compose`` or ``apptainer``."""
    from importlib.metadata import version

    config = config.resolve()
    state = Path(settings.site.state)
    writable = [state, *([Path(settings.site.cache)] if settings.site.cache else [])]
    values = {
        "site": settings.site.name,
        "user": getpass.getuser() if os.getuid() else "fedneuro",
        "uid": os.getuid() or 10001,
        "gid": os.getgid() or 10001,
        "program": Path(sys.executable).parent / "fedneuro-node",
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version": version("fedneuro"),
        "config": config,
        "folder": config.parent,
        "data": settings.site.data,
        "gpu": "--nv",
    }
    if kind == "systemd":
        quoted = {key: str(value).replace("%", "%%") for key, value in values.items()}
        return _SYSTEMD.format(hardened=HARDENED, **quoted, writable=" ".join(map(str, writable)))
    if kind == "compose":
        return _COMPOSE.format(**values, writable="".join(f"      - {path}:{path}\n" for path in writable))
    return _APPTAINER.format(**values, binds=" ".join(f"--bind {path}:{path}" for path in writable))
