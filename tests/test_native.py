"""The kernel behind its XLA handler: what it must refuse, and where it must not read or write.

`make sanitize` runs these tests with AddressSanitizer and UndefinedBehaviorSanitizer, too, beside
tests/native/kernel_test.cc, which sweeps the kernel itself.
"""

import os
import platform

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxembed import QuantizationConfig, backend, bag_native, built, kernel, use_backend
from jaxembed.bag import Bag, BagOperands, embedding_bags
from jaxembed.inputs import ragged
from jaxembed.quantization import quantize
from jaxembed.quantized_table import QuantizedTable
from jaxembed.resident_table import ResidentTable, TableForm, addresses
from jaxembed.serve.native_packing import NativePacker
from jaxembed.splits import SplitsRow

SANITIZED = "JAXEMBED_SANITIZED" in os.environ
# `make sanitize` that finds no kernel has tested nothing, and must not pass.
pytestmark = pytest.mark.skipif(not kernel.available() and not SANITIZED, reason="the kernel was not built")

# In the order of `Field` in decode.h.
FIELDS = dict.fromkeys(("layout", "combiner", "prune_ids", "prune_weights", "num_bags"), 0)
FIELDS |= {"sequence_length": 0, "row_type": 0, "dim": 0, "splits_row": 0, "vocabulary": -1, "table_row": 0}
FIELDS |= {"to": 0, "column": 0, "rows": 0, "codebook": -1}
FIELDS |= {"ids": 1, "bags": 2, "columns": -1, "weights": -1}
RAGGED, SPARSE = 1, 2
# What jax makes of it depends on whether the call was dispatched at once.
INVALID_ARGUMENT = (ValueError, jax.errors.JaxRuntimeError)
TABLE = jnp.arange(18, dtype=jnp.float32).reshape(6, 3)
IDS, SPLITS = jnp.array([1, 2, 3, 4], jnp.int32), jnp.array([0, 1, 4], jnp.int32)


def call(arguments=(TABLE, IDS, SPLITS), out=(2, 3), dtype=np.float32, counts=1, numbers=None, **fields):
    """The kernel with hand-made numbers, as no caller of embedding_bags could send them."""
    fields = FIELDS | {"layout": RAGGED, "num_bags": 2, "dim": 3} | fields
    numbers = list(fields.values()) if numbers is None else numbers
    results = [jax.ShapeDtypeStruct(out, dtype), jax.ShapeDtypeStruct((counts,), np.int32)]
    run = jax.ffi.ffi_call("jaxembed_embedding_bags", results)
    return run(*arguments, meta=np.array(numbers, np.int64))


@pytest.mark.skipif(not SANITIZED, reason="only for `make sanitize`")
@pytest.mark.parametrize(
    "name", ["libjaxembed_native", "libjaxembed_requests", "jaxembed_packing.abi3", "jaxembed_ragged.abi3"]
)
def test_the_library_under_test_is_the_instrumented_one(name):
    path = built.find(f"{name}.so")
    assert path is not None
    assert b"__asan_init" in path.read_bytes()
    assert kernel.available(), kernel.unavailable_reason()
    assert NativePacker.available
    assert ragged._init_for is not None


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not os.path.exists("/proc/cpuinfo"), reason="Linux on x86-64 alone tells"
)
def test_the_instruction_set_is_the_largest_of_this_processor():
    """As of compilers from GCC 11 and Clang 12 on, see CMakeLists.txt."""
    with open("/proc/cpuinfo") as lines:
        flags = set(next(line for line in lines if line.startswith("flags")).split())
    levels = {
        "v3": {"avx2", "fma", "bmi1", "bmi2", "movbe", "f16c", "abm"},
        "v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"},
    }
    expected = "baseline"
    for level, needs in levels.items():
        if not needs <= flags:
            break
        expected = level
    assert kernel.instruction_set() == expected


def test_hand_made_numbers_are_those_that_are_sent():
    out, bad = call()
    np.testing.assert_array_equal(out, [TABLE[1], TABLE[2] + TABLE[3] + TABLE[4]])
    assert int(bad[0]) == 0


HUGE = 2**62
NOWHERE = (jnp.zeros((2, 4), jnp.int32), IDS, SPLITS)
REFUSED = {
    "layout": ({"layout": 3}, r"layout must be in \[0, 2\], got 3"),
    "negative layout": ({"layout": -1}, "layout must be in"),
    "combiner": ({"combiner": HUGE}, "combiner must be in"),
    "row type": ({"row_type": 7}, r"row type must be in \[0, 6\], got 7"),
    "bags": ({"num_bags": -1}, "num_bags must be in"),
    "many bags": ({"num_bags": HUGE}, "num_bags must be in"),
    "more bags than splits": (
        {"num_bags": 3},
        r"row_splits must be int32 or int64 \[B \+ 1\] = \[4\], got int32 \[3\]",
    ),
    "sequence": ({"sequence_length": -1}, "sequence_length must be in"),
    "long sequence": ({"sequence_length": 2**31 - 1, "dim": 2**31 - 1}, "is too large"),
    "output": (
        {"sequence_length": 5},
        r"hold 15 columns of float32 from 0 on for each of 2 bags, got float32 \[2, 3\]",
    ),
    "no output": ({"to": 1}, "columns of float32 from 0 on for each of 2 bags, got none"),
    "negative output": ({"to": -1}, "got none"),
    "columns beyond": ({"column": 1}, r"must hold 3 columns of float32 from 1 on .* got float32 \[2, 3\]"),
    "negative column": ({"column": -HUGE}, "columns of float32 from -4611686018427387904 on"),
    "huge column": ({"column": HUGE}, "columns of float32 from 4611686018427387904 on"),
    "dim": ({"dim": 0}, r"dim must be in \[1, "),
    "wide dim": ({"dim": 4}, r"a table of dim 4 must be float32 \[V, 4\], got float32 \[6, 3\]"),
    "rows of another type": ({"row_type": 1}, r"must be bfloat16 \[V, 3\], got float32"),
    "no table": ({"rows": -1}, "got none"),
    "table out of range": ({"rows": HUGE}, "got none"),
    "table for addresses": (
        {"vocabulary": 6},
        r"addresses of tables must be int32 \[T, 4\] .* float32 \[6, 3\]",
    ),
    "addresses for a table": ({"arguments": NOWHERE}, r"must be float32 \[V, 3\], got int32 \[2, 4\]"),
    "row of addresses": ({"arguments": NOWHERE, "vocabulary": 6, "table_row": 2}, "with T above 2"),
    "negative row": ({"arguments": NOWHERE, "vocabulary": 6, "table_row": -1}, "with T above -1"),
    "huge vocabulary": ({"arguments": NOWHERE, "vocabulary": HUGE}, "for a table of 4611686018427387904 rows"),
    "no address": (
        {"arguments": NOWHERE, "vocabulary": 6, "table_row": 1},
        "row 1 of the addresses of tables holds none",
    ),
    "no ids": ({"ids": -5}, "ids must be int32 or int64"),
    "ids of another type": ({"ids": 0}, "ids must be int32 or int64"),
    "no splits": ({"bags": 3}, r"row_splits must be int32 or int64 \[B \+ 1\] = \[3\], got none"),
    "row of splits": (
        {"splits_row": 1},
        r"row 1 of row_splits must be one of int32 or int64 \[F, B \+ 1\] = \[F, 3\]",
    ),
    "weights of another type": ({"weights": 1}, r"weights must be float32 \[N\] = \[4\], got int32 \[4\]"),
    "row ids": ({"layout": SPARSE}, r"row ids must be int32 or int64 \[N\] = \[4\], got int32 \[3\]"),
    "positions": ({"layout": SPARSE, "bags": 1, "sequence_length": 1}, "columns must be int32 or int64"),
    "dense": ({"layout": 0}, "the dense layout needs as many bags as ids, got 2 bags for 4 ids"),
    "dense sequence": ({"layout": 0, "sequence_length": 1}, "the dense layout has no sequences"),
    "few numbers": ({"numbers": [1] * 16}, "make up a call; got 16 numbers"),
    "no numbers": ({"numbers": []}, r"counts of bad ids must be int32 \[F\] = \[0\]"),
    "numbers of two features": ({"numbers": [0] * 38}, r"counts of bad ids must be int32 \[F\] = \[2\]"),
    "counts": ({"counts": 2}, r"counts of bad ids must be int32 \[F\] = \[1\]"),
    "output type": ({"dtype": np.int32}, "the output must hold 3 columns of float32 .* got int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_numbers_are_refused(case):
    fields, message = REFUSED[case]
    with pytest.raises(INVALID_ARGUMENT, match=message) as error:
        jax.block_until_ready(call(**fields))
    assert "INVALID_ARGUMENT" in str(error.value)
    assert "of feature 0" not in str(error.value) or "; make the operands fit the Bag, or" in str(error.value)


@pytest.mark.parametrize("splits", [[0, 3, 1], [-1, 0, 4], [0, 1, 5], [0, 2**31 - 1, 4]])
def test_splits_that_do_not_rise_are_refused(splits):
    with pytest.raises(
        INVALID_ARGUMENT,
        match=r"feature 0 \(from 0, of 1 that the kernel looks up, in the order of their keys\): row_splits must not decrease and lie in \[0, 4\], .*; make them on the host",
    ):
        jax.block_until_ready(call((TABLE, IDS, jnp.array(splits, jnp.int32))))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
def test_row_splits_that_features_share_are_read_in_place(dtype):
    with jax.enable_x64():
        splits = jnp.array([[0, 1, 4], [1, 1, 2]], dtype)
        outs = [call((TABLE, IDS, splits), splits_row=row)[0] for row in (0, 1)]
    np.testing.assert_array_equal(outs[0], [TABLE[1], TABLE[2] + TABLE[3] + TABLE[4]])
    np.testing.assert_array_equal(outs[1], [[0, 0, 0], TABLE[2]])
    for row in (2, -1):
        with pytest.raises(INVALID_ARGUMENT, match=rf"row {row} of row_splits .*, got int32 \[2, 3\]"):
            jax.block_until_ready(call((TABLE, IDS, jnp.asarray(splits, jnp.int32)), splits_row=row))
    with pytest.raises(INVALID_ARGUMENT, match=r"row 0 of row_splits .* \[F, 4\], got int32 \[2, 3\]"):
        jax.block_until_ready(call((TABLE, IDS, jnp.asarray(splits, jnp.int32)), num_bags=3, out=(3, 3)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dim", [31, 32, 64, 256])
def test_long_bags_of_row_wise_codes_lose_no_digits(kind, dim):
    """Codes and biases must not be summed apart: both sums are large where the result is not."""
    rng = np.random.default_rng(dim)
    table = quantize(rng.normal(size=(500, dim)).astype(np.float32), kind)
    ids = rng.integers(0, 500, 4000).astype(np.int32)
    (out,), _ = embedding_bags(
        [Bag("ragged", 1)], [BagOperands(table, ids, np.array([0, 4000], np.int32))], "native"
    )
    expected = table.host_rows(0, 500).astype(np.float64)[ids].sum(axis=0)
    assert np.sqrt(np.mean((out[0] - expected) ** 2) / np.mean(expected**2)) < 1e-5


@pytest.mark.parametrize("dim", [8, 20, 64, 128])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_bad_id_changes_no_bit_of_other_bags(kind, dim):
    """Other code takes the bags of a piece of work from one with a bad id on, and how the work is cut depends on the threads."""
    rng = np.random.default_rng(dim)
    rows = rng.normal(size=(100, dim)).astype(np.float32)
    table = quantize(rows, kind) if kind.startswith("int") else jnp.asarray(rows, kind)
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 12, 300))]).astype(np.int32)
    ids = rng.integers(0, 100, splits[-1]).astype(np.int32)
    weights = rng.random(ids.size, np.float32)
    ids[:3] = 0
    splits[1:4] = 3
    bags, outs = [Bag("ragged", 300, combiner) for combiner in ("sum", "mean", "sqrtn")], []
    for first in (0, 100):
        ids[0] = first
        operands = BagOperands(table, jnp.asarray(ids), jnp.asarray(splits), weights=jnp.asarray(weights))
        found, bad = embedding_bags(bags, [operands] * 3, "native")
        assert bad.tolist() == [first == 100] * 3
        outs.append(np.stack(found)[:, 1:])
    np.testing.assert_array_equal(*outs, strict=True)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dim", [8, 20, 128])
def test_an_infinite_weight_is_one_of_the_row_not_of_its_bias(kind, dim):
    rows = jnp.full((2, dim), 3.0).at[1].set(-2.0)  # constant rows: codes or scales of 0
    table = quantize(np.asarray(rows), kind)
    ids, splits = jnp.array([0, 1], jnp.int32), jnp.array([0, 1, 2], jnp.int32)
    operands = BagOperands(table, ids, splits, weights=jnp.full(2, jnp.inf))
    for path in ("native", "xla"):
        (out,), _ = embedding_bags([Bag("ragged", 2, "sum")], [operands], path)
        np.testing.assert_array_equal(out, np.repeat([[np.inf], [-np.inf]], dim, axis=1))


@pytest.mark.parametrize("layout", ["ragged", "sparse"])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_not_above_0_are_pruned(combiner, layout):
    """NaN among them, as TensorFlow prunes it, and whatever their ids are."""
    weights = jnp.array([1.0, jnp.nan, 2.0, -1.0, -jnp.nan, 0.0, 0.5])
    ids, bags = jnp.array([1, 2, 3, 4, 9, 5, 9], jnp.int32), jnp.array([0, 2, 5, 7], jnp.int32)
    if layout == "sparse":
        bags = jnp.array([0, 0, 1, 1, 1, 2, 2], jnp.int32)
    bag = Bag(layout, 3, combiner, prune_weights=True)
    results = [
        embedding_bags([bag], [BagOperands(TABLE, ids, bags, weights=weights)], path)
        for path in ("native", "xla")
    ]
    expected = np.stack([TABLE[1], 2 * TABLE[3] if combiner == "sum" else TABLE[3], np.zeros(3)])
    for (out,), bad in results:
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        assert bad.tolist() == [1]


def test_a_kernel_of_other_sources_is_not_called(monkeypatch):
    monkeypatch.setattr(kernel, "_NUMBERS", 16)
    kernel._load.cache_clear()
    try:
        assert "was built from the sources of another version; reinstall" in str(kernel.unavailable_reason())
    finally:
        monkeypatch.undo()
        kernel._load.cache_clear()
    assert kernel.available()


def test_a_kernel_for_another_jaxlib_says_how_to_get_one(monkeypatch):
    def register(*args, **options):
        raise RuntimeError("of another version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    kernel._load.cache_clear()
    try:
        reason = str(kernel.unavailable_reason())
        assert "another jaxlib than the one here (of another version)" in reason
        assert "upgrade jaxlib, or reinstall jaxembed with `pip install --no-build-isolation`" in reason
        assert "compiler" not in reason
        with (
            pytest.raises(RuntimeError, match=r"upgrade jaxlib.*, or take the plain JAX path"),
            use_backend("native"),
        ):
            backend()
    finally:
        monkeypatch.undo()
        kernel._load.cache_clear()


@pytest.mark.parametrize("path", ["native", "xla"])
def test_bags_by_a_row_of_shared_splits(path):
    splits = jnp.array([[0, 1, 4], [1, 1, 2]], jnp.int32)
    bags = [Bag("ragged", 2, "mean")] * 2

    def total(table, splits):
        operands = [BagOperands(table, IDS, SplitsRow(splits, row)) for row in (0, 1)]
        outs, _ = embedding_bags(bags, operands, path)
        return sum(jnp.sum(out**2) for out in outs), outs

    (_, outs), gradient = jax.value_and_grad(total, has_aux=True)(TABLE, splits)
    expected = [
        embedding_bags([bag], [BagOperands(TABLE, IDS, splits[row])], "xla")[0] for row, bag in enumerate(bags)
    ]
    for out, (wanted,) in zip(outs, expected, strict=True):
        np.testing.assert_allclose(out, wanted, rtol=1e-6)
    assert gradient.shape == TABLE.shape
    vmapped, _ = jax.vmap(lambda s: total(TABLE, s))(jnp.stack([splits, splits]))
    np.testing.assert_allclose(vmapped, np.full(2, total(TABLE, splits)[0]), rtol=1e-6)


@pytest.mark.parametrize("path", ["native", "xla"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_table_without_rows(kind, path):
    table = jnp.zeros((0, 3)) if kind == "float32" else QuantizedTable("int8", 3, jnp.zeros((0, 11), jnp.uint8))
    bags = [Bag("ragged", 2, "mean"), Bag("dense", 4, "sum"), Bag("ragged", 2, "sum", sequence_length=2)]
    operands = [BagOperands(table, IDS, SPLITS), BagOperands(table, IDS), BagOperands(table, IDS, SPLITS)]
    outputs, bad_ids = jax.jit(lambda: embedding_bags(bags, operands, path))()
    for output, shape in zip(outputs, [(2, 3), (4, 3), (2, 2, 3)], strict=True):
        np.testing.assert_array_equal(output, np.zeros(shape, np.float32))
    assert bad_ids.tolist() == [4, 4, 3]


@pytest.mark.parametrize("layout", ["ragged", "sparse"])
def test_one_huge_bag_beside_empty_ones(layout):
    """More than two pieces of 1 MiB: several tasks share the bag, and the others stay zero."""
    table = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (500, 32)).astype(np.float32))
    ids = np.random.default_rng(1).integers(0, 500, 60_000).astype(np.int32)
    splits = np.where(np.arange(2001) <= 700, 0, ids.size).astype(np.int32)
    bags = splits if layout == "ragged" else np.full(ids.size, 700, np.int32)
    (out,), bad = embedding_bags([Bag(layout, 2000)], [BagOperands(table, ids, bags)], "native")
    expected = np.zeros((2000, 32), np.float32)
    expected[700] = np.bincount(ids, minlength=500) @ np.asarray(table)
    np.testing.assert_array_equal(out, expected)
    assert int(bad[0]) == 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("dim", [1, 7, 33, 130])
def test_many_features_in_one_call_share_what_they_share(kind, dim):
    rows = jnp.asarray(np.random.default_rng(dim).integers(-8, 8, (40, dim)).astype(np.float32))
    table = quantize(rows, kind) if kind in ("int8", "int4") else rows.astype(kind)
    ids, weights = jnp.arange(12, dtype=jnp.int32) * 3, jnp.arange(12, dtype=jnp.float32) / 4
    splits = jnp.array([0, 0, 5, 5, 12], jnp.int32)
    bags = [Bag("ragged", 4, "mean"), Bag("ragged", 4, sequence_length=3), Bag("dense", 12), Bag("ragged", 0)]
    operands = [
        BagOperands(table, ids, splits, weights=weights),
        BagOperands(table, ids, splits),
        BagOperands(table, ids),
        BagOperands(table, ids, splits[:1]),
    ]
    results = [embedding_bags(bags, operands, path) for path in ("native", "xla")]
    for ours, theirs in zip(*(outputs for outputs, _ in results), strict=True):
        assert ours.shape == theirs.shape
        tolerance = 1e-6 if ours.dtype == jnp.float32 else float(jnp.finfo(ours.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=tolerance, atol=1e-6
        )
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dim", [3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "codes8", "codes4"])
def test_a_row_that_is_not_combined_keeps_its_bits(dtype, dim):
    rng = np.random.default_rng(0)
    odd = np.array([-0.0, 1e-40, -1e-42, np.nan, -np.inf, 1.5], np.float32)  # zeros and subnormals with a sign
    if dtype in ("codes8", "codes4"):
        codebook = np.resize(odd, 256 if dtype == "codes8" else 16)
        shape = (500, dim) if dtype == "codes8" else (500, -(-dim // 2))
        table = QuantizedTable(dtype, dim, rng.integers(0, 256, shape, np.uint8), codebook)
        rows = table.host_rows(0, 500)
    else:
        bits = rng.integers(0, 2**32, (500, dim), np.uint32).astype("u4" if dtype == "float32" else "u2")
        rows = table = bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    ids = rng.integers(0, 500, 20_000).astype(np.int32)
    operands = BagOperands(jax.tree.map(jnp.asarray, table), jnp.asarray(ids))
    lookup = jax.jit(lambda operands: embedding_bags([Bag("dense", ids.size)], [operands], "native")[0][0])
    size = f"u{rows.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(lookup(operands)).view(size), rows[ids].view(size))


@pytest.mark.parametrize("combiner", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("dim", [7, 8, 16, 24, 32, 64, 128, 256])
def test_half_precision_of_any_bits(dim, dtype, combiner):
    """Each value alone, and sums or means of two, rounded to even once; what is not a number stays none."""
    bits = np.random.default_rng(dim).permutation(2**16).astype(np.uint16)
    if dtype == jnp.bfloat16:
        bits[(bits & 0x7F80) == 0] = 0  # XLA's threads take subnormal numbers of float32 for zero
    bits[bits == 0x8000] = 0  # added to zero it loses its sign
    rows = bits[: bits.size // dim * dim].view(dtype).reshape(-1, dim)
    count = len(rows)
    ids = np.concatenate([np.arange(count), np.arange(2 * count) % count]).astype(np.int32)
    splits = np.concatenate([np.arange(count), np.arange(count, 3 * count + 1, 2)]).astype(np.int32)
    (out,), _ = embedding_bags(
        [Bag("ragged", 2 * count, combiner)], [BagOperands(jnp.asarray(rows), ids, splits)], "native"
    )
    wide = rows.astype(np.float32)
    with np.errstate(all="ignore"):  # infinity less infinity, and sums that are too large
        pairs = wide[ids[count:]].reshape(count, 2, dim).sum(axis=1)
        expected = np.concatenate([wide, pairs / 2 if combiner == "mean" else pairs]).astype(dtype)
        number = ~np.isnan(expected)
        if dtype == jnp.bfloat16:
            number = (expected == 0) | (np.abs(expected) >= jnp.finfo(dtype).tiny)
    np.testing.assert_array_equal(np.isnan(np.asarray(out)), np.isnan(expected))
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16)[number], expected.view(np.uint16)[number])


@pytest.mark.parametrize("dim", [1, 7, 8, 16, 32, 64, 128, 256])
def test_float16_at_its_edges(dim):
    """Weights of a row of ones, rounded to even: to infinity from 65520 on, to subnormal numbers, and to zero."""
    tie = 2.0**-25  # half of the least subnormal number
    edges = [65504, 65519.996, 65520, 65536, 1e30, np.inf, np.nan, tie, 1.001 * tie, 3 * tie, 5 * tie]
    edges += [2.0**-14 - tie, 0.999 * (2.0**-14 - tie), 2.0**-14, 2.0**-24, 1e-40, 0]
    rng = np.random.default_rng(dim)
    random = rng.uniform(1, 2, 2000) * 2.0 ** rng.integers(-27, 17, 2000)
    weights = np.concatenate([edges, random]).astype(np.float32)
    weights = np.concatenate([weights, -weights[weights != 0]])
    ids, splits = np.zeros(weights.size, np.int32), np.arange(weights.size + 1, dtype=np.int32)
    operands = BagOperands(jnp.ones((1, dim), jnp.float16), ids, splits, weights=weights)
    (out,), _ = embedding_bags([Bag("ragged", weights.size)], [operands], "native")
    with np.errstate(all="ignore"):
        expected = np.repeat(weights.astype(np.float16)[:, None], dim, axis=1)
    out, number = np.asarray(out), ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_array_equal(out[number], expected[number])


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("dim", [7, 32])
def test_tables_are_found_by_their_addresses(dim, merged):
    rows = np.random.default_rng(dim).integers(-8, 8, (40, dim)).astype(np.float32)
    tables = [rows, rows.astype(jnp.bfloat16), rows.astype(np.float16)]
    tables += [quantize(rows, kind) for kind in ("int8", "int4")]
    tables += [quantize(rows, QuantizationConfig(buckets, -8, 8)) for buckets in (256, 16)]
    tables = jax.tree.map(np.asarray, tables)
    ids, splits = jnp.arange(12, dtype=jnp.int32) * 3 + 15, jnp.array([0, 0, 5, 5, 12], jnp.int32)
    bags = [Bag("ragged", 4, "mean")] * len(tables)
    lookup = bag_native.merged_embedding_bags if merged else bag_native.embedding_bags
    where = addresses(tables)

    def run(given):
        return lookup(bags, [BagOperands(table, ids, splits) for table in given])

    resident = [ResidentTable(where, row, TableForm.of(table)) for row, table in enumerate(tables)]
    found, expected = jax.jit(run)(resident), jax.jit(run)(tables)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found[1], expected[1])
    assert int(found[1][0]) > 0


@pytest.mark.parametrize("what", ["table", "weights", "everything"])
def test_vmap_equals_one_by_one(what):
    """JAX runs the kernel once for each element (its "sequential" rule)."""
    tables = jnp.stack([TABLE, 2 * TABLE, -TABLE])
    weights = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + 1
    ids = jnp.array([[1, 2, 3, 4], [0, 0, 5, 9], [5, 4, 3, -1]], jnp.int32)

    def one(table, ids, weights):
        (out,), bad = embedding_bags(
            [Bag("ragged", 2, "mean")], [BagOperands(table, ids, SPLITS, weights=weights)], "native"
        )
        return out, bad

    axes = {"table": (0, None, None), "weights": (None, None, 0), "everything": (0, 0, 0)}[what]
    arguments = [a if axis == 0 else a[1] for a, axis in zip((tables, ids, weights), axes, strict=True)]
    out, bad = jax.jit(jax.vmap(one, axes))(*arguments)
    for i in range(3):
        expected, expected_bad = one(
            *(a[i] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True))
        )
        np.testing.assert_array_equal(out[i], expected)
        np.testing.assert_array_equal(bad[i], expected_bad)
