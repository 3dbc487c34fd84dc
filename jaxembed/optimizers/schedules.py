"""Learning rate schedules that can be stored with a configuration; optax's cannot, being closures.

Their arguments, but for `name`, and values are those of `tf.keras.optimizers.schedules`.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxembed.shapes import Scalar


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Called with the step, gives the rate there: a float32 scalar.

    Args:
      initial_learning_rate: the rate that it starts from.
      decay_steps: how many steps it decays over.

    Raises:
      ValueError: if `decay_steps` is less than 1, or `warmup_steps`, where it has them, less than 0.
    """

    name: ClassVar[str]

    initial_learning_rate: float
    decay_steps: int

    def __post_init__(self) -> None:
        for name, least in (("decay_steps", 1), ("warmup_steps", 0)):
            value = getattr(self, name, least)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    def __call__(self, step: Any) -> Scalar:
        return self.rate(jnp.asarray(step).astype(jnp.float32))

    def rate(self, step: Scalar) -> Scalar:
        """The rate at a float32 step, to be computed with floats: an int of 2**31 or more is none to JAX."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """Down to `end_learning_rate` as (1 - step / decay_steps)^power, and then constant.

    Args:
      initial_learning_rate: the rate that it starts from.
      decay_steps: how many steps it decays over.
      end_learning_rate: the rate that it ends with.
      power: of the polynomial; 1 is linear.
      cycle: start again instead of being constant, each time over one more `decay_steps` in all.
      warmup_steps: before the decay, linear from 0 to `initial_learning_rate`. TensorFlow has none here.

    References:
      `tf.keras.optimizers.schedules.PolynomialDecay`.
    """

    name: ClassVar[str] = "polynomial_decay"

    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    warmup_steps: int = dataclasses.field(default=0, kw_only=True)

    def rate(self, step: Scalar) -> Scalar:
        """The rate at a float32 step."""
        decay_steps, warmup_steps = float(self.decay_steps), float(self.warmup_steps)
        at = step - warmup_steps
        rounds = jnp.maximum(-_whole(-at, self.decay_steps), 1) if self.cycle else 1
        steps = decay_steps * rounds
        left = jnp.where(at < steps, 1 - jnp.clip(at / steps, 0, 1), 0)
        span = self.initial_learning_rate - self.end_learning_rate
        decayed = span * left**self.power + self.end_learning_rate
        warming = self.initial_learning_rate * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warming, decayed)


@dataclasses.dataclass(frozen=True)
class CosineDecay(Schedule):
    """Down to `alpha` of where it started, as half a cosine, and then constant.

    Args:
      initial_learning_rate: the rate that it starts from.
      decay_steps: how many steps it decays over, after those of the warmup.
      alpha: what is left in the end, as a fraction of the rate that decays.
      warmup_target: the rate that decays, after a warmup from `initial_learning_rate`; None for no warmup.
      warmup_steps: how many steps the warmup, which is linear, takes; of no effect without a `warmup_target`.

    References:
      `tf.keras.optimizers.schedules.CosineDecay`.
    """

    name: ClassVar[str] = "cosine_decay"

    alpha: float = 0.0
    warmup_target: float | None = dataclasses.field(default=None, kw_only=True)
    warmup_steps: int = dataclasses.field(default=0, kw_only=True)

    def rate(self, step: Scalar) -> Scalar:
        """The rate at a float32 step."""
        initial, target = self.initial_learning_rate, self.warmup_target
        if target is None:
            return self._decayed(initial, step)
        warmup_steps = float(self.warmup_steps)
        warming = (target - initial) * step / max(warmup_steps, 1) + initial
        return jnp.where(step < warmup_steps, warming, self._decayed(target, step - warmup_steps))

    def _decayed(self, start: float, step: Scalar) -> Scalar:
        left = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / float(self.decay_steps), 0, 1)))
        return start * ((1 - self.alpha) * left + self.alpha)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """Times `decay_rate` every `decay_steps`, for ever.

    Args:
      initial_learning_rate: the rate that it starts from.
      decay_steps: how many steps one `decay_rate` takes.
      decay_rate: what is left after them, as a fraction.
      staircase: whether the rate stays the same until the steps are over.

    References:
      `tf.keras.optimizers.schedules.ExponentialDecay`.
    """

    name: ClassVar[str] = "exponential_decay"

    decay_rate: float
    staircase: bool = False

    def rate(self, step: Scalar) -> Scalar:
        """The rate at a float32 step."""
        decays = _whole(step, self.decay_steps) if self.staircase else step / float(self.decay_steps)
        return self.initial_learning_rate * self.decay_rate**decays


def _whole(step: Scalar, decay_steps: int) -> Scalar:
    """How many times `decay_steps` go into a float32 step, rounded down to a whole float32.

    Of integers: a compiled division of floats by a constant multiplies by its inverse, which may fall short of the whole.
    """
    return (jnp.floor(step).astype(jnp.int32) // min(decay_steps, 2**31 - 1)).astype(jnp.float32)
