"""One training step of tables and dense model together: lookup, gradients, both updates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxembed.shapes import ActivationTree, DenseFeatures, PerExample, Scalar

from .data import Batch
from .embedding import ShardedEmbedding
from .state import EmbeddingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      embedding: tables, slots and the number of steps taken.
      params: pure nested dict of the dense model's parameters.
      opt_state: of the optax optimizer.

    Examples:
      >>> from jaxembed.optimizers import Adagrad
      >>> from jaxembed.train import ShardedEmbedding
      >>> from jaxembed.train.data import batches, criteo_feature_config, synthetic_criteo
      >>> from jaxembed.train.dlrm import DLRM
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> features = dict(criteo_feature_config(10, 8))
      >>> embedding = ShardedEmbedding(features, Adagrad(0.05), mesh)
      >>> model = DLRM(13, len(features), 8, rngs=nnx.Rngs(0))
      >>> trainer = Trainer(embedding, model, optax.sgd(0.1))
      >>> state = trainer.init(jax.random.key(0))
      >>> sorted(state.params), state.embedding.step.item()
      (['bottom', 'top'], 0)
    """

    embedding: EmbeddingState
    params: Any
    opt_state: Any


def binary_cross_entropy(logits: PerExample, batch: Batch) -> Scalar:
    """Mean log-loss over the examples of a batch, padding left out: float32 scalar."""
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, batch.labels)
    return jnp.sum(losses * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1.0)


class Trainer:
    """Trains a ShardedEmbedding and a Flax NNX model around it.

    Args:
      embedding: the tables.
      model: called as `model(dense, activations) -> logits`; its parameters start as they are in it. It has no
        other state, as `nnx.BatchNorm` and `nnx.Dropout` have; for those, a step of your own around
        `jaxembed.train.Embedding` keeps it.
      optimizer: of the dense parameters.
      loss: called as `loss(logits, batch) -> scalar`.

    Raises:
      ValueError: if the model has state that is no `nnx.Param`.

    Examples:
      >>> from jaxembed.optimizers import Adagrad
      >>> from jaxembed.train import ShardedEmbedding
      >>> from jaxembed.train.data import batches, criteo_feature_config, synthetic_criteo
      >>> from jaxembed.train.dlrm import DLRM
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> features = dict(criteo_feature_config(10, 8))
      >>> embedding = ShardedEmbedding(features, Adagrad(0.05), mesh)
      >>> model = DLRM(13, len(features), 8, rngs=nnx.Rngs(0))
      >>> trainer = Trainer(embedding, model, optax.sgd(0.1))
      >>> state = trainer.init(jax.random.key(0))
      >>> for batch in batches(synthetic_criteo(64, 10), batch_size=32, num_epochs=1):
      ...     state, metrics = trainer.step(state, trainer.shard_batch(batch))
      >>> state.embedding.step.item(), sorted(metrics)
      (2, ['logits', 'loss', 'rounds'])
    """

    def __init__(
        self,
        embedding: ShardedEmbedding,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        loss: Callable[[PerExample, Batch], Scalar] = binary_cross_entropy,
    ):
        self.embedding = embedding
        self.optimizer = optimizer
        self.loss = loss
        _check_stateless(model)
        graphdef, params = nnx.split(model)
        self.graphdef: nnx.GraphDef[nnx.Module] = graphdef
        self._initial_params = nnx.to_pure_dict(params)
        #: (state, batch) to the next state, which takes the memory of this one, and a dict of the "loss", the [B]
        #: "logits", and the "rounds" that `ShardedEmbedding.lookup` counts.
        self.step: Any = jax.jit(self._step, donate_argnums=0)
        if any(stack.optimizer.callables for stack in embedding.stacks.values()):
            step = self.step
            self.step = lambda state, batch: step(state, batch, embedding.called_values())
        self.predict: jax.stages.Wrapped = jax.jit(self._predict)
        self.replicate: jax.stages.Wrapped = jax.jit(lambda arrays: arrays, out_shardings=embedding.replicated)

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state."""
        params = jax.device_put(self._initial_params, self.embedding.replicated)
        # Copied, since the step donates its state.
        params = jax.tree.map(jnp.copy, params)
        # Laid out as the step returns it, so that the second step finds the first one's program.
        opt_state = jax.device_put(self.optimizer.init(params), self.embedding.replicated)
        return TrainState(self.embedding.init(key), params, opt_state)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of a state, for compiling a step ahead of time."""

        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.embedding.replicated)

        params = jax.tree.map(abstract, self._initial_params)
        opt_state = jax.tree.map(abstract, jax.eval_shape(self.optimizer.init, params))
        return TrainState(self.embedding.abstract_state(), params, opt_state)

    def abstract_batch(self, batch: Batch) -> Batch:
        """Shapes, types and shardings of what `shard_batch` returns for a batch."""
        features, weights = self.embedding.abstract_batch(batch.features, batch.weights)
        sharding = self.embedding.batch_sharding
        rest = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for x in (batch.dense, batch.labels, batch.mask)
        ]
        return Batch(features, weights, *rest)

    def shard_batch(self, batch: Batch) -> Batch:
        """A host batch laid out over the mesh; what `step` and `predict` take.

        With several hosts, each passes its own rows, as `ShardedEmbedding.shard_batch` says.
        """
        return self._with_rest(batch, *self.embedding.shard_batch(batch.features, batch.weights))

    def pack_batch(self, batch: Batch) -> Batch:
        """The host's half of `shard_batch`: for a thread of its own, while a step runs."""
        packed = self.embedding.pack_batch(batch.features, batch.weights)
        return dataclasses.replace(batch, features=packed, weights={})

    def place_batch(self, packed: Batch, agreed: jax.Array | None = None) -> Batch:
        """The devices' half: a packed batch, and what `ShardedEmbedding.agree` returned for its features."""
        return self._with_rest(packed, *self.embedding.place_batch(packed.features, agreed))

    def apply_model(self, params: Any, dense: DenseFeatures, activations: ActivationTree) -> PerExample:
        """The dense model as a pure function: [B] logits."""
        return nnx.merge(self.graphdef, nnx.State(params))(dense, activations)

    def _with_rest(self, batch: Batch, features: Any, weights: Any) -> Batch:
        rest = jax.make_array_from_process_local_data(
            self.embedding.batch_sharding, (batch.dense, batch.labels, batch.mask)
        )
        return Batch(features, weights, *rest)

    def _step(
        self, state: TrainState, batch: Batch, called: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        activations, rounds = self.embedding.lookup(
            state.embedding, batch.features, batch.weights, count_rounds=True
        )

        def loss_of(params, activations):
            logits = self.apply_model(params, batch.dense, activations)
            return self.loss(logits, batch), logits

        gradient = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (loss, logits), (param_grads, activation_grads) = gradient(state.params, activations)
        embedding = self.embedding.apply_gradients(
            state.embedding, batch.features, activation_grads, batch.weights, called_values=called
        )
        updates, opt_state = self.optimizer.update(param_grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        found = {"loss": loss, "logits": logits, "rounds": rounds}
        return TrainState(embedding, params, opt_state), found

    def _predict(self, state: TrainState, batch: Batch) -> PerExample:
        activations = self.embedding.lookup(state.embedding, batch.features, batch.weights)
        return self.apply_model(state.params, batch.dense, activations)


def _check_stateless(model: nnx.Module) -> None:
    """Raises ValueError if a model has state beside its parameters, which gradients would be taken of."""
    rest = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
    found = [f"{'.'.join(map(str, path))} ({type(variable).__name__})" for path, variable in rest]
    if found:
        raise ValueError(
            "Trainer trains models whose only state is nnx.Param, got one with "
            f"{', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}. Use layers without "
            "other state, such as nnx.LayerNorm in place of nnx.BatchNorm, and no nnx.Dropout; or put "
            "jaxembed.train.Embedding into the model and write the step yourself, as its docstring shows."
        )
