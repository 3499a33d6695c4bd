# SPDX-License-Identifier: Apache-2.0
"""Which code computes, :mod:`fedneuro.privacy.code_hash`: hospital and coordinator name it alike."""

from ..privacy.code_hash import code_hash

__all__ = ["code_hash"]
