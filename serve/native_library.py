"""The native code that reads and packs requests; apart from the kernel's, as it needs none of XLA's headers."""

import ctypes
import functools

from jaxembed import built


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, its functions declared; None where it was not built, or lacks one of them.

    One of other sources that has them all is not told apart: whoever changes what they take builds it again.
    """
    path = built.find("libjaxembed_requests.so", "libjaxembed_requests.dylib")
    return None if path is None else _declared(str(path))


def _declared(path: str) -> ctypes.CDLL | None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    try:
        found = ctypes.CDLL(path)
        found.JaxembedReaderNew.restype = pointer
        found.JaxembedReaderDelete.argtypes = [pointer]
        found.JaxembedReaderRead.argtypes = [pointer, ctypes.c_char_p, size, size, pointer]
        found.JaxembedReaderWrite.argtypes = [pointer, pointer, pointer, pointer]
    except (OSError, AttributeError):
        return None
    return found
