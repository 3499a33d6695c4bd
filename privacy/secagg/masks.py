# SPDX-License-Identifier: Apache-2.0
"""Masks: key streams of ChaCha20, read as 64-bit words and added modulo 2^64.

A word plus a uniform, independent word is uniform, whatever the first was: that is the whole argument for why
one masked vector tells nothing. The key of a stream is 32 bytes and serves for one vector only, so the nonce is
constant. A stream of ChaCha20 repeats after 256 GiB; :data:`MAX_WORDS` stays far below.

Reference: RFC 8439, section 2.4.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

__all__ = ["MAX_WORDS", "add_streams"]

MAX_WORDS = 1 << 32
_BLOCK = 1 << 15  # words at a time: vector, stream and zeros stay in the processor's cache
_ZEROS = bytes(8 * _BLOCK)


def add_streams(vector: NDArray[np.uint64], added: Iterable[bytes], taken: Iterable[bytes]) -> None:
    """Add the streams of some keys to ``vector`` and subtract those of others, modulo 2^64, in place.

    Args:
        vector: uint64, one dimension, contiguous.
        added: keys of 32 bytes.
        taken: keys of 32 bytes.
    """
    if vector.size > MAX_WORDS:
        raise ValueError(f"a vector of {vector.size} words; at most {MAX_WORDS} may be masked")
    plus, minus = [_stream(key) for key in added], [_stream(key) for key in taken]
    words = np.empty(min(_BLOCK, vector.size), np.uint64)
    buffer = words.view(np.uint8).data
    for start in range(0, vector.size, _BLOCK):
        part = vector[start : start + _BLOCK]
        size = part.nbytes
        for streams, combine in ((plus, np.add), (minus, np.subtract)):
            for stream in streams:
                stream.update_into(memoryview(_ZEROS)[:size], buffer[:size])
                combine(part, words[: part.size], out=part)


def _stream(key: bytes) -> CipherContext:
    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
