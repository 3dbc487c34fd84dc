"""The sparsecore engine on 8 CPU devices: its layout, its host preprocessing, and what it leaves to the xla engine."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import (
    FeatureConfig,
    RaggedTensor,
    SparseTensor,
    TableConfig,
    serving_embedding_lookup,
)
from jaxembed.combiners import CustomCombiner
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, CustomOptimizer
from jaxembed.sparsecore_layout import StackedTable, check_stack
from jaxembed.train import Checkpointer, ShardedEmbedding
from jaxembed.train.engines import sparsecore_packing, sparsecore_stacks

pytest.importorskip("jax_tpu_embedding")

USER = TableConfig(101, 8, name="user", combiner="mean")
ITEM = TableConfig(53, 8, name="item", combiner="sqrtn")
TAG = TableConfig(7, 5, name="tag", combiner="sum", optimizer=SGD(0.5))
CONFIG = {
    "user": FeatureConfig(USER),
    "items": FeatureConfig(ITEM),
    "history": FeatureConfig(ITEM, max_sequence_length=3),
    "tags": FeatureConfig(TAG),
}


def mesh(devices=8):
    return jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])


def embedding(config=CONFIG, optimizer=None, engine="sparsecore", devices=8, **arguments):
    return ShardedEmbedding(config, optimizer or Adagrad(0.1), mesh(devices), engine=engine, **arguments)


def random_batch(seed, batch=16, weighted=False):
    rng = np.random.default_rng(seed)

    def ragged(vocabulary):
        lengths = rng.integers(0, 6, batch)
        return RaggedTensor.from_row_lengths(
            rng.integers(0, vocabulary, lengths.sum()).astype(np.int32), lengths
        )

    where = np.argwhere(rng.random((batch, 4)) < 0.5)
    inputs = {
        "user": rng.integers(0, 101, (batch, 2)).astype(np.int32),
        "items": ragged(53),
        "history": ragged(53),
        "tags": SparseTensor(where, rng.integers(0, 7, len(where)).astype(np.int32), (batch, 4)),
    }
    if not weighted:
        return inputs, None
    weights = dict.fromkeys(inputs)
    for name in ("items", "tags"):
        values = rng.uniform(0.1, 2, inputs[name].values.shape).astype(np.float32)
        weights[name] = dataclasses.replace(inputs[name], values=values)
    return inputs, weights


def random_like(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), tree)


def random_canonical(seed, of):
    """Tables and slots of random values, as `to_canonical` gives them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype), of.abstract_canonical())


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-6, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def places(stack):
    """The stack's tables as `jaxembed.sparsecore_layout` describes them."""
    blocks = stack.num_blocks
    return [
        StackedTable(
            p.table.name,
            stack.name,
            (p.table.vocabulary_size, p.table.dim),
            blocks,
            stack.num_positions // blocks,
            stack.dim,
            p.first_row,
            p.shift,
            p.rows * blocks,
        )
        for p in stack.placements
    ]


@pytest.mark.parametrize("optimizer", [Adagrad(0.1), FTRL(0.1), Adam(0.1), SGD(0.1), AdagradMomentum(0.1)])
def test_round_trips_from_xla_to_sparsecore_and_back_are_bit_equal(optimizer):
    config = {**CONFIG, "wide": FeatureConfig(TableConfig(300, 20, name="wide"))}
    theirs, ours = embedding(config, optimizer, "xla", devices=3), embedding(config, optimizer)
    tables, slots = random_canonical(0, theirs)
    there = ours.from_canonical(
        *jax.tree.map(np.asarray, theirs.to_canonical(theirs.from_canonical(tables, slots, 7)))
    )
    back = theirs.from_canonical(*jax.tree.map(np.asarray, ours.to_canonical(there)))
    assert_equal(theirs.to_canonical(back), (tables, slots, 7))


def test_stacks_are_laid_out_as_sparsecores_expect():
    """The arrays themselves, read by the layout that TensorFlow and jax-tpu-embedding agree on."""
    ours = embedding()
    tables, slots = random_canonical(0, ours)
    state = ours.from_canonical(tables, slots, 0)
    seen = set()
    for name, stack in ours.stacks.items():
        check_stack(places(stack))
        array = np.asarray(state.tables[name])
        assert array.shape[1] == 128
        assert array.size % (stack.num_blocks * 8 * 128) == 0
        rows = array.reshape(-1, stack.dim)
        for place, placement in zip(places(stack), stack.placements, strict=True):
            table = tables[place.name]
            np.testing.assert_array_equal(place.read_rows(rows, 0, len(table)), table)
            at = stack.position(placement, np.arange(len(table)))
            np.testing.assert_array_equal(rows[at, : table.shape[1]], table)
            seen.add(place.name)
    assert seen == {"user", "item", "tag"}
    assert any(place.rotation for stack in ours.stacks.values() for place in places(stack))


def test_one_seed_gives_one_table_on_both_engines():
    config = {"u": FeatureConfig(USER), "t": FeatureConfig(TAG)}
    states = [
        (e, e.init(jax.random.key(3))) for e in (embedding(config), embedding(config, engine="xla", devices=2))
    ]
    assert_equal(*[jax.tree.map(np.asarray, e.to_canonical(state)) for e, state in states])


def emulate(ours, batch, state, weights):
    """What SparseCores compute of the preprocessed ids, device by device, from row pointers, ids and gains."""
    outputs = {}
    for name, ids in batch.sparsecore.items():
        stack = ours.stacks[name]
        features = batch.layout.of_stack(name)
        blocks, cores = stack.num_blocks, stack.cores
        table = np.asarray(state.tables[name]).reshape(blocks, -1, stack.dim)
        samples = sum(f.num_segments for f in features) // cores
        out = np.zeros((stack.num_shards, cores, samples, stack.dim))
        for shard in range(stack.num_shards):
            gains = np.asarray(ids.gains[shard]) if weights is None else weights[name][shard]
            size = gains.size // cores
            pointers = np.asarray(ids.row_pointers[shard]).reshape(cores, -1)
            assert pointers.shape[1] == max(blocks, 8)
            for core in range(cores):
                start = 0
                for owner in range(blocks):
                    for place in range(core * size + start, core * size + pointers[core, owner]):
                        row = table[owner, ids.embedding_ids[shard, place]]
                        out[shard, core, ids.sample_ids[shard, place]] += gains[place] * row
                    start = -(-pointers[core, owner] // 8) * 8
        for f in features:
            first, size = f.first_segment // cores, f.num_segments // cores
            rows = out[:, :, first : first + size, : f.feature.table.dim].reshape(-1, f.feature.table.dim)
            outputs[f.path] = rows[: f.num_rows * f.inner].reshape(f.output_shape)
    return outputs


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("batch", [64, 13])
def test_preprocessed_ids_say_what_serving_looks_up(combiner, batch):
    config = {
        name: dataclasses.replace(f, table=dataclasses.replace(f.table, combiner=combiner))
        for name, f in CONFIG.items()
    }
    ours = embedding(config, devices=2)
    state = ours.from_canonical(*random_canonical(1, ours), 0)
    inputs, _ = random_batch(batch, batch)
    packed, _ = ours.shard_batch(inputs)
    assert not packed.positions
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    assert_close(emulate(ours, packed, state, None), serving_embedding_lookup(inputs, None, tables, config))


def test_rows_of_padding_are_not_preprocessed():
    ours, real = embedding(devices=2), np.arange(13) % 3 > 0
    state = ours.from_canonical(*random_canonical(1, ours), 0)
    inputs, _ = random_batch(0, 13)
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    whole = serving_embedding_lookup(inputs, None, tables, CONFIG)
    inputs["user"][~real] = 999
    packed, _ = ours.shard_batch(inputs, mask=real)
    assert_close(emulate(ours, packed, state, None), jax.tree.map(lambda x: (x.T * np.float32(real)).T, whole))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_reach_the_places_of_their_ids(combiner):
    """Gains are put together on the device from the weights; here, by numpy."""
    config = {
        name: dataclasses.replace(f, table=dataclasses.replace(f.table, combiner=combiner))
        for name, f in CONFIG.items()
    }
    ours = embedding(config, devices=2)
    state = ours.from_canonical(*random_canonical(1, ours), 0)
    inputs, weights = random_batch(5, 32, weighted=True)
    packed, values = ours.shard_batch(inputs, weights)
    gains = {}
    for name, ids in packed.sparsecore.items():
        features = packed.layout.of_stack(name)
        divided = np.concatenate([np.full(f.num_segments, f.is_combined) for f in features])
        gains[name] = np.zeros(ids.gains.shape)
        for shard in range(2):
            live = np.asarray(ids.slots[shard]) < ids.gains.shape[1]
            segments, w = np.asarray(ids.segments[shard])[live], np.asarray(values.values[name][shard])[live]
            total = np.bincount(segments, w if combiner == "mean" else w.astype(np.float64) ** 2, len(divided))
            divisor = {"sum": np.ones_like(total), "mean": total, "sqrtn": np.sqrt(total)}[combiner]
            w = np.where(divided[segments], w / divisor[segments], w)
            np.add.at(gains[name][shard], np.asarray(ids.slots[shard])[live], w)
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    expected = serving_embedding_lookup(inputs, weights, tables, config)
    assert_close(emulate(ours, packed, state, gains), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lookups_and_updates_equal_the_xla_engine(weighted):
    ours, theirs = embedding(), embedding(engine="xla")
    state, other = ours.init(jax.random.key(0)), theirs.init(jax.random.key(0))
    for batch in (16, 13):
        inputs, weights = random_batch(batch, batch, weighted)
        looked_up = ours.lookup(state, inputs, weights)
        tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
        assert_close(looked_up, serving_embedding_lookup(inputs, weights, tables, CONFIG))
        gradients = random_like(batch, looked_up)
        state = ours.apply_gradients(state, inputs, gradients, weights)
        other = theirs.apply_gradients(other, inputs, gradients, weights)
        assert_close(ours.to_canonical(state), jax.tree.map(np.asarray, theirs.to_canonical(other)), 1e-5, 1e-5)


def test_gradients_of_weights_and_tables():
    ours = embedding(devices=2)
    state = ours.init(jax.random.key(0))
    inputs, weights = random_batch(0, weighted=True)
    canonical = ours.to_canonical(state)
    tables = jax.tree.map(np.asarray, canonical[0])

    def total(activations):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(activations))

    def served(tables, weights):
        return total(serving_embedding_lookup(inputs, weights, tables, CONFIG))

    expected = jax.grad(served, argnums=(0, 1), allow_int=True)(tables, weights)
    batch, sharded = ours.shard_batch(inputs, weights)

    @jax.jit
    def gradients(tables, weights):
        state = ours.from_canonical(tables, *canonical[1:])
        return total(ours.lookup(state, batch, weights))

    of_tables, of_weights = jax.grad(gradients, argnums=(0, 1))(canonical[0], sharded)
    assert_close(of_tables, expected[0], 1e-5, 1e-5)
    of_weights = ours.unshard_weights(of_weights, inputs, weights)
    for name in ("items", "tags"):
        assert_close(of_weights[name].values, expected[1][name].values, 1e-5, 1e-5)


def test_bad_ids_are_counted_first_and_update_nothing():
    ours = embedding({"t": FeatureConfig(USER)}, SGD(1.0))
    state = ours.init(jax.random.key(0))
    bags = RaggedTensor.from_lists([[-1], [101], [2**31 - 1], [-(2**31)], [5, 101], [], [5], [100]])
    activations, counts = ours.lookup(state, {"t": bags}, count_bad_ids=True)
    table = np.asarray(ours.embedding_tables(state)[USER])
    expected = np.zeros((8, 8), np.float32)
    expected[[4, 6, 7]] = table[[5, 5, 100]]
    np.testing.assert_array_equal(activations["t"], expected)
    assert int(counts["t"]) == 5
    new = ours.apply_gradients(state, {"t": bags}, {"t": jnp.ones((8, 8))})
    changed = np.flatnonzero((np.asarray(ours.embedding_tables(new)[USER]) != table).any(axis=1))
    np.testing.assert_array_equal(changed, [5, 100])


def test_batches_beyond_the_limits_drop_nothing(capfd):
    """One id in every bag, then many different ones, then few again: limits grow, by few steps, and never shrink."""
    table = TableConfig(4096, 8, name="t", combiner="sum")
    ours = embedding({"t": FeatureConfig(table)}, devices=2)
    state = ours.from_canonical(*random_canonical(0, ours), 0)
    (stack,), seen = ours.stacks.values(), []
    rng = np.random.default_rng(0)
    for ids in (
        np.full((32, 1), 3),
        np.full((32, 20), 9),
        rng.integers(0, 4096, (32, 20)),
        rng.permutation(512).reshape(32, 16) * 8,
        np.full((32, 1), 3),
    ):
        bags = RaggedTensor.from_row_lengths(ids.reshape(-1).astype(np.int32), np.full(32, ids.shape[1]))
        packed, _ = ours.shard_batch({"t": bags})
        seen.append((packed.sparsecore[stack.name].max_ids, packed.sparsecore[stack.name].max_unique_ids))
        expected = serving_embedding_lookup(
            {"t": bags},
            None,
            jax.tree.map(np.asarray, ours.embedding_tables(state)),
            {"t": FeatureConfig(table)},
        )
        assert_close(emulate(ours, packed, state, None), expected, 1e-5, 1e-5)
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    assert "dropping" not in capfd.readouterr().err


def test_the_library_s_losses_are_never_silent(monkeypatch):
    """A batch that fits the number of ids but not the rest of the limits is laid out anew."""
    ours = embedding({"t": FeatureConfig(USER)}, devices=2)
    stack = next(iter(ours.stacks.values()))
    ours._sparsecore._limits[stack.name] = sparsecore_packing.Limits(64, 1, 8)
    state = ours.from_canonical(*random_canonical(0, ours), 0)
    inputs = {"t": np.arange(64, dtype=np.int32)}
    packed, _ = ours.shard_batch(inputs)
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    expected = serving_embedding_lookup(inputs, None, tables, {"t": FeatureConfig(USER)})
    assert_close(emulate(ours, packed, state, None), expected)


def test_dense_ids_may_be_traced():
    ours = embedding({"t": FeatureConfig(USER)}, devices=2)
    state = ours.init(jax.random.key(0))
    ids = np.array([[3, -1, 7], [100, 101, 0]], np.int32)
    activations = jax.jit(lambda state, ids: ours.lookup(state, {"t": ids}))(state, ids)
    eager, counts = ours.lookup(state, {"t": ids}, count_bad_ids=True)
    np.testing.assert_array_equal(activations["t"], eager["t"])
    assert int(counts["t"]) == 2


def test_checkpoints_know_nothing_of_the_engine(tmp_path):
    ours, theirs = embedding(devices=2), embedding(engine="xla", devices=3)
    state = moved = ours.from_canonical(*random_canonical(0, ours), 4)
    for source, target in ((ours, theirs), (theirs, ours)):
        directory = tmp_path / str(source.num_shards)
        with Checkpointer(directory, source) as checkpointer:
            checkpointer.save(moved)
        with Checkpointer(directory, target) as checkpointer:
            moved = checkpointer.restore().state
    assert_equal(jax.tree.map(np.asarray, ours.to_canonical(moved)), ours.to_canonical(state))


def test_tables_that_sparsecores_cannot_hold_are_named_once(caplog):
    tables = {
        "kept": {},
        "half": {"dtype": jnp.bfloat16},
        "dense": {"optimizer": Adam(0.1, lazy_adam=False)},
        "apart": {"optimizer": SGD(0.1, use_gradient_accumulation=False)},
        "mine": {"optimizer": CustomOptimizer(lambda g, w, *rest: w)},
        "copied": {},
        "full": {"vocabulary_size": 2**31 - 32},
    }
    config = {
        name: FeatureConfig(TableConfig(**{"vocabulary_size": 20, "dim": 8, "name": name, **arguments}))
        for name, arguments in tables.items()
    }
    ours = embedding(config, plan={"copied": "replicated"})
    (message,) = [record.getMessage() for record in caplog.records]
    for reason in (
        "'half': its dtype is bfloat16",
        "'dense': its optimizer Adam updates rows that are not looked up",
        "'apart': its optimizer has use_gradient_accumulation=False",
        "'mine': its optimizer CustomOptimizer may mix the components of a row (set `is_elementwise = True` on",
        "'copied': its plan is 'replicated'",
        "'full': its vocabulary_size 2147483616 leaves no room",
    ):
        assert reason in message
    assert "kept" not in message
    held = {p.table.name for stack in ours.stacks.values() if stack.cores for p in stack.placements}
    assert held == {"kept"}
    assert {p.table.name for stack in ours.stacks.values() for p in stack.placements} == set(tables)


def test_a_number_of_sparsecores_that_is_no_power_of_two_leaves_all_tables_to_xla(monkeypatch, caplog):
    """jax-tpu-embedding would end the process as soon as a batch is laid out."""
    # As engine="auto" finds them on three chips of v5p.
    monkeypatch.setattr("jaxembed.train.embedding.sparse_cores", lambda *_: 4)
    ours = embedding(engine="auto", devices=3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'item', 'tag', 'user': there are 12 SparseCores, which must be a power of two" in message
    assert not any(stack.cores for stack in ours.stacks.values())
    state = ours.init(jax.random.key(0))
    inputs, _ = random_batch(0)
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    assert_close(ours.lookup(state, inputs), serving_embedding_lookup(inputs, None, tables, CONFIG))


def test_a_number_of_sparsecores_that_is_no_power_of_two_is_an_error_where_they_are_asked_for():
    cores = sparsecore_stacks.sparse_cores
    assert cores("auto", device("TPU v5"), 3) == 4
    assert cores("sparsecore", device("TPU v6 lite"), 8) == 2
    for kind, platform in (("TPU v5", "tpu"), ("cpu", "cpu")):
        with pytest.raises(
            ValueError, match=r"needs a power of two of SparseCores, got 12, 4 on each of 3 devices"
        ):
            cores("sparsecore", device(kind, platform), 3)
    with pytest.raises(ValueError, match="needs a power of two of SparseCores, got 12"):
        embedding(devices=3)


def largest(valency, vectors):
    valid = jnp.arange(vectors.shape[0]) < valency
    return jnp.max(jnp.where(valid[:, None], vectors, -9), axis=0)


def test_tables_of_both_engines_are_looked_up_together():
    custom = TableConfig(60, 8, name="custom", combiner=CustomCombiner(largest, max_valency=4))
    half = TableConfig(40, 8, name="half", dtype=jnp.bfloat16)
    config = {**CONFIG, "half": FeatureConfig(half), "custom": FeatureConfig(custom)}
    ours = embedding(config, devices=2)
    state = ours.init(jax.random.key(0))
    inputs, _ = random_batch(0)
    inputs |= {"half": np.arange(16, dtype=np.int32), "custom": inputs["items"]}
    tables = jax.tree.map(np.asarray, ours.embedding_tables(state))
    assert_close(
        jax.tree.map(lambda x: np.asarray(x, np.float32), ours.lookup(state, inputs)),
        jax.tree.map(
            lambda x: np.asarray(x, np.float32), serving_embedding_lookup(inputs, None, tables, config)
        ),
    )


def device(kind, platform="tpu"):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


def test_the_engine_is_picked_from_the_devices(monkeypatch):
    cores = sparsecore_stacks.sparse_cores
    assert cores("auto", device("TPU v5")) == cores("auto", device("TPU v5p")) == 4
    assert cores("auto", device("TPU v6 lite")) == cores("sparsecore", device("TPU v6 lite")) == 2
    assert cores("auto", device("TPU v5 lite")) == 0
    assert cores("xla", device("TPU v5")) == 0
    assert cores("auto", device("cpu", "cpu")) == cores("auto", device("NVIDIA H100", "gpu")) == 0
    assert cores("sparsecore", device("cpu", "cpu")) == 4
    with pytest.raises(
        ValueError, match=r"needs a TPU with SparseCores \(v5p, v6e or later\), got 'TPU v5 lite'"
    ):
        cores("sparsecore", device("TPU v5 lite"))
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'gpu'"):
        cores("gpu", device("cpu", "cpu"))
    monkeypatch.setattr(sparsecore_stacks.importlib.util, "find_spec", lambda name: None)
    assert cores("auto", device("TPU v5")) == 0
    with pytest.raises(ValueError, match=r"needs jax-tpu-embedding: pip install 'jaxembed\[sparsecore\]'"):
        cores("sparsecore", device("TPU v5"))
