"""Table initializers: frozen, comparable by value, and named so that a configuration can be stored."""

import dataclasses
import json
import math
from typing import Any, ClassVar, Never

import jax
import jax.numpy as jnp

from jaxembed.names import UnregisteredError, unregistered
from jaxembed.stored_arguments import fields_as_json, object_from_json

__all__ = [
    "Constant",
    "Initializer",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "register_initializer",
]


@dataclasses.dataclass(frozen=True)
class Initializer:
    """Base of the initializers; call as `initializer(key, shape, dtype) -> Array`.

    Fields annotated as `float` become such, and must be finite.
    """

    name: ClassVar[str]

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type not in (float, "float"):  # text where annotations are postponed
                continue
            value = getattr(self, field.name)
            try:
                value = float(value)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} must be a finite number, "
                    f"got {getattr(self, field.name)!r}."
                )
            object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal values, redrawn beyond two standard deviations (`tf.initializers.TruncatedNormal`).

    `stddev` is that of the normal before truncation, as in TensorFlow.
    """

    name: ClassVar[str] = "truncated_normal"
    mean: float = 0.0
    stddev: float = 0.05

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        values = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (self.mean + self.stddev * values).astype(dtype)


@dataclasses.dataclass(frozen=True)
class RandomNormal(Initializer):
    """Normal values (`tf.initializers.RandomNormal`)."""

    name: ClassVar[str] = "random_normal"
    mean: float = 0.0
    stddev: float = 0.05

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return (self.mean + self.stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class RandomUniform(Initializer):
    """Uniform values in [minval, maxval) (`tf.initializers.RandomUniform`).

    They are drawn in float32 and rounded to the type of the table, in which they may be `maxval`.

    Raises:
      ValueError: if `minval` is above `maxval`.
    """

    name: ClassVar[str] = "random_uniform"
    minval: float = -0.05
    maxval: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minval > self.maxval:
            raise ValueError(
                f"RandomUniform: minval must be at most maxval, got {self.minval} and {self.maxval}; swap them."
            )

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, self.minval, self.maxval).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Constant(Initializer):
    """One value everywhere (`tf.initializers.Constant`)."""

    name: ClassVar[str] = "constant"
    value: float = 0.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


_REGISTRY: dict[str, type] = {c.name: c for c in (TruncatedNormal, RandomNormal, RandomUniform, Constant)}


def register_initializer(cls: type) -> type:
    """Class decorator: makes a frozen dataclass with a class attribute `name` storable as an initializer.

    Raises:
      ValueError: if `name` is missing or taken by another class.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{cls!r} must be a dataclass with a class attribute `name`.")
    if _REGISTRY.setdefault(name, cls) is not cls:
        raise ValueError(f"initializer name {name!r} is taken by {_REGISTRY[name]!r}; choose another.")
    return cls


def initializer_class(name: str) -> type:
    """The registered initializer of that name.

    Raises:
      UnregisteredError: if there is none.
    """
    if name not in _REGISTRY:
        raise unregistered("initializer", name, _REGISTRY, "jaxembed.initializers.register_initializer")
    return _REGISTRY[name]


@dataclasses.dataclass(frozen=True)
class UnregisteredInitializer:
    """An initializer that this process cannot make: it can be stored again, and not be called.

    Args:
      stored: JSON of its name and arguments.
      reason: why: it is not registered, or its class does not take the arguments.
    """

    stored: str
    reason: str = dataclasses.field(compare=False, repr=False)

    def __call__(self, *_: Any) -> Never:
        """Raises:
        UnregisteredError: always.
        """
        raise UnregisteredError(self.reason)


def initializer_to_dict(initializer: Any, owner: str) -> dict[str, Any]:
    """Its name and arguments as JSON-able values; `initializer_from_dict` gives it back.

    Args:
      initializer: of a table or of a combiner's weights.
      owner: whose it is, in words.

    Raises:
      ValueError: if it has no registered name, or arguments that are not JSON.
    """
    if isinstance(initializer, UnregisteredInitializer):
        return json.loads(initializer.stored)
    name = getattr(type(initializer), "name", None)
    if not isinstance(name, str) or _REGISTRY.get(name) is not type(initializer):
        raise ValueError(
            f"the initializer of {owner} cannot be stored: {initializer!r} has no registered name; use one of "
            "jaxembed.initializers or register yours with register_initializer."
        )
    what = f"the initializer {type(initializer).__name__} of {owner}"
    return {"name": name, "arguments": fields_as_json(initializer, what)}


def initializer_from_dict(data: dict[str, Any], keep_unregistered: bool = False) -> Any:
    """The inverse of `initializer_to_dict`.

    Args:
      data: what that gave.
      keep_unregistered: whether one that cannot be made is kept as stored.

    Raises:
      UnregisteredError: if it is not registered or its class does not take the arguments, and it is not kept.
    """
    try:
        return object_from_json(initializer_class(data["name"]), "initializer", data["arguments"])
    except UnregisteredError as e:
        if not keep_unregistered:
            raise
        return UnregisteredInitializer(json.dumps(data), str(e))
