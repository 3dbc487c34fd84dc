"""Row-sparse updates: deduplication, padding, jit with donation, and cost without the vocabulary."""

import hypothesis
import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.optimizers import SGD, Adagrad, Adam, dedupe, dedupe_ids, sparse_update

LAZY = [Adam(0.1), SGD(0.1, use_gradient_accumulation=False)]


@hypothesis.given(
    st.sampled_from([0, 12]).flatmap(
        lambda size: st.tuples(
            npst.arrays(np.int32, size, elements=st.integers(-2, 9)),
            npst.arrays(np.float32, (size, 2), elements=st.integers(-8, 8).map(float)),
        )
    ),
    st.integers(1, 8),
)
def test_dedupe_sums_by_id(operands, num_rows):
    ids, gradients = operands
    unique_ids, summed = dedupe(ids, gradients, num_rows)
    expected = sorted({int(i) for i in ids if 0 <= i < num_rows})
    padding = len(ids) - len(expected)
    assert unique_ids.tolist() == expected + [num_rows] * padding
    assert unique_ids.dtype == jnp.int32
    totals = [gradients[ids == i].sum(axis=0) for i in expected] + [np.zeros(2)] * padding
    np.testing.assert_array_equal(summed, np.reshape(totals, (len(ids), 2)))
    unique_again, order, segment = dedupe_ids(jnp.asarray(ids), num_rows)
    np.testing.assert_array_equal(unique_again, unique_ids)
    for position, where in zip(order.tolist(), segment.tolist(), strict=True):
        dropped = not 0 <= ids[position] < num_rows
        assert where == len(ids) if dropped else unique_ids[where] == ids[position]


def test_dedupe_drops_nan_of_padding_and_sums_bfloat16_in_float32():
    ids = jnp.array([1, -1, 1, 5] + [1] * 256)
    gradients = jnp.ones((260, 1), jnp.bfloat16).at[jnp.array([1, 3])].set(jnp.nan)
    unique_ids, summed = dedupe(ids, gradients, 5)
    assert unique_ids[:2].tolist() == [1, 5]
    assert summed.dtype == jnp.float32
    assert summed[0, 0] == 258.0  # bfloat16 would stop at 256
    assert not summed[1:].any()


@pytest.mark.parametrize("ids_type", [np.int8, np.int64, np.uint32])
def test_ids_of_any_integer_type(ids_type):
    ids = np.zeros(24, ids_type)
    ids[:3] = 3, 1, 3
    table, _ = sparse_update(SGD(1.0), jnp.zeros((11, 3)), {}, ids, jnp.ones((24, 3)), 0)
    assert table[:, 0].tolist() == [-21.0, -1.0, 0.0, -2.0, *[0.0] * 7]


@pytest.mark.parametrize(
    ("id_", "ids_type"), [(2**32 + 5, np.int64), (2**32 - 1, np.uint32), (2**63 + 5, np.uint64)]
)
def test_wide_ids_are_padding_and_not_another_row(id_, ids_type):
    ids = np.array([id_, 3], ids_type)
    table, _ = sparse_update(SGD(1.0), jnp.zeros((11, 1)), {}, ids, jnp.ones((2, 1)), 0)
    assert table[:, 0].tolist() == [0.0, 0.0, 0.0, -1.0, *[0.0] * 7]
    assert dedupe(ids, jnp.ones((2, 1)), 11)[0].tolist() == [3, 11]
    table, _ = sparse_update(SGD(1.0), jnp.zeros((4, 1)), {}, [1, 3], jnp.ones((2, 1)), 0)
    assert table[:, 0].tolist() == [0.0, -1.0, 0.0, -1.0]


@pytest.mark.parametrize("num_rows", [256, 300])
def test_narrow_ids_of_a_table_that_they_cannot_count(num_rows):
    ids = np.array([3, 255], np.uint8)
    table, _ = sparse_update(SGD(1.0), jnp.zeros((num_rows, 1)), {}, ids, jnp.ones((2, 1)), 0)
    assert np.flatnonzero(table[:, 0]).tolist() == [3, 255]


@pytest.mark.parametrize("optimizer", [*LAZY, Adam(0.1, lazy_adam=False)], ids=lambda o: o.name)
def test_a_batch_of_padding_or_of_nothing_leaves_lazy_tables_as_they_are(optimizer):
    table = jnp.arange(33.0).reshape(11, 3)
    slots = {name: jnp.full((11, 3), 0.3) for name in optimizer.slot_names}
    for ids in (np.array([11, -1, 2**31 - 1] * 8, np.int32), np.zeros(0, np.int32)):
        new, new_slots = sparse_update(optimizer, table, slots, ids, jnp.ones((len(ids), 3)), 0)
        assert bool((new == table).all()) == optimizer.is_lazy
        for name, slot in slots.items():
            assert bool((new_slots[name] == slot).all()) == optimizer.is_lazy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adagrad_leaves_what_has_an_accumulator_of_zero(dtype):
    """As other libraries start it: without a gradient, or with one whose square is 0 in float32."""
    optimizer, table = Adagrad(0.5), jnp.ones((3, 4), dtype)
    slots = {"accumulators": jnp.zeros((3, 4)).at[0, 3].set(1.0)}
    gradients = jnp.array([[0.0, 1e-30, 3.0, 0.0], [jnp.nan, 0.0, -2.0, 0.0]])
    expected = jnp.array([[1.0, 1.0, 0.5, 1.0], [jnp.nan, 1.0, 1.5, 1.0], [1.0] * 4])
    found, kept = sparse_update(optimizer, table, slots, np.array([0, 1], np.int32), gradients, 0)
    dense = optimizer.update_rows(jnp.pad(gradients, ((0, 1), (0, 0))), table, slots, 0.5, 0)
    for rows, accumulators in ((found, kept["accumulators"]), (dense[0], dense[1]["accumulators"])):
        np.testing.assert_array_equal(rows.astype(jnp.float32), expected)
        np.testing.assert_array_equal(accumulators, slots["accumulators"].at[:2].add(gradients * gradients))


def test_one_by_one_keeps_the_order_of_occurrences_over_many_chunks():
    """A clipped weight depends on the order; 2,500 updates of the hottest row, more than a chunk of ranks 0."""
    rng = np.random.default_rng(0)
    num_rows, size = 3000, 12_000
    ids = np.where(rng.random(size) < 0.2, 7, rng.integers(-5, num_rows + 5, size)).astype(np.int32)
    gradients = rng.choice(np.float32([-0.5, -0.25, 0.25, 0.5]), (size, 1))
    optimizer = SGD(1.0, use_gradient_accumulation=False, clip_weight_min=-1.0, clip_weight_max=0.75)
    table, _ = jax.jit(lambda *o: sparse_update(optimizer, *o))(jnp.zeros((num_rows, 1)), {}, ids, gradients, 0)
    expected = np.zeros(num_rows)
    for i, g in zip(ids, gradients[:, 0], strict=True):
        if 0 <= i < num_rows:
            expected[i] = np.clip(expected[i] - g, -1.0, 0.75)
    assert np.unique(expected).size > 3
    np.testing.assert_array_equal(table[:, 0], expected)


@pytest.mark.parametrize("optimizer", LAZY, ids=lambda o: o.name)
def test_donated_tables_are_updated_in_place_at_a_cost_flat_in_the_vocabulary(optimizer):
    def compile_at(num_rows):
        table = jax.ShapeDtypeStruct((num_rows, 16), jnp.float32)
        slots = {name: table for name in optimizer.slot_names}
        ids, gradients = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 16), jnp.float32)
        update = jax.jit(lambda *o: sparse_update(optimizer, *o), donate_argnums=(0, 1))
        return update.lower(table, slots, ids, gradients, jax.ShapeDtypeStruct((), jnp.int32)).compile()

    small, large = (compile_at(num_rows).memory_analysis() for num_rows in (10_000, 1_000_000))
    assert large.alias_size_in_bytes == (1 + len(optimizer.slot_names)) * 1_000_000 * 16 * 4
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 1_000_000


def test_donation_gives_what_the_undonated_update_gives():
    rng = np.random.default_rng(3)
    table, ids = rng.normal(size=(11, 3)).astype(np.float32), rng.integers(-1, 12, 24, np.int32)
    gradients = rng.normal(size=(24, 3)).astype(np.float32)
    optimizer = Adam(0.1, weight_decay_factor=0.01)
    expected = sparse_update(optimizer, table, optimizer.init_slots(table.shape), ids, gradients, 2)
    update = jax.jit(lambda *o: sparse_update(optimizer, *o), donate_argnums=(0, 1))
    donated = jnp.array(table)
    result = update(donated, optimizer.init_slots(table.shape), ids, gradients, 2)
    assert donated.is_deleted()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), result, expected)


def test_one_by_one_in_a_shard_map_that_checks_what_varies():
    optimizer = SGD(1.0, use_gradient_accumulation=False, clip_weight_max=0.5)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("x")
    update = jax.shard_map(
        lambda table, ids, gradients: sparse_update(optimizer, table, {}, ids, gradients, 0)[0],
        mesh=mesh,
        in_specs=(split, split, split),
        out_specs=split,
    )
    table = jax.jit(update)(
        jnp.zeros((4, 1)), jnp.array([1, 1, 1, 0, 2, 9]), jnp.array([[-1.0], [2.0], [1.0]] * 2)
    )
    # A third occurrence comes after two others: min(0 + 1, 0.5) - 2 - 1.
    assert table[:, 0].tolist() == [0.0, -2.5, 0.5, 0.0]


def test_learning_rate_can_be_passed_in():
    optimizer = SGD(lambda: 0.5)
    update = jax.jit(lambda *o, **k: sparse_update(optimizer, *o, **k))
    operands = (jnp.zeros((2, 1)), {}, np.array([1]), np.ones((1, 1), np.float32), 0)
    table, _ = update(*operands, learning_rate=optimizer.learning_rate_at(0))
    assert table[:, 0].tolist() == [0.0, -0.5]
    with pytest.raises(ValueError, match="a compiled function would call only once; call learning_rate_at"):
        update(*operands)
