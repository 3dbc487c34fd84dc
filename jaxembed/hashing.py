"""Stable 64-bit hashes of ids: the same on every machine, in every process and version."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash


def hash_ints(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """SplitMix64 of each id.

        z = id + 0x9E3779B97F4A7C15
        z = (z ^ z >> 30) 0xBF58476D1CE4E5B9
        z = (z ^ z >> 27) 0x94D049BB133111EB
        hash = z ^ z >> 31

    modulo 2**64; with a seed other than 0 it is the hash of (hash ^ seed). It is a bijection.

    Args:
      ids: integers of any shape; negative ones as their two's complement in 64 bits.
      seed: in [0, 2**64).

    Returns:
      uint64, of the same shape.

    Raises:
      ValueError: if the ids are no integers of 64 bits.

    References:
      Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014); Vigna's splitmix64.c.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise ValueError(
            f"ids must be integers of at most 64 bits, got {ids.dtype}; convert them, or hash their strings."
        )
    hashed = _splitmix64(ids if ids.dtype == np.uint64 else ids.astype(np.int64).view(np.uint64))
    return _splitmix64(hashed ^ np.uint64(seed)) if seed else hashed


def hash_strings(strings: Sequence[Any], seed: int = 0) -> np.ndarray:
    """XXH3 (64 bits) of the UTF-8 bytes of each string.

    Args:
      strings: N str or bytes; bytes as they are.
      seed: in [0, 2**64).

    Returns:
      uint64 [N].

    References:
      Collet, xxHash, https://github.com/Cyan4973/xxHash.
    """
    encoded = (string.encode() if isinstance(string, str) else string for string in strings)
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(data, seed) for data in encoded), np.uint64, len(strings))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a scalar warns where an array wraps around
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
