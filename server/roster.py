# SPDX-License-Identifier: Apache-2.0
"""Who takes part, with the public key of each: what secure aggregation and the dashboard ask the coordinator for.

A site's lasting identity is the key of its Flower node (P-384), written down at enrolment. A coordinator that wants
to cheat can enrol a site of its own, so hospitals compare :func:`key_fingerprint` with each other by another way.
"""

from ..privacy.contract import Role
from ..privacy.secagg.keys import fingerprint, identity_of_pem
from .registry import Registry

__all__ = ["identities", "key_fingerprint"]


def identities(registry: Registry, role: Role | None = None) -> dict[str, bytes]:
    """Public identity (49 bytes, compressed point) of every enrolled site, or of those with ``role``."""
    return {
        site.name: identity_of_pem(site.node_key.encode())
        for site in registry.sites()
        if site.state == "enrolled" and role in (None, site.role)
    }


def key_fingerprint(node_key: str) -> str:
    """What hospitals compare: SHA-256 of the identity, 64 hexadecimal digits; ``fedneuro-node enrol`` shows it too."""
    return fingerprint(identity_of_pem(node_key.encode()))
