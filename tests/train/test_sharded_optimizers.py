"""All optimizers with every option on 8 devices, against the formulas in float64, with repeated ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.names import UnregisteredError
from jaxembed.optimizers import SGD, Adam
from jaxembed.train import ShardedEmbedding
from jaxembed.unregistered import UnregisteredOptimizer
from tests.test_optimizers import MATRIX, OPTIMIZERS, OPTIONS, D, R, V, batch, reference_update

STEPS = 2
EXCHANGES = ("all_gather", "all_to_all")


def check(cases, exchange):
    """A table a case in one embedding: one program for all of them."""
    config, tables, slots, expected = {}, {}, {}, {}
    for index, (name, options) in enumerate(cases):
        optimizer = dataclasses.replace(OPTIMIZERS[name], **OPTIONS[options])
        key = f"{name}/{options}"
        config[key] = FeatureConfig(TableConfig(V, D, name=key, optimizer=optimizer))
        tables[key], ids, gradients = batch(index)
        slots[key] = {k: np.asarray(slot) for k, slot in optimizer.init_slots((V, D)).items()}
        wide = {k: slot.astype(np.float64) for k, slot in slots[key].items()}
        expected[key] = (tables[key].astype(np.float64), wide, ids, gradients)
    mesh = jax.make_mesh((8,), ("devices",))
    embedding = ShardedEmbedding(config, None, mesh, exchange=exchange)
    state = embedding.from_canonical(tables, slots, 0)
    update = jax.jit(embedding.apply_gradients)
    for step in range(STEPS):
        inputs = {key: ids[step].reshape(R // 3, 3) for key, (_, _, ids, _) in expected.items()}
        gradients = {key: jnp.asarray(g[step].reshape(R // 3, 3, D)) for key, (_, _, _, g) in expected.items()}
        state = update(state, embedding.shard_batch(inputs)[0], gradients)
        for key, (table, wide, ids, given) in expected.items():
            reference_update(config[key].table.optimizer, table, wide, ids[step], given[step], step)
    new_tables, new_slots, _ = jax.tree.map(np.asarray, embedding.to_canonical(state))
    for key, (table, wide, ids, _) in expected.items():
        np.testing.assert_allclose(new_tables[key], table, rtol=1e-6, atol=1e-6, err_msg=key)
        for k, slot in wide.items():
            np.testing.assert_allclose(new_slots[key][k], slot, rtol=1e-6, atol=1e-6, err_msg=f"{key} {k}")
        if config[key].table.optimizer.is_lazy:
            untouched = ~np.isin(np.arange(V), ids[:STEPS])
            assert untouched.any()
            np.testing.assert_array_equal(new_tables[key][untouched], tables[key][untouched])
            for k in wide:
                np.testing.assert_array_equal(new_slots[key][k][untouched], slots[key][k][untouched])


@pytest.mark.parametrize("plan", ["mod", "replicated", "column"])
def test_all_rows_take_a_step_where_the_optimizer_is_not_lazy(plan):
    """Also those of a table that the batch leaves out, whatever stack they are in."""
    optimizer = Adam(lambda: 0.1, lazy_adam=False)
    config = {name: FeatureConfig(TableConfig(16, 8, name=name)) for name in "ab"}
    embedding = ShardedEmbedding(config, optimizer, jax.make_mesh((8,), ("devices",)), plan={"b": plan})
    state = embedding.init(jax.random.key(0))
    tables, slots, _ = jax.tree.map(np.asarray, embedding.to_canonical(state))
    rows, kept, ids = tables["b"], slots["b"], np.arange(8, dtype=np.int32)
    for step, names in enumerate(("ab", "a")):
        batch, _ = embedding.shard_batch(dict.fromkeys(names, ids))
        gradients = dict.fromkeys(names, jnp.ones((8, 8)))
        state = jax.jit(embedding.apply_gradients)(
            state, batch, gradients, called_values=embedding.called_values()
        )
        dense = np.zeros((16, 8), np.float32)
        dense[:8] = step == 0
        rows, kept = optimizer.update_rows(dense, rows, kept, 0.1, step)
    found, found_slots, _ = embedding.to_canonical(state)
    np.testing.assert_allclose(found["b"], rows, rtol=1e-6, atol=1e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found_slots["b"], dict(kept))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_each_optimizer(exchange):
    names = ("sgd", "adagrad", "adagrad_momentum_nesterov", "adam", "adam_not_lazy", "ftrl", "custom")
    check([(name, "plain") for name in names], exchange)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(options, exchange):
    check([case for case in MATRIX if case[1] == options], exchange)


def test_optimizers_that_columns_cannot_have():
    def sharded(optimizer, dim=8):
        config = {"a": FeatureConfig(TableConfig(16, dim, name="a", optimizer=optimizer))}
        return ShardedEmbedding(config, None, jax.make_mesh((8,), ("devices",)), plan={"a": "column"})

    class Own(SGD):
        def rule(self, gradient, rows, slots, learning_rate, step):
            return rows - learning_rate * gradient, {}

    with pytest.raises(ValueError, match=r"optimizer Own may mix .*set `is_elementwise = True` on the"):
        sharded(Own(0.1))
    Own.is_elementwise = True
    sharded(Own(0.1))
    with pytest.raises(ValueError, match="its dim 12 must be a multiple of the 8 shards; use 'mod'"):
        sharded(Own(0.1), 12)
    with pytest.raises(UnregisteredError, match="unknown optimizer 'gone'"):
        sharded(UnregisteredOptimizer(stored="{}", reason="unknown optimizer 'gone'"))
