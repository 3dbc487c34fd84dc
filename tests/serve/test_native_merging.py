"""Rows that native code puts together in the buffers of a rung are those that numpy puts there."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import FeatureConfig, TableConfig
from jaxembed.serve import EmbeddingForServing, ServingFunction, native_packing
from jaxembed.serve.buffers import Buffers
from jaxembed.serve.features import served_features
from jaxembed.serve.ladder import Rung
from jaxembed.serve.layout import Layout
from jaxembed.serve.native_packing import merge
from jaxembed.serve.packing import Packed
from jaxembed.serve.rows import Rows, concatenate

# Not in `make sanitize`, which would pass having tested nothing.
pytestmark = pytest.mark.skipif(
    native_packing._MERGE is None and "JAXEMBED_SANITIZED" not in os.environ,
    reason="the native code was not built",
)

LIMIT, DENSE = 3, ((2,), (), (0,), (2, 2))
NAMES = ("a", "b", "c")
CONFIG = {name: FeatureConfig(TableConfig(50, 2, combiner="sum", name=name)) for name in NAMES}


def buffers_of(batch, weighted=True, dense=DENSE, limit=LIMIT):
    features = served_features(CONFIG, limit, NAMES if weighted else ())
    buffers = Buffers(Layout(features, shared=True), Rung(batch, limit), dense)
    for array in (buffers.ids, buffers.splits, *buffers.dense):
        array[...] = 77
    return buffers


def rows_of(seed, rows, *, weighted=True, gap=0, padding=0, most=LIMIT, dense=DENSE):
    """Rows whose first split is `gap`, as are those between the features, with splits behind those that count."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, most + 1, (len(NAMES), rows))
    splits = np.full((len(NAMES), rows + 1 + padding), 2**31 - 1, np.int32)
    at = 0
    for f in range(len(NAMES)):
        at += gap
        splits[f, : rows + 1] = at + np.concatenate([[0], np.cumsum(lengths[f])])
        at = splits[f, rows]
    ids = rng.integers(0, 50, at + gap).astype(np.int32)
    weights = rng.normal(size=len(ids)).astype(np.float32) if weighted else None
    arrays = [rng.normal(size=(rows, *shape)).astype(np.float32) for shape in dense]
    return Rows(Packed(rows, ids, splits, weights), arrays)


def in_numpy(parts, buffers):
    rows = concatenate(parts)
    layout = Layout(served_features(CONFIG, LIMIT, NAMES if buffers.weights is not None else ()), shared=True)
    layout.copy(rows.packed, 0, len(rows), Rung(buffers.batch, LIMIT), buffers)
    buffers.write_dense(rows.dense, len(rows))


def check_same(parts, batch, weighted=True):
    found, expected = buffers_of(batch, weighted), buffers_of(batch, weighted)
    assert merge(tuple(parts), found)
    in_numpy(parts, expected)
    total = expected.splits[-1, -1]
    np.testing.assert_array_equal(found.splits, expected.splits)
    np.testing.assert_array_equal(found.ids[:total], expected.ids[:total])
    assert (found.ids[total:] == 77).all()
    if weighted:
        np.testing.assert_array_equal(found.weights[:total], expected.weights[:total])
    for array, other in zip(found.dense, expected.dense, strict=True):
        np.testing.assert_array_equal(array, other)


KINDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "rows": st.integers(0, 4),
        "gap": st.integers(0, 2),
        "padding": st.integers(0, 2),
        "most": st.integers(0, LIMIT),
    }
)


@given(st.lists(KINDS, min_size=1, max_size=6), st.booleans(), st.integers(0, 3))
def test_same_as_numpy(drawn, weighted, further):
    parts = [rows_of(weighted=weighted, **options) for options in drawn]
    check_same(parts, max(sum(map(len, parts)), 1) + further, weighted)


def test_weights_of_features_without_any_are_not_looked_at():
    parts = [rows_of(0, 2), rows_of(1, 2, weighted=False)]
    check_same(parts, 4, weighted=False)
    assert not merge(tuple(parts), buffers_of(4))


def test_splits_of_part_of_a_wider_array():
    part = rows_of(0, 3, padding=5)
    view = part.packed.splits[:, :4]
    assert not view.flags.c_contiguous
    check_same([Rows(Packed(3, part.packed.ids, view, part.packed.weights), part.dense), rows_of(1, 1)], 4)


def test_long_rows_let_go_of_the_interpreter():
    parts = tuple(rows_of(seed, 2, weighted=False, most=20_000, dense=()) for seed in range(3))
    found = buffers_of(6, False, (), 20_000)
    assert merge(parts, found)
    merged = concatenate(parts).packed
    assert len(merged.ids) > 1 << 16
    np.testing.assert_array_equal(found.ids[: len(merged.ids)], merged.ids)
    np.testing.assert_array_equal(found.splits, merged.splits)


def changed(part=None, **fields):
    """Two rows with something else in place of one field."""
    part = part or rows_of(0, 2)
    dense = fields.pop("dense", part.dense)
    values = {name: getattr(part.packed, name) for name in ("rows", "ids", "splits", "weights")}
    return Rows(Packed(**values | fields), dense)


def with_split(feature, at, value):
    splits = rows_of(0, 2).packed.splits.copy()
    splits[feature, at] = value
    return changed(splits=splits)


class Subclass(np.ndarray):
    """Whose items might be anything."""


PART = rows_of(0, 2)
D = PART.dense
UNALIGNED = np.zeros(4 * len(PART.packed.ids) + 1, np.int8)[1:].view(np.int32)
UNUSUAL = {
    "more rows than the splits": changed(rows=3),
    "rows below 0": changed(rows=-1),
    "rows of many digits": changed(rows=2**70),
    "rows that are none": changed(rows=None),
    "int64 ids": changed(ids=PART.packed.ids.astype(np.int64)),
    "uint32 ids": changed(ids=PART.packed.ids.astype(np.uint32)),
    "swapped ids": changed(ids=PART.packed.ids.astype(">i4")),
    "strided ids": changed(ids=np.repeat(PART.packed.ids, 2)[::2]),
    "unaligned ids": changed(ids=UNALIGNED),
    "ids of rank 2": changed(ids=np.stack([PART.packed.ids] * 2, axis=1)),
    "a number of ids": changed(ids=np.array(3, np.int32)),
    "a subclass": changed(ids=PART.packed.ids.view(Subclass)),
    "a list": changed(ids=PART.packed.ids.tolist()),
    "too few ids": changed(ids=PART.packed.ids[:-1]),
    "too few weights": changed(weights=PART.packed.weights[:-1]),
    "float64 weights": changed(weights=PART.packed.weights.astype(np.float64)),
    "int64 splits": changed(splits=PART.packed.splits.astype(np.int64)),
    "splits in columns": changed(splits=np.asfortranarray(PART.packed.splits)),
    "splits of rank 1": changed(splits=PART.packed.splits[0]),
    "splits of fewer features": changed(splits=PART.packed.splits[:-1]),
    "a first split below 0": with_split(0, 0, -1),
    "a first split behind the last": with_split(0, 0, 2**31 - 1),
    "a last split behind the ids": with_split(2, 2, len(PART.packed.ids) + 1),
    "a last split of many ids": with_split(2, 2, 2**31 - 1),
    "a last split below 0": with_split(1, 2, -(2**31)),
    "fewer dense inputs": changed(dense=D[:-1]),
    "more dense inputs": changed(dense=[*D, D[0]]),
    "a tuple of dense inputs": changed(dense=tuple(D)),
    "dense inputs of fewer rows": changed(dense=[D[0][:1], *D[1:]]),
    "dense inputs of more rows": changed(dense=[np.concatenate([D[0], D[0]]), *D[1:]]),
    "wider dense inputs": changed(dense=[np.zeros((2, 3), np.float32), *D[1:]]),
    "dense inputs of another rank": changed(dense=[*D[:3], np.zeros((2, 4), np.float32)]),
    "float64 dense inputs": changed(dense=[D[0].astype(np.float64), *D[1:]]),
    "strided dense inputs": changed(dense=[np.asfortranarray(D[0]), *D[1:]]),
    "no dense array": changed(dense=[D[0], None, *D[2:]]),
}


@pytest.mark.parametrize("part", UNUSUAL.values(), ids=UNUSUAL)
def test_leaves_what_is_wrong_or_unusual(part):
    for parts in ((part,), (part, PART), (PART, part)):
        assert not merge(parts, buffers_of(4))
    assert merge((PART, PART), buffers_of(4))


def test_leaves_what_there_is_no_room_for():
    assert not merge((PART, rows_of(1, 3)), buffers_of(4))
    assert not merge((), buffers_of(4))
    for name in ("ids", "weights"):
        buffers = buffers_of(4)
        setattr(buffers, name, getattr(buffers, name)[: len(PART.packed.ids)])
        assert merge((PART,), buffers)
        setattr(buffers, name, getattr(buffers, name)[:-1])
        assert not merge((PART,), buffers)
    buffers = buffers_of(4)
    buffers.splits = buffers.splits[:, :-1]
    assert not merge((PART,), buffers)


def test_nothing_is_kept():
    kept = [PART, PART.packed, PART.packed.ids, PART.packed.splits, PART.packed.weights, *D]
    counts = list(map(sys.getrefcount, kept))
    buffers = buffers_of(4)
    for _ in range(100):
        assert merge((PART, PART), buffers)
        assert not merge((PART, UNUSUAL["no dense array"]), buffers)
        assert not merge((PART, UNUSUAL["too few ids"]), buffers)
    assert list(map(sys.getrefcount, kept)) == counts


def model(params, activations, dense):
    return {"sum": sum(activations.values()) + dense["x"], "x": dense["x"], "twice": 2 * dense["x"]}


@pytest.mark.parametrize("row_lengths", [None, (1,)])
def test_results_are_the_same_without_it_and_stay(monkeypatch, row_lengths):
    tables = {name: np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) for name in NAMES}
    embedding = EmbeddingForServing(CONFIG, tables)
    options = {"weighted": NAMES, "batch_sizes": (2, 6), "max_ids_per_row": LIMIT, "row_lengths": row_lengths}
    function = ServingFunction(embedding, model, dense_inputs={"x": 2}, **options).warm_up()
    requests = [
        [rows_of(seed * 8 + i, i, most=seed % (LIMIT + 1), dense=((2,),)) for i in range(1, seed % 4 + 2)]
        for seed in range(8)
    ]
    with pytest.MonkeyPatch.context() as patch:
        # Of one row length, nothing is too long for the first rung that is tried.
        few = [parts for parts in requests if sum(map(len, parts)) <= 6 and row_lengths is None]
        patch.setattr("jaxembed.serve.function.concatenate", None)
        assert [len(function.run(*parts)) for parts in few] == [3] * len(few)
    found = [function.run(*parts) for parts in requests]
    monkeypatch.setattr(native_packing, "_MERGE", None)
    for parts, result in zip(requests, found, strict=True):
        expected = function.run(*parts)
        for name, array in expected.items():
            np.testing.assert_allclose(result[name], array, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(result["x"], np.concatenate([part.dense[0] for part in parts]))
    assert function.compile_count == len(function.rungs)


@pytest.mark.parametrize("width", [3, 20_000])
def test_outputs_that_are_a_dense_input_are_not_overwritten(width):
    """Large ones are in memory of their own, which is not kept for the next request."""
    tables = {name: np.ones((50, 2), np.float32) for name in NAMES}
    options = {"weighted": NAMES, "batch_sizes": (2, 64), "max_ids_per_row": LIMIT}
    embedding = EmbeddingForServing(CONFIG, tables)
    function = ServingFunction(embedding, lambda p, a, d: d["x"], dense_inputs={"x": width}, **options)
    function.warm_up()
    given, found = [], []
    for seed in range(4):
        parts = [rows_of(seed * 8 + i, i, most=LIMIT, dense=((width,),)) for i in range(1, seed + 2)]
        given.append(np.concatenate([part.dense[0] for part in parts]))
        found.append(function.run(*parts))
    for array, result in zip(given, found, strict=True):
        np.testing.assert_array_equal(result, array)
    pooled = [buffers.dense[0] for spare in function._pool._spare.values() for buffers in spare]
    assert not any(np.shares_memory(result, array) for result in found for array in pooled)
    assert sum(array.nbytes for array in pooled) <= len(function.rungs) * (1 << 22)
