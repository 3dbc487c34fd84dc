"""Learning rates: numbers, callables without arguments, and schedules of the step; told apart once."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxembed.shapes import Scalar

LearningRate = float | Callable[..., Any]


def number(value: Any, what: str) -> float:
    """`value` as a float; ValueError if it is no finite number; True and "1" are none."""
    try:
        converted = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError):
        converted = math.nan
    if not math.isfinite(converted):
        raise ValueError(f"{what} must be a finite number, got {value!r}.")
    return converted


def number_or_callable(value: Any, what: str) -> LearningRate:
    """`value` as a float, or itself if it is a callable whose arguments are clear, and that can be a key."""
    if not callable(value):
        return number(value, f"{what}, if not a callable,")
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{what} must be hashable, as tables of equal optimizers are updated together, got {value!r}; make a "
            "dataclass frozen, or write `lambda step: ...` around it."
        ) from None
    _takes_step(value, what)
    return value


def is_called(value: LearningRate) -> bool:
    """Whether it is a callable without arguments, called at each update."""
    return callable(value) and not _takes_step(value, "learning_rate")


def returning(value: Any) -> Callable[[], Any]:
    """A callable without arguments that gives `value`."""
    return lambda: value


def call_each_once(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """What callables without arguments return now; equal ones are called once, as in TensorFlow."""
    values, results = {}, []
    for function in functions:
        if function not in values:
            values[function] = function()
        results.append(values[function])
    return results


def value_at(value: Any, step: Any, what: str) -> Scalar:
    """A number, a callable without arguments or a schedule of the step, as a float32 scalar."""
    if not callable(value):
        return jnp.asarray(value, jnp.float32)
    if _takes_step(value, what):
        return _scalar(value(step), value, what)
    return called_value(value, value(), step, what)


def called_value(value: Any, current: Any, step: Any, what: str) -> Scalar:
    """`current`, what the callable `value` returned at `step`, as a float32 scalar.

    Raises:
      ValueError: if it is concrete and the step traced, or no scalar.
    """
    if isinstance(step, jax.core.Tracer) and not isinstance(current, jax.core.Tracer):
        raise ValueError(
            f"{what} is a callable without arguments, which a compiled function would call only once; call "
            "learning_rate_at(step), or ShardedEmbedding.called_values(), outside of jit and pass its value in, "
            f"or use a schedule of the step. Got {value!r}."
        )
    return _scalar(current, value, what)


def _scalar(result: Any, function: Any, what: str) -> Scalar:
    array = jnp.asarray(result)
    if array.shape:
        raise ValueError(
            f"{what} must be a scalar, got an array of shape {list(array.shape)} from {function!r}."
        )
    return array.astype(jnp.float32)


def _takes_step(function: Callable[..., Any], what: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    needed = [p for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty]
    if len(required) > 1 or needed:
        raise ValueError(f"{what} must take no argument or the step alone, got {function!r}.")
    if not required and (positional or any(p.kind == p.VAR_POSITIONAL for p in parameters)):
        raise ValueError(
            f"{what} must take no argument or the step, but all arguments of {function!r} are optional; "
            "write `lambda: ...` or `lambda step: ...` around it."
        )
    return bool(required)
