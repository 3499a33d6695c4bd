# SPDX-License-Identifier: Apache-2.0
"""What the operator of a rehearsal's SuperLink does: :mod:`fedneuro.server.control`."""

from ..server.control import Control

__all__ = ["Control"]
