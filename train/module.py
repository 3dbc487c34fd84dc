"""Embedding: a ShardedEmbedding as a Flax NNX module, to put into a model."""

from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxembed.config import TableConfig
from jaxembed.optimizers import Optimizer
from jaxembed.shapes import ActivationTree, Inputs, Table, Weights

from .embedding import ShardedEmbedding
from .engines.batch import ShardedBatch, ShardedWeights
from .state import EmbeddingState


class EmbeddingVariable(nnx.Variable[EmbeddingState]):
    """Tables, slots and step. No `nnx.Param`, since optax must not update it: `apply_gradients` does."""


class Embedding(nnx.Module):
    """Sharded embedding tables inside an NNX model.

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.embedding = Embedding(feature_config, Adagrad(0.1), mesh, rngs=rngs)
                self.tower = MLP(..., rngs=rngs)

        @nnx.jit(donate_argnums=(0, 1))                    # the tables are updated in place, not copied
        def train_step(model, optimizer, batch):           # optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            activations = model.embedding(batch.features)
            gradients = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1))(model, activations, batch)
            optimizer.update(model, gradients[0])
            model.embedding.apply_gradients(batch.features, gradients[1])

    Gradients are taken with respect to the activations, not the tables, so that a step touches only the
    rows that were looked up. Ragged and sparse batches are laid out before a jitted step:

        batch, weights = model.embedding.sharded.shard_batch(features)

    A checkpoint holds the state of `sharded`, and what else it is given. Serving and exports start from it, or from
    `embedding_tables`:

        with Checkpointer("checkpoints", model.embedding.sharded) as checkpointer:
            dense = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            checkpointer.save(model.embedding.state.get_value(), model=dense)
            restored = checkpointer.restore(model=dense)
        model.embedding.state.set_value(restored.state)
        nnx.update(model, restored.model)

    Args:
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      mesh: over which the tables are sharded.
      rngs: its `params` stream initializes the tables.
      options: further arguments of ShardedEmbedding.

    Attributes:
      sharded: the ShardedEmbedding, whose `shard_batch` makes batches.
      state: the variable that holds its EmbeddingState.

    Examples:
      >>> import jax
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import SGD
      >>> movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> embedding = Embedding(features, SGD(1.0), mesh, rngs=nnx.Rngs(0))
      >>> embedding({"watched": je.RaggedTensor.from_lists([[0, 1], [], [3], [3]] * 2)})["watched"].shape
      (8, 2)

    References:
      `tf.tpu.experimental.embedding.TPUEmbedding`.
    """

    def __init__(
        self, feature_config: Any, optimizer: Optimizer, mesh: Mesh, *, rngs: nnx.Rngs, **options: Any
    ):
        self.sharded: ShardedEmbedding = ShardedEmbedding(feature_config, optimizer, mesh, **options)
        self.state: EmbeddingVariable = EmbeddingVariable(self.sharded.init(rngs.params()))

    def __call__(
        self, batch: ShardedBatch | Inputs, weights: ShardedWeights | Weights = None
    ) -> ActivationTree:
        """Activations, as `ShardedEmbedding.lookup`."""
        return self.sharded.lookup(self.state.get_value(), batch, weights)

    def apply_gradients(
        self,
        batch: ShardedBatch | Inputs,
        activation_gradients: ActivationTree,
        weights: ShardedWeights | Weights = None,
        *,
        called_values: dict[str, Any] | None = None,
    ) -> None:
        """Updates tables and slots in place, as `ShardedEmbedding.apply_gradients`."""
        state = self.sharded.apply_gradients(
            self.state.get_value(), batch, activation_gradients, weights, called_values=called_values
        )
        self.state.set_value(state)

    def called_values(self) -> dict[str, Any]:
        """What learning rates that are callables return now, as `ShardedEmbedding.called_values`."""
        return self.sharded.called_values()

    @property
    def embedding_tables(self) -> dict[TableConfig, Table]:
        """The [V, D] tables by TableConfig, for `serving_embedding_lookup`."""
        return self.sharded.embedding_tables(self.state.get_value())
