"""The library of the native kernel: where it is, and whether it can be called."""

import ctypes
import functools
import pathlib

import jax

from jaxembed import built

#: Name of the kernel as an XLA FFI target; a program exported with it needs it registered.
TARGET = "jaxembed_embedding_bags"
_NUMBERS = 19  # that describe a feature, see native/decode.h


@functools.cache
def _load() -> str | None:
    """Registers the kernel; returns why it cannot be, or None."""
    path = library()
    if path is None:
        return "the kernel was not built when jaxembed was installed; reinstall it where a C++ compiler is"
    try:
        kernel = ctypes.CDLL(str(path))
        handler, numbers = kernel.JaxembedEmbeddingBags, kernel.JaxembedNumbers()
    except (OSError, AttributeError) as e:
        return f"{path} cannot be loaded ({e}); reinstall jaxembed"
    if numbers != _NUMBERS:
        return f"{path} was built from the sources of another version; reinstall jaxembed"
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    except RuntimeError as e:
        # pip builds with the newest jaxlib, whatever the one that runs.
        return (
            f"the kernel was built for another jaxlib than the one here ({e}); upgrade jaxlib, or reinstall jaxembed "
            "with `pip install --no-build-isolation`"
        )
    return None


def library() -> pathlib.Path | None:
    """The file that the kernel is in, or None."""
    return built.find("libjaxembed_native.so", "libjaxembed_native.dylib")


def available() -> bool:
    """Whether the kernel can be called."""
    return _load() is None


def unavailable_reason() -> str | None:
    """Why it cannot, and what to do, or None."""
    return _load()


def instruction_set() -> str | None:
    """The instruction set of the kernel's hot loop on this processor, or None where there is no kernel."""
    if not available():
        return None
    describe = ctypes.CDLL(str(library())).JaxembedInstructionSet
    describe.restype = ctypes.c_char_p
    return describe().decode()
