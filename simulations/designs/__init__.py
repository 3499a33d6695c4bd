# SPDX-License-Identifier: Apache-2.0
"""Designs: several runs that answer one question (leave one site out, patient folds, searches)."""
