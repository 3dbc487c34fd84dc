"""Inputs of every form train on several devices as serving's gradients say; batches of other hosts and embeddings."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxembed import (
    FeatureConfig,
    RaggedTensor,
    SparseTensor,
    TableConfig,
    VocabularyFile,
    serving_embedding_lookup,
)
from jaxembed.optimizers import SGD, Adagrad
from jaxembed.serve import EmbeddingForServing, ServingFunction
from jaxembed.train import ShardedEmbedding
from jaxembed.train.engines.matching import plan_batch
from jaxembed.train.engines.packing_traced import pack_in_trace
from tests.train.test_sharded import (
    CONFIG,
    ONE_EXCHANGE,
    USER,
    assert_close,
    mesh,
    ragged,
    random_batch,
    random_like,
)

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


def test_means_by_large_weights():
    """Whose reciprocal is no normal number."""
    ids = RaggedTensor.from_lists([[0, 1], [2], [3, 4], []])
    weights = dataclasses.replace(ids, values=np.float32([1e38, 1e38, -1e38, 1, 2]))
    other = dataclasses.replace(ids, values=np.ones(5, np.float32))
    config = {"a": FeatureConfig(MEAN), "b": FeatureConfig(SUM)}
    check(config, {"a": ids, "b": ids}, {"a": weights, "b": other}, mesh(2), "auto")
    own = ShardedEmbedding({"a": FeatureConfig(MEAN)}, SGD(1.0), mesh(2))
    batch, values = own.shard_batch({"a": ids}, {"a": weights})
    state = own.init(jax.random.key(0))
    gradient = jax.grad(lambda values: own.lookup(state, batch, values)["a"].sum())(values)
    assert np.isfinite(own.unshard_weights(gradient, {"a": ids}, {"a": weights})["a"].values).all()


@pytest.mark.parametrize("weight", [1e38, 1e36, 1e19])
def test_small_gradients_of_means_by_large_weights(weight):
    """None is flushed to zero on its way, of rows or of weights."""
    ids = RaggedTensor.from_lists([[0, 1, 2], []])
    weights = np.float32([weight, weight / 2, -weight / 4])
    given, small = {"a": dataclasses.replace(ids, values=weights)}, np.full((2, 4), 1e-3, np.float32)
    own = ShardedEmbedding({"a": FeatureConfig(MEAN)}, SGD(1.0), mesh(2))
    rows = np.random.default_rng(0).uniform(-1, 1, (13, 4)).astype(np.float32)
    batch, values = own.shard_batch({"a": ids}, given)
    zeros = own.from_canonical({"mean": np.zeros_like(rows)}, {"mean": {}}, 0)
    new = own.to_canonical(own.apply_gradients(zeros, batch, {"a": small}, values))[0]["mean"]
    shares = np.float64(weights) / np.sum(np.float64(weights))
    np.testing.assert_allclose(new[:3], -shares[:, None] * small[:1], rtol=1e-5)
    state = own.from_canonical({"mean": rows}, {"mean": {}}, 0)
    gradient = jax.grad(lambda values: jnp.sum(small * own.lookup(state, batch, values)["a"]))(values)
    if weight < 1e30:  # else they are no normal numbers themselves
        found = np.float64(own.unshard_weights(gradient, {"a": ids}, given)["a"].values)
        expected = (rows[:3] - shares @ rows[:3]) @ np.float64(small[0]) / np.sum(np.float64(weights))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_malformed_inputs_are_refused():
    own = ShardedEmbedding({"a": FeatureConfig(MEAN)}, SGD(1.0), mesh(2))
    for splits, wrong in (([0, 3, 1], "must not decrease"), ([1, 2, 3], "start at 0"), ([0, 1, 9], "end at 9")):
        ids = RaggedTensor(jnp.array([1, 2, 3]), jnp.array(splits))
        for given in (ids, jax.device_get(ids)):
            with pytest.raises(ValueError, match=f"Feature 'a': row_splits .*{wrong}"):
                own.shard_batch({"a": given})
    ids = jax.device_get(SparseTensor(jnp.array([[0, 0], [-1, 0]]), jnp.array([1, 2]), (2, 4)))
    with pytest.raises(ValueError, match=r"Feature 'a': entry 1 lies at \[-1, 0\]"):
        own.shard_batch({"a": ids})


def test_activations_come_in_the_order_of_their_keys():
    """As in serving, whose configuration may be another kind of dict than a batch."""
    config = collections.OrderedDict(b=FeatureConfig(SUM), a=FeatureConfig(SUM))
    own = ShardedEmbedding(config, SGD(1.0), mesh(2))
    state = own.init(jax.random.key(0))
    function = ServingFunction(EmbeddingForServing(config, own.embedding_tables(state)), batch_sizes=(2,))
    ids = {"a": np.array([1, 2]), "b": np.array([3, 4])}
    ordered = collections.OrderedDict(b=ids["b"], a=ids["a"])
    for found in (own.lookup(state, ids), own.lookup(state, ordered), function(ids)):
        assert list(found) == ["a", "b"]


def test_gradients_of_weights_have_their_structure():
    """To JAX, the order of an OrderedDict is of its structure."""
    own = ShardedEmbedding({name: FeatureConfig(SUM) for name in "abc"}, SGD(1.0), mesh(2))
    ids = RaggedTensor.from_lists([[0, 1], [2]])
    inputs = {"a": ids, "b": ids, "c": ids}
    ones = dataclasses.replace(ids, values=np.ones(3, np.float32))
    weights = collections.OrderedDict(c=None, b=ones, a=dataclasses.replace(ones, values=2 * ones.values))
    _, values = own.shard_batch(inputs, weights)
    found = own.unshard_weights(values, inputs, weights)
    jax.tree.map(np.testing.assert_array_equal, found, weights)


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


def test_rows_of_padding_have_no_entries():
    """As if their gradients were zero; ids that are bad there are not counted."""
    own = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(4))
    inputs, weights = random_batch(0, 12)
    real = np.arange(12) % 3 > 0
    state = own.init(jax.random.key(0))
    batch, values = own.shard_batch(inputs, weights)
    whole = own.lookup(state, batch, values)
    gradients = random_like(1, whole)
    expected, without = jax.tree.map(lambda x: (x.T * np.float32(real)).T, (whole, gradients))
    inputs["user"][~real] = 999
    masked, masked_values = own.shard_batch(inputs, weights, real)
    found, bad_ids = own.lookup(state, masked, masked_values, count_bad_ids=True)
    assert_close(found, expected)
    assert not any(jax.tree.leaves(bad_ids))
    # One program takes both.
    both = (masked, masked_values), (batch, values)
    shapes, all_shapes = ([x.shape for x in jax.tree.leaves(each)] for each in both)
    assert shapes == all_shapes
    assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])
    actual = own.apply_gradients(state, masked, gradients, masked_values)
    wanted = own.apply_gradients(state, batch, without, values)
    assert_close(own.to_canonical(actual)[0], own.to_canonical(wanted)[0])
    _, vjp = jax.vjp(lambda w: own.lookup(state, masked, w), masked_values)
    of_weights = own.unshard_weights(*vjp(gradients), inputs, weights, real)
    _, vjp = jax.vjp(lambda w: own.lookup(state, batch, w), values)
    inputs["user"][~real] = 0
    assert_close(of_weights, own.unshard_weights(*vjp(without), inputs, weights))


def test_a_feature_may_have_several_rows_an_example_or_none_of_it():
    """Of a table that all of a batch is compared with, 8 rows are no multiple of 4 but by chance."""
    config = {name: FeatureConfig(SUM) for name in ("one", "grid", "other", "shared")}
    config["two"] = FeatureConfig(SUM, output_shape=(4, 2))
    own = ShardedEmbedding(config, SGD(1.0), mesh(2))
    inputs = {name: np.ones(count, np.int32) for name, count in (("one", 4), ("shared", 8), ("other", 3))}
    inputs |= {"grid": np.ones((4, 2), np.int32), "two": RaggedTensor.from_lists([[1]] * 8)}
    mask = np.float32([1, 0, 1, 0])
    found = own.lookup(own.init(jax.random.key(0)), own.shard_batch(inputs, None, mask)[0])
    rows = {name: np.asarray(x).any(-1).reshape(len(x), -1) for name, x in found.items()}
    for name, expected in rows.items():
        live = np.ones(len(expected), bool) if name in ("other", "shared") else mask > 0
        np.testing.assert_array_equal(expected, live[:, None] | np.zeros_like(expected))
    assert rows["grid"].shape == rows["two"].shape == (4, 2)


def test_raw_ids_of_padding_are_not_looked_at(tmp_path):
    """As of a host that fills its batch up with ids that a vocabulary does not know."""
    (tmp_path / "known").write_text("x\ny\n")
    known = FeatureConfig(SUM, preprocessing=VocabularyFile(tmp_path / "known", num_oov_buckets=0))
    config = {"one": known, "bags": known, "two": dataclasses.replace(known, output_shape=(3, 2))}
    own = ShardedEmbedding(config, SGD(1.0), mesh(1))
    mask = np.float32([1, 0, 1])

    def inputs(padding):
        rows = [["x", "y"], [padding], ["y"]]
        return {"one": ["x", padding, "y"], "bags": rows, "two": [row for row in rows for _ in range(2)]}

    (found, _), (expected, _) = (own.shard_batch(inputs(of), None, mask) for of in ("", "x"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"Feature 'one', row 2: id 'z' is not in the vocabulary"):
        own.shard_batch(inputs("") | {"one": ["x", "", "z"]}, None, mask)


@pytest.mark.parametrize("size", [2, 16])
def test_a_mask_of_no_feature_is_refused(size):
    own = ShardedEmbedding({"t": FeatureConfig(SUM)}, SGD(1.0), mesh(2))
    with pytest.raises(ValueError, match=rf"mask must be \[B\], .* got {size}; the features have {{'t': 8}}"):
        own.shard_batch({"t": np.arange(8)}, None, np.arange(size) > 0)
    own.shard_batch({"t": np.arange(8)}, None, np.ones(size))  # which asks for nothing


def test_traced_ids_are_those_of_all_hosts():
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(2))

    def pack(ids, mask=None):
        plan = plan_batch({"t": ids}, None, embedding.feature_config, embedding.stacks, 2, mask)
        assert plan.layout.features[0].output_shape == (4, 8)
        return pack_in_trace(plan, embedding.stacks, 2).bad_ids, plan.layout.features[0].num_rows

    bad_ids, num_rows = jax.jit(pack)(np.array([1, -1, 3, 4], np.int32))
    np.testing.assert_array_equal(bad_ids, [[1], [0]])
    assert num_rows == 4
    bad_ids, _ = jax.jit(lambda ids: pack(ids, np.array([1, 0, 1, 1])))(np.array([1, -1, 3, -1], np.int32))
    np.testing.assert_array_equal(bad_ids, [[0], [1]])


def test_hosts_agree_on_batches_of_dense_ids_too(monkeypatch):
    """What a host packed before, and has yet to place, has made its room larger."""
    embedding = ShardedEmbedding({"t": FeatureConfig(USER), "u": FeatureConfig(USER)}, SGD(1.0), mesh())
    fixed = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(), capacity=16)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, data: data)
    dense = {"t": np.arange(8, dtype=np.int32)}
    embedding._largest = lambda room: room.max(0)
    embedding.pack_batch({"u": RaggedTensor.from_lists([[0] * 20] * 4)})
    packed = embedding.pack_batch(dense)
    agreed = embedding.agree(packed)
    assert agreed[0] == 24
    assert agreed[1] == -agreed[2]
    assert embedding.place_batch(packed, agreed)[0].positions["row8_0"].shape[1] == 24
    assert fixed.agree(fixed.pack_batch(dense)) is None


def test_hosts_with_other_features_or_rows_are_told(monkeypatch):
    """Numbers of rows that add up to the same in a stack, and features of other stacks, too."""
    other = FeatureConfig(TableConfig(100, 16, name="other"))
    embedding = ShardedEmbedding(
        {"a": FeatureConfig(USER), "b": FeatureConfig(USER), "c": other}, SGD(1.0), mesh()
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, data: data)

    def packed(**sizes):
        return embedding.pack_batch({name: np.arange(size, dtype=np.int32) for name, size in sizes.items()})

    def agreed(*batches):
        embedding._largest = lambda own: own
        own = [embedding.agree(batch)[0] for batch in batches]
        return np.max(own, axis=0)

    here = packed(a=8, b=16)
    embedding.place_batch(here, agreed(here, packed(a=8, b=16)))
    for there in ({"a": 16, "b": 8}, {"a": 8, "b": 24}, {"a": 24}, {"a": 8, "b": 16, "c": 8}, {"c": 8}):
        with pytest.raises(
            ValueError, match=r"each host must pass the same features with as many rows, .* in stack"
        ):
            embedding.place_batch(here, agreed(here, packed(**there)))
    with pytest.raises(ValueError, match=r"this one has the rows {'a': 8, 'b': 16}; give all the same"):
        embedding.place_batch(here, agreed(here, packed(a=16, b=8)))


def test_hosts_with_other_programs_are_told(monkeypatch):
    """For the same features and rows."""
    own = ShardedEmbedding({"m": FeatureConfig(MEAN), "s": FeatureConfig(SUM)}, SGD(1.0), mesh(2))
    bags = RaggedTensor.from_lists([[1], [2], [3], [4]])
    ones = dataclasses.replace(bags, values=np.ones(4, np.float32))
    dense, sparse = np.arange(4), SparseTensor(np.stack([np.arange(4)] * 2, 1), np.arange(4), (4, 4))

    def forms(inputs, weights=None):
        packed = own.pack_batch(inputs, weights).batch
        return own._forms(packed.layout, packed.is_weighted)

    here = forms({"m": bags, "s": dense})
    assert here == forms({"m": sparse, "s": dense})  # which is the same program
    assert here != forms({"m": bags, "s": dense}, {"m": ones, "s": None})
    assert here != forms({"m": dense, "s": dense})
    assert here != forms({"m": bags, "s": dense[:, None]})


def test_hosts_compare_their_features_before_sparsecores_ask_for_limits(monkeypatch):
    """A host without a stack would ask less often, and the others wait."""
    pytest.importorskip("jax_tpu_embedding")
    config = {"a": FeatureConfig(SUM), "b": FeatureConfig(TableConfig(64, 32, name="wide"))}
    own = ShardedEmbedding(config, SGD(1.0), mesh(2), engine="sparsecore", capacity=64)
    ids = np.arange(8, dtype=np.int32)
    asked = []

    def gather(x):
        asked.append(x)
        # The other host is as this one in all but its second stack.
        return np.stack([x, x + np.arange(x.size)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with pytest.raises(ValueError, match=r"each host must pass the same features .* in stack 'sparsecore32_1'"):
        own.pack_batch({"a": ids, "b": ids})
    assert len(asked) == 1


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
