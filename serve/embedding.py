"""EmbeddingForServing: the tables of a feature configuration, on CPU, looked up as in training."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.checkpoint import read_checkpoint
from jaxembed.config import TableConfig
from jaxembed.features import feature_tables, table_of
from jaxembed.lookup import serving_embedding_lookup
from jaxembed.memory import aligned, shared
from jaxembed.preprocessing import preprocess
from jaxembed.quantization import quantize_as_trained
from jaxembed.resident_table import addresses
from jaxembed.shapes import ActivationTree, AnyCombinerWeights, AnyTable, CombinerWeights, Inputs, Weights


class EmbeddingForServing:
    """A feature configuration and its tables, restored for serving.

    Args:
      feature_config: a structure of FeatureConfig.
      tables: dict of TableConfig (or table name) to [V, D] array or QuantizedTable; others are ignored.
        Host arrays that start on a 64-byte boundary are used in place, not copied, so must not change.
        Arrays of tables with a quantization_config are quantized, so that the values are those of training.
      combiner_weights: by table name, the [num_weights] weights of its CustomCombiner.

    Raises:
      ValueError: if a table is missing, of another shape, not floating point, or cannot be quantized.

    Examples:
      >>> import jaxembed as je
      >>> movie = je.TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> rows = np.arange(8, dtype=np.float32).reshape(4, 2)
      >>> embedding = EmbeddingForServing(features, {"movie": rows})
      >>> embedding({"watched": je.RaggedTensor.from_lists([[0, 1], []])})["watched"].tolist()
      [[2.0, 4.0], [0.0, 0.0]]

    References:
      `tf.tpu.experimental.embedding.TPUEmbeddingForServing`.
    """

    def __init__(
        self,
        feature_config: Any,
        tables: Mapping[Any, AnyTable],
        combiner_weights: Mapping[str, AnyCombinerWeights] | None = None,
    ):
        self._feature_config = feature_config
        given = {
            config: _prepared(name, config, table_of(tables, config))
            for name, config in feature_tables(feature_config).items()
        }
        self._tables = jax.device_put(given, cpu_device())
        on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(given))
        self._addresses = shared(addresses(list(given.values())), cpu_device()) if on_host else None
        self._combiner_weights = jax.device_put(dict(combiner_weights or {}), cpu_device())

    @property
    def feature_config(self) -> Any:
        """The structure of FeatureConfig."""
        return self._feature_config

    @property
    def embedding_tables(self) -> dict[TableConfig, AnyTable]:
        """The [V, D] tables by TableConfig, on CPU; a pytree, to pass into a function of your own."""
        return dict(self._tables)

    @property
    def addresses(self) -> jax.Array | None:
        """Of the tables, as `resident_table.addresses` has them; None where not all lie in memory of the host's.

        An array of JAX may be deleted or donated by others at any time, so its memory is nobody's to keep.
        """
        return self._addresses

    @property
    def combiner_weights(self) -> dict[str, CombinerWeights]:
        """The weights of custom combiners, by table name."""
        return dict(self._combiner_weights)

    def __call__(self, features: Inputs, weights: Weights = None) -> ActivationTree:
        """`serving_embedding_lookup` of `features`, preprocessed, with optional `weights`, in these tables."""
        features = preprocess(features, self._feature_config)
        return serving_embedding_lookup(
            features, weights, self._tables, self._feature_config, combiner_weights=self._combiner_weights
        )

    @classmethod
    def restore(cls, path: str | pathlib.Path, step: int | None = None) -> "EmbeddingForServing":
        """From a checkpoint that `jaxembed.train` wrote; of the training program, only modules that register
        combiners are needed.

        Args:
          path: the checkpoint directory, or one step in it; or a serving bundle, whose tables are mapped.
          step: which step, or version of a bundle; default: the latest whole one.

        Raises:
          FileNotFoundError: if there is no such whole step.
          ValueError: if the checkpoint does not fit its own feature configuration, or a combiner is not registered.
        """
        checkpoint = read_checkpoint(path, step, model=False)
        return cls(checkpoint.feature_config, checkpoint.tables, checkpoint.combiner_weights)


def cpu_device() -> Any:
    """The `jax.Device` that serving runs on, whatever accelerators are about."""
    return jax.local_devices(backend="cpu")[0]


def _prepared(name: str, config: TableConfig, table: Any) -> Any:
    if isinstance(table, np.ndarray | jax.Array):
        if not jnp.issubdtype(table.dtype, jnp.floating):
            raise ValueError(
                f"table {name!r} must be floating point, got {table.dtype}; pass codes as a QuantizedTable."
            )
        if table.dtype == np.float64:
            table = table.astype(config.dtype)
        table = quantize_as_trained(table, config)
    return jax.tree.map(lambda array: aligned(array) if isinstance(array, np.ndarray) else array, table)
