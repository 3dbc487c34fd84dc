"""Inputs of other libraries become ours, and none of them is imported unless it is used."""

import subprocess
import sys

import jax.experimental.sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import jaxembed as je

ROWS = [[3, 1], [], [2, 2, 0]]


def test_lists_and_arrays():
    assert je.as_input(ROWS).to_lists() == ROWS
    np.testing.assert_array_equal(je.as_input([1, 2]), [1, 2])
    array = jnp.arange(3)
    assert je.as_input(array) is array
    ragged = je.RaggedTensor.from_lists(ROWS)
    assert je.as_input(ragged) is ragged
    with pytest.raises(ValueError, match="as_input cannot convert set"):
        je.as_input({1})
    for text in (["a"], np.array(["a"]), np.array([b"a"], object)):
        with pytest.raises(ValueError, match=r"cannot convert .*: dense ids must be .*jaxembed.preprocess"):
            je.as_input(text)


@pytest.mark.parametrize("large", [False, True])
def test_pyarrow_is_zero_copy(large):
    pa = pytest.importorskip("pyarrow")
    kind = pa.large_list(pa.int64()) if large else pa.list_(pa.int64())
    array = pa.array(ROWS, kind)
    ragged = je.as_input(array)
    assert ragged.to_lists() == ROWS
    assert np.shares_memory(ragged.values, array.values.to_numpy())
    assert je.as_input(array.slice(1)).to_lists() == ROWS[1:]
    assert je.as_input(pa.chunked_array([array, array])).to_lists() == ROWS * 2
    assert je.as_input(pa.chunked_array([], kind)).to_lists() == []


def test_pyarrow_refusals():
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="1 rows of the pyarrow array are null"):
        je.as_input(pa.array([[1], None]))
    with pytest.raises(ValueError, match="1 ids of the pyarrow array are null"):
        je.as_input(pa.array([[1, None]]))
    with pytest.raises(ValueError, match="of type list or large_list, got int64"):
        je.as_input(pa.array([1]))


@pytest.mark.parametrize("kind", ["csr_matrix", "coo_matrix", "csc_array"])
def test_scipy(kind):
    # Ids are the values; 0 is an id that scipy can store, too.
    matrix = scipy.sparse.coo_matrix(([5, 0, 7], ([1, 0, 1], [2, 1, 0])), (2, 4))
    sparse = je.as_input(getattr(scipy.sparse, kind)(matrix))
    np.testing.assert_array_equal(sparse.indices, [[0, 1], [1, 0], [1, 2]])
    np.testing.assert_array_equal(sparse.values, [0, 7, 5])
    assert sparse.dense_shape == (2, 4)


def test_bcoo_and_its_padding():
    bcoo = jax.experimental.sparse.BCOO.fromdense(jnp.array([[0, 3], [4, 0]]), nse=3)
    table = je.TableConfig(6, 2, combiner="sum", name="t")
    rows = jnp.arange(12.0).reshape(6, 2)
    out = je.serving_embedding_lookup(je.as_input(bcoo), None, {table: rows}, je.FeatureConfig(table))
    np.testing.assert_array_equal(out, rows[jnp.array([3, 4])])
    with pytest.raises(ValueError, match="neither batch nor dense dimensions"):
        je.as_input(jax.experimental.sparse.BCOO.fromdense(jnp.ones((2, 2), int), n_batch=1))


@pytest.mark.parity
def test_tensorflow():
    tf = pytest.importorskip("tensorflow")
    assert je.as_input(tf.ragged.constant(ROWS)).to_lists() == ROWS
    sparse = je.as_input(tf.sparse.from_dense([[0, 3], [4, 0]]))
    assert sparse.dense_shape == (2, 2)
    np.testing.assert_array_equal(sparse.values, [3, 4])
    np.testing.assert_array_equal(je.as_input(tf.constant([1, 2])), [1, 2])
    with pytest.raises(ValueError, match="Only rank 2 ragged tensor"):
        je.as_input(tf.ragged.constant([[[1], []]]))


def test_core_imports_no_other_library():
    others = ["scipy", "pyarrow", "tensorflow", "torch", "optax", "orbax", "flax"]
    program = f"import sys, jaxembed; print([m for m in {others} if m in sys.modules])"
    # scipy comes with jax itself.
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert set(eval(found)) <= {"scipy"}
