"""Stacked, mod-sharded, rotated and padded tables, and the two libraries that lay them out so."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxembed import sparsecore_layout as layout

SHAPES = {"a": (37, 6), "b": (64, 8), "c": (5, 3)}


def stacked_table(**changes):
    table = layout.StackedTable("a", "ab", (37, 6), 4, 20, 8, row_offset=3, rotation=1, padded_rows=40)
    return dataclasses.replace(table, **changes)


def values(name, slot=False):
    """Each value says its table, row and column."""
    rows, dim = SHAPES[name]
    row = 1000 * (ord(name) - ord("a") + 1) + np.arange(rows, dtype=np.float32)
    return row if slot else row[:, None] + np.arange(dim, dtype=np.float32) / 16


def stack(tables, slot=False):
    """The whole stack, written in two blocks a table."""
    out = np.zeros(tables[0].stack_shape[: 1 if slot else 2], np.float32)
    for table in tables:
        whole = values(table.name, slot)
        cut = len(whole) // 3
        table.write_rows(out, 0, whole[:cut])
        table.write_rows(out, cut, whole[cut:])
    return out


@st.composite
def places(draw):
    shards, dim = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rows, extra = draw(st.integers(1, 40)), draw(st.integers(0, 3))
    padded = (-(-rows // shards) + extra) * shards
    offset = draw(st.integers(0, 5))
    shard_rows = offset + padded // shards + draw(st.integers(0, 4))
    width, rotation = dim + draw(st.integers(0, 3)), draw(st.integers(0, shards - 1))
    return layout.StackedTable("t", "s", (rows, dim), shards, shard_rows, width, offset, rotation, padded)


def rows_in_stack(place, ids):
    """The map, an id at a time."""
    shard = (ids + place.rotation) % place.num_shards
    return shard * place.shard_rows + place.row_offset + ids // place.num_shards


@hypothesis.given(place=places(), slot=st.booleans(), data=st.data())
def test_rows_are_where_the_map_says(place, slot, data):
    start = data.draw(st.integers(0, place.shape[0]))
    stop = data.draw(st.integers(start, place.shape[0]))
    stacked = np.full(place.stack_shape[: 1 if slot else 2], -1, np.float32)
    shape = (stop - start,) if slot else (stop - start, place.shape[1])
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    place.write_rows(stacked, start, rows)
    at = rows_in_stack(place, np.arange(start, stop))
    expected = np.full_like(stacked, -1)
    if slot:
        expected[at] = rows
    else:
        expected[at, : place.shape[1]] = rows
    np.testing.assert_array_equal(stacked, expected)
    np.testing.assert_array_equal(place.read_rows(stacked, start, stop), rows)


def test_a_stack_on_disk_is_read_by_slices(tmp_path):
    place = stacked_table()
    whole = stack([place])
    whole.tofile(tmp_path / "stack")
    mapped = np.memmap(tmp_path / "stack", np.float32, "r", shape=place.stack_shape)
    np.testing.assert_array_equal(place.read_rows(mapped, 5, 30), values("a")[5:30])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": 4}, r"Table 'a' of stack 'ab': rotation must be in \[0, 4\), got 4"),
        ({"rotation": -1}, "rotation must be in"),
        ({"width": 5}, "6 columns do not fit into a width of 5"),
        ({"padded_rows": 36}, "a multiple of 4 and at least 37, got 36"),
        ({"padded_rows": 42}, "a multiple of 4 and at least 37, got 42"),
        ({"row_offset": 11}, r"rows \[11, 21\) of a shard are outside of its 20 rows"),
        ({"row_offset": -1}, "outside of its 20 rows"),
        ({"num_shards": 0}, "sizes must be at least 1"),
        ({"shape": (37,)}, r"shape must be \(rows, dim\), got \(37,\)"),
        ({"width": 8.5}, "width must be an int, got 8.5"),
    ],
)
def test_impossible_places_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stacked_table(**changes)


def test_wrong_rows_are_refused():
    place = stacked_table()
    stacked = np.zeros(place.stack_shape, np.float32)
    with pytest.raises(ValueError, match=r"rows \[30, 38\) are outside of \[0, 37\)"):
        place.read_rows(stacked, 30, 38)
    with pytest.raises(ValueError, match=r"the stack must be \[80, 8\] or \[80\], got \[79, 8\]"):
        place.read_rows(stacked[1:], 0, 1)
    with pytest.raises(ValueError, match=r"rows must be float32 \[N, 6\], got float64 \[2, 6\]"):
        place.write_rows(stacked, 0, np.zeros((2, 6)))


def test_tables_of_one_stack_do_not_share_rows():
    first = stacked_table()
    layout.check_stack([first, stacked_table(name="b", row_offset=13, padded_rows=28, shape=(28, 6))])
    with pytest.raises(ValueError, match="tables 'a' and 'b' share rows of a shard"):
        layout.check_stack([first, stacked_table(name="b", row_offset=10)])
    with pytest.raises(ValueError, match="names of their own"):
        layout.check_stack([first, first])
    with pytest.raises(ValueError, match="not of one stack"):
        layout.check_stack([first, stacked_table(name="b", width=16)])
    with pytest.raises(ValueError, match="at least one table"):
        layout.check_stack([])


@pytest.mark.parity
def test_equals_tensorflow():
    pytest.importorskip("tensorflow")
    from tensorflow.python.tpu import (
        _pywrap_sparse_core_layout,
        tpu_embedding_v3_checkpoint_adapter,
        tpu_embedding_v3_utils,
    )

    stacker = _pywrap_sparse_core_layout.SparseCoreLayoutStacker(
        num_partitions=4, sparse_cores_per_partition=4, disable_table_stacking=False
    )
    for name, (rows, dim) in SHAPES.items():
        stacker.AddTable(name, rows, dim, "group", output_samples=8, num_features=1)
    theirs = list(stacker.GetLayouts().tables)
    ours = [layout.from_tensorflow(table) for table in theirs]
    layout.check_stack(ours)
    assert {table.name: table.shape for table in ours} == SHAPES
    # Some rotation must differ from its opposite, or its sign could not be seen.
    assert any(2 * table.rotation % table.num_shards for table in ours)

    stacked = stack(ours)
    rows, width = ours[0].stack_shape
    spec = f"{rows} {width} 0,{rows}:0,{width}"
    expected = tpu_embedding_v3_checkpoint_adapter._shard_from_cpu_to_sc(
        [values(table.name) for table in ours], spec, theirs
    )
    np.testing.assert_array_equal(stacked, expected.numpy())
    for place, table in zip(
        ours, tpu_embedding_v3_checkpoint_adapter._unshard_from_sc_to_cpu(expected, theirs), strict=True
    ):
        np.testing.assert_array_equal(place.read_rows(stacked, 0, place.shape[0]), table.numpy())
    for place, table in zip(ours, theirs, strict=True):
        ids = np.arange(place.shape[0])
        shard, position = tpu_embedding_v3_utils.map_indices_in_shard(
            table.num_sparse_cores, table.sparse_core_shard_row_offset, table.sparse_core_shard_rotation, ids
        )
        np.testing.assert_array_equal(rows_in_stack(place, ids), shard * place.shard_rows + position)


@pytest.mark.parity
@pytest.mark.parametrize("slot", [False, True])
def test_equals_jax_tpu_embedding(slot):
    table_stacking = pytest.importorskip("jax_tpu_embedding.sparsecore.lib.nn.table_stacking")
    from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec

    features = [
        embedding_spec.FeatureSpec(
            name=name,
            table_spec=embedding_spec.TableSpec(
                name=name,
                vocabulary_size=rows,
                embedding_dim=dim,
                initializer=None,
                optimizer=embedding_spec.SGDOptimizerSpec(learning_rate=0.1),
                combiner="sum",
            ),
            input_shape=(16, 1),
            output_shape=(16, dim),
        )
        for name, (rows, dim) in SHAPES.items()
    ]
    table_stacking.auto_stack_tables(features, global_device_count=4, num_sc_per_device=4)
    proto = embedding.create_proto_from_feature_specs(features, 4, 4)
    ours = [table for spec in proto.stacked_table_specs for table in layout.from_jax_tpu_embedding(spec)]
    assert len(proto.stacked_table_specs) == 1
    assert {table.name: table.shape for table in ours} == SHAPES
    # Some rotation must differ from its opposite, or its sign could not be seen.
    assert any(2 * table.rotation % table.num_shards for table in ours)

    if slot:
        for place in ours:
            ids = range(place.shape[0])
            theirs = table_stacking.compute_physical_row_ids(
                place.num_shards, place.stack_shape[0], place.rotation, place.row_offset, np.asarray(ids)
            )
            np.testing.assert_array_equal(stack(ours, slot=True)[theirs], values(place.name, slot=True))
        return
    specs = {feature.name: feature.table_spec for feature in features}
    tables = {name: values(name) for name in specs}
    (theirs,) = table_stacking.stack_and_shard_tables(specs, tables, num_shards=16, pad_value=0.0).values()
    np.testing.assert_array_equal(stack(ours), np.asarray(theirs).reshape(ours[0].stack_shape))
    back = table_stacking.unshard_and_unstack_tables(specs, {ours[0].stack: theirs}, num_shards=16)
    for place in ours:
        np.testing.assert_array_equal(place.read_rows(stack(ours), 0, place.shape[0]), back[place.name])
