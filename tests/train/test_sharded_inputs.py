"""Inputs of every form train on several devices as serving's gradients say; batches of other hosts and embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig, serving_embedding_lookup
from jaxembed.optimizers import SGD
from jaxembed.train import ShardedEmbedding
from jaxembed.train.engines.matching import plan_batch
from jaxembed.train.engines.packing_traced import pack_in_trace
from tests.train.test_sharded import ONE_EXCHANGE, USER, assert_close, mesh, ragged, random_like

MEAN = TableConfig(13, 4, name="mean", combiner="mean")
SUM = TableConfig(13, 4, name="sum", combiner="sum")


def check(config, inputs, weights, devices, exchange, **options):
    """A lookup, and a step of SGD at a rate of 1."""
    own = ShardedEmbedding(config, SGD(1.0), devices, exchange=exchange, **options)
    state = own.init(jax.random.key(0))
    tables = jax.tree.map(np.asarray, own.to_canonical(state)[0])
    expected, vjp = jax.vjp(lambda tables: serving_embedding_lookup(inputs, weights, tables, config), tables)
    batch, values = own.shard_batch(inputs, weights)
    assert_close(own.lookup(state, batch, values), expected)
    gradients = random_like(1, expected)
    new = own.to_canonical(own.apply_gradients(state, batch, gradients, values))[0]
    assert_close(
        new, jax.tree.map(lambda table, g: table - np.asarray(g), tables, vjp(gradients)[0]), atol=1e-5
    )
    assert all((np.asarray(new[name]) != table).any() for name, table in tables.items())


def unsorted(rng, shape=(8, 6), least=0):
    """Ids in no order of their rows, and weights, some of which are 0 or less."""
    indices = rng.permutation(np.argwhere(rng.random(shape) < 0.6))
    ids = rng.integers(least, 13, len(indices)).astype(np.int32)
    weights = rng.choice(np.float32([-1, 0, 0.5, 2, 3]), len(indices))
    return SparseTensor(indices, ids, shape), SparseTensor(indices, weights, shape)


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_over_one_axis_of_the_mesh(exchange):
    """The other one has copies."""
    grid = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    inputs = {"a": ragged(np.random.default_rng(0), 8, 13), "b": np.arange(8, dtype=np.int32)}
    check({"a": FeatureConfig(MEAN), "b": FeatureConfig(SUM)}, inputs, None, grid, exchange, axis="x")


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_output_shape(exchange):
    inputs = {"a": ragged(np.random.default_rng(1), 12, 13)}
    check({"a": FeatureConfig(MEAN, output_shape=(6, 2))}, inputs, None, mesh(4), exchange)


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_sparse_rows_in_no_order(exchange):
    ids, _ = unsorted(np.random.default_rng(2))
    check({"a": FeatureConfig(MEAN), "b": FeatureConfig(SUM)}, {"a": ids, "b": ids}, None, mesh(4), exchange)


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_pruned_ids_and_weights(exchange):
    ids, weights = unsorted(np.random.default_rng(3), least=-3)
    config = {"a": FeatureConfig(MEAN), "b": FeatureConfig(SUM)}
    check(config, {"a": ids, "b": ids}, {"a": weights, "b": weights}, mesh(4), exchange)


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_weights_that_are_not_pruned(exchange):
    ids, weights = unsorted(np.random.default_rng(4))
    check(
        {
            "a": FeatureConfig(SUM, validate_weights_and_indices=False),
            "b": FeatureConfig(MEAN, validate_weights_and_indices=False),
        },
        {"a": ids, "b": ids},
        {"a": weights, "b": weights},
        mesh(4),
        exchange,
    )


def test_traced_ids_are_those_of_all_hosts():
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(2))

    def pack(ids):
        plan = plan_batch({"t": ids}, None, embedding.feature_config, embedding.stacks, num_hosts=2)
        assert plan.layout.features[0].output_shape == (4, 8)
        return pack_in_trace(plan, embedding.stacks, 2).bad_ids, plan.layout.features[0].num_rows

    bad_ids, num_rows = jax.jit(pack)(np.array([1, -1, 3, 4], np.int32))
    np.testing.assert_array_equal(bad_ids, [[1], [0]])
    assert num_rows == 4


def test_hosts_agree_on_batches_of_dense_ids_too(monkeypatch):
    """What a host packed before, and has yet to place, has made its room larger."""
    embedding = ShardedEmbedding({"t": FeatureConfig(USER), "u": FeatureConfig(USER)}, SGD(1.0), mesh())
    fixed = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(), capacity=16)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, data: data)
    dense = {"t": np.arange(8, dtype=np.int32)}
    embedding._largest = lambda room: room.max(0)
    embedding.pack_batch({"u": RaggedTensor.from_lists([[0] * 20] * 4)})
    assert embedding.agree(embedding.pack_batch(dense)).tolist() == [24]
    assert fixed.agree(fixed.pack_batch(dense)) is None


def test_weights_of_several_hosts_are_not_put_together(monkeypatch):
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh())
    bags = RaggedTensor.from_lists([[0, 1], [], [3], [3]] * 2)
    ones = {"t": RaggedTensor(np.ones(8, np.float32), bags.row_splits)}
    _, weights = embedding.shard_batch({"t": bags}, ones)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs the gradients of all devices on one host, got 2 hosts"):
        embedding.unshard_weights(weights, {"t": bags}, ones)


def test_a_batch_of_an_embedding_whose_tables_lie_elsewhere_is_refused():
    config, batch = {"t": FeatureConfig(USER)}, {"t": np.arange(8, dtype=np.int32)}
    ours, theirs, same = (
        ShardedEmbedding(config, SGD(rate), mesh(), plan={"user": plan})
        for rate, plan in ((1.0, "mod"), (1.0, "div"), (2.0, "mod"))
    )
    state = ours.init(jax.random.key(0))
    sharded, _ = theirs.shard_batch(batch)
    message = r"laid out by a ShardedEmbedding whose tables lie elsewhere: there .*'div'.*, here .*'mod'"
    with pytest.raises(ValueError, match=message):
        jax.jit(ours.lookup)(state, sharded)
    with pytest.raises(ValueError, match=message):
        ours.apply_gradients(state, sharded, {"t": jnp.ones((8, 8))})
    # Only what it looks up is to lie the same.
    more = {**config, "z": FeatureConfig(TableConfig(10, 16, name="z"))}
    larger = ShardedEmbedding(more, SGD(1.0), mesh(), plan={"user": "mod"})
    assert larger.lookup(larger.init(jax.random.key(0)), ours.shard_batch(batch)[0])["t"].shape == (8, 8)
    expected = ours.lookup(state, batch)["t"]
    np.testing.assert_array_equal(ours.lookup(state, same.shard_batch(batch)[0])["t"], expected)
