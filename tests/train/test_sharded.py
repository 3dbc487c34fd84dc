"""ShardedEmbedding on 8 devices against one device: lookups, updates, and what meshes must not change."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig, serving_embedding_lookup
from jaxembed.initializers import RandomUniform
from jaxembed.optimizers import SGD, Adagrad
from jaxembed.train.embedding import ShardedEmbedding

EXCHANGES = ("all_gather", "all_to_all")
#: Where one of them is enough for most runs.
ONE_EXCHANGE = (pytest.param("all_gather", marks=pytest.mark.slow), "all_to_all")


def mesh(devices=8):
    return jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])


def two_axes():
    return jax.make_mesh((2, 4), ("data", "model"))


USER = TableConfig(101, 8, name="user", combiner="mean")
ITEM = TableConfig(53, 8, name="item", combiner="sqrtn")
TAG = TableConfig(7, 4, name="tag", combiner="sum", optimizer=SGD(0.5), initializer=RandomUniform(-1, 1))
CONFIG = {
    "user": FeatureConfig(USER),
    "items": FeatureConfig(ITEM),
    "history": FeatureConfig(ITEM, max_sequence_length=3),
    "tags": (FeatureConfig(TAG), FeatureConfig(TAG)),
}


def ragged(rng, batch, vocabulary, longest=6, dtype=np.int32):
    lengths = rng.integers(0, longest + 1, batch)
    return RaggedTensor.from_row_lengths(rng.integers(0, vocabulary, lengths.sum()).astype(dtype), lengths)


def sparse(rng, batch, vocabulary, columns=4):
    where = rng.random((batch, columns)) < 0.5
    indices = np.argwhere(where)
    return SparseTensor(indices, rng.integers(0, vocabulary, len(indices)).astype(np.int32), (batch, columns))


def random_batch(seed, batch):
    rng = np.random.default_rng(seed)
    inputs = {
        "user": rng.integers(0, 101, (batch, 2)).astype(np.int32),
        "items": ragged(rng, batch, 53),
        "history": ragged(rng, batch, 53),
        "tags": (sparse(rng, batch, 7), ragged(rng, batch, 7)),
    }
    weights = jax.tree.map(lambda x: None, inputs, is_leaf=lambda x: not isinstance(x, dict | tuple))
    items, tags = inputs["items"], inputs["tags"][0]
    weights["items"] = RaggedTensor(rng.normal(size=items.values.shape).astype(np.float32), items.row_splits)
    weights["tags"] = (
        SparseTensor(tags.indices, rng.random(tags.values.shape).astype(np.float32), tags.dense_shape),
        None,
    )
    return inputs, weights


def random_like(seed, tree):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape).astype(np.float32)) for x in leaves])


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **{"rtol": 1e-6, "atol": 2e-6, **tolerance})


@pytest.mark.parametrize(
    ("batch", "weighted"),
    [
        (16, False),
        (13, True),
        pytest.param(16, True, marks=pytest.mark.slow),
        pytest.param(13, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_lookup_equals_serving(exchange, batch, weighted):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    inputs, weights = random_batch(batch, batch)
    weights = weights if weighted else None
    expected = serving_embedding_lookup(inputs, weights, embedding.embedding_tables(state), CONFIG)
    assert_close(embedding.lookup(state, inputs, weights), expected)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_updates_equal_dense_gradients_on_one_device(exchange, weighted):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), two_axes(), exchange=exchange)
    state = embedding.init(jax.random.key(1))
    tables, slots, _ = jax.tree.map(np.asarray, embedding.to_canonical(state))
    for step in range(3):
        inputs, weights = random_batch(10 + step, 16)
        weights = weights if weighted else None
        activations, vjp = jax.vjp(
            lambda t, i=inputs, w=weights: serving_embedding_lookup(i, w, t, CONFIG), tables
        )
        gradients = random_like(step, activations)
        (dense,) = vjp(gradients)
        for name, config in embedding.tables.items():
            optimizer = config.optimizer or Adagrad(0.1)
            tables[name], slots[name] = jax.tree.map(
                np.asarray,
                optimizer.update_rows(
                    dense[name], tables[name], slots[name], optimizer.learning_rate_at(step), step
                ),
            )
        state = embedding.apply_gradients(state, inputs, gradients, weights)
    actual_tables, actual_slots, step = embedding.to_canonical(state)
    assert int(step) == 3
    assert_close(actual_tables, tables, atol=1e-5)
    assert_close(actual_slots, slots, atol=1e-5, rtol=1e-5)


def test_one_seed_gives_one_table_on_every_mesh():
    def table(mesh, plan=None):
        embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, plan=plan)
        return jax.tree.map(np.asarray, embedding.to_canonical(embedding.init(jax.random.key(3)))[:2])

    expected = table(mesh(1))
    for other in (mesh(8), mesh(3), two_axes()):
        jax.tree.map(np.testing.assert_array_equal, table(other), expected)
    assert np.std(expected[0]["user"]) == pytest.approx(0.88 / np.sqrt(8), rel=0.1)


def test_an_initializer_that_gives_a_whole_table():
    values = np.arange(101 * 8, dtype=np.float32).reshape(101, 8)
    config = FeatureConfig(
        TableConfig(101, 8, name="t", initializer=lambda key, shape, dtype: jnp.asarray(values))
    )
    embedding = ShardedEmbedding(config, SGD(0.1), mesh())
    tables = embedding.embedding_tables(embedding.init(jax.random.key(0)))
    np.testing.assert_array_equal(tables[config.table], values)


def test_canonical_states_carry_over_to_another_mesh():
    source = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(8))
    state = source.init(jax.random.key(5))
    inputs, weights = random_batch(0, 16)
    gradients = random_like(0, source.lookup(state, inputs, weights))
    state = source.apply_gradients(state, inputs, gradients, weights)
    target = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(3))
    moved = target.from_canonical(*jax.tree.map(np.asarray, source.to_canonical(state)))
    jax.tree.map(np.testing.assert_array_equal, source.to_canonical(state), target.to_canonical(moved))
    assert_close(
        jax.tree.map(np.asarray, target.lookup(moved, inputs, weights)),
        jax.tree.map(np.asarray, source.lookup(state, inputs, weights)),
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bad_ids_give_zeros_are_counted_and_update_nothing(exchange):
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    bags = RaggedTensor.from_lists([[-1], [101], [2**31 - 1], [-(2**31)], [5, 101], [], [5], [100]])
    batch = {"t": bags}
    activations, counts = embedding.lookup(state, batch, count_bad_ids=True)
    table = np.asarray(embedding.embedding_tables(state)[USER])
    expected = np.zeros((8, 8), np.float32)
    expected[[4, 6, 7]] = table[[5, 5, 100]]
    np.testing.assert_array_equal(activations["t"], expected)
    assert int(counts["t"]) == 5
    new = embedding.apply_gradients(state, batch, {"t": jnp.ones((8, 8))})
    changed = np.flatnonzero((np.asarray(embedding.embedding_tables(new)[USER]) != table).any(axis=1))
    np.testing.assert_array_equal(changed, [5, 100])


@pytest.mark.parametrize("bad", [-1, 101, 2**40])
def test_bad_ids_of_an_eager_lookup_are_refused(bad):
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh())
    state = embedding.init(jax.random.key(0))
    message = rf"Feature 't': id {bad} at position 1.* vocabulary_size 101"
    for batch in (np.array([5, bad]), RaggedTensor(np.array([5, bad]), np.array([0, 1, 2]))):
        with pytest.raises(ValueError, match=message):
            embedding.lookup(state, {"t": batch})
        assert not embedding.lookup(state, embedding.shard_batch({"t": batch})[0])["t"][1].any()


def test_ids_of_a_ragged_sequence_from_l_on_are_cut_off():
    """They are neither looked up, nor counted, nor updated, whether or not they are rows."""
    embedding = ShardedEmbedding({"t": FeatureConfig(USER, max_sequence_length=2)}, SGD(1.0), mesh(2))
    state = embedding.init(jax.random.key(0))
    batch = {"t": RaggedTensor.from_lists([[1, 2, 101, 7], [3], [], [4, 5, -1]])}
    table = np.asarray(embedding.embedding_tables(state)[USER])
    expected = table[[[1, 2], [3, 0], [0, 0], [4, 5]]]
    expected[1, 1] = expected[2] = 0
    np.testing.assert_array_equal(embedding.lookup(state, batch)["t"], expected)
    _, counts = embedding.lookup(state, batch, count_bad_ids=True)
    assert int(counts["t"]) == 0
    new = embedding.apply_gradients(state, batch, {"t": jnp.ones((4, 2, 8))})
    changed = np.flatnonzero((np.asarray(embedding.embedding_tables(new)[USER]) != table).any(axis=1))
    np.testing.assert_array_equal(changed, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("exchange", [pytest.param("auto", marks=pytest.mark.slow), *EXCHANGES])
def test_a_batch_without_rows(exchange):
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, Adagrad(1.0), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    for batch, shape in (
        (RaggedTensor.from_lists([]), (0, 8)),
        (np.zeros(0, np.int32), (0, 8)),
        (np.zeros((2, 0), np.int32), (2, 0, 8)),
    ):
        activations = embedding.lookup(state, {"t": batch})["t"]
        assert activations.shape == shape
        new = embedding.apply_gradients(state, {"t": batch}, {"t": activations})
        jax.tree.map(
            np.testing.assert_array_equal, embedding.to_canonical(new)[:2], embedding.to_canonical(state)[:2]
        )


def test_dense_ids_may_be_traced_and_others_say_what_to_do():
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh())
    state = embedding.init(jax.random.key(0))
    ids = np.array([[3, -1, 7], [100, 101, 0]] * 3, np.int32)
    lookup = jax.jit(lambda state, ids: embedding.lookup(state, {"t": ids}, count_bad_ids=True))
    activations, counts = lookup(state, ids)
    eager, eager_counts = embedding.lookup(state, {"t": ids}, count_bad_ids=True)
    np.testing.assert_array_equal(activations["t"], eager["t"])
    assert int(counts["t"]) == int(eager_counts["t"]) == 6
    with pytest.raises(ValueError, match=r"call ShardedEmbedding\.shard_batch on the batch before jit"):
        lookup(state, RaggedTensor.from_lists([[1]]))


@pytest.mark.parametrize(("dtype", "vocabulary"), [(np.uint8, 256), (np.int8, 300), (np.uint16, 1 << 16)])
def test_traced_ids_of_a_type_that_cannot_count_the_vocabulary(dtype, vocabulary):
    embedding = ShardedEmbedding({"t": FeatureConfig(TableConfig(vocabulary, 4, name="t"))}, SGD(1.0), mesh())
    state, ids = embedding.init(jax.random.key(0)), np.array([0, 1, 127, np.iinfo(dtype).max] * 2, dtype)
    lookup = jax.jit(lambda state, ids: embedding.lookup(state, {"t": ids}, count_bad_ids=True))
    activations, counts = lookup(state, ids)
    np.testing.assert_array_equal(activations["t"], np.asarray(embedding.to_canonical(state)[0]["t"])[ids])
    assert int(counts["t"]) == 0


def test_wide_ids_of_the_host_beside_traced_ones():
    features = {name: FeatureConfig(TableConfig(16, 4, name=name)) for name in "ab"}
    embedding = ShardedEmbedding(features, SGD(1.0), mesh())
    state, wide = embedding.init(jax.random.key(0)), np.array([2**32 + 5, 5] * 4)
    lookup = jax.jit(lambda state, ids: embedding.lookup(state, {"a": ids, "b": wide}, count_bad_ids=True))
    activations, counts = lookup(state, np.arange(8, dtype=np.int32))
    assert (int(counts["a"]), int(counts["b"])) == (0, 4)
    assert not np.asarray(activations["b"])[::2].any()


def test_row_splits_of_any_integer_type():
    embedding = ShardedEmbedding({"t": FeatureConfig(USER, max_sequence_length=2)}, SGD(1.0), mesh())
    state = embedding.init(jax.random.key(0))
    values, splits = np.array([1, 2, 3]), np.array([0, 2, 3])
    expected = embedding.lookup(state, {"t": RaggedTensor(values, splits)})["t"]
    for dtype in (np.uint64, np.uint8):
        found = embedding.lookup(state, {"t": RaggedTensor(values, splits.astype(dtype))})["t"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_a_batch_that_looks_up_one_shard_only_is_exact(exchange):
    """All ids on one shard and far more than a round takes: nothing is dropped."""
    table = TableConfig(4096, 4, name="t", combiner="sum")
    embedding = ShardedEmbedding({"t": FeatureConfig(table)}, SGD(1.0), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {"t": RaggedTensor.from_row_lengths((rng.permutation(512) * 8).astype(np.int32), np.full(16, 32))}
    tables = embedding.embedding_tables(state)
    assert_close(
        embedding.lookup(state, batch),
        serving_embedding_lookup(batch, None, tables, {"t": FeatureConfig(table)}),
    )
    new = embedding.apply_gradients(state, batch, {"t": jnp.ones((16, 4))})
    expected = np.asarray(tables[table]).copy()
    np.subtract.at(expected, batch["t"].values, 1)
    np.testing.assert_allclose(embedding.embedding_tables(new)[table], expected, rtol=1e-6, atol=1e-6)


def test_extra_rounds_of_all_to_all_are_counted():
    table = TableConfig(4096, 4, name="t", combiner="sum")
    embedding = ShardedEmbedding({"t": FeatureConfig(table)}, SGD(1.0), mesh(), exchange="all_to_all")
    rng = np.random.default_rng(0)
    ids = rng.permutation(512).astype(np.int32)

    def rounds(ids):
        bags = RaggedTensor.from_row_lengths(ids, np.full(16, 32))
        _, counts = embedding.lookup(embedding.init(jax.random.key(0)), {"t": bags}, count_rounds=True)
        return [int(count) for count in counts.values()]

    assert rounds(ids) == [1]
    # Each shard asks one owner for 64 rows, and has room for 24 a round; a round ends where the first is full.
    assert 3 <= rounds(ids * 8)[0] <= 8
    embedding = ShardedEmbedding({"t": FeatureConfig(table)}, SGD(1.0), mesh(), exchange="all_gather")
    assert rounds(ids) == []


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_more_tables_take_no_more_collectives(exchange):
    def collectives(num_tables):
        config = {f"t{i}": FeatureConfig(TableConfig(40 + i, 8, name=f"t{i}")) for i in range(num_tables)}
        embedding = ShardedEmbedding(config, Adagrad(0.1), mesh(), exchange=exchange)

        def step(state, batch):
            return embedding.apply_gradients(state, batch, embedding.lookup(state, batch))

        batch, _ = embedding.shard_batch(dict.fromkeys(config, np.arange(16, dtype=np.int32)))
        text = jax.jit(step).lower(embedding.abstract_state(), batch).as_text()
        return Counter(re.findall(r"stablehlo\.(all_gather|all_to_all|reduce_scatter|all_reduce)\b", text))

    found = collectives(2)
    assert found[exchange] > 0
    assert collectives(7) == found


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_rows_travel_in_the_type_of_their_table(dtype, name):
    table = TableConfig(400, 8, name="t", combiner="mean", dtype=dtype)
    config, inputs = {"t": FeatureConfig(table)}, {"t": ragged(np.random.default_rng(0), 16, 400)}
    embeddings = [ShardedEmbedding(config, SGD(1.0), mesh(), exchange=exchange) for exchange in EXCHANGES]
    found = [e.lookup(e.init(jax.random.key(0)), inputs)["t"] for e in embeddings]
    np.testing.assert_array_equal(*[np.asarray(x, np.float32) for x in found])
    batch, _ = embeddings[1].shard_batch(inputs)
    text = jax.jit(embeddings[1].lookup).lower(embeddings[1].abstract_state(), batch).as_text()
    moved = set(re.findall(r"stablehlo\.all_to_all.* -> tensor<\d+x\d+x\d+x(\w+)>", text))
    assert moved == {name}


@pytest.mark.parametrize("exchange", ONE_EXCHANGE)
def test_gradients_of_weights(exchange):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    inputs, weights = random_batch(0, 16)
    tables = embedding.embedding_tables(state)
    cotangents = random_like(0, serving_embedding_lookup(inputs, weights, tables, CONFIG))

    def total(activations):
        return sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(activations), jax.tree.leaves(cotangents), strict=True)
        )

    expected = jax.grad(lambda w: total(serving_embedding_lookup(inputs, w, tables, CONFIG)), allow_int=True)(
        weights
    )
    batch, sharded = embedding.shard_batch(inputs, weights)
    gradients = jax.jit(jax.grad(lambda w: total(embedding.lookup(state, batch, w))))(sharded)
    actual = embedding.unshard_weights(gradients, inputs, weights)
    np.testing.assert_allclose(actual["items"].values, expected["items"].values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual["tags"][0].values, expected["tags"][0].values, rtol=1e-5, atol=1e-5)
    assert actual["user"] is None
    assert actual["tags"][1] is None


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gradients_of_tables(exchange):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh(), exchange=exchange)
    state = embedding.init(jax.random.key(0))
    inputs, weights = random_batch(0, 16)
    tables, slots, step = embedding.to_canonical(state)

    def total(activations):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(activations))

    expected = jax.grad(lambda t: total(serving_embedding_lookup(inputs, weights, t, CONFIG)))(tables)
    batch, sharded = embedding.shard_batch(inputs, weights)

    @jax.jit
    @jax.grad
    def gradient(tables):
        return total(embedding.lookup(embedding.from_canonical(tables, slots, step), batch, sharded))

    assert_close(jax.tree.map(np.asarray, gradient(tables)), jax.tree.map(np.asarray, expected), atol=1e-5)


@pytest.mark.parametrize("plan", ["table", "div", "mod"])
def test_tables_of_more_rows_than_there_are_positions(plan):
    rows = 2**29 + 1 if plan == "table" else 2**31 - 1
    config = {"t": FeatureConfig(TableConfig(rows, 1, name="t"))}
    message = (
        rf"table 't' cannot be sharded by '{plan}' over 4 devices: it takes \d+ rows on each.* leave 536870911"
    )
    with pytest.raises(ValueError, match=message):
        ShardedEmbedding(config, SGD(), mesh(4), plan={"t": plan})


def test_refusals():
    with pytest.raises(ValueError, match=r"exchange must be one of .* got 'ring'"):
        ShardedEmbedding(CONFIG, SGD(), mesh(), exchange="ring")
    with pytest.raises(ValueError, match=r"axis must name axes of the mesh, \('devices',\), got 'model'"):
        ShardedEmbedding(CONFIG, SGD(), mesh(), axis="model")
    with pytest.raises(ValueError, match=r"table 'item' needs an optimizer, got None"):
        ShardedEmbedding(CONFIG, None, mesh())
    with pytest.raises(ValueError, match=r"plan names no table of the configuration: \['movie'\]"):
        ShardedEmbedding(CONFIG, SGD(), mesh(), plan={"movie": "mod"})
    with pytest.raises(
        ValueError, match=r"mesh must be a jax.sharding.Mesh, such as of jax.make_mesh, got 'cpu'"
    ):
        ShardedEmbedding(CONFIG, SGD(), "cpu")
    for plan in (["mod"], 3):
        with pytest.raises(
            ValueError, match=rf"plan must be a mapping of table names .* got {re.escape(str(plan))}"
        ):
            ShardedEmbedding(CONFIG, SGD(), mesh(), plan=plan)
    for capacity in (2.5, 0, -1, True, "8"):
        with pytest.raises(
            ValueError, match=f"capacity must be None or an int of at least 1, got {capacity!r}"
        ):
            ShardedEmbedding(CONFIG, SGD(), mesh(), capacity=capacity)
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(), mesh(), capacity=np.int64(8))
    state = embedding.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"more than the capacity of 8; pass a larger capacity"):
        embedding.lookup(state, {"t": np.zeros(80, np.int32)})
    batch = {"t": np.zeros(8, np.int32)}
    with pytest.raises(ValueError, match=r"must have the shape of its activation, \[8, 8\], got \[8, 4\]"):
        embedding.apply_gradients(state, batch, {"t": jnp.zeros((8, 4))})
    for gradient, message in [
        (None, "be an array, got None; that of an activation that the loss leaves out is zeros"),
        ("ones", "be an array, got str"),
        (jnp.ones((8, 8), jnp.complex64), "hold real numbers, got complex64"),
    ]:
        with pytest.raises(ValueError, match=f"gradient of feature 't' must {message}"):
            embedding.apply_gradients(state, batch, {"t": gradient})
    with pytest.raises(ValueError, match=r"activation_gradients must have the structure of the batch"):
        embedding.apply_gradients(state, batch, {"u": jnp.zeros((8, 8))})
    tables, slots, step = embedding.to_canonical(state)
    with pytest.raises(ValueError, match=r"table 'user' must be float32\[101, 8\], got float32\[101, 4\]"):
        embedding.from_canonical({"user": tables["user"][:, :4]}, slots, step)


@pytest.mark.parametrize("engine", ["xla", "sparsecore"])
def test_a_batch_is_looked_up_with_the_weights_it_was_laid_out_with(engine):
    if engine == "sparsecore":
        pytest.importorskip("jax_tpu_embedding")
    embedding = ShardedEmbedding({"t": FeatureConfig(USER)}, SGD(1.0), mesh(), engine=engine)
    state = embedding.init(jax.random.key(0))
    bags = RaggedTensor.from_lists([[0, 1], [], [3], [3]] * 2)
    given = {"t": RaggedTensor(np.full(8, 5, np.float32), bags.row_splits)}
    batch, weights = embedding.shard_batch({"t": bags}, given)
    plain, none = embedding.shard_batch({"t": bags})
    wide = RaggedTensor.from_lists([[0] * 20] * 8)
    ones = {"t": RaggedTensor(np.ones(160, np.float32), wide.row_splits)}
    _, others = embedding.shard_batch({"t": wide}, ones)
    gradients = {"t": jnp.ones((8, 8))}
    assert none is None
    embedding.lookup(state, batch, weights)
    for wrong, message in {
        (batch, None): r"laid out with weights, got None: pass the weights that shard_batch returned",
        (plain, weights): r"laid out without weights, got ShardedWeights: pass weights to shard_batch, too",
        (batch, others): r"must be what shard_batch returned with it: entries by stack are \{.*\}, got weights",
    }.items():
        with pytest.raises(ValueError, match=message):
            embedding.lookup(state, *wrong)
        with pytest.raises(ValueError, match=message):
            jax.jit(embedding.apply_gradients)(state, wrong[0], gradients, wrong[1])
    with pytest.raises(ValueError, match=r"must be what shard_batch returned with it, got dict"):
        embedding.lookup(state, batch, given)
