"""Columns, batches and the Grain pipeline."""

import dataclasses
import itertools

import grain
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.train.data import Batch, Examples, RaggedColumn, batches
from jaxembed.train.data.shuffle import permute


def make_examples(count=50, seed=0):
    """Examples whose every column tells which example it belongs to."""
    rng = np.random.default_rng(seed)
    lengths, rows = rng.integers(0, 5, count), np.arange(count)
    values = np.repeat(rows, lengths).astype(np.int32)
    column = RaggedColumn(values, np.cumsum(lengths) - lengths, lengths, values.astype(np.float32) / 2)
    return Examples(
        {"id": rows, "bag": column, "plain": column.select(slice(None))}, rows[:, None] * 2.0, rows % 2
    )


def rows_of(batch: Batch) -> list[int]:
    return batch.features["id"][batch.mask > 0].tolist()


def check_batch(examples: Examples, batch: Batch):
    """Every column of the batch belongs to the examples that its ids name."""
    count = int(batch.mask.sum())
    rows = rows_of(batch)
    bags, weights = batch.features["bag"], batch.weights["bag"]
    lengths = np.diff(bags.row_splits)
    np.testing.assert_array_equal(lengths[:count], examples.features["bag"].lengths[rows])
    np.testing.assert_array_equal(lengths[count:], 0)
    np.testing.assert_array_equal(bags.values[: lengths.sum()], np.repeat(rows, lengths[:count]))
    np.testing.assert_array_equal(weights.values[: lengths.sum()] * 2, np.repeat(rows, lengths[:count]))
    np.testing.assert_array_equal(batch.dense[:count, 0], np.asarray(rows) * 2)
    np.testing.assert_array_equal(batch.labels[:count], np.asarray(rows) % 2)
    np.testing.assert_array_equal(batch.mask, np.arange(batch.mask.size) < count)


def test_batches_hold_their_examples_in_fixed_shapes():
    examples = make_examples()
    found = list(batches(examples, 8, num_epochs=2))
    for batch in found:
        check_batch(examples, batch)
    shapes = {str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), batch)) for batch in found}
    assert len(shapes) == 1
    rows = [row for batch in found for row in rows_of(batch)]
    assert sorted(rows[:50]) == sorted(rows[50:]) == list(range(50))
    assert rows[:50] != rows[50:]
    assert found[-1].mask.sum() == 4


def test_raw_ids_stay_as_wide_as_they_are():
    """They are hashed later, or looked up in a vocabulary."""
    wide = np.array([2**40, -(2**40), 7])
    column = RaggedColumn(wide, np.arange(3), np.ones(3, np.int64))
    examples = Examples({"one": wide, "bag": column}, np.zeros((3, 0)), np.zeros(3))
    (batch,) = batches(examples, 4, shuffle=False, num_epochs=1)
    assert batch.features["one"].tolist() == [*wide, 7]  # padding looks up no other row
    assert batch.features["bag"].values[:3].tolist() == wide.tolist()
    none = examples.take(np.zeros(0, np.int64), 2, {"bag": 3})
    assert none.features["one"].tolist() == [2**40, 2**40]
    unsigned = dataclasses.replace(examples, features={"one": wide.clip(0).astype(np.uint64), "bag": column})
    both = Examples.concatenate([examples, unsigned])
    assert both.features["one"].tolist() == [2**40, -(2**40), 7, 2**40, 0, 7]
    huge = dataclasses.replace(examples, features={"one": np.full(3, 2**63, np.uint64), "bag": column})
    with pytest.raises(ValueError, match=r"int64 in some files and uint64 beyond 2\*\*63 - 1"):
        Examples.concatenate([examples, huge])


def test_batch_is_a_pytree_that_compiles_once():
    examples, traces = make_examples(), []

    @jax.jit
    def step(batch):
        traces.append(1)
        return batch.labels.sum(), batch.features["bag"].values.sum()

    for batch in batches(examples, 8, num_epochs=1):
        step(batch)
    assert len(traces) == 1


@pytest.mark.parametrize("prefetch", [0, 3])
def test_restored_iterators_go_on_at_the_next_batch_from_every_step(prefetch):
    dataset = batches(make_examples(), 8, num_epochs=2, seed=3, prefetch=prefetch)
    iterator, states, rows = iter(dataset), [], []
    for _ in range(13):
        states.append(iterator.get_state())
        rows.append(rows_of(next(iterator)))
    with pytest.raises(StopIteration):
        next(iterator)
    for step, state in enumerate(states):
        resumed = iter(dataset)
        resumed.set_state(state)
        assert [rows_of(batch) for batch in resumed] == rows[step:]


def test_endless_pipelines_keep_on_giving_whole_epochs():
    dataset = batches(make_examples(6), 4, seed=1)
    rows = [row for batch in itertools.islice(dataset, 9) for row in rows_of(batch)]
    assert all(sorted(rows[i : i + 6]) == list(range(6)) for i in range(0, 36, 6))


def test_seed_decides_the_order_and_nothing_else_does():
    def order(**kwargs):
        return [rows_of(batch) for batch in batches(make_examples(), 8, num_epochs=1, **kwargs)]

    assert order(seed=1) == order(seed=1, prefetch=5, num_threads=3)
    assert order(seed=1) != order(seed=2)
    assert list(itertools.chain(*order(shuffle=False))) == list(range(50))
    assert len(order(drop_remainder=True)) == 6


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_batches_of_one_host(hosts):
    examples = make_examples()
    whole = list(batches(examples, 8, num_epochs=1, seed=5))
    parts = []
    for host in range(hosts):
        shard = grain.sharding.ShardOptions(shard_index=host, shard_count=hosts)
        parts.append(list(batches(examples, 8, num_epochs=1, seed=5, shard=shard)))
    for step, batch in enumerate(whole):
        for part in parts:
            check_batch(examples, part[step])
            assert part[step].mask.shape == (8 // hosts,)
        assert [row for part in parts for row in rows_of(part[step])] == rows_of(batch)


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permute_is_a_permutation(size, seed, epoch):
    found = permute(np.arange(size), size, seed, epoch)
    np.testing.assert_array_equal(np.sort(found), np.arange(size))
    np.testing.assert_array_equal(permute(np.arange(size)[::3], size, seed, epoch), found[::3])


def test_permute_scatters_like_chance():
    size = 10_000
    found = permute(np.arange(size), size, 0, 1)
    # Of a random permutation: fixed points ~ Poisson(1), neighbours uncorrelated.
    assert np.sum(found == np.arange(size)) < 10
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(found, permute(np.arange(size), size, 0, 2))[0, 1]) < 0.05
    halves = np.histogram2d(np.arange(size), found, bins=10)[0]
    assert np.sum((halves - 100) ** 2 / 100) < 200
    large = permute(np.arange(1000), 4_000_000_000, 0)
    assert np.unique(large).size == 1000
    assert 0 <= large.min() < large.max() < 4_000_000_000


def test_overflow_names_the_feature_and_what_to_do():
    dataset = batches(make_examples(), 8, capacities={"bag": 3}, prefetch=0)
    with pytest.raises(ValueError, match=r"feature 'bag': .* more than its\s+capacity of 3; raise capacities"):
        next(iter(dataset))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple of 1"),
        ({"batch_size": 3, "shard": grain.sharding.ShardOptions(0, 2)}, "positive multiple of 2 hosts, got 3"),
        ({"batch_size": 2, "num_epochs": 0}, "num_epochs must be at least 1 or None"),
        (
            {"batch_size": 2, "capacities": {"id": 4}},
            r"capacities must be of ragged features \['bag', 'plain'\]",
        ),
        ({"batch_size": 64, "num_epochs": 1, "drop_remainder": True}, "do not fill one batch of 64"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        batches(make_examples(), **kwargs)


def test_wrong_columns():
    with pytest.raises(ValueError, match=r"columns must be of one length, got \{'id': 3, 'dense': 2"):
        Examples({"id": np.arange(3)}, np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ValueError, match=r"bags must lie in \[0, 4\)"):
        RaggedColumn(np.arange(4), np.asarray([0, 3]), np.asarray([2, 2]))
    with pytest.raises(ValueError, match="weights must be parallel to values"):
        RaggedColumn(np.arange(4), np.asarray([0]), np.asarray([2]), np.ones(3))
    with pytest.raises(ValueError, match="at least one example"):
        batches(make_examples().select(slice(0)), 4)
