"""The optimizers' rules, each on rows [R, D] of any number R."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from jaxembed.optimizers.base import Optimizer, Slots
from jaxembed.optimizers.learning_rate import LearningRate
from jaxembed.shapes import Rows, Scalar


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent: w <- w - lr g.

    Args:
      learning_rate: see `Optimizer`, as for the other options.

    References:
      `tf.tpu.experimental.embedding.SGD`.
    """

    name: ClassVar[str] = "sgd"
    is_elementwise: ClassVar[bool] = True
    is_additive: ClassVar[bool] = True
    learning_rate: LearningRate = 0.01

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        return rows - learning_rate * gradient, {}


@dataclasses.dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: a <- a + g^2, w <- w - lr g / sqrt(a), or w where a is 0.

    Args:
      learning_rate: see `Optimizer`, as for the other options.
      initial_accumulator_value: what a, the slot "accumulators", starts from; above 0.

    Raises:
      ValueError: if `initial_accumulator_value` is not positive.

    References:
      `tf.tpu.experimental.embedding.Adagrad`; Duchi et al., "Adaptive subgradient methods", 2011.
    """

    name: ClassVar[str] = "adagrad"
    is_elementwise: ClassVar[bool] = True
    is_additive: ClassVar[bool] = True
    initial_accumulator_value: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._put_number("initial_accumulator_value")
        if self.initial_accumulator_value <= 0:
            raise ValueError(
                f"initial_accumulator_value must be a positive float, got {self.initial_accumulator_value}."
            )

    @property
    def slot_initial_values(self) -> dict[str, float]:
        return {"accumulators": self.initial_accumulator_value}

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        accumulators = slots["accumulators"] + gradient * gradient
        # Slots that come from elsewhere may be 0; a component without a gradient so far, or one too small to square, stays.
        is_zero = accumulators == 0
        update = learning_rate * gradient / jnp.where(is_zero, 1, jnp.sqrt(accumulators))
        return rows - jnp.where(is_zero, 0, update), {"accumulators": accumulators}


@dataclasses.dataclass(frozen=True)
class AdagradMomentum(Optimizer):
    """Adagrad with momentum over the scaled gradients.

        a <- a + g^2, or beta2 a + (1 - beta2) g^2 where beta2 is not 1
        s  = g (a + epsilon)^(-1 / exponent)
        m <- momentum m + s
        w <- w - lr m, or w - lr (momentum m + s) with Nesterov

    Args:
      learning_rate: see `Optimizer`, as for the other options.
      momentum: decay of m, the slot "momenta", which starts from 0.
      use_nesterov: whether to look ahead by one step of momentum.
      exponent: root taken of the accumulator, above 0.
      beta2: decay of a, the slot "accumulators", which starts from 0; 1 sums.
      epsilon: added to the accumulator, above 0.

    Raises:
      ValueError: if `epsilon` or `exponent` is not positive, or `beta2` not in [0, 1].

    References:
      `tf.tpu.experimental.embedding.AdagradMomentum`; Agarwal et al., "Disentangling adaptive gradient
      methods from learning rates", 2020.
    """

    name: ClassVar[str] = "adagrad_momentum"
    is_elementwise: ClassVar[bool] = True
    is_additive: ClassVar[bool] = True
    momentum: float = 0.0
    use_nesterov: bool = False
    exponent: float = 2.0
    beta2: float = 1.0
    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._put_number("momentum", "exponent", "beta2", "epsilon")
        if self.epsilon <= 0:
            raise ValueError(f"Adagrad momentum: epsilon must be positive, got {self.epsilon}.")
        if self.exponent <= 0:
            raise ValueError(f"Adagrad momentum: exponent must be positive, got {self.exponent}.")
        if not 0 <= self.beta2 <= 1:
            raise ValueError(f"Adagrad momentum: beta2 must be >= 0 and <= 1, got {self.beta2}.")

    @property
    def slot_initial_values(self) -> dict[str, float]:
        return {"accumulators": 0.0, "momenta": 0.0}

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        accumulators = slots["accumulators"]
        if self.beta2 == 1:
            accumulators = accumulators + gradient * gradient
        else:
            accumulators = self.beta2 * accumulators + (1 - self.beta2) * (gradient * gradient)
        scaled = gradient / _power(accumulators + self.epsilon, 1 / self.exponent)
        momenta = self.momentum * slots["momenta"] + scaled
        update = self.momentum * momenta + scaled if self.use_nesterov else momenta
        return rows - learning_rate * update, {"accumulators": accumulators, "momenta": momenta}


@dataclasses.dataclass(frozen=True)
class FTRL(Optimizer):
    """Follow the regularized leader.

        a' = a + g^2,  p(x) = x^(-learning_rate_power)
        l <- l + g - (p(a') - p(a)) w / lr
        w <- (clip(l, l1) - l) / ((p(a') + beta) / lr + 2 l2)
        a <- a'

    so that w is 0 where |l| <= l1. beta adds beta / (2 lr) to l2. The weight follows from the slots, so that
    the first update of a row replaces what it was initialized to.

    Args:
      learning_rate: see `Optimizer`, as for the other options.
      learning_rate_power: how the learning rate decreases, at most 0; 0 keeps it.
      l1_regularization_strength: l1, at least 0.
      l2_regularization_strength: l2, at least 0.
      beta: see the paper.
      initial_accumulator_value: what a, the slot "accumulators", starts from; above 0, or at least 0 with
        `allow_zero_accumulator`. The slot "linears", l, starts from 0.
      multiply_linear_by_learning_rate: keep lr l in the slot "linears" instead. The same for a constant
        learning rate, and without NaN for one of 0.
      allow_zero_accumulator: keep the weight 0 instead of NaN or infinite where a is 0.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      `tf.tpu.experimental.embedding.FTRL`; McMahan et al., "Ad click prediction: a view from the trenches",
      2013, algorithm 1.
    """

    name: ClassVar[str] = "ftrl"
    is_elementwise: ClassVar[bool] = True
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    multiply_linear_by_learning_rate: bool = dataclasses.field(default=False, kw_only=True)
    allow_zero_accumulator: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        strengths = ("l1_regularization_strength", "l2_regularization_strength", "beta")
        self._put_number("learning_rate_power", "initial_accumulator_value", *strengths)
        if self.learning_rate_power > 0:
            raise ValueError(f"learning_rate_power must be at most 0, got {self.learning_rate_power}.")
        for field in strengths:
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}.")
        initial = self.initial_accumulator_value
        if initial < 0 or (initial == 0 and not self.allow_zero_accumulator):
            raise ValueError(
                f"initial_accumulator_value must be a positive float, got {initial}; "
                "0 needs allow_zero_accumulator=True."
            )

    @property
    def slot_initial_values(self) -> dict[str, float]:
        return {"accumulators": self.initial_accumulator_value, "linears": 0.0}

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        accumulators = slots["accumulators"] + gradient * gradient
        power = _power(accumulators, -self.learning_rate_power)
        change = power - _power(slots["accumulators"], -self.learning_rate_power)
        l1, l2 = self.l1_regularization_strength, self.l2_regularization_strength
        if self.multiply_linear_by_learning_rate:
            linears = slots["linears"] + learning_rate * gradient - change * rows
            l1 = learning_rate * l1
            denominator = power + self.beta + 2 * l2 * learning_rate
        else:
            linears = slots["linears"] + gradient - change / learning_rate * rows
            denominator = (power + self.beta) / learning_rate + 2 * l2
        live = jnp.abs(linears) > l1
        if self.allow_zero_accumulator:
            live &= denominator > 0
            denominator = jnp.where(denominator > 0, denominator, 1)
        rows = jnp.where(live, (jnp.clip(linears, -l1, l1) - linears) / denominator, 0)
        return rows, {"accumulators": accumulators, "linears": linears}

    def linears_of(self, rows: Rows, accumulators: Rows, learning_rate: Scalar) -> Rows:
        """The slot "linears" that gives these rows, for rows that come without it; all float32 [N, D]."""
        power = _power(accumulators, -self.learning_rate_power) + self.beta
        l1, l2 = self.l1_regularization_strength, self.l2_regularization_strength
        if self.multiply_linear_by_learning_rate:
            return -rows * (power + 2 * l2 * learning_rate) - jnp.sign(rows) * (learning_rate * l1)
        return -rows * (power / learning_rate + 2 * l2) - jnp.sign(rows) * l1


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam, lazy by default: only rows that are looked up move, and their moments decay only then.

        m <- beta_1 m + (1 - beta_1) g,  v <- beta_2 v + (1 - beta_2) g^2
        w <- w - lr_t m / sqrt(v + epsilon^2), or w - lr_t m / (sqrt(v) + epsilon)
        lr_t = lr sqrt(1 - beta_2^t) / (1 - beta_1^t), t = step + 1

    Args:
      learning_rate: see `Optimizer`, as for the other options.
      beta_1: decay of m, the slot "momenta", in [0, 1).
      beta_2: decay of v, the slot "velocities", in [0, 1).
      epsilon: above 0.
      lazy_adam: False updates every row of the table at each step, at the cost of the whole table; needs
        `use_gradient_accumulation`.
      sum_inside_sqrt: the first of the two denominators.
      bias_correction: False takes lr_t = lr: TensorFlow's optimizer leaves the correction to the caller's
        learning rate, so programs that carry it there must turn it off here.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      `tf.tpu.experimental.embedding.Adam`; Kingma and Ba, "Adam", 2015, end of section 2.
    """

    name: ClassVar[str] = "adam"
    is_elementwise: ClassVar[bool] = True
    is_additive: ClassVar[bool] = True
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    lazy_adam: bool = True
    sum_inside_sqrt: bool = True
    bias_correction: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._put_number("beta_1", "beta_2", "epsilon")
        for field in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be >= 0 and < 1, got {getattr(self, field)}.")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}.")
        if not self.use_gradient_accumulation and not self.lazy_adam:
            raise ValueError(
                "lazy_adam=False needs gradient accumulation, got use_gradient_accumulation=False; "
                "set it to True."
            )

    @property
    def slot_initial_values(self) -> dict[str, float]:
        return {"momenta": 0.0, "velocities": 0.0}

    @property
    def is_lazy(self) -> bool:
        return self.lazy_adam

    def rule(
        self, gradient: Rows, rows: Rows, slots: Slots, learning_rate: Scalar, step: Scalar
    ) -> tuple[Rows, Slots]:
        momenta = self.beta_1 * slots["momenta"] + (1 - self.beta_1) * gradient
        velocities = self.beta_2 * slots["velocities"] + (1 - self.beta_2) * (gradient * gradient)
        if self.bias_correction:
            t = step.astype(jnp.float32) + 1
            learning_rate = learning_rate * jnp.sqrt(_one_minus_power(self.beta_2, t))
            learning_rate = learning_rate / _one_minus_power(self.beta_1, t)
        if self.sum_inside_sqrt:
            scale = jnp.sqrt(velocities + self.epsilon**2)
        else:
            scale = jnp.sqrt(velocities) + self.epsilon
        return rows - learning_rate * momenta / scale, {"momenta": momenta, "velocities": velocities}


#: Those that are stored by their names.
RULES = (SGD, Adagrad, AdagradMomentum, FTRL, Adam)


def _power(values, exponent):
    return jnp.sqrt(values) if exponent == 0.5 else jnp.power(values, exponent)


def _one_minus_power(base, t):
    # 1 - base^t loses half of the digits in float32 while base^t is near 1.
    return -jnp.expm1(t * (math.log(base) if base else -math.inf))
