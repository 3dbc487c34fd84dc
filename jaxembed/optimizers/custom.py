"""An optimizer given as a function of one row."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax

from jaxembed.initializers import Constant
from jaxembed.optimizers.base import Optimizer, Slots
from jaxembed.optimizers.learning_rate import LearningRate, number, number_or_callable, value_at
from jaxembed.shapes import Rows, Scalar


@dataclasses.dataclass(frozen=True, init=False)
class CustomOptimizer(Optimizer):
    """An optimizer defined by a function of one row, applied to each row that is updated.

    The function is called as

        custom_computation(gradient, embedding_table, slot_variables, learning_rate, hyperparameters)

    with the gradient and the weights of a row, [1, D] each, a list of its slots, [1, D] or [1, 1], the
    learning rate and a list of the hyperparameters, scalars. All are float32. It returns the weights, or a
    tuple of them and the slots. Unlike the other optimizers, it may mix the components of a row.

    Args:
      custom_computation: as above, in JAX.
      learning_rate: see `Optimizer`, as for the other options, by keyword. TensorFlow has no others here.
      slot_names: names of the slots.
      slot_initializers: what each slot starts from: a number or a `jaxembed.initializers.Constant`.
      hyperparameters: numbers, callables without arguments or schedules of the step.
      slot_dims: for each slot, 2 for [V, D] or 1 for one number a row, [V]. None takes 2.

    Raises:
      ValueError: if an argument is not of the form above, or, when the rows are updated, if the function
        returns another number of arrays or other shapes.

    References:
      `tf.tpu.experimental.embedding.CustomOptimizer`. Duplicates of an id are summed first, as on a
      SparseCore, unless `use_gradient_accumulation` is False.
    """

    name: ClassVar[str] = "custom"

    custom_computation: Callable[..., Any]
    # The default hides the base's property of this name.
    slot_names: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    slot_initializers: tuple[float, ...] = ()
    hyperparameters: tuple[LearningRate, ...] = ()
    slot_dims: tuple[int, ...] = ()

    def __init__(
        self,
        custom_computation: Callable[..., Any],
        learning_rate: LearningRate = 0.01,
        slot_names: Sequence[str] | None = None,
        slot_initializers: Sequence[Any] | None = None,
        hyperparameters: Sequence[LearningRate] | None = None,
        slot_dims: Sequence[int] | None = None,
        **options: Any,
    ):
        self._put("custom_computation", custom_computation)
        self._put("slot_names", tuple(slot_names or ()))
        self._put("slot_initializers", tuple(slot_initializers or ()))
        self._put("hyperparameters", tuple(hyperparameters or ()))
        self._put("slot_dims", tuple(slot_dims or ()))
        super().__init__(learning_rate, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, initializers, dims = self.slot_names, self.slot_initializers, self.slot_dims
        if not callable(self.custom_computation):
            raise ValueError(f"custom_computation must be a callable, got {self.custom_computation!r}.")
        if len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"slot_names must be different names, got {names!r}.")
        if len(names) != len(initializers):
            raise ValueError(
                f"The number of slot_names ({len(names)}) must match the number of slot_initializers "
                f"({len(initializers)})."
            )
        if dims and len(dims) != len(names):
            raise ValueError(
                f"The number of slot_dims ({len(dims)}) must match the number of slot_names ({len(names)})."
            )
        for name, dim in zip(names, dims, strict=False):
            if dim not in (1, 2):
                raise ValueError(
                    f"Unsupported slot dim {dim!r} for slot {name!r}. Only 1D and 2D are supported."
                )
        values = [_initial_value(*pair) for pair in zip(names, initializers, strict=True)]
        self._put("slot_initializers", tuple(values))
        hyperparameters = [number_or_callable(value, "a hyperparameter") for value in self.hyperparameters]
        self._put("hyperparameters", tuple(hyperparameters))

    @property
    def slot_initial_values(self) -> dict[str, float]:
        return dict(zip(self.slot_names, self.slot_initializers, strict=True))

    def _rates(self):
        return self.learning_rate, *self.hyperparameters

    def _with_rates(self, rates):
        return self._with(learning_rate=rates[0], hyperparameters=tuple(rates[1:]))

    def slot_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = self.slot_dims[self.slot_names.index(name)] if self.slot_dims else 2
        return tuple(shape[:1]) if dim == 1 else tuple(shape)

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        hyperparameters = [value_at(value, step, "a hyperparameter") for value in self.hyperparameters]

        def update_row(gradient, *arrays):
            weights, *slots = (x.reshape(1, -1) for x in arrays)
            new = self.custom_computation(gradient[None], weights, slots, learning_rate, hyperparameters)
            new = tuple(new) if isinstance(new, tuple | list) else (new,)
            sizes, expected = [x.size for x in new], [x.size for x in arrays]
            if sizes != expected:
                raise ValueError(
                    f"custom_computation must return the row and its slots {self.slot_names}, of sizes "
                    f"{expected}, got arrays of sizes {sizes}."
                )
            return tuple(x.reshape(old.shape) for x, old in zip(new, arrays, strict=True))

        rows, *new = jax.vmap(update_row)(gradient, rows, *(slots[name] for name in self.slot_names))
        return rows, dict(zip(self.slot_names, new, strict=True))


def _initial_value(name: str, initializer: Any) -> float:
    if isinstance(initializer, Constant):
        return initializer.value
    if callable(initializer):
        raise ValueError(
            f"slot {name!r} must start from a constant, got {initializer!r}; pass a number or "
            "jaxembed.initializers.Constant."
        )
    return number(initializer, f"the initial value of slot {name!r}")
