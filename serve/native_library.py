"""The native code that reads requests; apart from the kernel's, as it needs none of XLA's headers."""

import ctypes
import functools

from jaxembed import built


@functools.cache
def library(holding: bool = False) -> ctypes.CDLL | None:
    """The library, its functions declared; None where it was not built, or lacks one of them.

    One of other sources that has them all is not told apart: whoever changes what they take builds it again.

    Args:
      holding: whether its functions hold the interpreter, for calls too short to be worth letting go of it.
    """
    path = built.find("libjaxembed_requests.so", "libjaxembed_requests.dylib")
    return None if path is None else _declared(str(path), ctypes.PyDLL if holding else ctypes.CDLL)


def _declared(path: str, load: type[ctypes.CDLL]) -> ctypes.CDLL | None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    try:
        found = load(path)
        found.JaxembedReaderMake.restype = pointer
        found.JaxembedReaderDelete.argtypes = [pointer]
        found.JaxembedReaderTake.argtypes = [pointer, ctypes.c_char_p, size, size]
        found.JaxembedReaderFill.argtypes = [pointer, pointer]
    except (OSError, AttributeError):
        return None
    return found
