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
        import torch  # a runner that reads messages and never draws does without

        values = np.empty(n)
        half = _CHUNK // 2
        radius, angle, turned = np.empty(half), np.empty(half), torch.empty(half, dtype=torch.float64)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            first = (len(part) + 1) // 2
            r, a, t = radius[:first], angle[:first], turned[:first]
            words = self._words(2 * first) >> np.uint64(11)
            np.multiply(words[:first], -(2.0**-53), out=r)
            np.add(r, 1.0, out=r)  # 1 - u, which is exact, and never 0
            np.log(r, out=r)
            np.multiply(r, -2.0, out=r)
            np.sqrt(r, out=r)
            np.multiply(words[first:], 2.0**-53 * 2.0 * np.pi, out=a)
            # PyTorch's cosine and sine are vectorised in float64, NumPy's are not: a third of the time.
            np.multiply(r, torch.cos(torch.from_numpy(a), out=t).numpy(), out=part[:first])
            rest = len(part) - first
            turned_back = torch.sin(torch.from_numpy(a), out=t).numpy()
            np.multiply(r[:rest], turned_back[:rest], out=part[first:])
        return values

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` uniform 64-bit words."""
        values = np.empty(n, np.uint64)
        for start in range(0, n, _CHUNK):
            part = values[start : start + _CHUNK]
            part[:] = self._words(len(part))
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
