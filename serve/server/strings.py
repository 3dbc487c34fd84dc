"""Tensors of strings, of datatype BYTES: the ids of features whose preprocessing takes strings.

In JSON they are strings; in bytes each is its length in 4 bytes, little-endian, and its UTF-8.

References:
  https://github.com/triton-inference-server/server, "Binary Tensor Data Extension": "BYTES".
"""

import struct

import numpy as np

from jaxembed.serve.features import ServedFeature

from .errors import bad_request

_LENGTH = struct.Struct("<I")


def takes_strings(feature: ServedFeature) -> bool:
    """Whether the ids of a feature are strings."""
    preprocessing = feature.config.preprocessing
    return preprocessing is not None and preprocessing.dtype == "string"


def from_elements(name: str, count: int, data: bytes) -> np.ndarray:
    """Strings [count], of bytes, that were sent one after the other.

    Raises:
      RequestError: if there are more of them, or fewer.
    """
    strings: list[bytes] = []
    at, end = 0, len(data)
    while at < end and len(strings) < count:
        start = at + _LENGTH.size
        if start > end:
            break
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > end:
            break
        strings.append(bytes(data[start:at]))
    if at != end or len(strings) != count:
        raise bad_request(
            f"input {name!r}: {count} BYTES are each a length of 4 bytes and so many bytes, got {end} bytes that are not."
        )
    found = np.empty(count, object)
    found[:] = strings
    return found
