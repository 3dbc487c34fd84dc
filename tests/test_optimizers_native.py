"""The native row update: the rows that the portable one gives, for every option, in place."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.backends import use_backend
from jaxembed.optimizers import SGD, Adagrad, Adam, native, sparse_update

# `make sanitize` that finds no kernel has tested nothing, and must not pass.
pytestmark = pytest.mark.skipif(
    not native.available() and "JAXEMBED_SANITIZED" not in os.environ, reason="the native kernel was not built"
)
OPTIONS = {
    "plain": {},
    "clipped": {"clipvalue": (-0.3, 0.2), "clip_weight_min": -1.0, "clip_weight_max": 0.5},
    "decayed": {"weight_decay_factor": 0.01},
    "decayed by rate": {"weight_decay_factor": 0.1, "multiply_weight_decay_factor_by_learning_rate": True},
}


def entries(seed, vocabulary, count, segments, dim):
    """Rows with many duplicates, rows out of range, and segments that are padding."""
    rng = np.random.default_rng(seed)
    rows = np.minimum(rng.zipf(1.3, count), vocabulary + 2).astype(np.int32) - 2
    where = np.sort(rng.integers(0, segments + 2, count)).astype(np.int32)
    table = rng.normal(size=(vocabulary, dim)).astype(np.float32)
    gradients = rng.normal(size=(segments, dim)).astype(np.float32)
    return table, rows, where, rng.uniform(-1, 2, count).astype(np.float32), gradients


def expected(optimizer, table, slots, rows, where, weights, gradients):
    values = gradients.at[where].get(mode="fill", fill_value=0)
    values = values if weights is None else values * weights[:, None]
    rows = jnp.where(where < gradients.shape[0], rows, table.shape[0])
    return sparse_update(optimizer, table, slots, rows, values, jnp.int32(0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cls", [SGD, Adagrad])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "count", "dim"), [(7, 50, 3), (5000, 20_000, 16), (1, 9, 64), (100, 0, 8)]
)
def test_gives_the_rows_of_the_portable_update(cls, options, weighted, vocabulary, count, dim):
    optimizer = cls(0.5, **options)
    table, rows, where, weights, gradients = map(jnp.asarray, entries(0, vocabulary, count, 40, dim))
    weights = weights if weighted else None
    slots = optimizer.init_slots(table.shape)
    assert native.supports(optimizer, table)
    found = jax.jit(
        lambda *arrays: native.update_entries(optimizer, *arrays, jnp.float32(0.5)),
    )(table, slots, rows, where, weights, gradients)
    wanted = expected(optimizer, table, slots, rows, where, weights, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)
    ids, segments = np.asarray(rows), np.asarray(where)
    touched = np.isin(np.arange(vocabulary), ids[segments < 40])
    np.testing.assert_array_equal(np.asarray(found[0])[~touched], np.asarray(table)[~touched])


def test_is_the_same_bits_every_time():
    optimizer = Adagrad(0.1)
    table, *rest = map(jnp.asarray, entries(1, 300, 60_000, 500, 32))
    update = jax.jit(lambda *arrays: native.update_entries(optimizer, *arrays, jnp.float32(0.1)))
    first, *others = [update(table, optimizer.init_slots(table.shape), *rest) for _ in range(5)]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_updates_donated_arrays_in_place_and_leaves_others_alone():
    optimizer = Adagrad(0.1)
    table, *rest = map(jnp.asarray, entries(2, 1000, 100, 40, 8))
    slots = optimizer.init_slots(table.shape)
    update = lambda *arrays: native.update_entries(optimizer, *arrays, jnp.float32(0.1))  # noqa: E731
    before = np.array(table)
    jax.block_until_ready(jax.jit(update)(table, slots, *rest))
    np.testing.assert_array_equal(table, before)
    pointers = table.unsafe_buffer_pointer(), slots["accumulators"].unsafe_buffer_pointer()
    table, slots = jax.jit(update, donate_argnums=(0, 1))(table, slots, *rest)
    assert (table.unsafe_buffer_pointer(), slots["accumulators"].unsafe_buffer_pointer()) == pointers
    assert not np.array_equal(table, before)


def test_nan_gradients_reach_the_table():
    table, rows = jnp.ones((4, 2), jnp.float32), jnp.asarray([1], jnp.int32)
    gradients = jnp.asarray([[jnp.nan, 1.0]], jnp.float32)
    for options in OPTIONS.values():
        optimizer = SGD(0.5, **options)
        found, _ = native.update_entries(
            optimizer, table, {}, rows, jnp.zeros(1, jnp.int32), None, gradients, jnp.float32(0.5)
        )
        assert np.isnan(found[1, 0])
        assert np.isfinite(np.delete(np.asarray(found), 2)).all()


def test_shapes_that_do_not_fit_are_errors():
    table, rows = jnp.ones((4, 2), jnp.float32), jnp.zeros(3, jnp.int32)
    gradients = jnp.ones((2, 3), jnp.float32)
    told = (
        r"must fit each other; got 3 rows, 3 segments, 0 weights, gradients \[2, 3\] for D = 2, and 6 numbers"
    )
    with pytest.raises(Exception, match=told):
        jax.block_until_ready(
            native.update_entries(SGD(0.5), table, {}, rows, rows, None, gradients, jnp.float32(0.5))
        )


@pytest.mark.parametrize("cls", [SGD, Adagrad])
def test_a_table_without_rows_is_left_alone(cls):
    optimizer, table = cls(0.5), jnp.ones((0, 2), jnp.float32)
    slots, rows = optimizer.init_slots(table.shape), jnp.asarray([-1, 0, 1], jnp.int32)
    gradients = jnp.ones((3, 2), jnp.float32)
    table, slots = native.update_entries(
        optimizer, table, slots, rows, jnp.arange(3), None, gradients, jnp.float32(0.5)
    )
    assert [x.shape for x in jax.tree.leaves((table, slots))] == [(0, 2)] * (1 + len(slots))


def test_what_it_covers():
    table = jnp.ones((4, 2), jnp.float32)
    assert not native.supports(Adam(0.1), table)
    assert not native.supports(SGD(0.1, use_gradient_accumulation=False), table)
    assert not native.supports(SGD(0.1), table.astype(jnp.bfloat16))
    with use_backend("xla"):
        assert not native.supports(SGD(0.1), table)
