"""One training step of tables and dense model together: lookup, gradients, both updates."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxembed.shapes import ActivationTree, DenseFeatures, PerExample, Scalar

from .data import Batch
from .embedding import ShardedEmbedding
from .pure_model import PureModel
from .state import EmbeddingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      embedding: tables, slots and the number of steps taken.
      params: nested dict of the dense model's parameters.
      opt_state: of the optax optimizer.
      model_state: nested dict of what else the model holds: running averages of `nnx.BatchNorm`, keys and counts of
        `nnx.Rngs`; empty for most models.

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
      >>> sorted(state.model)
      ['opt_state', 'params']
      >>> again = TrainState(state.embedding, **state.model)
    """

    embedding: EmbeddingState
    params: Any
    opt_state: Any
    model_state: Any = dataclasses.field(default_factory=dict[str, Any])

    @property
    def model(self) -> dict[str, Any]:
        """All but the tables, by name: what `Checkpointer.save` and `restore` take as `model`.

        Without "model_state" where the model has none. `TrainState(restored.state, **restored.model)` is the way back.
        """
        rest = {"model_state": self.model_state} if self.model_state else {}
        return {"params": self.params, "opt_state": self.opt_state, **rest}


def binary_cross_entropy(logits: PerExample, batch: Batch) -> Scalar:
    """Mean log-loss over the examples of a batch, padding left out: float32 scalar."""
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, batch.labels)
    return jnp.sum(losses * batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1.0)


class Trainer:
    """Trains a ShardedEmbedding and a Flax NNX model around it.

    A step runs the model as after `model.train()`, and keeps what the model changes of its state in
    `TrainState.model_state`; `predict` and `apply_model` run it as after `model.eval()`, and change nothing. All of
    this is one program over the batch of all devices and hosts: `nnx.BatchNorm` averages over all of it, and a mask
    of `nnx.Dropout` is drawn once for all of it, whatever the mesh. The random keys are part of the state: a run
    that was stopped goes on with the draws that were to come. A model that draws in evaluation, too, does so with the
    keys that it was made with, each time the same.

    Args:
      embedding: the tables.
      model: called as `model(dense, activations) -> logits`; it is left as it is, and its parameters and other state
        start as they are in it. Where its call has an argument `mask`, it gets a bool [B] in training, False for
        rows that fill up a last batch: `nnx.BatchNorm` counts those otherwise, so pass it on (`mask[:, None]`), or
        train on whole batches. Evaluation passes no mask.
      optimizer: of the dense parameters.
      loss: called as `loss(logits, batch) -> scalar`.

    Raises:
      ValueError: if the model holds tables of its own (`jaxembed.train.Embedding`).

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
        self._model = PureModel(model)
        #: (state, batch) to the next state, which takes the memory of this one, and a dict of the "loss", the [B]
        #: "logits", and the "rounds" that `ShardedEmbedding.lookup` counts.
        self.step: Any = jax.jit(self._step, donate_argnums=0)
        if any(stack.optimizer.callables for stack in embedding.stacks.values()):
            self.step = _Calling(self.step, embedding)
        self.predict: jax.stages.Wrapped = jax.jit(self._predict)
        self.replicate: jax.stages.Wrapped = jax.jit(lambda arrays: arrays, out_shardings=embedding.replicated)

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state.

        Raises:
          ValueError: if the model of another process started from other parameters, random keys or averages.
        """
        try:
            initial = jax.device_put((self._model.params, self._model.state), self.embedding.replicated)
        except AssertionError as e:  # JAX compares what is to be the same everywhere
            raise ValueError(
                "all processes must start from the same model; make it on each with nnx.Rngs of the same seeds: "
                f"{str(e)[:300]}"
            ) from e
        # Laid out as the step returns it, so that the second step finds the first one's program.
        opt_state = jax.device_put(self.optimizer.init(initial[0]), self.embedding.replicated)
        # Copied, since the step donates its state, and optimizers may keep the first parameters in theirs.
        (params, model_state), opt_state = jax.tree.map(jnp.copy, (initial, opt_state))
        return TrainState(self.embedding.init(key), params, opt_state, model_state)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of a state, for compiling a step ahead of time."""

        def abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.embedding.replicated)

        params, model_state = jax.tree.map(abstract, (self._model.params, self._model.state))
        opt_state = jax.tree.map(abstract, jax.eval_shape(self.optimizer.init, params))
        return TrainState(self.embedding.abstract_state(), params, opt_state, model_state)

    def abstract_batch(self, batch: Batch) -> Batch:
        """Shapes, types and shardings of what `shard_batch` returns for a batch."""
        features, weights = self.embedding.abstract_batch(batch.features, batch.weights, batch.mask)
        sharding = self.embedding.batch_sharding
        hosts = jax.process_count()
        rest = [
            jax.ShapeDtypeStruct((x.shape[0] * hosts, *x.shape[1:]), x.dtype, sharding=sharding)
            for x in (batch.dense, batch.labels, batch.mask)
        ]
        return Batch(features, weights, *rest)

    def shard_batch(self, batch: Batch) -> Batch:
        """A host batch laid out over the mesh; what `step` and `predict` take.

        Rows whose mask is 0 look nothing up, and update nothing: see `Batch.mask`.

        With several hosts, each passes its own rows, as `ShardedEmbedding.shard_batch` says.
        """
        return self._with_rest(batch, *self.embedding.shard_batch(batch.features, batch.weights, batch.mask))

    def pack_batch(self, batch: Batch) -> Batch:
        """The host's half of `shard_batch`: for a thread of its own, while a step runs."""
        packed = self.embedding.pack_batch(batch.features, batch.weights, batch.mask)
        return dataclasses.replace(batch, features=packed, weights={})

    def place_batch(self, packed: Batch, agreed: jax.Array | None = None) -> Batch:
        """The devices' half: a packed batch, and what `ShardedEmbedding.agree` returned for its features."""
        return self._with_rest(packed, *self.embedding.place_batch(packed.features, agreed))

    def variables(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What evaluation and serving need of `TrainState.model`, or of the dense model of a checkpoint.

        It is what `apply_model` takes: parameters and running averages in one nested dict, without random keys. Of a
        model that has parameters alone, it is these. For `export_model`'s `params`, and `select_model` of
        `convert_to_bundle`.
        """
        return self._model.variables(model["params"], model.get("model_state", {}))

    def apply_model(self, variables: Any, dense: DenseFeatures, activations: ActivationTree) -> PerExample:
        """The dense model in evaluation mode, as a pure function of `variables`: [B] logits."""
        return self._model.evaluate(variables, dense, activations)

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

        live = batch.mask > 0

        def loss_of(params, activations):
            logits, after = self._model.train(
                params, state.model_state, batch.dense, _filled(activations, live), live
            )
            return self.loss(logits, batch), (logits, after)

        gradient = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
        (loss, (logits, after)), (param_grads, activation_grads) = gradient(state.params, activations)
        model_state = jax.lax.with_sharding_constraint(after, self.embedding.replicated)
        embedding = self.embedding.apply_gradients(
            state.embedding, batch.features, activation_grads, batch.weights, called_values=called
        )
        updates, opt_state = self.optimizer.update(param_grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        found = {"loss": loss, "logits": logits, "rounds": rounds}
        return TrainState(embedding, params, opt_state, model_state), found

    def _predict(self, state: TrainState, batch: Batch) -> PerExample:
        activations = self.embedding.lookup(state.embedding, batch.features, batch.weights)
        activations = _filled(activations, batch.mask > 0)
        return self.apply_model(self.variables(state.model), batch.dense, activations)


def _filled(activations: ActivationTree, live: jax.Array) -> ActivationTree:
    """The activations, without the zeros of rows that are not `live`, bool [B].

    A model that divides by the norm of a row, or by a deviation within it, makes NaN of zeros, and a loss that leaves the
    row out does not keep that from the gradients of the parameters. These numbers differ from column to column and from
    feature to feature, and are small, for the averages of models that take no mask.
    """
    leaves, treedef = jax.tree.flatten(activations)
    filled = []
    for place, leaf in enumerate(leaves):
        if leaf.ndim > 1 and leaf.shape[0] == live.shape[0]:
            own = leaf.shape[1:]
            angles = np.arange(1, 1 + math.prod(own), dtype=np.float32) + np.float32(place)
            row = (np.float32(0.1) * jnp.sin(angles)).reshape(own)
            leaf = jnp.where(live.reshape(-1, *[1] * len(own)), leaf, row.astype(leaf.dtype))
        filled.append(leaf)
    return jax.tree.unflatten(treedef, filled)


class _Calling:
    """A compiled step, given what learning rates that are callables return now.

    What `lower` compiles takes that as a third argument.
    """

    def __init__(self, step: Any, embedding: ShardedEmbedding):
        self._step = step
        self._embedding = embedding

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        return self._step(state, batch, self._embedding.called_values())

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        return self._step.lower(state, batch, self._embedding.called_values())
