"""Learning rate schedules that can be stored with a configuration; optax's cannot, being closures."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxembed.shapes import Scalar


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear from 0 to `learning_rate` in `warmup_steps`, then down to `end_learning_rate` in `decay_steps`.

    Raises:
      ValueError: if a number of steps is negative, or `decay_steps` is 0.
    """

    name: ClassVar[str]

    learning_rate: float
    decay_steps: int
    end_learning_rate: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.decay_steps < 1 or self.warmup_steps < 0:
            raise ValueError(
                "decay_steps must be at least 1 and warmup_steps at least 0, got "
                f"{self.decay_steps} and {self.warmup_steps}."
            )

    def __call__(self, step: Any) -> Scalar:
        step = jnp.asarray(step).astype(jnp.float32)
        left = self.left(jnp.clip((step - self.warmup_steps) / self.decay_steps, 0, 1))
        decayed = self.end_learning_rate + (self.learning_rate - self.end_learning_rate) * left
        warming = self.learning_rate * step / max(self.warmup_steps, 1)
        return jnp.where(step < self.warmup_steps, warming, decayed)

    def left(self, done: Scalar) -> Scalar:
        """What is left of the way down, from 1 to 0, when `done` of the decay steps, from 0 to 1, are."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """Down as (1 - done)^power."""

    name: ClassVar[str] = "polynomial_decay"
    power: float = 1.0

    def left(self, done: Scalar) -> Scalar:
        return (1 - done) ** self.power


@dataclasses.dataclass(frozen=True)
class CosineDecay(Schedule):
    """Down as half a cosine."""

    name: ClassVar[str] = "cosine_decay"

    def left(self, done: Scalar) -> Scalar:
        return 0.5 * (1 + jnp.cos(jnp.pi * done))
