# SPDX-License-Identifier: Apache-2.0
"""A service file for the coordinator, hardened: ``fedneuro-server unit systemd`` prints one.

An ordinary user, a read-only system, no new privileges, and one folder that can be written. The passphrase of the
issuing key lies encrypted with the machine's own key (TPM where there is one; systemd-creds(1)), and is handed over
on a file descriptor: never in the environment, on the command line, or in a file that a backup takes along.
"""

import getpass
import os
import sys
from pathlib import Path

from ..privacy.service_file import HARDENED
from .consortium import Consortium

__all__ = ["unit_text"]

_SYSTEMD = """\
# /etc/systemd/system/fedneuro-server.service
#   fedneuro-server unit systemd --config {folder} | sudo tee /etc/systemd/system/fedneuro-server.service
#   sudo mkdir -p /etc/credstore.encrypted
#   systemd-ask-password -n "Issuing key:" \\
#     | sudo systemd-creds encrypt --name=fedneuro-passphrase - /etc/credstore.encrypted/fedneuro-passphrase
#   sudo systemctl enable --now fedneuro-server
[Unit]
Description=FedNeuro coordinator of {name}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
LoadCredentialEncrypted=fedneuro-passphrase
ExecStart=/bin/sh -c 'exec "$0" "$@" 3< "$$CREDENTIALS_DIRECTORY/fedneuro-passphrase"' \\
  {program} start --config {folder} --passphrase-fd 3
Restart=always
RestartSec=2
# What a setting or a file asks a person to mend is not tried again and again.
RestartPreventExitStatus=2 3
# A run under way is taken up again at the next start: docs/coordinator.md.
KillMode=mixed
TimeoutStopSec=60

{hardened}ReadWritePaths={folder}
PrivateDevices=yes
RestrictNamespaces=yes
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


def unit_text(consortium: Consortium) -> str:
    """The service file; the user is the one who asks, or ``fedneuro`` where that is root."""
    values = {
        "name": consortium.name,
        "user": getpass.getuser() if os.getuid() else "fedneuro",
        "folder": str(consortium.folder),
        "program": str(Path(sys.executable).parent / "fedneuro-server"),
    }
    return _SYSTEMD.format(hardened=HARDENED, **{key: value.replace("%", "%%") for key, value in values.items()})
