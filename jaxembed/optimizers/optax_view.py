"""The same rules as optax transformations, for small dense tables."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxembed.optimizers.base import Optimizer
from jaxembed.shapes import Scalar

if TYPE_CHECKING:
    import optax


class OptaxState(NamedTuple):
    """State of `as_optax`: the number of updates done, and the slots of each parameter."""

    step: Scalar
    slots: Any


def as_optax(optimizer: Optimizer) -> "optax.GradientTransformation":
    """The optimizer as an `optax.GradientTransformation` of dense parameters.

    Each update is `optimizer.update_rows` of whole parameters, and the updates are new - old. So rows with
    a zero gradient are updated too: momentum moves them and weight decay shrinks them, unlike in a sparse
    update. `update` needs the parameters.

    Args:
      optimizer: any optimizer. One that is not elementwise needs parameters [V, D].

    Returns:
      The transformation, whose state is an `OptaxState`.

    Raises:
      ValueError: if it is no Optimizer; when used, if parameters are missing, not floating point, or not [V, D]
        where they must be, or if a gradient is not of the shape of its parameter.
    """
    import optax

    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"as_optax takes an optimizer of jaxembed.optimizers, such as Adagrad(0.05), got {optimizer!r}."
        )

    def init(params):
        for path, param in jax.tree.leaves_with_path(params):
            if not _is_floating(param):
                raise ValueError(
                    f"as_optax updates floating-point arrays, got {_described(param)} for the parameter at "
                    f"{_name(path)}."
                )
            if not optimizer.is_elementwise and param.ndim != 2:
                raise ValueError(
                    f"{type(optimizer).__name__} updates tables [V, D], got a parameter of shape {param.shape}; set "
                    "`is_elementwise = True` on the class if it updates each component by itself."
                )
        slots = jax.tree.map(lambda param: optimizer.init_slots(param.shape), params)
        return OptaxState(jnp.zeros((), jnp.int32), slots)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("as_optax needs the parameters: call update(gradients, state, params).")
        leaves, structure = jax.tree.flatten(params)
        gradients = structure.flatten_up_to(updates)
        for (path, param), gradient in zip(jax.tree.leaves_with_path(params), gradients, strict=True):
            if not _is_floating(gradient) or gradient.shape != param.shape:
                raise ValueError(
                    f"the gradient of the parameter at {_name(path)} must be floating point of its shape, "
                    f"{list(param.shape)}, got {_described(gradient)}."
                )
        own = optimizer.with_called_at(state.step)
        learning_rate = own.learning_rate_at(state.step)
        results = [
            own.update_rows(gradient, param, slots, learning_rate, state.step)
            for gradient, param, slots in zip(
                gradients, leaves, structure.flatten_up_to(state.slots), strict=True
            )
        ]
        updates = [new - old for (new, _), old in zip(results, leaves, strict=True)]
        slots = structure.unflatten([slots for _, slots in results])
        return structure.unflatten(updates), OptaxState(state.step + 1, slots)

    return optax.GradientTransformation(init, update)


def _is_floating(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def _described(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else repr(array)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"
