"""Figures of tables, summed up by blocks, are those of the whole table."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import QuantizationConfig, TableConfig
from jaxembed.checkpoint import digest_arrays
from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.inspection import statistics, table_stats
from jaxembed.quantization import (
    UnquantizableError,
    quantization_error,
    quantize,
    quantize_as_trained,
    simulate_on_host,
)


def stored(table):
    return StoredArray("table", table, digest_arrays([table])[0])


@pytest.fixture(scope="module")
def table():
    """Several blocks; some rows dead, broken or there twice."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300_000, 9)).astype(np.float32) * rng.lognormal(0, 1, (300_000, 1)).astype(
        np.float32
    )
    rows[[5, 299_999]] = 0
    rows[7, 3], rows[250_000, 0] = np.nan, -np.inf
    rows[[200_000, 200_001, 299_998]] = rows[11]
    return rows


def test_of_the_whole_table(table):
    found = table_stats(stored(table), quantization_config=QuantizationConfig(16, -1, 1))
    assert (found.num_dead, found.num_bad, found.num_duplicates) == (2, 2, 3)
    finite = table[np.isfinite(table).all(axis=1)]
    norms = np.linalg.norm(finite.astype(np.float64), axis=1)
    assert found.norms == pytest.approx((0, np.median(norms), norms.max()), rel=0.006)
    lower, upper, counts = found.norm_counts
    assert counts.sum() == norms.size
    for edge in lower[:: len(lower) // 7]:
        assert counts[lower < edge].sum() == (norms.astype(np.float32) < np.float32(edge)).sum()
    assert (lower[1:] >= upper[:-1]).all()
    assert [found.quantization[how] for how in ("as trained", "int8", "int4")] == [None] * 3
    assert found.quantization["bfloat16"].max > 0


def test_errors_of_quantization(table):
    finite = table[np.isfinite(table).all(axis=1)]
    found = table_stats(stored(finite), quantization_config=QuantizationConfig(16, -1, 1)).quantization
    for how in ("int8", "int4"):
        expected = quantization_error(finite, quantize(finite, how))
        assert found[how].max == expected.max
        assert found[how].mean == pytest.approx(expected.mean, rel=1e-6)
    gap = np.abs(simulate_on_host(finite, QuantizationConfig(16, -1, 1)) - finite)
    assert found["as trained"].max == gap.max()


@pytest.mark.parametrize(
    ("value", "num_buckets", "expected"), [(np.nan, 16, False), (np.inf, 16, True), (np.nan, 999, True)]
)
def test_errors_are_of_tables_that_can_be_quantized(value, num_buckets, expected):
    """Codes stand for no NaN; with more buckets than a code can name, rows stay as they are."""
    rows = np.ones((4, 3), np.float32)
    rows[2, 1] = value
    config = QuantizationConfig(num_buckets, -1, 1)
    found = table_stats(stored(rows), quantization_config=config).quantization
    assert (found["as trained"] is not None) is expected
    assert found["bfloat16"].max == 0
    assert found["int8"] is found["int4"] is None
    quantizing = contextlib.nullcontext() if expected else pytest.raises(UnquantizableError)
    with quantizing:
        quantize_as_trained(rows, TableConfig(4, 3, name="x", quantization_config=config))


def test_duplicates_of_a_large_table_are_estimated(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_DIGESTS", 20_000)
    rows = np.random.default_rng(0).normal(size=(100_000, 3)).astype(np.float32)
    assert table_stats(stored(rows)).num_duplicates == 0
    rows[50_000:] = rows[:50_000]
    assert table_stats(stored(rows)).num_duplicates == pytest.approx(50_000, rel=0.05)


@pytest.mark.parametrize("value", range(4))
def test_large_groups_are_counted_whether_in_the_sample_or_not(monkeypatch, value):
    monkeypatch.setattr(statistics, "MAX_DIGESTS", 20_000)
    rows = np.random.default_rng(value).normal(size=(100_000, 3)).astype(np.float32)
    rows[::2] = 1 + value
    assert table_stats(stored(rows)).num_duplicates == 49_999
    rows[:] = 1 + value
    assert table_stats(stored(rows)).num_duplicates == 99_999


def test_duplicates_are_never_more_than_the_rows(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_DIGESTS", 1)
    found = statistics._Duplicates(64)
    for start in range(0, 64, 8):  # groups too small to be large
        found.add(np.repeat(np.arange(start, start + 8, 2, dtype=np.float32), 2)[:, None])
    assert found.count() < 64


def test_a_constant_table_keeps_one_digest():
    found = statistics._Duplicates(4000)
    for _ in range(4):
        found.add(np.full((1000, 3), 0.5, np.float32))
        assert [part.size for part, _ in found._new] == [1] * len(found._new)
    assert found.count() == 3999
    assert found._kept[0].size == 1
    assert statistics._Duplicates(0).count() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_errors_of_many_buckets_are_those_of_the_type(dtype):
    """Training looks up values that are rounded to the table's type."""
    rows = np.random.default_rng(0).uniform(-1, 1, (100, 8)).astype(jnp.dtype(dtype))
    config = QuantizationConfig(1000, -1, 1)
    trained = quantize_as_trained(rows, TableConfig(100, 8, name="x", quantization_config=config, dtype=dtype))
    gap = np.abs(trained.astype(np.float32) - rows.astype(np.float32))
    found = table_stats(stored(rows), quantization_config=config).quantization["as trained"]
    assert found.max == gap.max()


@given(
    st.integers(1, 40), st.integers(1, 9), st.sampled_from([np.float32, np.float16, np.int8]), st.integers(1, 4)
)
def test_duplicates_are_counted_exactly(num_rows, dim, dtype, values):
    rows = np.random.default_rng(num_rows).integers(1, 1 + values, (num_rows, dim)).astype(dtype)
    distinct = len({row.tobytes() for row in rows})
    assert table_stats(stored(rows)).num_duplicates == num_rows - distinct


def test_nearest_rows_are_those_of_the_whole_table(table):
    found = table_stats(stored(table), num_samples=4).neighbours
    assert len(found) == 4
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    for row, neighbours in found.items():
        similarities = unit @ unit[row]
        similarities[row] = -np.inf
        similarities[~np.isfinite(similarities)] = -np.inf
        best = np.sort(similarities)[::-1][:5]
        assert [n.similarity for n in neighbours] == pytest.approx(best.tolist(), abs=1e-5)
        assert all(similarities[n.row] == pytest.approx(n.similarity, abs=1e-5) for n in neighbours)
        assert row not in [n.row for n in neighbours]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, 3.4e38])
def test_extreme_tables(scale):
    rows = np.full((3, 4), scale, np.float32)
    found = table_stats(stored(rows), num_samples=2)
    assert found.norms == pytest.approx((2 * scale,) * 3, rel=0.01)
    assert found.num_dead == (3 if scale == 0 else 0)
    assert all(n.similarity == pytest.approx(1) for near in found.neighbours.values() for n in near)


def test_damage_is_an_error(table):
    array = stored(table)
    changed = table.copy()
    changed[100_000, 0] += 1
    with pytest.raises(CheckpointError, match="table is damaged: rows"):
        table_stats(StoredArray("table", changed, array.digests))


def test_values_at_the_end_of_float32_have_figures():
    """Some forms cannot hold them, and the norms are beyond float32."""
    greatest = np.finfo(np.float32).max
    rows = np.ones((5, 4), np.float32)
    rows[1], rows[2, 0], rows[2, 1] = greatest, greatest, -greatest
    found = table_stats(stored(rows), quantization_config=QuantizationConfig(16, -1, 1), num_samples=2)
    assert found.num_bad == 0
    assert found.norms == pytest.approx((2, 2, 2 * float(greatest)), rel=0.006)
    assert {how: error is None for how, error in found.quantization.items()} == {
        "as trained": False,
        "bfloat16": True,
        "int8": True,
        "int4": True,
    }
    lower, upper, counts = found.norm_counts
    assert (lower < upper).all()
    assert np.isfinite(upper).all()
    assert counts.tolist() == [3, 2]
