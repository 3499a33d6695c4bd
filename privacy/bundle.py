# SPDX-License-Identifier: Apache-2.0
"""The thin app bundle: what Flower wants to see of an app, without any code.

Flower sends an app to every node as a bundle (FAB). Ours holds one file that names the objects in the
installed package; both sides run the wheel that they installed. A hospital's node serves exactly one bundle,
by hash, and never unpacks it. The bundle is a function of the installed versions of FedNeuro and Flower alone,
so whoever has the same versions can build it again and compare.
"""

import hashlib
from importlib.metadata import version

__all__ = ["bundle", "bundle_hash"]

_PROJECT = """\
[project]
name = "fedneuro"
version = "{version}"
description = "FedNeuro: thin bundle, the code is what each side installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedneuro"

[tool.flwr.app.components]
serverapp = "fedneuro.server.app:app"
clientapp = "fedneuro.client.app:app"

[tool.flwr.app.config]
study = ""
out = ""
"""


def bundle() -> bytes:
    """The bundle of the installed version."""
    from flwr.cli.build import build_fab_from_files

    project = _PROJECT.format(version=version("fedneuro"))
    content: bytes = build_fab_from_files({"pyproject.toml": project.encode()})[0]
    return content


def bundle_hash(content: bytes) -> str:
    """SHA-256 of a bundle, as Flower and ``node.toml`` (``runner.bundle``) name it."""
    return hashlib.sha256(content).hexdigest()
