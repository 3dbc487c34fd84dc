"""The NNX module trains inside a model, and equals the functional form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxembed as je
from jaxembed.optimizers import SGD, Adagrad, Adam
from jaxembed.train import Embedding, ShardedEmbedding, Trainer
from jaxembed.train.data import Batch

TABLE = je.TableConfig(32, 4, combiner="sum", name="t")
CONFIG = {"a": je.FeatureConfig(TABLE), "b": je.FeatureConfig(TABLE)}


class Model(nnx.Module):
    def __init__(self, mesh, rngs):
        self.embedding = Embedding(CONFIG, Adagrad(0.1), mesh, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, activations):
        return self.head(activations["a"] + activations["b"])[:, 0]


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])


@pytest.fixture
def features():
    return {
        "a": je.RaggedTensor.from_lists([[i, i + 1] for i in range(8)]),
        "b": np.arange(8, dtype=np.int32),
    }


def loss(model, activations, labels):
    return jnp.mean((model(activations) - labels) ** 2)


def test_trains_inside_a_model(mesh, features):
    model = Model(mesh, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    batch, _ = model.embedding.sharded.shard_batch(features)
    labels = jnp.arange(8.0) / 8

    @nnx.jit(donate_argnums=(0, 1))
    def train_step(model, optimizer, batch, labels):
        activations = model.embedding(batch)
        value, gradients = nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1))(
            model, activations, labels
        )
        optimizer.update(model, gradients[0])
        model.embedding.apply_gradients(batch, gradients[1])
        return value

    before = np.asarray(model.embedding.embedding_tables[TABLE])
    held = sum(x.nbytes for x in jax.tree.leaves(model.embedding.state.get_value())) // mesh.size
    compiled = train_step.lower(model, optimizer, batch, labels).compile()
    assert compiled.compiled.memory_analysis().alias_size_in_bytes >= held
    losses = [float(train_step(model, optimizer, batch, labels)) for _ in range(20)]
    after = np.asarray(model.embedding.embedding_tables[TABLE])
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(after[9:], before[9:])
    assert (after[:9] != before[:9]).any(axis=1).all()


def test_first_update_is_that_of_the_functional_form(mesh, features):
    module = Embedding(CONFIG, Adagrad(0.1), mesh, rngs=nnx.Rngs(0))
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh)
    state = embedding.from_canonical(*embedding.to_canonical(module.state.get_value()))
    gradients = jax.tree.map(jnp.ones_like, module(features))
    module.apply_gradients(features, gradients)
    state = embedding.apply_gradients(state, features, gradients)
    np.testing.assert_array_equal(module.embedding_tables[TABLE], embedding.embedding_tables(state)[TABLE])


def test_a_learning_rate_that_is_called_trains_in_a_jitted_step(mesh, features):
    rates = iter([1.0, 0.25])
    module = Embedding(CONFIG, SGD(lambda: next(rates)), mesh, rngs=nnx.Rngs(0))
    batch, _ = module.sharded.shard_batch({"a": np.arange(8, dtype=np.int32), "b": features["b"] + 8})
    gradients = jax.tree.map(jnp.ones_like, module(batch))

    @nnx.jit
    def step(module, called):
        module.apply_gradients(batch, gradients, called_values=called)

    for rate in (1.0, 0.25):
        before = np.asarray(module.embedding_tables[TABLE])
        step(module, module.called_values())
        moved = before - np.asarray(module.embedding_tables[TABLE])
        np.testing.assert_allclose(moved[:16], rate, rtol=1e-5)
        np.testing.assert_array_equal(moved[16:], 0)


class Head(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, dense, activations):
        return self.linear(activations["a"] + activations["b"] + dense)[:, 0]


@pytest.fixture
def optax_promotes():
    """optax's Adam mixes a float with an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("optax_promotes")
def test_trainer_learns_and_compiles_once(mesh, features):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.3), mesh)
    trainer = Trainer(embedding, Head(nnx.Rngs(0)), optax.adam(0.03))
    state = trainer.init(jax.random.key(0))
    labels, mask = (np.arange(8) % 2).astype(np.float32), np.ones(8, np.float32)
    batch = Batch(features, {"a": None, "b": None}, np.zeros((8, 4), np.float32), labels, mask)
    sharded = trainer.shard_batch(batch)
    losses = []
    for _ in range(30):
        state, metrics = trainer.step(state, sharded)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.step._cache_size() == 1
    logits = np.asarray(trainer.predict(state, sharded))
    assert ((logits > 0) == (labels > 0.5)).all()


@pytest.mark.usefixtures("optax_promotes")
def test_padding_examples_change_nothing(mesh, features):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.3), mesh)
    trainer = Trainer(embedding, Head(nnx.Rngs(0)), optax.adam(0.03))
    mask = np.array([1] * 6 + [0] * 2, np.float32)
    states = []
    for padding_label in (0.0, 1.0):
        labels = np.array([0, 1, 0, 1, 0, 1, padding_label, padding_label], np.float32)
        batch = Batch(features, {"a": None, "b": None}, np.zeros((8, 4), np.float32), labels, mask)
        state, _ = trainer.step(trainer.init(jax.random.key(0)), trainer.shard_batch(batch))
        states.append(np.asarray(embedding.embedding_tables(state.embedding)[TABLE]))
    np.testing.assert_array_equal(*states)


@pytest.mark.usefixtures("optax_promotes")
def test_rows_of_padding_take_no_step(features):
    """Of these optimizers each occurrence of an id is a step of its own, whatever its gradient."""
    tables = []
    for count in (1, 8):
        ids = {"a": np.full(count, 3, np.int32), "b": np.r_[5, np.full(count - 1, 6)].astype(np.int32)}
        optimizer = Adam(0.1, use_gradient_accumulation=False, weight_decay_factor=0.01)
        embedding = ShardedEmbedding(CONFIG, optimizer, jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
        trainer = Trainer(embedding, Head(nnx.Rngs(0)), optax.adam(0.03))
        mask = (np.arange(count) < 1).astype(np.float32)
        batch = Batch(ids, {"a": None, "b": None}, np.zeros((count, 4), np.float32), mask, mask)
        state, _ = trainer.step(trainer.init(jax.random.key(0)), trainer.shard_batch(batch))
        tables.append(np.asarray(embedding.embedding_tables(state.embedding)[TABLE]))
    np.testing.assert_allclose(*tables, rtol=1e-6)
