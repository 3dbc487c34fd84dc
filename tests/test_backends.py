"""Which path a lookup takes: the native kernel or plain JAX, eagerly, in programs and in exported ones."""

import functools
import warnings

import jax
import jax.export  # not loaded by jax itself
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed as je
from jaxembed import backends, bag_native, kernel
from jaxembed.bag import Bag, BagOperands, embedding_bags
from tests.test_lookup import FEATURE, ROWS, lookup


def test_a_call_outside_of_a_jit_takes_the_path_of_its_platform():
    if not kernel.available():
        pytest.skip("no native kernel")
    operands = [BagOperands(jnp.asarray(ROWS), jnp.array([1]), jnp.array([0, 1]))]
    leaves, tree = jax.tree.flatten(operands)
    bags = (Bag("ragged", 1),)
    call = {"bags": bags, "tree": tree, "places": (0, 1, 2), "in_exports": False, "merged": False}
    traced = bag_native._program.trace(*leaves, **call)
    calls = [
        "jaxembed_embedding_bags" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")
    ]
    assert calls == [True, False]


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_export_with_symbolic_sizes_and_without_custom_calls(backend):
    @jax.jit
    def f(values, splits, table):
        return lookup(je.RaggedTensor(values, splits), table=table)

    n, b = jax.export.symbolic_shape("n, b")
    arguments = (
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
        jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype),
    )
    concrete = (jnp.array([1, 2, 3], jnp.int32), jnp.array([0, 1, 1, 3], jnp.int32), ROWS)
    with je.use_backend(backend):
        direct = f(*concrete)
        # What a program has been compiled as says nothing of what it is exported as.
        assert (kernel.TARGET in f.lower(*concrete).as_text()) == (je.backend() == "native")
        fixed = jax.export.export(f)(*concrete)
        exported = jax.export.export(f, platforms=("cpu", "tpu"))(*arguments)
    np.testing.assert_array_equal(jax.export.deserialize(fixed.serialize()).call(*concrete), direct)
    loaded = jax.export.deserialize(exported.serialize())
    for out in (direct, loaded.call(*concrete)):
        np.testing.assert_array_equal(out, [ROWS[1], [0, 0, 0], ROWS[2] + ROWS[3]])


def test_all_features_are_one_call_of_the_kernel():
    if not kernel.available():
        pytest.skip("the kernel was not built")
    tables = [
        je.TableConfig(6, dim, combiner=combiner, name=f"t{dim}") for dim, combiner in ((2, "sum"), (4, "mean"))
    ]
    rows = {tables[0]: jnp.ones((6, 2)), tables[1]: jnp.ones((6, 4), jnp.bfloat16)}
    features = {
        f"{f:02}": je.FeatureConfig(table=tables[f % 2], max_sequence_length=3 if f % 5 == 4 else 0)
        for f in range(26)
    }
    lists = [[1, 2], [3]]
    kinds = (je.RaggedTensor.from_lists, je.SparseTensor.from_lists, je.RaggedTensor.from_lists)
    inputs = {name: kinds[f % 3](lists) for f, name in enumerate(features)}
    inputs["00"] = jnp.arange(5, dtype=jnp.int32)
    program = jax.jit(lambda inputs, rows: je.serving_embedding_lookup(inputs, None, rows, features))
    by_name = {table.name: array for table, array in rows.items()}
    with je.use_backend("auto"):
        text = program.lower(inputs, by_name).as_text()
    assert text.count(f"custom_call @{kernel.TARGET}") == 1


@pytest.mark.parametrize("bits", ["float8_e4m3fn", "float64"])
def test_a_table_of_another_type_leaves_the_other_features_to_the_kernel(bits):
    if not kernel.available():
        pytest.skip("the kernel was not built")
    ids, splits = jnp.array([1, 2, 3, 9], jnp.int32), jnp.array([0, 1, 4], jnp.int32)
    weights = jnp.array([1.0, 2.0, 0.5, 1.0])
    bags = [Bag("ragged", 2, "mean"), Bag("ragged", 2), Bag("dense", 4), Bag("ragged", 2, sequence_length=2)]
    with jax.enable_x64(bits == "float64"):
        rows = jnp.asarray(ROWS, jnp.float32)
        tables = [rows.astype(bits), rows, 2 * rows.astype(bits), 3 * rows]

        def total(tables, weights, path):
            operands = [BagOperands(t, ids, splits, weights=weights) for t in tables]
            outs, bad = embedding_bags(bags, operands, path)
            return sum(jnp.sum(out.astype(jnp.float32) ** 2) for out in outs), (outs, bad)

        def results(path):
            run = functools.partial(total, path=path)
            gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(tables, weights)
            return gradients, jax.vmap(run, (None, 0))(tables, jnp.stack([weights, 2 * weights]))

        ours, theirs = results("auto"), results("xla")
        text = jax.jit(total, static_argnums=2).lower(tables, weights, "auto").as_text()
    assert text.count(f"custom_call @{kernel.TARGET}") == 1
    assert ours[0][0][1][1].tolist() == [1, 1, 1, 0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-6)


def test_export_with_the_kernel():
    if not kernel.available():
        pytest.skip("the kernel was not built")
    ids = je.RaggedTensor.from_lists([[1], [2, 3]])
    arguments = (ids.values, ids.row_splits, ROWS)
    f = jax.jit(lambda values, splits, table: lookup(je.RaggedTensor(values, splits), table=table))
    with je.use_backend("native"):
        exported = jax.export.export(
            f, disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(kernel.TARGET)]
        )(*arguments)
    assert kernel.TARGET in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(*arguments), [ROWS[1], ROWS[2] + ROWS[3]])
    (b,) = jax.export.symbolic_shape("b")
    symbolic = (ids.values, jax.ShapeDtypeStruct((b + 1,), jnp.int32), ROWS)
    with je.use_backend("native"), pytest.raises(ValueError, match="need batches of fixed sizes, got symbolic"):
        jax.export.export(f, disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(kernel.TARGET)])(
            *symbolic
        )


def test_an_empty_environment_variable_is_as_none(monkeypatch):
    monkeypatch.setenv("JAXEMBED_BACKEND", "")
    wanted = "native" if kernel.available() else "xla"
    with warnings.catch_warnings(action="ignore"):
        assert je.backend() == wanted


def test_the_fallback_is_said_at_the_line_of_the_user(monkeypatch):
    monkeypatch.delenv("JAXEMBED_BACKEND", raising=False)
    monkeypatch.setattr(kernel, "_load", lambda: "the kernel was not built")
    monkeypatch.setattr(backends, "_said", set())
    with pytest.warns(RuntimeWarning, match="plain JAX: the kernel was not built") as caught:
        je.serving_embedding_lookup(je.RaggedTensor.from_lists([[1], [2, 3]]), None, {"t": ROWS}, FEATURE)
    assert [warning.filename for warning in caught] == [__file__]


def test_native_refuses_tables_that_the_kernel_does_not_have():
    if not kernel.available():
        pytest.skip("the kernel was not built")
    ids, table = je.RaggedTensor.from_lists([[1], [2, 3]]), ROWS.astype(jnp.float8_e4m3fn)
    assert lookup(ids, table=table).dtype == table.dtype
    with (
        je.use_backend("native"),
        pytest.raises(ValueError, match=r"no tables of float8_e4m3fn; .*use_backend\(\"auto"),
    ):
        lookup(ids, table=table)
