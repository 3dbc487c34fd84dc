"""What all optimizers of embedding tables share: their options, and the order in which these apply to a row."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.optimizers.learning_rate import (
    LearningRate,
    call_each_once,
    called_value,
    is_called,
    number,
    number_or_callable,
    returning,
    value_at,
)
from jaxembed.shapes import Rows, Scalar, Table

Slots = Mapping[str, Rows]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Base of the optimizers: frozen, comparable by value, and named so that a configuration can be stored.

    One update of the rows w with the gradient g, at learning rate lr, is, in this order:

        g <- clip(g, clipvalue)
        w <- w - weight_decay_factor w            (times lr, if asked)
        w, slots <- rule(g, w, slots, lr, step)   (the subclass)
        w <- clip(w, clip_weight_min, clip_weight_max)

    Weight decay is decoupled from the gradient, and only rows that are updated decay: with a lazy optimizer,
    those that the batch looked up. Steps count from 0, the first update.

    A subclass with a rule of its own sets `is_elementwise = True` if that updates each component by itself: its tables
    may then be split along their width, or be held by SparseCores.

    The arguments, their defaults and errors are TensorFlow's. Those below other than `learning_rate` are
    keyword-only here.

    Args:
      learning_rate: a float; a callable without arguments, called once at each update, whatever shares
        it; or a schedule, such as optax's, called with the step. In a function that you compile, `with_called` says how to do the second.
      use_gradient_accumulation: sum the gradients of all occurrences of an id in the batch, then update the
        row once. False applies the occurrences one by one: feature after feature in the order of
        their paths, then by batch row, then by place in the row, on any number of devices.
      clip_weight_min: lower bound of the weights, or None.
      clip_weight_max: upper bound of the weights, or None.
      weight_decay_factor: share of the weight taken off at each update, or None.
      multiply_weight_decay_factor_by_learning_rate: whether that share is times the learning rate.
      clipvalue: c > 0 clips the summed gradient to [-c, c], a tuple (min, max) to these, either of them
        possibly None. Needs `use_gradient_accumulation`.
      slot_variable_creation_fn: called as `fn(shape, slot_names, initial_values)` by `init_slots`, returns a
        dict of the slots by name. None fills them with their initial values.
      low_dimensional_packing_status: accepted for TensorFlow's sake; the layout is the engine's choice.

    Raises:
      ValueError: if an argument is not of the form above.

    References:
      `tf.tpu.experimental.embedding`, tensorflow/core/protobuf/tpu/optimization_parameters.proto, and, for
      weight decay, Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """

    name: ClassVar[str]
    #: Whether each component of a row is updated by itself, so that a table may be split along its width.
    is_elementwise: ClassVar[bool] = False
    #: Whether the rule only adds to a row what does not depend on it.
    is_additive: ClassVar[bool] = False

    learning_rate: LearningRate = 0.001
    use_gradient_accumulation: bool = dataclasses.field(default=True, kw_only=True)
    clip_weight_min: float | None = dataclasses.field(default=None, kw_only=True)
    clip_weight_max: float | None = dataclasses.field(default=None, kw_only=True)
    weight_decay_factor: float | None = dataclasses.field(default=None, kw_only=True)
    multiply_weight_decay_factor_by_learning_rate: bool | None = dataclasses.field(default=None, kw_only=True)
    clipvalue: float | tuple[float | None, float | None] | None = dataclasses.field(default=None, kw_only=True)
    slot_variable_creation_fn: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)
    low_dimensional_packing_status: bool = dataclasses.field(default=False, kw_only=True)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for promise in ("is_elementwise", "is_additive"):
            for base in cls.__mro__:
                if promise in vars(base):
                    break
                # What is known of a rule further on is not known of this one.
                if {"rule", "update_rows"} & vars(base).keys():
                    setattr(cls, promise, False)
                    break

    def __post_init__(self) -> None:
        self._check_switches()
        self._put("learning_rate", number_or_callable(self.learning_rate, "learning_rate"))
        for field in ("clip_weight_min", "clip_weight_max", "weight_decay_factor"):
            if getattr(self, field) is not None:
                self._put_number(field)
        if self.slot_variable_creation_fn is not None and not callable(self.slot_variable_creation_fn):
            raise ValueError(
                "slot_variable_creation_fn must be either None or a callable, "
                f"got {self.slot_variable_creation_fn!r}."
            )
        low, high = self.clip_weight_min, self.clip_weight_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"clip_weight_min must not be above clip_weight_max, got {low} and {high}.")
        if self.clipvalue is not None:
            if not self.use_gradient_accumulation:
                raise ValueError(
                    "When use_gradient_accumulation is False, gradient clipping cannot be used and clipvalue "
                    f"should be left as None, got {self.clipvalue!r}."
                )
            self._put("clipvalue", _clip_range(self.clipvalue))

    @property
    def slot_initial_values(self) -> dict[str, float]:
        """What each slot starts from, by TensorFlow's name of the slot."""
        return {}

    @property
    def slot_names(self) -> tuple[str, ...]:
        """TensorFlow's names of the slots."""
        return tuple(self.slot_initial_values)

    @property
    def clip_gradient_min(self) -> float | None:
        """Lower bound of the summed gradient, or None."""
        return self.clipvalue[0] if isinstance(self.clipvalue, tuple) else None

    @property
    def clip_gradient_max(self) -> float | None:
        """Upper bound of the summed gradient, or None."""
        return self.clipvalue[1] if isinstance(self.clipvalue, tuple) else None

    @property
    def is_lazy(self) -> bool:
        """Whether only rows with a gradient are updated; else every row is, at each step."""
        return True

    def init_slots(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict[str, Table]:
        """The slots of a table of that shape, [V, D], at their initial values.

        Raises:
          ValueError: if `slot_variable_creation_fn` returns other names or shapes.
        """
        shapes = {name: self.slot_shape(name, shape) for name in self.slot_names}
        if self.slot_variable_creation_fn is None:
            values = self.slot_initial_values
            return {name: jnp.full(shapes[name], values[name], dtype) for name in shapes}
        slots = self.slot_variable_creation_fn(shape, list(shapes), list(self.slot_initial_values.values()))
        found = {name: jnp.shape(slot) for name, slot in dict(slots).items()}
        if found != shapes:
            raise ValueError(f"slot_variable_creation_fn must return slots of shapes {shapes}, got {found}.")
        return {name: jnp.asarray(slots[name]).astype(dtype) for name in shapes}

    def slot_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the slot `name` of a table of that shape."""
        del name
        return tuple(shape)

    def learning_rate_at(self, step: Any) -> Scalar:
        """The learning rate of update number `step`, a float32 scalar.

        Raises:
          ValueError: if the learning rate is a callable without arguments that returns a concrete number
            while `step` is traced, since the compiled function would never call it again.
        """
        return value_at(self.learning_rate, step, "learning_rate")

    @property
    def callables(self) -> tuple[Callable[[], Any], ...]:
        """Those of its arguments that are callables without arguments, called at each update."""
        return tuple(rate for rate in self._rates() if callable(rate) and is_called(rate))

    def with_called(self, values: Sequence[Any]) -> Self:
        """The optimizer with values in place of its `callables`, for programs that take the values as arguments."""
        left = iter(values)
        return self._with_rates([returning(next(left)) if is_called(rate) else rate for rate in self._rates()])

    def with_called_at(self, step: Any) -> Self:
        """The same with what its `callables` return at update number `step`, each called once.

        Raises:
          ValueError: as `learning_rate_at`.
        """
        functions = self.callables
        if not functions:
            return self
        pairs = zip(functions, call_each_once(functions), strict=True)
        return self.with_called([called_value(f, value, step, "learning_rate") for f, value in pairs])

    def update_rows(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Any, step: Any
    ) -> tuple[Rows, dict[str, Rows]]:
        """One update of some rows: pure, each row by itself.

        Args:
          gradient: [N, D], for any N.
          rows: [N, D]; computed on in float32, returned in their own type.
          slots: by name, float32 [N, D].
          learning_rate: float32 scalar, as of `learning_rate_at`.
          step: int scalar, 0 at the first update.

        Returns:
          The rows and slots, updated.
        """
        learning_rate = jnp.asarray(learning_rate, jnp.float32)
        gradient, weights = gradient.astype(jnp.float32), rows.astype(jnp.float32)
        gradient = _clip(gradient, self.clip_gradient_min, self.clip_gradient_max)
        if self.weight_decay_factor:
            decay = self.weight_decay_factor
            if self.multiply_weight_decay_factor_by_learning_rate:
                decay = decay * learning_rate
            weights = weights - decay * weights
        weights, slots = self.rule(gradient, weights, slots, learning_rate, jnp.asarray(step))
        weights = _clip(weights, self.clip_weight_min, self.clip_weight_max)
        return weights.astype(rows.dtype), dict(slots)

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        """The optimizer's own rule, without the shared options; all float32."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `optimizer_from_dict` gives the optimizer back, equal.

        Raises:
          ValueError: if it holds a callable that has no registered name, or what is not JSON.
        """
        from jaxembed.optimizers.registry import optimizer_to_dict

        return optimizer_to_dict(self)

    def _check_switches(self) -> None:
        """All arguments that are True or False must be; the truth of "no" would be."""
        for field in filter(lambda field: field.init, dataclasses.fields(self)):
            value, is_optional = getattr(self, field.name), field.type in (bool | None, "bool | None")
            if (field.type not in (bool, "bool") and not is_optional) or (value is None and is_optional):
                continue
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{field.name} must be True or False, got {value!r}.")
            self._put(field.name, bool(value))

    def _rates(self) -> tuple[LearningRate, ...]:
        """All arguments that may be callables."""
        return (self.learning_rate,)

    def _with_rates(self, rates: Sequence[LearningRate]) -> Self:
        return self._with(learning_rate=rates[0])

    def _with(self, **fields: Any) -> Self:
        other = copy.copy(self)
        for field, value in fields.items():
            other._put(field, value)
        return other

    def _put(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _put_number(self, *fields: str) -> None:
        for field in fields:
            self._put(field, number(getattr(self, field), field))


def _clip_range(clipvalue: Any) -> tuple[float | None, float | None]:
    if not isinstance(clipvalue, tuple | list):
        bound = number(clipvalue, "clipvalue")
        if bound <= 0:
            raise ValueError(f"clipvalue must be positive or a tuple (min, max), got {clipvalue!r}.")
        return -bound, bound
    if len(clipvalue) != 2:
        raise ValueError(f"clipvalue must be a number or a tuple (min, max), got {clipvalue!r}.")
    low, high = (None if bound is None else number(bound, "clipvalue") for bound in clipvalue)
    if low is not None and high is not None and low > high:
        raise ValueError(f"clipvalue must have min <= max, got {clipvalue!r}.")
    return low, high


def _clip(values: jax.Array, low: float | None, high: float | None) -> jax.Array:
    if low is not None:
        values = jnp.maximum(values, np.float32(low))
    if high is not None:
        values = jnp.minimum(values, np.float32(high))
    return values
