"""Learning rates that are callables or schedules of optax, on every engine and exchange, eagerly and in jitted steps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import SGD, Adagrad, Adam, CustomOptimizer, as_optax, sparse_update
from jaxembed.train import ShardedEmbedding, Trainer
from jaxembed.train.data import Batch
from jaxembed.train.dlrm import DLRM

V, D, STEPS = 40, 8, 3
RATES = [0.5, 0.25, 0.125]
#: Constants of the formulas below, one a step.
SCALES = [1.0, 3.0, 2.0]


class Dial:
    """A value that the program turns, and how often it was asked for."""

    def __init__(self):
        self.value, self.calls = 0.0, 0

    def __call__(self):
        self.calls += 1
        return self.value


def scaled_sgd(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
    return embedding_table - learning_rate * hyperparameters[0] * hyperparameters[1] * gradient


def embedding_of(rate, scale, devices=8, **options):
    schedule = optax.exponential_decay(RATES[0], 1, 0.5)
    optimizers = {
        "sgd": SGD(rate),
        "adagrad": Adagrad(rate, 1.0),
        "adam": Adam(schedule, epsilon=1e-8),
        "custom": CustomOptimizer(scaled_sgd, schedule, hyperparameters=[scale, 2.0]),
        "copied": SGD(rate),
    }
    config = {
        name: FeatureConfig(TableConfig(V, D, name=name, optimizer=own)) for name, own in optimizers.items()
    }
    mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
    return ShardedEmbedding(config, None, mesh, plan={"copied": "replicated"}, **options)


def check(embedding, rate, scale, update):
    """All gradients are 1 and no id repeats, so that every formula is one line."""
    state = embedding.init(jax.random.key(0))
    ids = {name: np.arange(16, dtype=np.int32) for name in embedding.tables}
    batch, _ = embedding.shard_batch(ids)
    ones = {name: jnp.ones((16, D)) for name in ids}
    expected = {name: np.asarray(t) for name, t in embedding.to_canonical(state)[0].items()}
    expected = {name: t.astype(np.float64) for name, t in expected.items()}
    for step in range(STEPS):
        rate.value, scale.value = RATES[step], SCALES[step]
        state = update(state, batch, ones)
        moves = {
            "sgd": RATES[step],
            "copied": RATES[step],
            "adagrad": RATES[step] / np.sqrt(2.0 + step),
            "adam": RATES[step],  # m / sqrt(v), both corrected, is 1
            "custom": RATES[step] * SCALES[step] * 2,
        }
        tables = embedding.to_canonical(state)[0]
        for name, move in moves.items():
            expected[name][:16] -= move
            np.testing.assert_allclose(tables[name], expected[name], rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 1},
        pytest.param({"exchange": "all_gather"}, marks=pytest.mark.slow),
        {"exchange": "all_to_all"},
        pytest.param({"engine": "sparsecore"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_callables_are_called_at_each_update(options):
    if "engine" in options:
        pytest.importorskip("jax_tpu_embedding")
    rate, scale = Dial(), Dial()
    embedding = embedding_of(rate, scale, **options)
    check(embedding, rate, scale, embedding.apply_gradients)
    # One call a step, whatever shares them.
    assert (rate.calls, scale.calls) == (STEPS, STEPS)


def test_a_callable_that_counts_gives_one_value_to_all_that_share_it():
    calls = itertools.count(1)

    def rate():
        return float(next(calls))

    def add_both(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
        return embedding_table - (learning_rate + hyperparameters[0]) * gradient

    optimizers = {
        "narrow": SGD(rate),
        "wide": SGD(rate),
        "custom": CustomOptimizer(add_both, rate, hyperparameters=[rate]),
    }
    config = {
        name: FeatureConfig(TableConfig(V, 4 if name == "narrow" else D, name=name, optimizer=own))
        for name, own in optimizers.items()
    }
    embedding = ShardedEmbedding(config, None, jax.make_mesh((8,), ("d",)))
    state = embedding.init(jax.random.key(0))
    batch, _ = embedding.shard_batch({name: np.arange(8, dtype=np.int32) for name in config})
    for step in (1.0, 2.0):
        before = embedding.to_canonical(state)[0]
        gradients = jax.tree.map(jnp.ones_like, embedding.lookup(state, batch))
        state = embedding.apply_gradients(state, batch, gradients)
        after = embedding.to_canonical(state)[0]
        for name, factor in {"narrow": 1, "wide": 1, "custom": 2}.items():
            moved = np.asarray(before[name] - after[name])[:8]
            np.testing.assert_allclose(moved, factor * step, rtol=1e-6, err_msg=name)
    # Without a mesh, too: of several parameters, and of learning rate and hyperparameter.
    transformation = as_optax(optimizers["custom"])
    params = [jnp.zeros((2, D)), jnp.zeros((3, D))]
    updates, _ = transformation.update(jax.tree.map(jnp.ones_like, params), transformation.init(params), params)
    np.testing.assert_array_equal(np.concatenate(updates), np.full((5, D), -6.0))
    table, _ = sparse_update(optimizers["custom"], params[0], {}, jnp.arange(2), jnp.ones((2, D)), 0)
    np.testing.assert_array_equal(table, np.full((2, D), -8.0))
    assert next(calls) == 5


def test_jitted_steps_take_what_was_called_outside():
    rate, scale = Dial(), Dial()
    embedding = embedding_of(rate, scale)
    step = jax.jit(lambda *args, called: embedding.apply_gradients(*args, called_values=called))
    check(embedding, rate, scale, lambda *args: step(*args, called=embedding.called_values()))
    assert step._cache_size() == 1
    state = embedding.init(jax.random.key(0))
    batch, _ = embedding.shard_batch({name: np.arange(8, dtype=np.int32) for name in embedding.tables})
    gradients = {name: jnp.ones((8, D)) for name in embedding.tables}
    with pytest.raises(ValueError, match=r"call only once: pass embedding.called_values\(\) to the step"):
        jax.jit(embedding.apply_gradients)(state, batch, gradients)


def test_the_trainer_calls_them_at_each_step():
    rate = Dial()
    config = {"t": FeatureConfig(TableConfig(V, D, name="t"))}
    embedding = ShardedEmbedding(config, SGD(rate), jax.make_mesh((8,), ("d",)))
    model = DLRM(1, 1, D, bottom=(4,), top=(4,), rngs=nnx.Rngs(0))
    trainer = Trainer(embedding, model, optax.sgd(0.1))
    ones = np.ones(8, np.float32)
    batch = trainer.shard_batch(Batch({"t": np.arange(8, dtype=np.int32)}, None, ones[:, None], ones, ones))
    state = trainer.init(jax.random.key(0))
    tables = []
    for rate.value in (0.0, 1.0, 0.0):
        tables.append(np.asarray(embedding.to_canonical(state.embedding)[0]["t"]))
        state, _ = trainer.step(state, batch)
    tables.append(np.asarray(embedding.to_canonical(state.embedding)[0]["t"]))
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(tables)]
    assert moved == [False, True, False]
    assert rate.calls == 3
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    compiled = trainer.step.lower(trainer.abstract_state(), abstract).compile()
    rate.value = 1.0
    state, _ = compiled(state, batch, embedding.called_values())
    after = np.asarray(embedding.to_canonical(state.embedding)[0]["t"])
    assert not np.array_equal(after, tables[-1])


def test_a_schedule_that_cannot_be_a_key_says_what_to_do():
    @dataclasses.dataclass
    class Warmup:
        peak: float

        def __call__(self, step):
            return self.peak * step

    with pytest.raises(ValueError, match=r"learning_rate must be hashable, .* make a dataclass frozen"):
        SGD(Warmup(0.1))
