"""What serving_embedding_lookup promises beyond TensorFlow's answers: ids, padding, errors, gradients."""

import collections

import hypothesis
import jax
import jax.export  # not loaded by jax itself
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxembed as je
from jaxembed import kernel
from jaxembed.bag import Bag, BagOperands, embedding_bags, row_gradients
from jaxembed.memory import aligned_empty
from jaxembed.quantization import quantize
from tests.generate import lookups

# Row r of the table holds 100 r + column, so that a wrong row shows.
V, D = 6, 3
ROWS = jnp.arange(V, dtype=jnp.float32)[:, None] * 100 + jnp.arange(D, dtype=jnp.float32)
TABLE = je.TableConfig(V, D, combiner="sum", name="t")
FEATURE = je.FeatureConfig(TABLE)


@pytest.fixture(params=["xla", "native"])
def path(request):
    if request.param == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    with je.use_backend(request.param):
        yield request.param


def lookup(ids, weights=None, feature=FEATURE, table=ROWS, **arguments):
    return je.serving_embedding_lookup(ids, weights, {"t": table}, feature, **arguments)


@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, 2**40, -(2**40), 2**32 + 1])
def test_ids_outside_of_the_vocabulary(path, bad):
    ids = np.array([1, bad, 2], np.int64)
    with pytest.raises(ValueError, match=rf"Feature 'clicks': id {bad} at position 1.* vocabulary_size 6"):
        je.serving_embedding_lookup({"clicks": ids}, None, {"t": ROWS}, {"clicks": FEATURE})
    ragged = je.RaggedTensor(ids, np.array([0, 2, 3]))
    with pytest.raises(ValueError, match=rf"id {bad} at position 1, row 0"):
        lookup(ragged)
    for call in (lookup, jax.jit(lookup, static_argnames="count_bad_ids")):
        out, count = call(ragged, count_bad_ids=True)
        np.testing.assert_array_equal(out, ROWS[jnp.array([1, 2])])
        assert int(count) == 1


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "uint64"])
def test_integers_of_any_type(path, dtype):
    ids = np.array([1, 4, 2], dtype)
    ragged = je.RaggedTensor(ids, np.array([0, 2, 3], dtype))
    sparse = je.SparseTensor(np.array([[0, 0, 1], [99, 1, 0], [99, 1, 1]], dtype), ids, (100, 3, 2))
    for call in (lookup, jax.jit(lookup)):
        np.testing.assert_array_equal(call(ids), ROWS[ids])
        np.testing.assert_array_equal(call(ragged), [ROWS[1] + ROWS[4], ROWS[2]])
        out = call(sparse)
        assert out.shape == (100, 3, D)
        np.testing.assert_array_equal(out[99, 1], ROWS[4] + ROWS[2])
        np.testing.assert_array_equal(jnp.abs(out).sum(axis=(1, 2)).nonzero()[0], [0, 99])


def test_padding_of_a_sparse_tensor_counts_nowhere_whatever_its_other_coordinates(path):
    indices = np.array([[0, 0, 0], [2, -1, 0], [2, 0, 3], [2, -2, 3]])
    sparse = je.SparseTensor(indices, np.array([1, 1, 4, 4]), (2, 3, 4))
    for call in (lookup, jax.jit(lookup)):
        out = call(sparse)
        np.testing.assert_array_equal(out[0, 0], ROWS[1])
        assert not np.any(np.asarray(out).reshape(6, -1)[1:])


def test_sparse_inputs_of_symbolic_sizes():
    n, b = jax.export.symbolic_shape("n, b")
    sizes = jax.ShapeDtypeStruct((b,), jnp.int32)
    shapes = jax.ShapeDtypeStruct((n, 3), jnp.int32), jax.ShapeDtypeStruct((n,), jnp.int32), sizes
    with je.use_backend("xla"):
        exported = jax.export.export(
            jax.jit(lambda i, v, rows: lookup(je.SparseTensor(i, v, (rows.shape[0], 3, 4))))
        )(*shapes)
    indices = np.array([[0, 1, 0], [1, 2, 3], [2, -1, 0]], np.int32)
    out = exported.call(indices, np.array([1, 4, 4], np.int32), np.zeros(2, np.int32))
    np.testing.assert_array_equal(out[0, 1], ROWS[1])
    np.testing.assert_array_equal(out[1, 2], ROWS[4])
    assert np.count_nonzero(np.abs(out).sum(-1)) == 2


def test_uint32_ids_do_not_wrap(path):
    out, count = jax.jit(lookup, static_argnames="count_bad_ids")(
        jnp.array([2**32 - 1, 1], jnp.uint32), count_bad_ids=True
    )
    np.testing.assert_array_equal(out, [[0, 0, 0], ROWS[1]])
    assert int(count) == 1


def test_lists_say_what_to_do():
    with pytest.raises(
        ValueError, match=r"no feature 'a/0/0'.*Convert the lists of 'a' with jaxembed.as_input"
    ):
        je.serving_embedding_lookup({"a": [[1, 2], [3]]}, None, {"t": ROWS}, {"a": FEATURE})


def test_bad_ids_leave_a_mean_alone(path):
    feature = je.FeatureConfig(je.TableConfig(V, D, combiner="mean", name="t"))
    out, count = lookup(je.RaggedTensor.from_lists([[1, -1, 3], [9]]), feature=feature, count_bad_ids=True)
    np.testing.assert_array_equal(out, [ROWS[2], [0, 0, 0]])
    assert int(count) == 2


@pytest.mark.parametrize("host", [jax.device_get, lambda x: jax.tree.map(np.asarray, x), lambda x: x])
def test_what_no_constructor_has_seen_is_checked(path, host):
    for splits, wrong in (([0, 3, 1], "must not decrease"), ([1, 2, 3], "start at 0"), ([0, 1, 9], "end at 9")):
        ids = host(je.RaggedTensor(jnp.array([1, 2, 3]), jnp.array(splits)))
        with pytest.raises(ValueError, match=f"Feature 'f': row_splits .*{wrong}"):
            je.serving_embedding_lookup({"f": ids}, None, {"t": ROWS}, {"f": FEATURE})
    for row in (-1, 7):
        ids = host(je.SparseTensor(jnp.array([[0, 0], [row, 0]]), jnp.array([1, 2]), (2, 4)))
        with pytest.raises(ValueError, match=rf"Feature 'f': entry 1 lies at \[{row}, 0\]"):
            je.serving_embedding_lookup({"f": ids}, None, {"t": ROWS}, {"f": FEATURE})


@pytest.mark.parametrize("weight", [1e38, -1e38, 3.0])
def test_a_mean_by_a_large_weight(path, weight):
    """Whose reciprocal is no normal number."""
    weights = np.array([weight, 1.0], np.float32)
    ids = je.RaggedTensor.from_lists([[2], [3]])
    feature = je.FeatureConfig(je.TableConfig(V, 3, combiner="mean", name="table"))

    def mean(table):
        weighted = je.RaggedTensor(weights, ids.row_splits)
        return je.serving_embedding_lookup({"a": ids}, {"a": weighted}, {"table": table}, {"a": feature})["a"]

    table = ROWS / 400  # the sum itself must not overflow
    np.testing.assert_allclose(mean(table), table[2:4], rtol=1e-6)
    gradient = jax.grad(lambda table: mean(table).sum())(table)
    np.testing.assert_allclose(gradient[2:4], np.ones((2, 3)), rtol=1e-6)


@pytest.mark.parametrize("weight", [1e38, 1e36, 1e19, 1e10])
def test_small_gradients_of_means_by_large_weights(path, weight):
    """None is flushed to zero on its way, of rows or of weights."""
    weights = np.float32([weight, weight / 2, -weight / 4])
    ids, small = je.RaggedTensor.from_lists([[1, 2, 3]]), np.float32([[1e-3] * 3])
    feature = je.FeatureConfig(je.TableConfig(V, 3, combiner="mean", name="t"))

    def loss(table, values):
        return jnp.sum(small * lookup(ids, je.RaggedTensor(values, ids.row_splits), feature, table))

    of_rows, of_weights = jax.grad(loss, (0, 1))(jnp.asarray(ROWS), jnp.asarray(weights))
    shares = np.float64(weights) / np.sum(np.float64(weights))
    np.testing.assert_allclose(of_rows[1:4], shares[:, None] * small, rtol=1e-5)
    if weight < 1e30:  # else they are no normal numbers themselves
        rows = np.float64(ROWS[1:4])
        expected = (rows - shares @ rows) @ small[0] / np.sum(np.float64(weights))
        np.testing.assert_allclose(np.float64(of_weights), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prune", [False, True])
def test_weights_do_nothing_to_dense_ids(path, prune):
    operands = BagOperands(jnp.asarray(ROWS), jnp.array([1, 2]), weights=jnp.array([-1.0, 0.0]))
    (out,), counts = embedding_bags([Bag("dense", 2, prune_weights=prune)], [operands])
    np.testing.assert_array_equal(out, ROWS[1:3])
    assert counts.tolist() == [0]


def test_jax_finds_faults_in_lookups(path):
    """By its switches that run programs call by call."""
    ids = je.RaggedTensor.from_lists([[1, 2], [3]])
    with jax.disable_jit():
        np.testing.assert_array_equal(lookup(ids), [ROWS[1] + ROWS[2], ROWS[3]])
        gradient = jax.grad(lambda rows: lookup(ids, table=rows).sum())(ROWS)
    np.testing.assert_array_equal(gradient.sum(axis=1), [0, D, D, D, 0, 0])
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        lookup(ids, table=ROWS.at[1].set(jnp.nan))


@pytest.mark.parametrize("bad", [-1, V, 2**40])
def test_ids_of_a_ragged_sequence_from_l_on_are_not_looked_up(path, bad):
    feature = je.FeatureConfig(TABLE, max_sequence_length=2)
    ids = je.RaggedTensor(np.array([1, 2, bad, 4, 3]), np.array([0, 4, 5]))
    expected = [[ROWS[1], ROWS[2]], [ROWS[3], [0] * D]]
    np.testing.assert_array_equal(lookup(ids, feature=feature), expected)
    for call in (lookup, jax.jit(lookup, static_argnames=("feature", "count_bad_ids"))):
        out, count = call(ids, feature=feature, count_bad_ids=True)
        np.testing.assert_array_equal(out, expected)
        assert int(count) == 0


def test_a_quantization_config_is_not_applied(path):
    coarse = je.TableConfig(V, D, combiner="sum", name="t", quantization_config=je.QuantizationConfig(2, 0, 1))
    np.testing.assert_array_equal(lookup(np.arange(V), feature=je.FeatureConfig(coarse)), ROWS)


def test_other_rows_do_not_leak(path):
    table = ROWS.at[0].set(jnp.nan).at[V - 1].set(jnp.inf)
    ids = je.RaggedTensor(np.array([1, -1, V, 2, 0]), np.array([0, 3, 4, 4]))
    out, _ = lookup(ids, table=table, count_bad_ids=True)
    np.testing.assert_array_equal(out, [ROWS[1], ROWS[2], [0, 0, 0]])


@pytest.mark.parametrize("padding", [0, -7, 2**31 - 1])
def test_padding_is_never_read(path, padding):
    values = np.array([1, 2, 3, padding, padding], np.int32)
    ragged = je.RaggedTensor(values, np.array([0, 1, 3], np.int32))
    np.testing.assert_array_equal(lookup(ragged), [ROWS[1], ROWS[2] + ROWS[3]])
    indices = np.array([[0, 0], [1, 0], [1, 4], [2, 0], [2, 0]])
    np.testing.assert_array_equal(
        lookup(je.SparseTensor(indices, values, (2, 5))), [ROWS[1], ROWS[2] + ROWS[3]]
    )
    _, count = lookup(ragged, count_bad_ids=True)
    assert int(count) == 0


def test_pad_keeps_results_and_refuses_too_little(path):
    ragged, sparse = je.RaggedTensor.from_lists([[1], [2, 3]]), je.SparseTensor.from_lists([[1], [2, 3]])
    np.testing.assert_array_equal(lookup(ragged.pad(9)), lookup(ragged))
    np.testing.assert_array_equal(lookup(sparse.pad(9)), lookup(sparse))
    with pytest.raises(ValueError, match="capacity must be at least 3 values, got 2"):
        ragged.pad(2)


def test_unsorted_sparse_rows(path):
    ids = je.SparseTensor([[1, 0], [0, 1], [1, 2], [0, 0]], [1, 2, 3, 4], (2, 3))
    np.testing.assert_array_equal(lookup(ids), [ROWS[2] + ROWS[4], ROWS[1] + ROWS[3]])


Pair = collections.namedtuple("Pair", ["left", "right"])


def test_structures(path):
    config = {"a": [FEATURE, FEATURE], "b": Pair(FEATURE, (FEATURE,)), "c": FEATURE}
    ragged = je.RaggedTensor.from_lists([[1], [2]])
    ones = je.RaggedTensor(np.full(2, 2, np.float32), ragged.row_splits)
    inputs = {"a": [ragged, np.array([3])], "b": Pair(ragged, (np.array([[4]]),))}
    weights = {"a": [ones, None], "b": Pair(None, (None,))}
    out = je.serving_embedding_lookup(inputs, weights, {TABLE: ROWS}, config)
    leaves = {"a": [0, 0], "b": Pair(0, (0,))}
    assert jax.tree.structure(out) == jax.tree.structure(leaves)
    np.testing.assert_array_equal(out["a"][0], 2 * ROWS[1:3])
    np.testing.assert_array_equal(out["b"].right[0], ROWS[4][None, None])


def test_refusals():
    ragged = je.RaggedTensor.from_lists([[1], [2]])
    weights = je.RaggedTensor(np.ones(2, np.float32), ragged.row_splits)
    sparse = je.SparseTensor.from_lists([[1], [2]])
    sequence = je.FeatureConfig(TABLE, max_sequence_length=2)

    def refused(message, *arguments, **keywords):
        with pytest.raises(ValueError, match=message):
            lookup(*arguments, **keywords)

    refused("Weight specified for .*, but input is dense", np.array([1]), weights)
    refused(
        "is of type RaggedTensor but it does not match type of the input which is SparseTensor", sparse, weights
    )
    refused("Weight specified for .*, but this is a sequence feature", ragged, weights, sequence)
    refused("is a sequence feature but a dense array was passed", np.array([1]), feature=sequence)
    refused("is a masked array with 1 masked entries", np.ma.array([1, 2], mask=[0, 1]))
    refused("is type str. A dense array, a SparseTensor or a RaggedTensor expected", "abc")
    refused("must hold integer ids, got float32", np.ones(2, np.float32))
    refused("must hold integer ids, got <U1; look strings up .* jaxembed.preprocess does", np.array(["a"]))
    refused("must be parallel to its input", ragged, je.RaggedTensor.from_lists([[1.0]]))
    refused("must be floating point, got int64", ragged, ragged)
    refused(
        "should be the factor of the input data batch size",
        ragged,
        feature=je.FeatureConfig(TABLE, output_shape=[3]),
    )
    refused(r"table 't' must be \[6, 3\] \(vocabulary_size, dim\), got shape \[5, 3\]", ragged, table=ROWS[:5])
    with pytest.raises(ValueError, match="Inputs are not a subset of feature_config: it has no feature 'b'"):
        je.serving_embedding_lookup({"b": ragged}, None, {TABLE: ROWS}, {"a": FEATURE})
    with pytest.raises(ValueError, match="weights must have the structure of inputs"):
        je.serving_embedding_lookup({"a": ragged}, [weights], {TABLE: ROWS}, {"a": FEATURE})
    with pytest.raises(ValueError, match="tables has no table for 't'"):
        je.serving_embedding_lookup({"a": ragged}, None, {"u": ROWS}, {"a": FEATURE})
    other = je.FeatureConfig(je.TableConfig(V + 1, D, name="t"))
    with pytest.raises(ValueError, match="two tables are named 't' but differ"):
        je.serving_embedding_lookup({"a": ragged}, None, {TABLE: ROWS}, {"a": FEATURE, "b": other})


@hypothesis.settings(max_examples=10)
@hypothesis.given(case=lookups())
def test_native_equals_plain_jax_with_gradients(case):
    if not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")

    def run(table, weights):
        return je.serving_embedding_lookup(case.ids, weights, {"table": table}, case.feature)

    def loss(table, weights):
        out = run(table, weights)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    outputs, gradients = {}, {}
    for name in ("xla", "native"):
        with je.use_backend(name):
            outputs[name] = run(case.table, case.weights)
            arguments = (0, 1) if case.weights is not None else (0,)
            gradient = jax.jit(jax.grad(loss, arguments, allow_int=True))
            gradients[name] = gradient(jnp.asarray(case.table), case.weights)
    np.testing.assert_allclose(outputs["native"], outputs["xla"], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*(jax.tree.leaves(gradients[n]) for n in ("native", "xla")), strict=True):
        if ours.dtype == jnp.float32:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_tables_take_float32_weights(path, dtype):
    feature = je.FeatureConfig(je.TableConfig(V, D, combiner="mean", name="t", dtype=dtype))
    ids = je.RaggedTensor.from_lists([[1, 2], [3]])
    weights = je.RaggedTensor(np.array([0.25, 0.75, 2.0], np.float32), ids.row_splits)
    out = lookup(ids, weights, feature, ROWS.astype(dtype))
    assert out.dtype == dtype
    rows = np.asarray(ROWS.astype(dtype), np.float32)
    expected = np.stack([0.25 * rows[1] + 0.75 * rows[2], rows[3]])
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=float(jnp.finfo(dtype).eps))


def test_vmap(path):
    splits = jnp.array([[0, 1, 3], [0, 2, 3]], jnp.int32)

    def one(splits):
        ragged = je.RaggedTensor.tree_unflatten(None, (jnp.array([1, 2, 3], jnp.int32), splits))
        return lookup(ragged)

    out = jax.vmap(one)(splits)
    np.testing.assert_array_equal(out[0], [ROWS[1], ROWS[2] + ROWS[3]])
    np.testing.assert_array_equal(out[1], [ROWS[1] + ROWS[2], ROWS[3]])


def test_a_sequence_length_that_is_ignored_is_logged_once(caplog):
    feature = je.FeatureConfig(TABLE, max_sequence_length=2)
    ids = je.SparseTensor([[0, 0, 0], [0, 0, 1]], [1, 2], (1, 2, 2))
    with caplog.at_level("WARNING", "jaxembed"):
        for _ in range(2):
            out = je.serving_embedding_lookup({"ignored": ids}, None, {TABLE: ROWS}, {"ignored": feature})[
                "ignored"
            ]
    np.testing.assert_array_equal(out[0], [ROWS[1] + ROWS[2], [0, 0, 0]])
    (record,) = caplog.records
    assert "Feature 'ignored': max_sequence_length is ignored" in record.getMessage()


def test_shard_map(path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def sharded(out_specs):
        return jax.shard_map(
            lambda table, ids: lookup(ids, table=table),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("x")),
            out_specs=out_specs,
        )

    ids = jnp.array([3, 1, 1, 0], jnp.int32)
    whole = sharded(PartitionSpec("x"))
    np.testing.assert_array_equal(jax.jit(whole)(ROWS, ids), ROWS[np.asarray(ids)])
    gradient = jax.grad(lambda table: whole(table, ids).sum())(jnp.asarray(ROWS))
    np.testing.assert_array_equal(gradient[:4, 0], [1, 2, 0, 1])
    with pytest.raises(ValueError, match="require replication"):
        sharded(PartitionSpec())(ROWS, ids)


@pytest.mark.parametrize("ids", [je.RaggedTensor.from_lists([]), je.RaggedTensor.from_lists([[], []])])
def test_empty(path, ids):
    np.testing.assert_array_equal(lookup(ids), np.zeros((ids.num_rows, D)))


@pytest.mark.parametrize("ids", [je.RaggedTensor.from_lists([[], []]), je.SparseTensor([], [], (2, 1))])
@pytest.mark.parametrize("combiner", ["sum", "mean"])
def test_weights_of_no_ids_are_of_any_type(path, ids, combiner):
    feature = je.FeatureConfig(je.TableConfig(V, D, combiner=combiner, name="t"))
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(lookup(ids, ids, feature=feature), np.zeros((2, D)))


def test_structures_of_other_kinds_of_dicts():
    config = {"b": FEATURE, "a": FEATURE}
    ids = collections.OrderedDict(a=jnp.array([2]), b=jnp.array([1]))
    turned = collections.OrderedDict(reversed(ids.items()))
    turned = je.serving_embedding_lookup(turned, None, {"t": ROWS}, config)
    assert (type(turned), list(turned)) == (collections.OrderedDict, ["a", "b"])
    for inputs in (ids, collections.defaultdict(list, ids)):
        out = je.serving_embedding_lookup(inputs, None, {"t": ROWS}, config)
        assert type(out) is type(inputs)
        paired = jax.tree.map(lambda i, o: (i, o), inputs, out)
        np.testing.assert_array_equal(paired["a"][1][0], ROWS[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": None}, "tables must be a dict of TableConfig"),
        ({"tables": {"t": ROWS.tolist()}}, "must be an array or a QuantizedTable, got list"),
        ({"tables": {"t": np.arange(V * D).reshape(V, D)}}, "table 't' must be floating point, got int64"),
        ({"weights": [None]}, "weights must have the structure of inputs"),
    ],
)
def test_arguments_of_another_kind(change, message):
    arguments = {"inputs": {"0": jnp.array([1])}, "weights": None, "tables": {"t": ROWS}}
    with pytest.raises(ValueError, match=message):
        je.serving_embedding_lookup(**(arguments | change), feature_config={"0": FEATURE})


@pytest.mark.parametrize("quantized", [False, True])
def test_arrays_of_the_other_byte_order(path, quantized):
    rows = np.asarray(ROWS, ">f4")
    table = quantize(rows, "int8") if quantized else rows
    splits = np.array([0, 1, 3], ">i4")
    ids, weights = (je.RaggedTensor(np.array([1, 2, 3], t), splits) for t in (">i8", ">f4"))
    swapped = lookup(ids, weights, table=table)
    native = lookup(
        je.RaggedTensor(ids.values.astype(np.int32), splits.astype(np.int32)),
        je.RaggedTensor(weights.values.astype(np.float32), splits.astype(np.int32)),
        table=quantize(np.asarray(ROWS), "int8") if quantized else ROWS,
    )
    np.testing.assert_array_equal(swapped, native)


def test_bags_are_checked():
    with pytest.raises(ValueError, match=r"combiner must be one of .*, got 'max'"):
        Bag("ragged", 1, "max")
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'padded'"):
        Bag("padded", 1)
    bag = Bag("ragged", 1)
    for name, operands in {
        "ids": BagOperands(ROWS, jnp.ones(1), jnp.array([0, 1])),
        "bags": BagOperands(ROWS, jnp.ones(1, int), jnp.array([0.0, 1.0])),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be integers, got float32"):
            embedding_bags([bag], [operands])
        with pytest.raises(ValueError, match=f"{name} must be integers, got float32"):
            row_gradients(bag, operands, jnp.ones((1, D)))


@pytest.mark.parametrize("column", [3, 5, -1])
def test_compiled_programs_do_not_look_at_the_last_axis(path, column):
    ids = je.SparseTensor(jnp.array([[0, column], [1, 0]]), jnp.array([1, 2]), (3, 2))
    np.testing.assert_array_equal(jax.jit(lookup)(ids), [ROWS[1], ROWS[2], [0] * D])
    sequence = jax.jit(lambda ids: lookup(ids, feature=je.FeatureConfig(TABLE, max_sequence_length=4)))(ids)
    wanted = np.zeros((3, 4, D))
    if column == 3:
        wanted[0, 3] = ROWS[1]
    wanted[1, 0] = ROWS[2]
    np.testing.assert_array_equal(sequence, wanted)
    deep = je.SparseTensor(jnp.array([[0, 0, column], [1, 0, 0]]), jnp.array([1, 2]), (2, 2, 2))
    np.testing.assert_array_equal(jax.jit(lookup)(deep), [[ROWS[1], [0] * D], [ROWS[2], [0] * D]])
    with pytest.raises(ValueError, match=r"outside of dense_shape \[3, 2\]"):
        lookup(ids)


@pytest.mark.parametrize("splits", [[0, 2, 1, 3], [0, 2, 2, 4], [1, 2, 2, 3], [-2, 0, 1, 3]])
@pytest.mark.parametrize("count_bad_ids", [False, True])
def test_row_splits_of_the_device_are_checked_whether_or_not_bad_ids_are_counted(path, splits, count_bad_ids):
    ids = je.RaggedTensor(jnp.array([0, 1, 3]), jnp.array(splits))
    with pytest.raises(ValueError, match="Feature '': row_splits"):
        lookup(ids, count_bad_ids=count_bad_ids)


def test_arrays_of_the_device_are_checked_as_those_of_the_host_are(path):
    ids = je.RaggedTensor(jnp.array([1, 2, 3]), jnp.array([0, 1, 3]))
    weights = je.RaggedTensor(jnp.ones(3), jnp.array([0, 2, 3]))
    with pytest.raises(ValueError, match="parallel to its input: their row_splits differ"):
        lookup(ids, weights)
    for coordinate, shape in (([7, 0], (2, 2)), ([0, 5, 0], (2, 3, 2))):
        sparse = je.SparseTensor(jnp.array([coordinate]), jnp.array([1]), shape)
        with pytest.raises(ValueError, match=f"entry 0 lies at .*outside of dense_shape .{shape[0]}, "):
            lookup(sparse)
    # In a trace, what lies outside is in no row.
    outside = je.SparseTensor(jnp.array([[0, 1, 0], [0, 5, 0], [-1, 2, 0]]), jnp.array([1, 2, 3]), (2, 3, 2))
    out = jax.jit(lookup)(outside)
    np.testing.assert_array_equal(out[0, 1], ROWS[1])
    assert float(jnp.abs(out).sum()) == float(jnp.abs(ROWS[1]).sum())


@pytest.mark.parametrize("layout", ["dense", "ragged", "sparse"])
def test_wide_ids_stay_wide_in_programs_of_64_bits(path, layout):
    del path
    wide = [1, 2**32 + 1, -(2**40), 3]
    rows = [[x] for x in wide]
    ids = {
        "dense": np.array(wide),
        "ragged": je.RaggedTensor.from_lists(rows),
        "sparse": je.SparseTensor.from_lists(rows),
    }[layout]
    feature = je.FeatureConfig(TABLE, validate_weights_and_indices=False)
    with jax.enable_x64():
        out, bad = jax.jit(lambda ids: lookup(ids, feature=feature, count_bad_ids=True))(
            jax.tree.map(jnp.asarray, ids)
        )
    np.testing.assert_array_equal(out, [ROWS[1], np.zeros(D), np.zeros(D), ROWS[3]])
    assert int(bad) == 2


def test_buffers_may_be_filled_again_once_the_call_returned():
    count, config = 1_000_000, je.TableConfig(20_000, 8, combiner="sum", name="t")
    ids, weights = aligned_empty((count,), np.int32), aligned_empty((count,), np.float32)
    # XLA copies what is not aligned, and reads the others where they lie.
    splits = aligned_empty((count // 20 + 2,), np.int32)[1:]
    # The kernel ends the process where this goes wrong, so that plain JAX comes first.
    for name in ["xla", "native"] if kernel.available() else ["xla"]:
        for layout in ("ragged", "dense"):
            ids[:], weights[:], splits[:] = 7, 1, np.arange(0, count + 1, 20)
            ragged, parallel = je.RaggedTensor(ids, splits), je.RaggedTensor(weights, splits)
            arguments = (ragged, parallel) if layout == "ragged" else (ids, None)
            with je.use_backend(name):
                out = lookup(*arguments, je.FeatureConfig(config), jnp.ones((20_000, 8)))
                ids[:], weights[:], splits[:] = 2**31 - 1, 3, 0
            np.testing.assert_array_equal(out, 20 if layout == "ragged" else 1)


@pytest.mark.parametrize("layout", ["ragged", "sparse"])
def test_a_batch_of_sequences_may_be_larger_than_int32(path, layout):
    batch, length, count = 2**16, 2**15 + 1, 5
    ids = jax.ShapeDtypeStruct((count,), np.int32)
    bags = jax.ShapeDtypeStruct((batch + 1 if layout == "ragged" else count,), np.int32)
    operands = BagOperands(
        jax.ShapeDtypeStruct((V, 1), jnp.bfloat16), ids, bags, ids if layout == "sparse" else None
    )
    bag = Bag(layout, batch, sequence_length=length)
    out = jax.eval_shape(lambda operands: embedding_bags([bag], [operands], path)[0][0], operands)
    assert out.shape == (batch, length, 1)


def test_activations_come_in_the_order_of_their_keys():
    """As out of a program: a model that goes through them finds one order in training and serving."""
    features = {"user": FEATURE, "item": FEATURE, "later": {"b": FEATURE, "a": FEATURE}}
    ids = {"user": np.array([1]), "item": np.array([2]), "later": {"b": np.array([3]), "a": np.array([4])}}
    for wrap in (lambda call: call, jax.jit):
        out = wrap(lambda ids: je.serving_embedding_lookup(ids, None, {"t": ROWS}, features))(ids)
        assert list(out) == ["item", "later", "user"]
        assert list(out["later"]) == ["a", "b"]
