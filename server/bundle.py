# SPDX-License-Identifier: Apache-2.0
"""The thin app bundle, :mod:`fedneuro.privacy.bundle`: both sides make it, so that both can compare."""

from ..privacy.bundle import bundle, bundle_hash

__all__ = ["bundle", "bundle_hash"]
