# SPDX-License-Identifier: Apache-2.0
"""Random numbers that protect patients: the operating system seeds them, and nobody can replay them.

Whoever can predict the noise can subtract it. So the generator is AES-256 in counter mode with a key from
``os.urandom``, made at construction: it takes no seed, ignores ``torch.manual_seed``, ``numpy.random.seed``
and ``monai.utils.set_determinism``, cannot be copied or pickled, and takes a fresh key in a forked process.

References: NIST SP 800-38A §6.5 (counter mode); Box and Muller 1958.
"""

import os
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["SecureRandom"]

_CHUNK = 1 << 14  # numbers made at a time, so that the working arrays stay in the processor's cache
_ZEROS = bytes(8 * _CHUNK)


class SecureRandom:
    """A cryptographic generator of uniform and normal numbers and of Poisson samples.

    Guarantees:
        - Two instances share nothing; nothing that a program or a study file sets has an influence.
        - One key yields far fewer than 2^64 blocks, so the key stream cannot be told from random bits.

    Not safe for threads that share an instance.
    """

    def __init__(self) -> None:
        self._rekey()

    def uniform(self, n: int) -> NDArray[np.float64]:
        """``n`` numbers, uniform on the multiples of 2^-53 in [0, 1)."""
        values = np.empty(n)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            np.multiply(self._words(len(part)) >> np.uint64(11), 2.0**-53, out=part)
        return values

    def normal(self, n: int) -> NDArray[np.float64]:
        """``n`` independent standard normal numbers, exact to 53 bits of each uniform (tails end at 8.57)."""
        values = np.empty(n)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            uniform = self.uniform(2 * half)
            radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:half]))  # 1 - u is never 0
            angle = uniform[half:] * (2.0 * np.pi)
            np.multiply(radius, np.cos(angle), out=part[:half])
            rest = len(part) - half
            np.multiply(radius[:rest], np.sin(angle[:rest]), out=part[half:])
        return values

    def poisson_sample(self, n: int, rate: float) -> NDArray[np.intp]:
        """Sorted positions, perhaps none, out of ``n``: each is chosen on its own with probability ``rate``."""
        return np.flatnonzero(self.uniform(n) < rate)

    def _rekey(self) -> None:
        self._process = os.getpid()
        cipher = Cipher(AES256(os.urandom(32)), CTR(os.urandom(16)))
        self._stream: CipherContext = cipher.encryptor()

    def _words(self, n: int) -> NDArray[np.uint64]:
        """``n`` words of the key stream; n is at most :data:`_CHUNK`."""
        if os.getpid() != self._process:
            # A forked child holds the parent's key: with it, two sites would add the same noise.
            self._rekey()
        return np.frombuffer(self._stream.update(_ZEROS[: 8 * n]), dtype=np.uint64)

    def __reduce__(self) -> NoReturn:
        raise TypeError("SecureRandom cannot be copied or pickled: a second holder of its key could replay the noise")
