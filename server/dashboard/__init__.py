# SPDX-License-Identifier: Apache-2.0
"""The dashboard: a consortium and its runs in a browser. :mod:`.serve` starts it, :mod:`.app` says what there is."""
