"""The values of a QuantizationConfig, and simulated quantization to them.

    code(x)  = floor((clip(x, lower, upper) - lower) / quantum + 1/2)       quantum = (upper - lower) / (num_buckets - 1)
    value(c) = lower + c quantum

Training computes these on an accelerator, conversion on the host, and serving must give the very same
values. Compilers differ in whether they contract a product and a sum, and how they divide. So products here
are exact (the quantum is split into parts of few bits), and codes are found by comparing with the borders
between buckets, whatever the first guess was: every program gets the same bits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.config import QuantizationConfig
from jaxembed.shapes import AnyShape

MAX_BUCKETS = 1 << 16
_MANTISSA = 24
_TINY = np.finfo(np.float32).tiny


def simulate_quantization(x: AnyShape, config: QuantizationConfig) -> AnyShape:
    """The nearest of the values of `config`, with the gradient of the identity (straight-through).

    The gradient passes outside of [lower, upper], too, as on TPUs, where the backward pass is that of a
    lookup without quantization.

    Args:
      x: floating point array; NaN stays NaN.
      config: static.

    Returns:
      An array like `x`.

    Raises:
      ValueError: if float32 cannot tell the values of `config` apart.

    References:
      `tf.tpu.experimental.embedding.QuantizationConfig`; `SimulatedQuantization` in TensorFlow's
      optimization_parameters.proto. Bengio et al., https://arxiv.org/abs/1308.3432 (straight-through).
    """
    return _simulate(jnp.asarray(x), config)


def _nearest(x: jax.Array, config: QuantizationConfig) -> jax.Array:
    buckets = Buckets(config)
    rows = x.astype(jnp.float32)
    values = buckets.values(buckets.codes(rows, jnp))
    return jnp.where(jnp.isnan(rows), rows, values).astype(x.dtype)


def _straight_through(config, primals, tangents):
    return _simulate(primals[0], config), tangents[0]


_simulate = jax.custom_jvp(_nearest, nondiff_argnums=(1,))
_simulate.defjvp(_straight_through)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The arithmetic of a QuantizationConfig, the same bits in every program.

    Args:
      config: which.

    Raises:
      ValueError: if float32 cannot tell its values apart.
    """

    config: QuantizationConfig

    def __post_init__(self) -> None:
        config = self.config
        if config.num_buckets > MAX_BUCKETS:
            raise ValueError(
                f"num_buckets must be at most {MAX_BUCKETS} to quantize, got {config.num_buckets}."
            )
        with np.errstate(over="ignore"):
            ends = np.array([config.lower, config.upper], np.float32)
        quantum = (float(ends[1]) - float(ends[0])) / (config.num_buckets - 1)
        if not np.isfinite(ends).all():
            raise ValueError(f"{config} has an end beyond float32; use a narrower range.")
        if quantum < 8 * float(np.spacing(np.abs(ends).max())):
            raise ValueError(
                f"{config} has values that float32 cannot tell apart; use fewer buckets or a wider range."
            )
        if quantum < 2.0**-90:
            raise ValueError(
                f"{config} has values {quantum:g} apart, but they must be at least 2**-90 apart; use fewer buckets or a "
                "wider range."
            )

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.array([self.config.lower, self.config.upper], np.float32)

    @functools.cached_property
    def _halves(self) -> tuple[np.float32, ...]:
        """Parts of half the quantum, greatest first, of so few bits that any multiple in use is exact."""
        last = 2 * (self.config.num_buckets - 1) + 1
        rest = (float(self._ends[1]) - float(self._ends[0])) / (self.config.num_buckets - 1) / 2
        bits, unit, parts = _MANTISSA - last.bit_length(), math.frexp(rest)[1], []
        for _ in range(-(-_MANTISSA // bits)):
            unit -= bits
            parts.append(np.float32(math.ldexp(math.floor(math.ldexp(rest, -unit)), unit)))
            rest -= float(parts[-1])
        return tuple(parts)

    def at(self, half_steps: Any) -> Any:
        """lower + half_steps quantum / 2, float32, not falling; borders are at odd numbers of half steps."""
        total: Any = self._ends[0]
        for part in reversed(self._halves):
            total = half_steps * part + total
        return total

    def values(self, codes: Any) -> Any:
        """Values of codes that are float32 arrays of integers."""
        return self.at(codes * np.float32(2))

    def codes(self, x: Any, xp: Any = np) -> Any:
        """Codes of float32 values (not NaN), as float32 integers; `xp` is numpy or jax.numpy."""
        lower, upper = self._ends
        one, two = np.float32(1), np.float32(2)
        # Some processors take subnormal numbers for zeros: all must.
        x = xp.clip(xp.where(xp.abs(x) < _TINY, np.float32(0), x), lower, upper)
        inverse = np.float32(1 / (2 * sum(map(float, self._halves))))
        guess = xp.floor((x - lower) * inverse + np.float32(0.5))
        found = (
            guess
            - one
            + (x >= self.at(guess * two - one)).astype(np.float32)
            + (x >= self.at(guess * two + one)).astype(np.float32)
        )
        return xp.clip(found, np.float32(0), np.float32(self.config.num_buckets - 1))

    def codebook(self, size: int) -> np.ndarray:
        """Values of the codes 0, 1, ..., float32 [size]; codes that do not occur have the last value."""
        codes = np.minimum(np.arange(size), self.config.num_buckets - 1)
        return self.values(codes.astype(np.float32))
