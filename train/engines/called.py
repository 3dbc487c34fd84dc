"""Values of learning rates and hyperparameters that are callables without arguments, called outside of the step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxembed.optimizers.learning_rate import call_each_once

from .placement import Stack


def called_values(stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """What they return now: float32 scalars by stack; empty where there are none. Stacks may share a callable."""
    called = {name: stack.optimizer.callables for name, stack in stacks.items()}
    values = iter(call_each_once(f for functions in called.values() for f in functions))
    return {
        name: tuple(_scalar(next(values)) for _ in functions) for name, functions in called.items() if functions
    }


def called_now(stacks: Mapping[str, Stack], step: Any) -> dict[str, Any]:
    """The same, called by the step itself.

    Raises:
      ValueError: if the step is being compiled, and would keep their values of now.
    """
    values = called_values(stacks)
    concrete = [v for v in jax.tree.leaves(values) if not isinstance(v, jax.core.Tracer)]
    if concrete and isinstance(step, jax.core.Tracer):
        raise ValueError(
            "a learning rate is a callable without arguments, which a jitted step would call only once: pass "
            "embedding.called_values() to the step as an argument, and from there to apply_gradients as "
            "called_values; or use a schedule of the step."
        )
    return values


def _scalar(value: Any) -> Any:
    return (
        jnp.asarray(value, jnp.float32) if isinstance(value, jax.core.Tracer) else np.asarray(value, np.float32)
    )
