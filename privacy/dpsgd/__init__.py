# SPDX-License-Identifier: Apache-2.0
"""Patient-level DP-SGD: one patient, one gradient, one clip; then noise.

Step of the engine, with the patients that Poisson sampling chose:

1. for each patient, K crops over all of that patient's scans: the gradient of their mean loss (:mod:`.paths`);
2. clip it to L2 norm C in float32, whatever K is; a gradient that is not finite counts as zero;
3. sum; also over no patient at all, which is a release like any other;
4. add N(0, σ²C²) in float64 from :class:`~fedneuro.privacy.noise.SecureRandom` and round to a fixed grid;
5. divide by the *public* expected number of patients.

Steps 2 to 5 are :class:`PatientGradient`; they are the same whatever way the gradients came. Before a study
:func:`self_test` tries the whole on made-up patients, and :func:`check_network` names layers that cannot be used.
A library's own clipping is never used: hooks were measured to break the bound silently (a contribution of 24 C with
ghost clipping and Dice, of K·C with K-crop loaders).

References: Abadi et al. 2016, https://arxiv.org/abs/1607.00133; De et al. 2022 (averaging crops before clipping),
https://arxiv.org/abs/2204.13650; Mironov 2012 (why noise is rounded), https://doi.org/10.1145/2382196.2382264.
"""

from .gradient import Clipping, PatientGradient, StepReport
from .paths import Loop, Loss, Path, Vmap
from .proof import largest_contribution, self_test, synthetic_patients
from .trial import Choice, Engine, choose_path
from .validators import check_loss, check_network, fix

__all__ = [
    "Choice",
    "Clipping",
    "Engine",
    "Loop",
    "Loss",
    "Path",
    "PatientGradient",
    "StepReport",
    "Vmap",
    "check_loss",
    "check_network",
    "choose_path",
    "fix",
    "largest_contribution",
    "self_test",
    "synthetic_patients",
]
