"""Every kind of bad request: refused on the host, naming the place, without harm to the next one."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxembed import FeatureConfig, HashBuckets, RaggedTensor, SparseTensor, TableConfig
from jaxembed.serve import EmbeddingForServing, ServingFunction
from jaxembed.serve.structures import Reader
from tests.serve import requests

NAN, INF = float("nan"), float("inf")
GOOD = {
    "user": [1, 2],
    "items/history": [[3, 4], []],
    "items/recent": [[5], [6, 7, 8, 9]],
    "text/0": [[0], [6]],
    "text/1": [[1, 2, 3], []],
}


@pytest.fixture(scope="module")
def serve():
    embedding = EmbeddingForServing(requests.FEATURE_CONFIG, requests.make_tables())

    def model(params, activations, dense):
        return activations["user"] + dense["dense"][:, :1]

    return ServingFunction(
        embedding,
        model,
        dense_inputs={"dense": 2},
        weighted=["items/history", "text/0"],
        batch_sizes=(2,),
        max_ids_per_row=6,
        row_lengths=(),
    ).warm_up()


@pytest.fixture(autouse=True)
def good_requests_go_on(serve):
    good = {"dense": [[1, 2], [3, 4]]}
    expected = serve(requests.nest(GOOD), dense=good)
    yield
    np.testing.assert_array_equal(serve(requests.nest(GOOD), dense=good), expected)


def refused(serve, match, weights=None, dense=None, **changes):
    leaves = dict(GOOD)
    leaves.update({path.replace("__", "/"): leaf for path, leaf in changes.items()})
    weights = weights and requests.nest(weights)
    with pytest.raises(ValueError, match=match):
        serve(requests.nest(leaves), weights, dense or {"dense": [[1, 2], [3, 4]]})


HISTORY = "Feature 'items/history'"


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        ([[3, 70], []], "row 0, position 1: id 70 is outside of table 'items' with vocabulary_size 70"),
        ([[], [4, 5, -5]], r"row 1, position 2: id -5 is outside.*\[0, 70\)"),
        ([[2**31 - 1], []], f"row 0, position 0: id {2**31 - 1} is outside"),
        ([[0], [2**31]], f"row 1, position 0: id {2**31} is outside"),
        ([[2**40], [1]], f"row 0, position 0: id {2**40} is outside"),
        ([[-(2**40)], [1]], f"row 0, position 0: id -{2**40} is outside"),
        ([[2**70], [1]], f"row 0, position 0: id {2**70} is outside"),
        ([[1, 2.0], []], "row 0, position 1: ids must be ints, got 2.0"),
        ([[1], [NAN]], "row 1, position 0: ids must be ints, got nan"),
        ([[1], ["a"]], "row 1, position 0: ids must be ints, got 'a'; look strings up in a vocabulary"),
        ([[True], [1]], "row 0, position 0: ids must be ints, got True"),
        ([[5, 6, 7], [8, False]], "row 1, position 1: ids must be ints, got False"),
        ([[None], [1]], "row 0, position 0: ids must be ints, got None"),
        ([[[1]], [1]], r"row 0, position 0: ids must be ints, got \[1\]"),
        ([[1], 2], "row 1 must be a list of int ids or one int id, alike in all rows, got 2"),
        ([1, [2]], r"row 1, position 0: ids must be ints, got \[2\]"),
        ([[1], "ab"], "row 1 must be a list of int ids.*got 'ab'; look strings up"),
        ([[1], {1: 2}], "row 1 must be a list of int ids"),
        ([[1], None], "row 1 must be a list of int ids.*got None"),
        (["a", "b"], "row 0 must be a list of int ids or one int id.*got 'a'; look strings up"),
        ([1.5, 2.5], "row 0 must be a list of int ids or one int id.*got 1.5"),
        ([True, False], "row 0 must be a list of int ids.*got True"),
        ([[1] * 7, []], "row 0 has 7 ids; at most 6 are served"),
        (3, "must be a list of lists of ints.*got int"),
        ("abc", "must be a list of lists of ints.*got str"),
        ({"a": 1}, "must be a list of lists of ints.*got dict"),
        (np.array([1.0, 2.0]), "must hold integer ids, got float64"),
        (np.array([True, False]), "must hold integer ids, got bool"),
        (np.array(["a", "b"]), "must hold integer ids, got <U1; look strings up"),
        (np.array([1, 2], object), r"got object; pass ints as a list, as tolist\(\) gives it; look strings up"),
        (np.ma.array([1, 2], mask=[0, 1]), r"is a masked array with 1 masked entries, .* pass its filled"),
        ([np.ma.array([1, 2], mask=[0, 1]), np.array([3])], "row 0 is a masked array with 1 masked entries"),
        ([np.ma.array([1, 2], mask=[0, 1]), [3]], "row 0, position 1: ids must be ints, got None"),
        ([np.array([1]), [2, True]], "row 1, position 1: ids must be ints, got True"),
        ([np.int64(1), [2]], "row 0 must be a list of int ids or one int id, alike in all rows"),
        (np.array([[1, 2], [3, 4]]), r"must be \[B\], one id a row, got shape \[2, 2\]; pass bags as"),
        (np.array(3), r"must be \[B\], one id a row, got shape \[\]"),
        (np.array([1, 70]), "row 1, position 0: id 70 is outside"),
        (np.array([1, 2**40]), f"row 1, position 0: id {2**40} is outside"),
        (np.array([2**64 - 5, 1], np.uint64), f"row 0, position 0: id {2**64 - 5} is outside"),
        (jnp.array([1, -1]), "row 1, position 0: id -1 is outside"),
        ([np.int64(1), np.int64(70)], "row 1, position 0: id 70 is outside"),
        ([np.array([1, 71]), np.array([2])], "row 0, position 1: id 71 is outside"),
        ([np.array([1.5]), np.array([2])], "must hold integer ids, got float64"),
        ([np.array([1]), np.array([2, 70], np.uint64)], "row 1, position 1: id 70 is outside"),
        ([np.array([1]), np.array([2**64 - 5], np.uint64)], f"row 1, position 0: id {2**64 - 5} is outside"),
        ([np.array([[1]]), np.array([2])], r"row 0 must be flat, got an array of shape \(1, 1\)"),
        ([[1], np.array([99])], "row 1, position 0: id 99 is outside"),
        (RaggedTensor([1, 2, 70], [0, 1, 3]), "row 1, position 1: id 70 is outside"),
        (RaggedTensor([1, 2, -3], [0, 3, 3]), "row 0, position 2: id -3 is outside"),
        (RaggedTensor(np.ones(2), [0, 1, 2]), "must hold integer ids, got float64"),
        (RaggedTensor(np.zeros(9, np.int32), [0, 7, 9]), "row 0 has 7 ids; at most 6"),
        (SparseTensor([[1, 0]], [70], (2, 1)), "row 1, position 0: id 70 is outside"),
        (SparseTensor([[0, 0], [1, 0], [1, 3]], [-1, -1, 99], (2, 4)), "row 1, position 3: id 99 is outside"),
        (SparseTensor([[1, 0], [0, 2]], [1, 99], (2, 4)), "row 0, position 2: id 99 is outside"),
        (SparseTensor([[1, 0]], np.array([1.0]), (2, 1)), "must hold integer ids, got float64"),
        (
            SparseTensor([[1, 0, 0]], [1], (2, 1, 1)),
            r"must be of rank 2 to be served, got dense_shape \[2, 1, 1\]",
        ),
    ],
)
def test_bad_ids(serve, leaf, match):
    refused(serve, f"{HISTORY}.*{match}", items__history=leaf)


def test_rows_of_different_types_of_integers(serve):
    """Joined as they are, int64 and uint64 are floats to numpy."""

    def answer(rows):
        return serve(requests.nest({**GOOD, "items/history": rows}), dense={"dense": [[1, 2], [3, 4]]})

    mixed = [np.array([3]), np.array([4, 69], np.uint64)]
    np.testing.assert_array_equal(answer(mixed), answer([[3], [4, 69]]))


def test_an_id_out_of_range_with_others_in_order(serve):
    """Lists are packed before arrays; the place is still the feature's own."""
    ragged = RaggedTensor([1, 2], [0, 1, 2])
    refused(serve, "'text/1', row 1, position 0: id 30 ", items__history=ragged, text__1=[[29], [30]])
    refused(
        serve, "'items/history', row 1, position 0: id 99 ", items__history=RaggedTensor([1, 99], [0, 1, 2])
    )
    refused(serve, "'user', row 0, position 0: id 50 ", user=[50, 1], text__0=np.array([1, 2]))
    wide = RaggedTensor(np.array([1, 2**33]), [0, 1, 2])
    refused(serve, f"'text/1', row 1, position 0: id {2**33}", user=np.array([1, 2]), text__1=wide)


def test_bad_arrays_of_other_libraries(serve):
    pa = pytest.importorskip("pyarrow")
    refused(
        serve,
        f"{HISTORY}: as_input: 1 rows of the pyarrow array are null",
        items__history=pa.array([[1], None]),
    )
    refused(serve, f"{HISTORY}, row 1, position 0: id 70 ", items__history=pa.array([[1], [70]]))


def test_splits_that_decrease():
    with pytest.raises(ValueError, match="row_splits must not decrease"):
        RaggedTensor([1, 2], [0, 2, 1])


def test_splits_of_a_device_that_decrease(serve):
    bags = RaggedTensor(jnp.arange(3), jnp.array([0, 2, 1]))
    wrong = "RaggedTensor: row_splits must not decrease"
    refused(serve, f"{HISTORY}: {wrong}", items__history=bags)
    weights = dict.fromkeys(GOOD) | {"items/history": RaggedTensor(jnp.ones(3), bags.row_splits)}
    refused(serve, f"Weight for 'items/history': {wrong}", weights=weights)


@pytest.mark.parametrize("row", [-1, 3])
def test_coordinates_that_no_constructor_has_seen(serve, row):
    ids = SparseTensor(jnp.array([[0, 0], [row, 0]]), jnp.array([1, 2]), (2, 4))
    for leaf in (ids, jax.device_get(ids)):
        refused(serve, rf"{HISTORY}: SparseTensor: entry 1 lies at \[{row}, 0\]", items__history=leaf)


def test_lengths_that_no_constructor_has_seen(serve):
    ids = SparseTensor([[0, 0], [1, 0]], [1, 2], (2, 4))
    wrong = r"SparseTensor: indices must be \[nnz, 2\] and values \[nnz\], got \(2, 2\) and \(1,\)"
    short = jax.tree.map(lambda x: x[:1] if x.ndim == 1 else x, ids)
    refused(serve, f"{HISTORY}: {wrong}", items__history=short)
    weights = dict.fromkeys(GOOD) | {"items/history": short}
    refused(serve, f"Weight for 'items/history': {wrong}", weights=weights, items__history=ids)


def test_sequences(serve):
    recent = "Feature 'items/recent'"
    refused(serve, f"{recent}, row 1, position 0: id 70 is outside", items__recent=np.array([1, 70]))
    holes = SparseTensor([[0, 0], [1, 1]], [1, 2], (2, 2))
    refused(serve, f"{recent}: a sparse sequence must fill columns", items__recent=holes)
    refused(serve, f"{recent}, row 1, position 2: id 70 is outside", items__recent=[[], [1, 2, 70, 71]])
    # Beyond max_sequence_length nothing is looked at.
    serve(requests.nest(GOOD | {"items/recent": [[], [1, 2, 3, 70]]}), dense={"dense": np.ones((2, 2))})
    serve(
        requests.nest(GOOD | {"items/recent": RaggedTensor([1, 2, 3, -9], [0, 0, 4])}),
        dense={"dense": np.ones((2, 2))},
    )


def test_numbers_of_rows(serve):
    same = "must have the same number of rows: 'items/history' has 2, "
    refused(serve, f"{same}'user' has 3", user=[1, 2, 3])
    refused(serve, f"{same}'text/1' has 1", text__1=[[1]])
    refused(serve, f"{same}'text/1' has 3", text__1=RaggedTensor([1], [0, 1, 1, 1]))
    refused(serve, f"{same}'text/0' has 0", text__0=[])


def test_structure(serve):
    inputs, dense = requests.nest(GOOD), {"dense": np.ones((2, 2))}

    def check(match, inputs, weights=None):
        with pytest.raises(ValueError, match=match):
            serve(inputs, weights, dense)

    check("inputs must have all of .*'user' is missing", {k: v for k, v in inputs.items() if k != "user"})
    check("inputs has no feature 'nope'; features are", inputs | {"nope": [1, 2]})
    check("inputs must have feature 'user', got None", inputs | {"user": None})
    check("inputs at 'items' must be a dict with .*got list", inputs | {"items": [1, 2]})
    check("inputs at 'text' must be a list or tuple of 2 entries, got 1", inputs | {"text": ([[1], [2]],)})
    check("inputs must be a dict with .*got list", [1, 2])
    check("weights has no feature 'nope'", inputs, {"nope": [[1.0]]})


def test_keys_that_are_one_name():
    """Numbers are keys of Python's, and their digits of JSON's."""
    features = {number: FeatureConfig(TableConfig(5, 1, name=f"t{number}")) for number in (1, 2)}
    reader = Reader({"a": features})
    for keys in ({1: [3], 2: [4]}, {"1": [3], "2": [4]}, {1: [3], "2": [4]}):
        assert reader.inputs({"a": keys}) == [[3], [4]]
        assert reader.weights({"a": keys}) == [[3], [4]]
    for config, tree in (({"a": features}, {"a": {1: [3], "1": [4], 2: [5]}}), (features, {1: [3], "1": [4]})):
        for read in (Reader(config).inputs, Reader(config).weights):
            with pytest.raises(ValueError, match=r"has feature '1' twice, as 1 and as '1'; pass it once"):
                read(tree)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (
            {"items/history": [[1, NAN], []]},
            "'items/history', row 0, position 1 must be a finite float32, got nan",
        ),
        (
            {"items/history": [[INF, 1], []]},
            "'items/history', row 0, position 0 must be a finite float32, got inf",
        ),
        ({"items/history": [[1, 1e39], []]}, "row 0, position 1 must be a finite float32, got 1e[+]39"),
        ({"items/history": [[1, "a"], []]}, "row 0, position 1 must be a finite float32, got 'a'"),
        ({"items/history": [[True, 1.0], []]}, "row 0, position 0 must be a finite float32, got True"),
        ({"items/history": [[1, None], []]}, "row 0, position 1 must be a finite float32, got None"),
        (
            {"items/history": [[1], []]},
            "'items/history' must be parallel to its ids: row 0 has 1 weights for 2",
        ),
        ({"items/history": [[1, 2]]}, "'items/history' must be parallel to its ids: got 1 rows for 2"),
        ({"items/history": [1.0, 2.0]}, "'items/history': a row of it must be a list, got float"),
        ({"items/history": 3.0}, "'items/history': it must be a list of lists, got float"),
        (
            {"items/history": [[[1], [2, 3]], []]},
            r"'items/history', row 0, position 0 must be a finite float32, got \[1\]",
        ),
        ({"user": [1.0, 2.0]}, "'user', but input is dense"),
        (
            {"text/1": [[1.0] * 3, []]},
            r"'text/1', which was not announced; pass weighted=\['text/1', .* export_model, or --weighted text/1 to",
        ),
        ({"items/recent": [[1.0], [1.0] * 4]}, "'items/recent', but this is a sequence feature"),
    ],
)
def test_bad_weights_of_lists(serve, weights, match):
    refused(serve, f"(W|w)eight (specified )?for {match}" if match[0] == "'" else match, weights=weights)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (RaggedTensor(np.array([NAN, 1], np.float32), [0, 2, 2]), "row 0, position 0 must be a finite float32"),
        (RaggedTensor(np.array([1, 1e39]), [0, 2, 2]), "row 0, position 1 must be a finite float32, got inf"),
        (RaggedTensor(np.array([1, 1]), [0, 2, 2]), "must be floating point, got int64"),
        (RaggedTensor(np.ones(2, np.float32), [0, 1, 2]), "parallel to its ids: row 0 has 1 weights for 2 ids"),
        (
            SparseTensor([[0, 0]], np.ones(1, np.float32), (2, 1)),
            "it must be a RaggedTensor or a list of lists",
        ),
        (np.ones(2), "it must be a RaggedTensor or a list of lists, got ndarray"),
        ([[1.0, True], []], "row 0, position 1 must be a finite float32, got True"),
        ([[10**400, 1], []], "row 0, position 0 must be a finite float32, got 1000"),
        ([[[1], [2, 3]], []], r"row 0, position 0 must be a finite float32, got \[1\]"),
    ],
)
def test_bad_weights_of_ragged_ids(serve, weight, match):
    ids = RaggedTensor([3, 4], [0, 2, 2])
    refused(serve, f"Weight for 'items/history'.*{match}", {"items/history": weight}, items__history=ids)


def test_bad_weights_of_sparse_ids(serve):
    ids = SparseTensor([[0, 0], [1, 0], [1, 2]], [3, 4, 5], (2, 3))
    other = SparseTensor([[0, 0], [0, 0], [0, 0]], np.ones(3, np.float32), (2, 3))
    nan, pruned = (
        SparseTensor(ids.indices, np.array(w, np.float32), (2, 3)) for w in ([1, NAN, 1], [1, 0, INF])
    )
    ragged = RaggedTensor(np.ones(2, np.float32), [0, 1, 2])
    for weight, match in [
        (other, "their indices differ"),
        (nan, "row 1, position 0 must be a finite float32, got nan"),
        (pruned, "row 1, position 2 must be a finite float32, got inf"),
        (ragged, "it must be a SparseTensor, as its ids are, got RaggedTensor"),
    ]:
        refused(serve, match, {"items/history": weight}, items__history=ids)


@pytest.mark.parametrize(
    ("dense", "match"),
    [
        ({"other": 1}, r"dense must be a dict with \['dense'\], got \['other'\]"),
        ([1], r"dense must be a dict with \['dense'\], got list"),
        ({"dense": [[1, 2]]}, r"'dense' must be of shape \[2, 2\] \(rows as in the features\), got \[1, 2\]"),
        ({"dense": [[1, 2], [3]]}, r"'dense' must be of shape \[2, 2\], got uneven rows"),
        ({"dense": [[1, "a"], [3, 4]]}, "'dense' must hold numbers, got <U"),
        ({"dense": np.ones((2, 2), bool)}, "'dense' must hold numbers, got bool"),
        ({"dense": np.ones((2, 2), object)}, "'dense' must hold numbers, got object"),
        (
            {"dense": [[True, False]] * 2},
            r"'dense', row 0, position \[0\]: must hold numbers, got True",
        ),
        ({"dense": [[1, 2], [0.5, None]]}, r"'dense', row 1, position \[1\]: must hold numbers, got None"),
        ({"dense": [[10**20, 2], [True, 1]]}, r"'dense', row 1, position \[0\]: must hold numbers, got True"),
        ({"dense": [[1, 2], [3, -(10**400)]]}, r"row 1, position \[1\]: must be a finite float32, got -1000"),
        ({"dense": [[1, 2], [3, 10**5000]]}, r"row 1, position \[1\]: must be a finite float32, got an int"),
        ({"dense": np.ma.masked_equal([[1, 2], [3, 3]], 3)}, "'dense' is a masked array with 2 masked entries"),
        (
            {"dense": [[1, 2], np.ma.masked_equal([3, 4], 3)]},
            "'dense', row 1, is a masked array with 1 masked entries",
        ),
        ({"dense": [[1, 2], [NAN, 4]]}, r"'dense', row 1, position \[0\]: must be a finite float32, got nan"),
        ({"dense": [[1, 2], [3, 1e39]]}, r"row 1, position \[1\]: must be a finite float32, got 1e[+]39"),
    ],
)
def test_bad_dense_inputs(serve, dense, match):
    refused(serve, match, dense=dense)


def test_ints_of_any_size_are_numbers(serve):
    def answer(number, history):
        inputs = requests.nest({**GOOD, "items/history": history})
        weights = requests.nest({"items/history": [[number, 1], []]})
        return serve(inputs, weights, {"dense": [[number, 1], [-number, 0.5]]})

    for history in (GOOD["items/history"], RaggedTensor([3, 4], [0, 2, 2])):
        for number in (2**63, 10**20, 10**30):
            np.testing.assert_array_equal(answer(number, history), answer(float(number), history))


SCALARS = st.one_of(
    st.integers(-3, 75),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
    st.binary(max_size=2),
    st.sampled_from([np.int64(3), np.uint8(200), np.float32(1), np.bool_(True), np.str_("a")]),
)
ARRAYS = st.one_of(
    hnp.arrays(
        st.sampled_from(["int8", "int64", "uint64", "float32", "bool", "<U2", "O", "complex64", "M8[s]"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
)
GARBAGE = st.recursive(
    st.one_of(SCALARS, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.integers(0, 3), inner, max_size=2),
    ),
    max_leaves=8,
)
FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(GARBAGE, st.sampled_from(sorted(GOOD)))
def test_garbage_for_ids_is_refused(serve, leaf, path):
    inputs = requests.nest(GOOD | {path: leaf})
    try:
        result = serve(inputs, dense={"dense": np.zeros((2, 2))})
    except ValueError:
        return
    assert result.shape == (2, 4)
    assert len(leaf) == 2
    flat = [id_ for row in leaf for id_ in np.atleast_1d(row).tolist()]
    assert not any(isinstance(id_, bool) for id_ in flat)
    flat = [operator.index(id_) for id_ in flat]
    length = requests.feature(path).max_sequence_length
    assert length or all(0 <= id_ < requests.feature(path).table.vocabulary_size for id_ in flat)


@FUZZ
@given(GARBAGE)
def test_garbage_for_weights_and_dense_inputs_is_refused(serve, leaf):
    dense = {"dense": np.zeros((2, 2))}
    expected = serve(requests.nest(GOOD), dense=dense)
    for weights, given_dense in [({"items/history": leaf}, dense), ({}, {"dense": leaf}), ({}, leaf)]:
        try:
            result = serve(requests.nest(GOOD), requests.nest(weights), given_dense)
        except ValueError:
            continue
        assert result.shape == expected.shape
        assert np.isfinite(result).all()


@FUZZ
@given(GARBAGE)
def test_garbage_for_requests_is_refused(serve, garbage):
    with pytest.raises(ValueError):
        serve(garbage, dense={"dense": np.zeros((2, 2))})


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([["0.5"]], "Weight for 'raw', row 0, position 0 must be a finite float32, got '0.5'"),
        ([[True]], "Weight for 'raw', row 0, position 0 must be a finite float32, got True"),
        ([[[1.0]]], r"Weight for 'raw', row 0, position 0 must be a finite float32, got \[1.0\]"),
    ],
)
def test_bad_weights_of_ids_that_are_hashed(weights, match):
    table = TableConfig(5, 2, combiner="sum", name="t")
    feature = FeatureConfig(table, preprocessing=HashBuckets(5, "string"))
    serve = ServingFunction(
        EmbeddingForServing({"raw": feature}, {"t": np.ones((5, 2), np.float32)}),
        weighted=["raw"],
        batch_sizes=(1,),
    )
    assert serve({"raw": [["ann"]]}, {"raw": [[2]]})["raw"].tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match=match):
        serve({"raw": [["ann"]]}, {"raw": weights})


def test_keys_that_are_numbers_are_found_as_text():
    table = TableConfig(5, 2, combiner="sum", name="t")
    embedding = EmbeddingForServing({0: FeatureConfig(table)}, {"t": np.ones((5, 2), np.float32)})
    serve = ServingFunction(embedding, weighted=["0"], batch_sizes=(1,))
    for inputs, weights in (
        ({0: [[1]]}, {0: [[3.0]]}),
        ({"0": [[1]]}, {"0": [[3.0]]}),
        ({0: [[1]]}, {"0": [[3.0]]}),
    ):
        assert serve(inputs, weights)[0].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("leaf", [np.array(5), 5])
def test_a_single_number_beside_features_that_disagree(serve, leaf):
    refused(serve, "must have", items__history=[[3]], text__1=leaf)
