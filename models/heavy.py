# SPDX-License-Identifier: Apache-2.0
"""PyTorch and MONAI, loaded with the garbage collector at rest.

Loading them makes a million objects that stay, and the collector walks through all of them again and again: a
quarter of the time. Whoever trains takes ``torch`` from here, before anything else imports it. The objects are then
moved out of the collector's sight (:func:`gc.freeze`), which also keeps later collections short.
"""

import gc

_was_on = gc.isenabled()
gc.disable()
try:
    import monai.networks.nets  # noqa: F401
    import torch
    import torch._dynamo  # the first step of an optimiser would load it, in the middle of a round
finally:
    gc.freeze()
    if _was_on:
        gc.enable()

__all__ = ["torch"]
