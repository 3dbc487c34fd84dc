"""The feature configuration: which features exist and which table each one looks up.

The arguments, defaults and errors are those of `tf.tpu.experimental.embedding` (TensorFlow 2.21).
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed.id_mapping import HashBuckets, Preprocessing, VocabularyFile
from jaxembed.initializers import Initializer, TruncatedNormal
from jaxembed.optimizers.base import Optimizer

COMBINERS = ("mean", "sum", "sqrtn")


def _as_int(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be an int, got {value!r}.") from None


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Simulated quantization of a table to `num_buckets` evenly spaced values.

    A value x becomes the nearest of the `num_buckets` points that divide [lower, upper] evenly,
    both ends included; values outside the range are clipped to it.

    Args:
      num_buckets: number of points, at least 2.
      lower: smallest representable value.
      upper: largest representable value, above `lower`.

    Raises:
      ValueError: if `num_buckets` is below 2 or `lower` is not below `upper`.

    Examples:
      >>> from jaxembed.quantization import simulate_quantization
      >>> simulate_quantization(jnp.asarray([-2.0, 0.2, 0.9]), QuantizationConfig(3, lower=-1, upper=1)).tolist()
      [-1.0, 0.0, 1.0]

    References:
      `tf.tpu.experimental.embedding.QuantizationConfig`.
    """

    num_buckets: int
    lower: float
    upper: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_buckets", _as_int(self.num_buckets, "num_buckets"))
        object.__setattr__(self, "lower", float(self.lower))
        object.__setattr__(self, "upper", float(self.upper))
        if self.num_buckets < 2:
            raise ValueError(f"num_buckets must be at least 2, got {self.num_buckets}.")
        if not (math.isfinite(self.lower) and math.isfinite(self.upper) and self.lower < self.upper):
            raise ValueError(
                f"lower must be finite and below upper, got lower={self.lower}, upper={self.upper}."
            )


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """One embedding table of shape [vocabulary_size, dim].

    Equal by value, hashable, and ordered by `name`, so that a dict keyed by TableConfig is a pytree. Two that are
    equal are one table, which their features share; TensorFlow refuses two objects of one name.

    Args:
      vocabulary_size: number of rows V.
      dim: width of a row D.
      initializer: called as `initializer(key, shape, dtype)`. Default: truncated normal with mean 0
        and standard deviation 1/sqrt(dim).
      optimizer: optimizer of this table; None takes the one given to `ShardedEmbedding`.
      combiner: "mean", "sum" or "sqrtn", or a `CustomCombiner`: how the rows of one bag become one row.
      name: name of the table, unique in a feature configuration. Required: tables are ordered, stored
        and matched by it.
      quantization_config: simulated in training, applied for real in serving.
      dtype: floating point type of the rows.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="movie").vocabulary_size
      4

    References:
      `tf.tpu.experimental.embedding.TableConfig`.
    """

    vocabulary_size: int
    dim: int
    initializer: Initializer | Callable[..., Any] | None = None
    optimizer: Optimizer | None = None
    combiner: Any = "mean"
    name: str = ""
    quantization_config: QuantizationConfig | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        def put(field, value):
            object.__setattr__(self, field, value)

        put("vocabulary_size", _as_int(self.vocabulary_size, "vocabulary_size"))
        put("dim", _as_int(self.dim, "dim"))
        if self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size must be at least 1, got {self.vocabulary_size}.")
        if self.vocabulary_size >= 2**31:
            raise ValueError(
                f"vocabulary_size must be below 2**31, got {self.vocabulary_size}; "
                "hash the ids into fewer buckets or split the table."
            )
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}.")
        if self.dim >= 2**31:
            raise ValueError(f"dim must be below 2**31, got {self.dim}.")
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer):
            raise ValueError(
                f"optimizer must be one of jaxembed.optimizers or None, got {self.optimizer!r}; wrap a rule of your "
                "own in CustomOptimizer."
            )
        if self.initializer is None:
            put("initializer", TruncatedNormal(mean=0.0, stddev=1.0 / math.sqrt(self.dim)))
        elif not callable(self.initializer):
            raise ValueError(
                f"initializer must be callable as initializer(key, shape, dtype), got {self.initializer!r}."
            )
        if isinstance(self.combiner, str) and self.combiner not in COMBINERS:
            raise ValueError(f"combiner must be one of {COMBINERS} or a CustomCombiner, got {self.combiner!r}.")
        if not isinstance(self.combiner, str) and not callable(
            getattr(self.combiner, "combiner_computation", None)
        ):
            raise ValueError(f"combiner must be one of {COMBINERS} or a CustomCombiner, got {self.combiner!r}.")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(
                f"TableConfig needs a name, got {self.name!r}; pass name='...': tables are ordered, "
                "stored and matched by name."
            )
        if self.quantization_config is not None and not isinstance(
            self.quantization_config, QuantizationConfig
        ):
            raise ValueError(
                f"quantization_config must be a QuantizationConfig, got {self.quantization_config!r}."
            )
        try:
            dtype = jnp.dtype(self.dtype)
        except (TypeError, DeprecationWarning):  # numpy warns of "a8", which is no number
            raise ValueError(f"dtype must be a floating point type, got {self.dtype!r}.") from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {dtype.name}.")
        put("dtype", dtype)

    def __lt__(self, other: Any) -> bool:
        if not isinstance(other, TableConfig):
            return NotImplemented
        # The second key orders tables of one name in a total way; configurations that hold such a
        # pair are refused by `feature_tables`.
        return (self.name, repr(self)) < (other.name, repr(other))


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """One input feature and how it is looked up.

    Args:
      table: the TableConfig that the feature's ids refer to. Features may share a table.
      max_sequence_length: L. 0 combines each bag to [D]; above 0 gives [L, D] a row, without combining. As in
        TensorFlow it is ignored where `output_shape` is set, and for sparse inputs of rank above 2.
      validate_weights_and_indices: for sparse inputs, prune ids < 0, and weights not above 0 unless the
        combiner is "sum". Ragged inputs are never pruned.
      output_shape: leading dimensions of the activation, without D; for ragged inputs. Its product
        must be B (combined) or a multiple of B (a sequence per row), where B is the whole batch that is passed
        (in training, of the process): TensorFlow's is that of one replica.
      name: kept with the configuration, where it must be unique; inputs and errors go by the feature's path.
      preprocessing: `HashBuckets` or `VocabularyFile`, which make rows of raw ids, alike in training and
        serving (`jaxembed.preprocess`); None takes ids as rows.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> movie = TableConfig(vocabulary_size=4, dim=2, name="movie")
      >>> features = {"watched": FeatureConfig(movie), "last": FeatureConfig(movie, max_sequence_length=3)}
      >>> features["last"].table.name
      'movie'

    References:
      `tf.tpu.experimental.embedding.FeatureConfig`.
    """

    table: TableConfig
    max_sequence_length: int = 0
    validate_weights_and_indices: bool = True
    output_shape: tuple[int, ...] | None = None
    name: str | None = None
    preprocessing: Preprocessing | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.table, TableConfig):
            raise ValueError(f"table must be a TableConfig, got {self.table!r}.")
        length = _as_int(self.max_sequence_length, "max_sequence_length")
        if length < 0:
            raise ValueError(f"max_sequence_length must be at least 0, got {length}.")
        if length >= 2**31:
            raise ValueError(f"max_sequence_length must be below 2**31, got {length}.")
        object.__setattr__(self, "max_sequence_length", length)
        if not isinstance(self.validate_weights_and_indices, bool):
            raise ValueError(
                f"validate_weights_and_indices must be True or False, got {self.validate_weights_and_indices!r}."
            )
        if self.output_shape is not None:
            try:
                shape = tuple(operator.index(n) for n in np.atleast_1d(np.asarray(self.output_shape, object)))
            except TypeError:
                raise ValueError(f"output_shape must be ints or None, got {self.output_shape!r}.") from None
            if any(n < 1 for n in shape):
                raise ValueError(f"output_shape must hold ints of at least 1, got {shape}.")
            object.__setattr__(self, "output_shape", shape or None)
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name must be a str or None, got {self.name!r}.")
        if self.preprocessing is None:
            return
        if not isinstance(self.preprocessing, HashBuckets | VocabularyFile):
            raise ValueError(
                f"preprocessing must be HashBuckets, VocabularyFile or None, got {self.preprocessing!r}."
            )
        if self.preprocessing.num_rows > self.table.vocabulary_size:
            raise ValueError(
                f"preprocessing gives rows in [0, {self.preprocessing.num_rows}), but table {self.table.name!r} has "
                f"vocabulary_size {self.table.vocabulary_size}; make the table larger or the buckets fewer."
            )
