"""RaggedTensor and SparseTensor: constructors, padding, refusals."""

import dataclasses
import inspect
import itertools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed as je
from jaxembed import built
from jaxembed.inputs import ragged as ragged_inputs

bags = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6)


@hypothesis.given(rows=bags)
def test_ragged_constructors_agree(rows):
    ragged = je.RaggedTensor.from_lists(rows)
    assert ragged.to_lists() == rows
    lengths = [len(row) for row in rows]
    assert je.RaggedTensor.from_row_lengths(ragged.values, lengths).to_lists() == rows
    assert je.RaggedTensor.from_row_splits(ragged.values, ragged.row_splits).to_lists() == rows
    rowids = np.repeat(np.arange(len(rows)), lengths)
    assert je.RaggedTensor.from_value_rowids(ragged.values, rowids, len(rows)).to_lists() == rows
    dense = np.full((len(rows), 5), -1)
    for row, ids in zip(dense, rows, strict=True):
        row[: len(ids)] = ids
    assert je.RaggedTensor.from_dense(dense).to_lists() == rows
    assert ragged.pad(40).to_lists() == rows
    assert ragged.pad(40).values.shape == (40,)


@hypothesis.given(rows=bags)
def test_sparse_constructors_agree(rows):
    sparse = je.SparseTensor.from_lists(rows)
    assert sparse.num_rows == len(rows)
    rebuilt = [sparse.values[sparse.indices[:, 0] == b].tolist() for b in range(len(rows))]
    assert rebuilt == rows
    padded = sparse.pad(50)
    assert (padded.indices[sparse.values.shape[0] :, 0] == len(rows)).all()


def test_pytrees_pass_through_jit():
    ragged, sparse = je.RaggedTensor.from_lists([[1], [2, 3]]), je.SparseTensor.from_lists([[1], [2, 3]])
    out = jax.jit(lambda x: x)((ragged, sparse))
    assert out[0].to_lists() == [[1], [2, 3]]
    assert out[1].dense_shape == (2, 2)


@pytest.mark.parametrize(("id_", "kept"), [(2**40, 2**31 - 1), (-(2**40), -(2**31)), (5, 5)])
def test_wide_ids_saturate_at_the_border_of_jit(id_, kept):
    ragged = je.RaggedTensor(np.array([id_], np.int64), np.array([0, 1]))
    assert jax.jit(lambda x: x.values)(ragged).tolist() == [kept]


def test_converted_dense_ids_saturate_before_a_jit_could_wrap_them():
    ids = je.as_input(np.array([[5, 2**32 + 1], [-(2**40), 7]], np.int64))
    assert jax.jit(lambda x: x)(ids).tolist() == [[5, 2**31 - 1], [-(2**31), 7]]
    assert je.as_input([]).dtype == np.int32


class _Foreign:
    """An array of another library's, whose types are no types of numpy."""

    shape, dtype = (2,), "foreign.int64"

    def __array__(self, dtype=None, copy=None):
        return np.array([object(), object()])


def test_columns_of_tables_are_rows():
    """Numbers beside missing ones come as floats, those of columns of lists as objects."""
    assert je.RaggedTensor.from_lists([[1.0, 2.0], []], np.int32).values.tolist() == [1, 2]
    for dtype, row in ((np.int64, [1, 2]), (np.float32, [0.5, 1])):
        ragged = je.RaggedTensor.from_lists([np.array(row, object), []], dtype)
        assert (ragged.to_lists(), ragged.dtype) == ([row, []], dtype)


@pytest.mark.parametrize("dtype", [None, np.uint64])
@pytest.mark.parametrize(
    "rows",
    [
        [[14695981039346656037], [7]],
        [[5, 2**63]],
        [np.array([2**64 - 1], np.uint64), np.array([7])],
        [np.array([2**53 + 1], np.uint64), [7]],
        [np.array([2**63, 7], object)],
    ],
)
def test_large_ids_are_not_rounded(rows, dtype):
    """Numpy joins signed and unsigned integers of 64 bits to floats."""
    expected = [[int(id_) for id_ in row] for row in rows]
    ragged = je.RaggedTensor.from_lists(rows, dtype)
    assert (ragged.to_lists(), ragged.dtype.kind in "iu") == (expected, True)
    assert je.SparseTensor.from_lists(rows, dtype).values.tolist() == [*itertools.chain(*expected)]
    assert je.as_input(rows).to_lists() == expected


def test_lists_of_strings():
    rows = [["film", "x\0"], [], [b"y\0"]]
    for dtype in (None, object):
        ragged = je.RaggedTensor.from_lists(rows, dtype)
        assert (ragged.to_lists(), ragged.dtype) == (rows, object)
    assert je.RaggedTensor.from_lists([["a"], ["bc"]], str).values.dtype == "<U2"
    assert je.RaggedTensor.from_lists([["a"], ["bc"]], "S2").to_lists() == [[b"a"], [b"bc"]]
    assert je.as_input([np.array(["a", "bc"])]).to_lists() == [["a", "bc"]]
    assert je.RaggedTensor.from_lists([[], []], object).to_lists() == [[], []]


def test_lists_of_arrays_are_rows_whoever_made_them():
    rows = [jax.numpy.array([1, 2]), jax.numpy.array([3, 4])]
    assert je.as_input(rows).to_lists() == je.as_input([np.asarray(row) for row in rows]).to_lists()


def test_masked_arrays_that_hide_nothing():
    shown = np.ma.array([1, 2], mask=[0, 0])
    assert je.RaggedTensor(shown, [0, 2]).to_lists() == je.as_input([shown]).to_lists() == [[1, 2]]
    assert je.as_input(shown).tolist() == [1, 2]


MASKED = np.ma.array([1, 2], mask=[0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: je.RaggedTensor(np.zeros((2, 2)), [0, 2]), r"values must be \[N\], got shape \(2, 2\)"),
        (lambda: je.RaggedTensor([1, 2], [[0, 2]]), r"row_splits must be \[B \+ 1\]"),
        (lambda: je.RaggedTensor([1, 2], [0.0, 2.0]), "row_splits must be integers"),
        (
            lambda: je.RaggedTensor(np.arange(2), np.array([0, 2], "m8[s]")),
            r"row_splits must be integers, got timedelta64\[s\]",
        ),
        (lambda: je.RaggedTensor([1, 2], [1, 2]), "row_splits must start at 0, got 1"),
        (
            lambda: je.RaggedTensor([1, 2], [0, 2, 1]),
            "row_splits must not decrease, got 2 then 1 at position 2",
        ),
        (lambda: je.RaggedTensor([1, 2], [0, 3]), "row_splits end at 3 but there are only 2 values"),
        (lambda: je.RaggedTensor("ab", [0, 1]), "RaggedTensor needs arrays, got str"),
        (lambda: je.RaggedTensor.from_lists([["a", 1]]), "rows must hold numbers, or strings alone, got <U"),
        (lambda: je.RaggedTensor.from_lists([["a"], [1]]), "rows must hold numbers, or strings alone, got <U"),
        (
            lambda: je.RaggedTensor.from_lists([[2**63], [-1]], np.int64),
            "int64 or uint64 numbers, got -1 to 92",
        ),
        (lambda: je.RaggedTensor.from_lists([[2**63, -1]]), "int64 or uint64 numbers, got -1 to 92"),
        (lambda: je.RaggedTensor.from_lists([[2**64]]), "got 18446744073709551616 to 18446744073709551616"),
        (lambda: je.RaggedTensor.from_lists([[2**63], [7]], np.int64), "must hold int64 numbers, got uint64"),
        (
            lambda: je.RaggedTensor.from_lists([np.array([2.0**31], np.float32)], np.int32),
            "must hold int32 numbers, got float32",
        ),
        (lambda: je.RaggedTensor.from_lists([[2.0**63]], np.int64), "must hold int64 numbers, got float64"),
        (lambda: je.RaggedTensor.from_lists([[[1]]]), "row 0 must be a flat list"),
        (lambda: je.RaggedTensor.from_row_lengths([1], [-1]), "row_lengths must be"),
        (
            lambda: je.RaggedTensor.from_row_lengths([1, 2], np.array([2**62] * 4 + [2])),  # 2 in 64 bits
            f"must add up to the number of values, got {2**64 + 2} for 2",
        ),
        (lambda: je.RaggedTensor.from_lists([["abc"], ["abcd"]], "U3"), "that <U3 can hold whole, got 'abcd'"),
        (lambda: je.RaggedTensor.from_lists([["a\0"]], "U3"), "can hold whole, got 'a"),
        (lambda: je.RaggedTensor.from_lists([[b"abcd"]], "S3"), "can hold whole, got b'abcd'"),
        (
            lambda: je.RaggedTensor.from_row_lengths([1, 2, 3], [1]),
            "must add up to the number of values, got 1 for 3",
        ),
        (lambda: je.RaggedTensor.from_row_splits([1, 2], [0, 3]), "row_splits end at 3 but there are only 2"),
        (
            lambda: je.RaggedTensor.from_row_splits([1, 2, 3], [0, 1]),
            "must end at the number of values, got 1 for 3",
        ),
        (lambda: je.as_input(np.array([[1, 2], [3]], object)), "ndarray of lists; pass a list of lists"),
        (lambda: je.as_input(np.array([np.arange(2), [3]], object)), "ndarray of lists; pass a list of lists"),
        (lambda: je.RaggedTensor.from_lists(None), "rows must be a list of lists, got None"),
        (lambda: je.RaggedTensor.from_value_rowids([], [], nrows=-1), "nrows must be at least 0, got -1"),
        (lambda: je.SparseTensor([], [], None), "dense_shape must be ints, got None"),
        (lambda: je.RaggedTensor.from_value_rowids([1, 2], [1, 0]), "sort the values by row first"),
        (
            lambda: je.RaggedTensor.from_value_rowids(np.array([7, 8]), np.array([2, 0], np.uint32), nrows=3),
            "sort the values by row first",
        ),
        (
            lambda: je.RaggedTensor.from_lists([[1], [2**32 + 5]], np.int32),
            "must hold int32 numbers, got int64 from 1 to 4294967301",
        ),
        (lambda: je.RaggedTensor.from_lists([[1.5]], np.int32), "must hold int32 numbers, got float64"),
        (lambda: je.RaggedTensor.from_lists([[np.nan]], np.int32), "must hold int32 numbers, got float64"),
        (
            lambda: je.RaggedTensor.from_lists([["0.5"]], np.float32),
            "rows must hold numbers for float32, got strings",
        ),
        (
            lambda: je.RaggedTensor.from_lists([[True]], np.float32),
            "rows must hold numbers, or strings alone, got bool",
        ),
        (lambda: je.RaggedTensor(MASKED, [0, 2]), "values is a masked array with 1 masked entries"),
        (lambda: je.RaggedTensor.from_lists([[1], MASKED]), "from_lists: row 1 is a masked array"),
        (lambda: je.SparseTensor([[0, 0], [0, 1]], MASKED, (1, 2)), "SparseTensor: values is a masked array"),
        (lambda: je.as_input(MASKED), r"as_input: x is a masked array .* pass its filled\(...\), or"),
        (lambda: je.as_input(_Foreign()), "as_input cannot convert _Foreign"),
        (lambda: je.RaggedTensor.from_value_rowids([1, 2], [0]), "must be of one length, got 2 and 1"),
        (lambda: je.RaggedTensor.from_dense([1, 2]), r"must be \[B, L\]"),
        (lambda: je.SparseTensor([[0, 0]], [1], (2,)), "at least 2 ints of at least 0"),
        (lambda: je.SparseTensor([[0, 0]], [1, 2], (2, 2)), r"indices must be \[nnz, 2\] and values \[nnz\]"),
        (lambda: je.SparseTensor([[0.0, 0.0]], [1], (2, 2)), "indices must be integers"),
        (
            lambda: je.SparseTensor([[0, 2]], [1], (2, 2)),
            r"entry 0 lies at \[0, 2\], outside of dense_shape \[2, 2\]",
        ),
        (lambda: je.SparseTensor([[3, 0]], [1], (2, 2)), "only padding may, at row 2"),
        (lambda: je.SparseTensor([[0, 0]], [1], ("a", 2)), "dense_shape must be ints"),
        (lambda: je.SparseTensor.from_lists([[1, 2]]).pad(1), "capacity must be at least 2 entries, got 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def native_ragged(monkeypatch):
    """A RaggedTensor made by native code, and the calls that it left to Python."""
    if ragged_inputs._init_for is None:
        pytest.skip("the native code was not built")
    left = []

    def init(self, *args, **kwargs):
        left.append((args, kwargs))
        ragged_inputs._init_in_python(self, *args, **kwargs)

    monkeypatch.setattr(je.RaggedTensor, "__init__", ragged_inputs._init_for(je.RaggedTensor, init))
    yield left
    ragged_inputs._init_for(je.RaggedTensor, ragged_inputs._init_in_python)


def made(values, splits, init):
    ragged = object.__new__(je.RaggedTensor)
    try:
        init(ragged, values, splits)
    except ValueError as e:
        return str(e)
    return ragged.values, ragged.row_splits


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.lists(st.integers(-2, 6), max_size=6),
    st.integers(0, 6),
    st.sampled_from([np.int32, np.int64, np.int16, np.uint32, ">i4", np.float32]),
    st.booleans(),
)
def test_native_code_takes_what_python_takes_and_no_more(native_ragged, splits, size, dtype, strided):
    values, splits = np.zeros(size, np.float32), np.array(splits, np.int64).astype(dtype)
    if strided:
        splits = np.repeat(splits, 2)[::2]
    native_ragged.clear()
    native = made(values, splits, je.RaggedTensor.__init__)
    python = made(values, splits, ragged_inputs._init_in_python)
    if isinstance(python, str):
        assert native == python
    else:
        assert native[0] is python[0] is values
        assert native[1] is python[1] is splits
        usual = np.dtype(dtype) in (np.int32, np.int64) and splits.flags.c_contiguous
        assert bool(native_ragged) != usual


def test_signature_of_a_ragged_tensor():
    class Same(je.RaggedTensor):
        pass

    @dataclasses.dataclass(frozen=True, eq=False)
    class Named(je.RaggedTensor):
        name: str = ""

    class Rows(je.RaggedTensor):
        def __init__(self, rows):
            super().__init__(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))

    class New(je.RaggedTensor):
        def __new__(cls, rows):
            return super().__new__(cls)

    wanted = {je.RaggedTensor: "values row_splits", Same: "values row_splits", Rows: "rows", New: "rows"}
    for cls, names in (wanted | {Named: "values row_splits name"}).items():
        assert " ".join(inspect.signature(cls).parameters) == names
    assert "name: str = ''" in Named.__doc__


def test_a_subclass_checks_what_it_wants_to():
    class Checked(je.RaggedTensor):
        def __post_init__(self):
            super().__post_init__()
            if np.any(np.asarray(self.values) < 0):
                raise ValueError("negative")

    for values, splits in (
        ([-1], [0, 1]),
        (np.array([-1]), np.array([0, 1])),
        (jnp.array([-1]), jnp.array([0, 1])),
    ):
        with pytest.raises(ValueError, match="negative"):
            Checked(values, splits)
    with pytest.raises(ValueError, match="row_splits must not decrease"):
        Checked(np.array([1]), np.array([0, 2, 1]))
    assert Checked(np.array([1]), np.array([0, 1])).to_lists() == [[1]]


def test_native_code_leaves_what_is_unusual_to_python(native_ragged):
    values, splits = np.zeros(3, np.int32), np.array([0, 1, 3])
    for args, kwargs in [
        (([1, 2, 3], splits), {}),
        ((values, [0, 3]), {}),
        ((values,), {"row_splits": splits}),
        ((), {"values": values, "row_splits": splits}),
    ]:
        native_ragged.clear()
        assert je.RaggedTensor(*args, **kwargs).row_splits[-1] == 3
        assert len(native_ragged) == 1
    for args in [
        (values,),
        (values, splits, 1),
        (values.reshape(1, -1), splits),
        (None, splits),
        (values, None),
    ]:
        with pytest.raises((TypeError, ValueError)):
            je.RaggedTensor(*args)
    with pytest.raises(TypeError, match="object"):
        je.RaggedTensor.__init__(7, values, splits)


def test_built_files_are_found_whatever_else_is_on_the_path(monkeypatch, tmp_path):
    (tmp_path / "jaxembed" / "native").mkdir(parents=True)
    (tmp_path / "jaxembed" / "native" / "two").touch()
    monkeypatch.setattr(sys, "path", [b"/x", "", str(tmp_path)])
    assert built.find("one", "two") == tmp_path / "jaxembed" / "native" / "two"
    assert built.find("one") is None


def test_a_subclass_with_fields_of_its_own_is_checked():
    @dataclasses.dataclass(frozen=True)
    class Named(je.RaggedTensor):
        name: str = ""

    assert Named(np.array([1]), np.array([0, 1]), "a").name == "a"
    with pytest.raises(ValueError, match="row_splits must not decrease"):
        Named(np.array([1]), np.array([0, 2, 1]))
