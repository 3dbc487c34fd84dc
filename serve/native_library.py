"""The native code that reads and packs requests; apart from the kernel's, as it needs none of XLA's headers."""

import ctypes
import functools
import pathlib
import sys

_NAMES = ("libjaxembed_requests.so", "libjaxembed_requests.dylib")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, its functions declared; None where it was not built, or is of other sources."""
    # An editable install keeps the sources in one place and the built library in site-packages.
    for folder in (pathlib.Path(p) / "jaxembed" / "native" for p in sys.path if p):
        for name in _NAMES:
            if (folder / name).is_file():
                return _declared(str(folder / name))
    return None


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
