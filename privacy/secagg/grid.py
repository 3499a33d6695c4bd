# SPDX-License-Identifier: Apache-2.0
r"""The integer grid of a secure aggregation: how gradients and noise become whole numbers, and why ε still holds.

A patient's clipped gradient is rounded to multiples of a step g; everything after that is whole numbers: the sum
over a site's patients, the noise, the masks, the sum over sites. So the guarantee is about the very numbers that
are sent. With H sites, of which t may drop out or collude, n = H - t, d parameters and s the width of
:mod:`~fedneuro.privacy.secagg.discrete_gaussian`:

1. *Sensitivity.* Rounding moves each coordinate by at most 1/2, so one patient's whole-number gradient is at most
   :math:`\Delta = C/g + \sqrt{d}/2` long. That is not only proved: each one is measured, and one that is longer
   counts as zero. Zero-out of the patient changes the sum by just that vector.
2. *Noise.* Each site adds :math:`N_Z(0, s^2)`. The noise that the server and t others cannot subtract has width
   :math:`S \ge s\sqrt{n}`. The step g is chosen so that :math:`s\sqrt{n} = \sigma\Delta`: the noise multiplier
   counts the rounding in.
3. *ε.* Rounding a Gaussian of width S to whole numbers is post-processing, so x + round(N(0, S²)) has the guarantee
   of the Gaussian mechanism with :math:`\sigma`, which is what the accountant computes. Its probability of k over
   that of :math:`N_Z(0, S^2)` is, per coordinate and up to 1e-32, :math:`\int_{-1/2}^{1/2} \cosh(kx/S^2)
   e^{-x^2/2S^2} dx`, whose logarithm lies between :math:`-1/(24S^2)` and :math:`k^2/(24S^4)`. Over d coordinates the
   two laws agree to a factor :math:`e^{\pm\eta}`, :math:`\eta = (\sqrt{d} + 41)^2 / (24 S^2)`, but for vectors longer
   than :math:`S(\sqrt{d} + 40)`, whose probability is below e^-800. So R releases, subsampled or not, adaptive or
   not, are :math:`(\varepsilon + 2R\eta, e^{R\eta}\delta + 10^{-24})`-private where the Gaussians are
   :math:`(\varepsilon, \delta)`-private: replace one law by the other in the hockey-stick divergence and back. The
   last summand covers the table of the sampler. The accountant therefore gets all but :data:`SHARE` of ε and of δ
   (:func:`fedneuro.privacy.budget.training_event`), and :meth:`Grid.prove` checks that this pays for it.
4. *Head-room.* A site's sum stays below 2^62 / H in every coordinate (measured), and H draws of noise are below
   2^56, so the true sum lies within ±2^63 and is read off the modular one without ambiguity.

References: Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism",
https://arxiv.org/abs/2102.06387 (sums, grid, modular clipping); Canonne, Kamath & Steinke 2020,
https://arxiv.org/abs/2004.00010.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, ContractViolation
from ..noise import SecureRandom
from .discrete_gaussian import LARGEST, WIDTH, discrete_gaussian

__all__ = ["MAX_SITES", "SHARE", "Grid", "SiteSum", "check_sites"]

MAX_SITES: Final = 1000
SHARE: Final = 1e-6
"""Share of ε and of δ that is kept back for the difference between whole numbers and Gaussians."""
_LIMIT: Final = 2**62
_COARSEST: Final = 1e-3  # rounding may cost this share of the noise at most


class Grid:
    """The grid of one study's aggregations; the same at every site and at the server, from public numbers.

    Args:
        clip: C, bound on the L2 norm of one patient's gradient.
        noise_multiplier: σ of the sum over sites, over the sensitivity.
        size: d, number of trainable parameters.
        sites: H, training sites of the study; at least 2 more than ``tolerate``.
        tolerate: t, sites that may drop out or collude; below a third of H.

    Attributes:
        step: g, what one whole number stands for in units of the gradient.
        sensitivity: Δ, bound on one patient's whole-number gradient.

    Raises:
        BadInput: the numbers allow no aggregation, or the grid would be too coarse.

    Example:
        >>> grid = Grid(clip=1.0, noise_multiplier=2.0, size=10_000, sites=4, tolerate=0)
        >>> round(grid.noise_std / 2.0, 6)
        1.0
        >>> grid.prove(releases=100, epsilon=1.0)
    """

    def __init__(self, *, clip: float, noise_multiplier: float, size: int, sites: int, tolerate: int) -> None:
        check_sites(sites, tolerate)
        self.size, self.sites, self._survivors = size, sites, sites - tolerate
        self.sensitivity = WIDTH * math.sqrt(self._survivors) / noise_multiplier
        rounding = math.sqrt(size) / 2
        if rounding > _COARSEST * self.sensitivity:
            raise BadInput(
                f"{size} parameters with noise multiplier {noise_multiplier:g}: rounding would be felt; "
                "train fewer parameters or raise epsilon"
            )
        self.step = clip / (self.sensitivity - rounding)
        self._unit = 1 / self.step

    @property
    def noise_std(self) -> float:
        """Standard deviation, in units of the gradient, of the noise that is sure to stay: σC and a trifle."""
        return self.noise_of(self._survivors)

    def noise_of(self, sites: int) -> float:
        """The same, of the noise of ``sites`` sites together."""
        return WIDTH * math.sqrt(sites) * self.step

    def prove(self, *, releases: int, epsilon: float) -> None:
        """Check that :data:`SHARE` of ε and δ pays for the whole numbers; see point 3 of the module's text.

        Raises:
            BadInput: it does not.
        """
        eta = (math.sqrt(self.size) + 41) ** 2 / (24 * WIDTH**2 * self._survivors)
        if releases * eta > SHARE / 2 * min(1.0, epsilon):
            raise BadInput(
                f"{releases} rounds of {self.size} parameters at epsilon = {epsilon:g}: more than the proof of the "
                "whole-number noise covers; take fewer rounds or parameters"
            )

    def read(self, total: NDArray[np.uint64]) -> NDArray[np.float64]:
        """The sum of gradients, in their own unit, from the sum modulo 2^64.

        Raises:
            ContractViolation: a number is beyond the head-room: a mask was not taken off.
        """
        signed = total.view(np.int64)
        if max(int(signed.max()), -int(signed.min())) > _LIMIT + 2**56:
            raise ContractViolation("the sum lies beyond its head-room: not every mask was taken off")
        return signed.astype(np.float64) * np.float64(self.step)


class SiteSum:
    """A site's sum of whole-number gradients over the patients of one step; :meth:`noised` ends it.

    Not to be sent before :meth:`noised`: until then it is exact.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._sum = np.zeros(grid.size, np.int64)
        self._most = int(_LIMIT / (grid.sites * grid.sensitivity))
        self.patients = self.left_out = 0

    def add(self, gradient: NDArray[np.float32]) -> None:
        """Add one patient's clipped gradient; one that breaks the bound, or is not finite, counts as zero.

        Raises:
            ContractViolation: more patients than the head-room allows (tens of thousands at least).
        """
        self.patients += 1
        if self.patients > self._most:
            raise ContractViolation(f"more than {self._most} patients in one step: beyond the head-room of the sum")
        scaled = gradient.astype(np.float64)
        scaled *= self._grid._unit
        np.rint(scaled, out=scaled)
        # Whole numbers far below 2^53: the norm is right to 1e-12, and the margin is larger than that.
        if not math.sqrt(float(np.dot(scaled, scaled))) * (1 + 1e-9) <= self._grid.sensitivity:
            self.left_out += 1
            return
        self._sum += scaled.astype(np.int64)

    def noised(self, random: SecureRandom) -> NDArray[np.uint64]:
        """The sum with the site's share of the noise, modulo 2^64, ready to be masked. Call once."""
        self._sum += discrete_gaussian(self._grid.size, random)
        return self._sum.view(np.uint64)


def check_sites(sites: int, tolerate: int) -> None:
    """Refuse numbers of sites with which no aggregation protects anyone.

    Raises:
        BadInput: saying which bound is broken.
    """
    if sites > MAX_SITES:
        raise BadInput(f"{sites} training sites; one aggregation takes {MAX_SITES} at most")
    if sites - tolerate < 2:
        raise BadInput(
            f'{sites} training sites with privacy.tolerate = {tolerate}: mode "distributed" needs two that stay; '
            'a sum over one is that one\'s update. Use mode "local"'
        )
    if 3 * tolerate >= sites and tolerate:
        raise BadInput(
            f"privacy.tolerate = {tolerate} of {sites} training sites; expected fewer than a third of them, "
            "so that no lie about who dropped out can reveal one site's vector"
        )


assert MAX_SITES * LARGEST < 2**56  # noqa: S101 - the head-room of point 4, in constants
