"""Which path a lookup takes: the native CPU kernel or plain JAX."""

import contextlib
import contextvars
import os
import sys
import warnings
from collections.abc import Iterator

from jaxembed import kernel

BACKENDS = ("auto", "native", "xla")
ENVIRONMENT_VARIABLE = "JAXEMBED_BACKEND"

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("jaxembed_backend", default=None)
_said: set[str] = set()


def backend() -> str:
    """The path that lookups take on CPU now: "native" (the C++ kernel) or "xla" (plain JAX).

    "native" wherever the kernel was built, unless the environment variable JAXEMBED_BACKEND (empty: as if unset) or
    `use_backend` says otherwise. Other platforms always take "xla", and so do tables of a type that the kernel does
    not have.

    Raises:
      ValueError: if JAXEMBED_BACKEND is none of "auto", "native", "xla".
      RuntimeError: if "native" is asked for where the kernel is not available.

    Examples:
      >>> with use_backend("xla"):
      ...     backend()
      'xla'
    """
    wanted = _wanted()
    if wanted not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {BACKENDS}, got {wanted!r}.")
    if wanted == "xla":
        return "xla"
    if kernel.available():
        return "native"
    if wanted == "native":
        raise RuntimeError(
            f"the native kernel is not available: {kernel.unavailable_reason()}, or take the plain JAX path with "
            "JAXEMBED_BACKEND=xla."
        )
    if "fallback" not in _said:
        _said.add("fallback")
        warnings.warn(
            f"jaxembed looks tables up in plain JAX: {kernel.unavailable_reason()}, or set JAXEMBED_BACKEND=xla to "
            "silence this.",
            RuntimeWarning,
            stacklevel=_users_level(),
        )
    return "xla"


def lookup_path() -> str:
    """What a lookup is traced as: "xla", "native", or "auto", which is the kernel except in exported programs.

    Raises:
      ValueError: as `backend`.
      RuntimeError: as `backend`.
    """
    return "auto" if backend() == "native" and _wanted() == "auto" else backend()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the path of the lookups that are traced within: "auto", "native" or "xla".

    Under "native", lookups in tables of a type that the kernel does not have are refused; under "auto" these, and not
    those of the other features, are plain JAX. A function that `jax.jit` has traced keeps the path it was traced with.
    Programs of `jax.export` are plain JAX under "auto"; under "native" they call the kernel, which the process that runs
    them must have, and `jax.export.export` must be told so with
    `DisabledSafetyCheck.custom_call("jaxembed_embedding_bags")`; their batches are of fixed sizes. Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) takes "xla".

    Raises:
      ValueError: if `name` is none of these.

    Examples:
      >>> with use_backend("xla"):
      ...     backend()
      'xla'
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}.")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def _wanted() -> str:
    return _override.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def _users_level() -> int:
    """The `stacklevel`, for whom calls this, of the first caller outside of jaxembed."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "jaxembed":
        frame, level = frame.f_back, level + 1
    return level
