"""CustomCombiner: a function of the user's own that combines the rows of one bag."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.initializers import initializer_from_dict, initializer_to_dict
from jaxembed.names import unregistered
from jaxembed.optimizers.learning_rate import number
from jaxembed.shapes import Activations, CombinerWeights, Sequences, Valencies

__all__ = ["CustomCombiner", "register_combiner"]

_REGISTRY: dict[str, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class CustomCombiner:
    """Combines each bag with a function, the same on sparse and ragged ids.

        @register_combiner("sum_of_valid")
        def sum_of_valid(valency, vectors):
            valid = jnp.arange(vectors.shape[0]) < valency
            return jnp.sum(jnp.where(valid[:, None], vectors, 0), axis=0)

        TableConfig(..., combiner=CustomCombiner(sum_of_valid, max_valency=16))

    Args:
      combiner_computation: called as `f(valency, vectors)`, with `weights` as a third argument where
        `num_weights` is above 0, and vectorized over the batch. `valency` is the int32 number of ids in
        the bag, at most `max_valency`; `vectors` is [max_valency, D] float32, the looked-up rows in the
        order of the ids (times their weights where the input has weights), zeros beyond the valency;
        `weights` is [num_weights]. Returns [D].
      max_valency: ids of a bag beyond it are dropped.
      num_weights: how many weights of its own the function has.
      initializer: of these weights, called as `initializer(key, shape, dtype)`.
      combiner_weights_learning_rate: of these weights, trained with SGD.

    Raises:
      ValueError: if an argument is not of the form above.

    References:
      `tf.tpu.experimental.embedding.CustomCombiner`. TensorFlow raises on it for sparse ids outside of a
      TPU, and sums ragged ones.
    """

    combiner_computation: Callable[..., Any]
    max_valency: int
    num_weights: int = 0
    initializer: Any = None
    combiner_weights_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not callable(self.combiner_computation):
            raise ValueError(f"combiner_computation must be callable, got {self.combiner_computation!r}.")
        for field, least in (("max_valency", 1), ("num_weights", 0)):
            try:
                value = operator.index(getattr(self, field))
            except TypeError:
                value = least - 1
            if value < least:
                raise ValueError(f"{field} must be an int of at least {least}, got {getattr(self, field)!r}.")
            object.__setattr__(self, field, value)
        if self.num_weights > 0 and self.initializer is None:
            raise ValueError("When `num_weights` is greater than 0, `initializer` must be set.")
        rate = number(self.combiner_weights_learning_rate, "combiner_weights_learning_rate")
        object.__setattr__(self, "combiner_weights_learning_rate", rate)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; `combiner_from_dict` gives it back.

        Raises:
          ValueError: if the function or the initializer has no registered name.
        """
        name = getattr(self.combiner_computation, "combiner_name", None)
        if _REGISTRY.get(str(name)) is not self.combiner_computation:
            raise ValueError(
                f"the combiner_computation {self.combiner_computation!r} cannot be stored: it has no registered "
                "name; decorate it with jaxembed.combiners.register_combiner('...')."
            )
        initializer = None
        if self.initializer is not None:
            initializer = initializer_to_dict(self.initializer, f"the CustomCombiner {name!r}")
        return {
            "combiner_computation": name,
            "max_valency": self.max_valency,
            "num_weights": self.num_weights,
            "initializer": initializer,
            "combiner_weights_learning_rate": self.combiner_weights_learning_rate,
        }

    def __call__(
        self, valency: Valencies, vectors: Sequences, weights: CombinerWeights | None = None
    ) -> Activations:
        """Combines a batch: [B] valencies, [B, max_valency, D] float32 vectors, [num_weights] weights to [B, D]."""
        function, arguments = self.combiner_computation, ()
        if self.num_weights:
            arguments = (weights,)
        combined = jax.vmap(lambda count, rows: function(count, rows, *arguments))(valency, vectors)
        expected = (vectors.shape[0], vectors.shape[2])
        if combined.shape != expected:
            raise ValueError(
                f"combiner_computation must return [D] = [{expected[1]}], got {list(combined.shape[1:])}."
            )
        return combined


def register_combiner(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: names a combiner_computation, so that a configuration with it can be stored.

    Whoever opens what was stored, to serve it too, imports the module that registers it: `jaxembed serve --import MODULE`.

    Raises:
      ValueError: if the name is taken by another function.
    """

    def register(function):
        if _REGISTRY.setdefault(name, function) is not function:
            raise ValueError(f"combiner name {name!r} is taken by {_REGISTRY[name]!r}; choose another.")
        function.combiner_name = name
        return function

    return register


def combiner_from_dict(data: dict[str, Any], keep_unregistered: bool = False) -> CustomCombiner:
    """The inverse of `CustomCombiner.to_dict`.

    Args:
      data: what that gave.
      keep_unregistered: whether an initializer that cannot be made is kept as stored.

    Raises:
      UnregisteredError: if the function is not registered, or the initializer can neither be made nor is kept.
    """
    arguments = dict(data)
    name, initializer = arguments.pop("combiner_computation"), arguments.pop("initializer")
    if name not in _REGISTRY:
        raise unregistered("combiner", name, _REGISTRY, "jaxembed.combiners.register_combiner")
    if initializer is not None:
        initializer = initializer_from_dict(initializer, keep_unregistered)
    return CustomCombiner(_REGISTRY[name], initializer=initializer, **arguments)


def positions_in_rows(rows: Any, live: Any, num_rows: int) -> tuple[Any, Any]:
    """Where each live entry comes in its row, in the order of the entries.

    Args:
      rows: [N] row ids, in any order.
      live: [N] bool.
      num_rows: B.

    Returns:
      [N] int32 positions, -1 for entries that are not live or lie in no row; [B] int32 entries per row.
    """
    rows, live = jnp.asarray(rows), jnp.asarray(live)
    live &= (rows >= 0) & (rows < num_rows)
    key = jnp.where(live, rows, num_rows).astype(jnp.int32)
    counts = jnp.zeros(num_rows, jnp.int32).at[key].add(1, mode="drop")
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    order = jnp.argsort(key, stable=True)
    ranks = jnp.arange(key.shape[0], dtype=jnp.int32) - starts[key[order]]
    return jnp.full(key.shape, -1, jnp.int32).at[order].set(jnp.where(live[order], ranks, -1)), counts


def ranks_on_host(rows: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Where each live entry comes in its row, in the order of the entries; -1 for the others."""
    source = np.flatnonzero(live)
    source = source[np.argsort(rows[source], kind="stable")]
    ordered = rows[source]
    ranks = np.full(rows.size, -1)
    ranks[source] = np.arange(source.size) - np.searchsorted(ordered, ordered)
    return ranks
