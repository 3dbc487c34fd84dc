"""One training step of one table in each library: a lookup of summed bags, a squared loss, an update.

Each contender is built once for a table and has `step(i)`, which trains on batch i and returns when the table is
updated, and `rows(ids)`, the rows it then has.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Problem:
    """A table, an optimizer and batches.

    Attributes:
      vocabulary: V.
      dim: D.
      optimizer: "sgd" or "adagrad".
      learning_rate: of it.
      ids: a list of int32 [B, L] batches.
      targets: float32 [B, D], one a batch; the loss is half the squared distance of the bags' sums from them.
    """

    vocabulary: int
    dim: int
    optimizer: str
    learning_rate: float
    ids: list[np.ndarray]
    targets: list[np.ndarray]

    def table(self) -> np.ndarray:
        """float32 [V, D], the same for all."""
        return np.random.default_rng(1).standard_normal((self.vocabulary, self.dim), np.float32) * 0.01


def squared(out, target):
    """Half the squared distance."""
    return 0.5 * jnp.sum((out - target) ** 2)


class Jaxembed:
    """ShardedEmbedding on one CPU device; batches laid out ahead, as the prefetching thread does."""

    name = "jaxembed"

    def __init__(self, problem: Problem):
        from jaxembed import FeatureConfig, RaggedTensor, TableConfig
        from jaxembed.optimizers import SGD, Adagrad
        from jaxembed.train import ShardedEmbedding

        table = TableConfig(problem.vocabulary, problem.dim, combiner="sum", name="table")
        optimizer = {"sgd": SGD, "adagrad": Adagrad}[problem.optimizer](problem.learning_rate)
        mesh = jax.make_mesh((1,), ("devices",))
        own = ShardedEmbedding({"ids": FeatureConfig(table)}, optimizer, mesh)
        slots = {"accumulators": jnp.full((problem.vocabulary, problem.dim), 0.1, jnp.float32)}
        slots = slots if problem.optimizer == "adagrad" else {}
        self._state = own.from_canonical({"table": jnp.asarray(problem.table())}, {"table": slots}, 0)
        splits = [np.arange(ids.shape[0] + 1, dtype=np.int32) * ids.shape[1] for ids in problem.ids]
        self._inputs = [
            {"ids": RaggedTensor(ids.reshape(-1), split)}
            for ids, split in zip(problem.ids, splits, strict=True)
        ]
        self._own = own
        self._batches = [own.shard_batch(inputs)[0] for inputs in self._inputs]
        self._targets = [jax.device_put(target, own.batch_sharding) for target in problem.targets]

        def step(state, batch, target):
            out = own.lookup(state, batch)["ids"]
            loss, gradient = jax.value_and_grad(squared)(out, target)
            return own.apply_gradients(state, batch, {"ids": gradient}), loss

        self._step = jax.jit(step, donate_argnums=0)

    def step(self, i):
        self._state, loss = self._step(self._state, self._batches[i], self._targets[i])
        jax.block_until_ready((self._state, loss))

    def lay_out(self, i):
        """The host's part of a step, which a thread does ahead."""
        jax.block_until_ready(self._own.shard_batch(self._inputs[i])[0])

    def rows(self, ids):
        return np.asarray(self._own.to_canonical(self._state)[0]["table"][ids])


class DenseOptax:
    """A gather, its dense gradient, and optax over the whole table."""

    name = "dense optax"

    def __init__(self, problem: Problem):
        optimizer = {
            "sgd": optax.sgd(problem.learning_rate),
            "adagrad": optax.adagrad(problem.learning_rate, initial_accumulator_value=0.1, eps=0.0),
        }[problem.optimizer]
        table = jnp.asarray(problem.table())
        self._state = table, optimizer.init(table)
        self._batches = [
            (jnp.asarray(i), jnp.asarray(t)) for i, t in zip(problem.ids, problem.targets, strict=True)
        ]

        def step(state, ids, target):
            table, slots = state
            loss, gradient = jax.value_and_grad(lambda table: squared(jnp.sum(table[ids], axis=1), target))(
                table
            )
            updates, slots = optimizer.update(gradient, slots)
            return (optax.apply_updates(table, updates), slots), loss

        self._step = jax.jit(step, donate_argnums=0)

    def step(self, i):
        self._state, loss = self._step(self._state, *self._batches[i])
        jax.block_until_ready((self._state, loss))

    def rows(self, ids):
        return np.asarray(self._state[0][ids])


class KerasRs:
    """keras_rs.layers.DistributedEmbedding on JAX, and its keras optimizer, in one jitted step."""

    name = "keras-rs"

    def __init__(self, problem: Problem):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras
        import keras_rs

        batch, length = problem.ids[0].shape
        optimizer = {
            "sgd": lambda: keras.optimizers.SGD(problem.learning_rate),
            "adagrad": lambda: keras.optimizers.Adagrad(
                problem.learning_rate, initial_accumulator_value=0.1, epsilon=0.0
            ),
        }[problem.optimizer]()
        table = keras_rs.layers.TableConfig(
            name="table",
            vocabulary_size=problem.vocabulary,
            embedding_dim=problem.dim,
            combiner="sum",
            placement="default_device",
        )
        feature = keras_rs.layers.FeatureConfig(
            name="ids", table=table, input_shape=(batch, length), output_shape=(batch, problem.dim)
        )
        layer = keras_rs.layers.DistributedEmbedding({"ids": feature})
        layer.build({"ids": (batch, length)})
        (variable,) = layer.trainable_variables
        variable.assign(problem.table())
        optimizer.build([variable])
        self._state = (
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            [v.value for v in optimizer.variables],
        )
        # The layer and the optimizer would keep the table a second time.
        self._batches = [
            (jnp.asarray(i), jnp.asarray(t)) for i, t in zip(problem.ids, problem.targets, strict=True)
        ]

        def step(state, ids, target):
            trainable, others, slots = state

            def loss_of(trainable):
                out, updated = layer.stateless_call(trainable, others, {"ids": ids})
                return squared(out["ids"], target), updated

            (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
            trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
            return (trainable, others, slots), loss

        self._step = jax.jit(step, donate_argnums=0)

    def step(self, i):
        self._state, loss = self._step(self._state, *self._batches[i])
        jax.block_until_ready((self._state, loss))

    def rows(self, ids):
        return np.asarray(self._state[0][0][ids])


class Torch:
    """torch.nn.EmbeddingBag(sparse=True) and the torch optimizer that takes sparse gradients."""

    name = "torch sparse"

    def __init__(self, problem: Problem):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._torch = torch
        self._bag = torch.nn.EmbeddingBag.from_pretrained(
            torch.from_numpy(problem.table()), freeze=False, mode="sum", sparse=True
        )
        self._optimizer = {
            "sgd": lambda p: torch.optim.SGD(p, problem.learning_rate),
            "adagrad": lambda p: torch.optim.Adagrad(
                p, problem.learning_rate, initial_accumulator_value=0.1, eps=0.0
            ),
        }[problem.optimizer](self._bag.parameters())
        self._batches = [
            (torch.from_numpy(i.astype(np.int64)), torch.from_numpy(t))
            for i, t in zip(problem.ids, problem.targets, strict=True)
        ]

    def step(self, i):
        ids, target = self._batches[i]
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.5 * (self._bag(ids) - target).square().sum()
        loss.backward()
        self._optimizer.step()
        loss.item()

    def rows(self, ids):
        with self._torch.no_grad():
            return self._bag.weight[self._torch.from_numpy(ids.astype(np.int64))].numpy().copy()


CONTENDERS = (Jaxembed, DenseOptax, KerasRs, Torch)
