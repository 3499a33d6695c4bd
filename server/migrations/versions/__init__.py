# SPDX-License-Identifier: Apache-2.0
"""One module per step; each names the step before it. A step that was released is never changed."""
