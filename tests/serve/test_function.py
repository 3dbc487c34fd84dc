"""ServingFunction: equal to serving_embedding_lookup, and never compiling once warm."""

import gc
import threading
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxembed import (
    FeatureConfig,
    HashBuckets,
    RaggedTensor,
    SparseTensor,
    TableConfig,
    initializers,
    kernel,
    serving_embedding_lookup,
    use_backend,
)
from jaxembed.combiners import CustomCombiner
from jaxembed.memory import aligned_empty
from jaxembed.quantization import quantize
from jaxembed.serve import EmbeddingForServing, ServingFunction
from jaxembed.serve.ladder import Rung
from tests.serve import requests

TABLES = requests.make_tables()
EMBEDDING = EmbeddingForServing(requests.FEATURE_CONFIG, TABLES)
SIZES = {"batch_sizes": (1, 4, 8), "max_ids_per_row": requests.MAX_IDS}
PATHS = [
    "xla",
    pytest.param("native", marks=pytest.mark.skipif(not kernel.available(), reason="no native kernel")),
]


def model(params, activations, dense):
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(activations)]
    hidden = jnp.concatenate([*flat, dense["dense"], dense["age"][:, None]], axis=1)
    return {"score": jax.nn.sigmoid(hidden @ params["w"]), "hidden": hidden}


PARAMS = {"w": np.linspace(-1, 1, 4 + 8 + 24 + 4 + 8 + 3, dtype=np.float32)}


@pytest.fixture(scope="module", params=PATHS)
def lookup(request):
    with use_backend(request.param):
        function = ServingFunction(EMBEDDING, weighted=requests.WEIGHTED, row_lengths=(2,), **SIZES)
        return function.warm_up()


@pytest.fixture(scope="module")
def ranking():
    shapes = {"dense": 2, "age": ()}
    function = ServingFunction(EMBEDDING, model, PARAMS, dense_inputs=shapes, row_lengths=(), **SIZES)
    return function.warm_up()


@pytest.fixture
def compilations():
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@settings(max_examples=12)
@given(requests.requests())
def test_equals_serving_embedding_lookup(lookup, request):
    inputs, weights, expected, rows = request
    before = lookup.compile_count
    result = lookup(inputs, weights)
    assert lookup.compile_count == before
    for path, (ids, parallel) in expected.items():
        config = {"f": requests.feature(path)}
        answer = serving_embedding_lookup(
            {"f": ids}, None if parallel is None else {"f": parallel}, TABLES, config
        )["f"]
        mine = requests.feature(path, result)
        assert mine.shape == answer.shape
        assert mine.shape[0] == rows
        np.testing.assert_allclose(mine, answer, rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("rows", [0, 3, 8, 19])
def test_model_sees_every_row(ranking, rows):
    inputs, rng = requests.random_inputs(rows, rows), np.random.default_rng(rows)
    dense = {"dense": rng.normal(size=(rows, 2)), "age": list(range(rows))}
    result = ranking(inputs, dense=dense)
    assert result["score"].shape == (rows,)
    assert isinstance(result["score"], np.ndarray)
    if rows:
        ragged = requests.nest(
            {path: RaggedTensor.from_lists(requests.feature(path, inputs)) for path in requests.PATHS}
        )
        dense = {"dense": dense["dense"].astype(np.float32), "age": np.arange(rows, dtype=np.float32)}
        expected = model(PARAMS, EMBEDDING(ragged), dense)
        np.testing.assert_allclose(result["score"], expected["score"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["hidden"], expected["hidden"], rtol=1e-5, atol=1e-6)


def test_never_compiles_after_warm_up(ranking, compilations):
    assert ranking.ready
    assert ranking.compile_count == len(ranking.rungs) == 3
    for rows in [*range(20), 100]:
        ranking(requests.random_inputs(rows, rows), dense={"dense": np.ones((rows, 2)), "age": [1] * rows})
    assert compilations == []
    assert ranking.compile_count == 3


def test_compiles_a_rung_once_without_warm_up(compilations):
    table = TableConfig(5, 4, name="table")
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": np.ones((5, 4), np.float32)})
    function = ServingFunction(embedding, batch_sizes=(1, 2), max_ids_per_row=3)
    assert not function.ready
    for _ in range(2):
        np.testing.assert_array_equal(function([[0, 4]]), np.ones((1, 4)))
    assert function.compile_count == len(compilations) == 1


def test_rungs():
    with use_backend("xla"):
        function = ServingFunction(EMBEDDING, max_batch_size=20, max_ids_per_row=64)
    assert function.rungs == [Rung(b, n) for b in (1, 4, 16, 20) for n in (8, 64)]


@pytest.mark.skipif(not kernel.available(), reason="no native kernel")
def test_rungs_of_the_native_kernel():
    with use_backend("native"):
        function = ServingFunction(EMBEDDING)
    assert [rung.row_length for rung in function.rungs] == [128] * 20


@pytest.mark.parametrize("quantized", [False, True])
def test_tables_of_the_host_and_of_the_device_give_the_same(quantized):
    tables = {table: quantize(rows, "int8") if quantized else rows for table, rows in TABLES.items()}
    given = EmbeddingForServing(requests.FEATURE_CONFIG, jax.tree.map(jnp.asarray, tables))
    assert given.addresses is None
    on_device = ServingFunction(given, **SIZES)
    on_host = ServingFunction(EmbeddingForServing(requests.FEATURE_CONFIG, tables), **SIZES)
    assert not on_host.share_programs(on_device)
    inputs = requests.random_inputs(5, 3)
    for one, other in zip(jax.tree.leaves(on_device(inputs)), jax.tree.leaves(on_host(inputs)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tables_live_as_long_as_the_function():
    table = TableConfig(100_000, 16, name="table")
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": np.full((100_000, 16), 3, np.float32)})
    function = ServingFunction(embedding, batch_sizes=(1,))
    for rows in embedding.embedding_tables.values():
        rows.delete()
    del embedding, rows
    gc.collect()
    other = np.full((100_000, 16), 7, np.float32)  # where the memory would be that is not kept
    np.testing.assert_array_equal(function([[99_999]]), np.full((1, 16), 3))
    assert other[0, 0] == 7


def test_addresses_keep_their_tables():
    """XLA keeps the arguments of a program that runs, even if whoever called it was interrupted and is gone."""
    table = TableConfig(1000, 16, name="table")
    rows = aligned_empty((1000, 16), np.float32)
    rows[...], gone = 3, weakref.ref(rows)
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": rows})
    where = embedding.addresses
    del embedding, rows
    gc.collect()
    assert gone() is not None
    del where
    gc.collect()
    assert gone() is None


def test_inside_of_a_trace():
    table = TableConfig(4, 1, name="table")
    rows = np.arange(4, dtype=np.float32)[:, None]
    function = ServingFunction(EmbeddingForServing(FeatureConfig(table), {"table": rows}), batch_sizes=(1,))
    assert float(jax.jit(lambda x: x + function([[3]])[0, 0])(1.0)) == 4


def test_a_model_without_results():
    table = TableConfig(4, 1, name="table")
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": np.ones((4, 1), np.float32)})
    assert ServingFunction(embedding, lambda params, activations, dense: {}, batch_sizes=(1,))([[1]]) == {}


def test_tensors_that_a_transformation_made():
    """It checks nothing, as it may hold anything there."""
    table = TableConfig(50, 2, name="table")
    embedding = EmbeddingForServing(
        {name: FeatureConfig(table) for name in "ab"}, {"table": np.ones((50, 2), np.float32)}
    )
    function = ServingFunction(embedding, batch_sizes=(1, 2))
    one, two = ({name: RaggedTensor.from_lists([[i, i + 1]]) for name in "ab"} for i in (1, 5))
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), one, two)
    structure = jax.tree.structure(one["a"])
    wide = {
        name: jax.tree.unflatten(structure, [tensor.values.reshape(1, 2), tensor.row_splits])
        for name, tensor in one.items()
    }
    empty = jax.tree.map(lambda x: x[:0], one)
    for request in (stacked, wide, empty):
        with pytest.raises(ValueError, match=r"must be \[N\]|must be \[B \+ 1\]"):
            function(request)


def test_progress(capsys):
    table = TableConfig(5, 4, name="table")
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": np.ones((5, 4), np.float32)})
    function, seen = ServingFunction(embedding, batch_sizes=(1, 2), max_ids_per_row=1), []
    function.warm_up(lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    function.warm_up(progress=True)
    assert "2/2\n" in capsys.readouterr().err


def test_threads(ranking):
    requests_ = [requests.random_inputs(seed, rows) for seed, rows in enumerate([1, 3, 8, 20])]
    dense = [{"dense": np.full((rows, 2), rows), "age": [1] * rows} for rows in [1, 3, 8, 20]]
    expected = [ranking(inputs, dense=d)["score"] for inputs, d in zip(requests_, dense, strict=True)]
    failures = []

    def work(start):
        for i in range(start, start + 60):
            got = ranking(requests_[i % 4], dense=dense[i % 4])["score"]
            if not np.array_equal(got, expected[i % 4]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_results_outlive_later_requests(lookup):
    """Buffers are reused between requests; results must not be views of them."""
    first = lookup(requests.random_inputs(1, 4))
    kept = jax.tree.map(np.copy, first)
    for seed in range(5):
        lookup(requests.random_inputs(seed, 4))
    jax.tree.map(np.testing.assert_array_equal, first, kept)


def test_results_are_no_views_of_the_request():
    table = TableConfig(5, 4, name="table")
    embedding = EmbeddingForServing(FeatureConfig(table), {"table": np.ones((5, 4), np.float32)})
    function = ServingFunction(
        embedding, lambda params, activations, dense: dense["x"], dense_inputs={"x": 64}, batch_sizes=(4,)
    )
    raw = np.zeros(4 * 64 + 16, np.float32)
    dense = raw[-raw.ctypes.data % 64 // 4 :][: 4 * 64].reshape(4, 64)
    result = function([0, 1, 2, 3], dense={"x": dense})
    dense[:] = 7
    np.testing.assert_array_equal(result, np.zeros((4, 64)))


def test_inputs_of_other_libraries(lookup):
    pa = pytest.importorskip("pyarrow")
    sp = pytest.importorskip("scipy.sparse")
    inputs = requests.random_inputs(7, 3)
    expected = lookup(inputs)
    history = inputs["items"]["history"]
    changed = inputs | {"items": inputs["items"] | {"history": pa.array(history, pa.list_(pa.int64()))}}
    jax.tree.map(np.testing.assert_array_equal, lookup(changed), expected)
    matrix = sp.csr_matrix(np.array([[3, 0, 5], [0, 0, 0], [6, 0, 0]]))
    sparse, lists = ({"text": (tags, inputs["text"][1])} for tags in (matrix, [[3, 5], [], [6]]))
    jax.tree.map(np.testing.assert_array_equal, lookup(inputs | sparse), lookup(inputs | lists))


def test_large_outputs_are_not_merged():
    tables = {f"t{i}": TableConfig(9, 4096, name=f"t{i}") for i in range(3)}
    arrays = {name: np.arange(9 * 4096, dtype=np.float32).reshape(9, 4096) for name in tables}
    config = {name: FeatureConfig(table) for name, table in tables.items()}
    function = ServingFunction(EmbeddingForServing(config, arrays), batch_sizes=(2, 8), max_ids_per_row=1)
    for rows in (1, 2, 7):
        ids = [(3 * i) % 9 for i in range(rows)]
        result = function(dict.fromkeys(config, ids))
        np.testing.assert_array_equal(result["t1"], arrays["t1"][ids])


def test_jit_function_inside_a_jit(ranking):
    inputs = requests.random_inputs(5, 3)
    ragged = requests.nest(
        {path: RaggedTensor.from_lists(requests.feature(path, inputs)) for path in requests.PATHS}
    )
    dense = {"dense": np.ones((3, 2), np.float32), "age": np.ones(3, np.float32)}

    @jax.jit
    def doubled(tables, params, inputs, dense):
        return 2 * ranking.jit_function(tables, params, inputs, None, dense)["score"]

    result = doubled(EMBEDDING.embedding_tables, PARAMS, ragged, dense)
    np.testing.assert_allclose(result, 2 * ranking(inputs, dense=dense)["score"], rtol=1e-5)


def test_bfloat16():
    table = TableConfig(5, 4, name="table", dtype=jnp.bfloat16)
    embedding = EmbeddingForServing([FeatureConfig(table)], {"table": jnp.ones((5, 4), jnp.bfloat16) * 3})
    (result,) = ServingFunction(embedding, batch_sizes=(2,), max_ids_per_row=2)([[[1, 2], []]])
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.astype(np.float32), [[3] * 4, [0] * 4])


@pytest.mark.parametrize("path", PATHS)
def test_custom_combiners(path):
    def heaviest(valency, vectors, weights):
        return jnp.max(vectors, axis=0) * weights[0] + valency.astype(jnp.float32)

    combiner = CustomCombiner(heaviest, max_valency=3, num_weights=1, initializer=initializers.Constant(1.0))
    table = TableConfig(5, 4, name="table", combiner=combiner)
    config = {"a": FeatureConfig(table), "b": FeatureConfig(requests.USERS)}
    tables = TABLES | {table: np.arange(20, dtype=np.float32).reshape(5, 4)}
    embedding = EmbeddingForServing(config, tables, {"table": np.array([2.0], np.float32)})
    lists = {"a": [[1, 4], [], [2]], "b": [[1], [2, 3], []]}
    with use_backend(path):
        function = ServingFunction(embedding, weighted=["a"], batch_sizes=(4,), max_ids_per_row=5)
        result = function(lists, {"a": [[3.0, 1.0], [], [0.5]]})
    weights = {"a": RaggedTensor.from_lists([[3.0, 1.0], [], [0.5]], np.float32), "b": None}
    expected = embedding({key: RaggedTensor.from_lists(value) for key, value in lists.items()}, weights)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), result, expected)
    for ids in (np.array([1]), [1], [np.int64(1)]):
        with pytest.raises(ValueError, match="Feature 'a' has a combiner of its own, which dense ids"):
            function({"a": ids, "b": np.array([1])})


def test_one_id_a_row_of_a_sequence():
    combiner = CustomCombiner(lambda valency, vectors: vectors[0], max_valency=3)
    table = TableConfig(5, 1, combiner=combiner, name="table")  # sequences are not combined
    config = {
        "rows": FeatureConfig(table, max_sequence_length=2),
        "raw": FeatureConfig(table, max_sequence_length=2, preprocessing=HashBuckets(5, "string")),
    }
    rows = np.arange(1, 6, dtype=np.float32)[:, None]
    function = ServingFunction(EmbeddingForServing(config, {"table": rows}), batch_sizes=(2,))
    raw = ["ann", "bob"]
    for ids in ([3, 0], (3, 0), np.array([3, 0]), jnp.array([3, 0]), [np.int64(3), np.int64(0)]):
        found = function({"rows": ids, "raw": raw})
        assert found["rows"][..., 0].tolist() == [[4, 0], [1, 0]]
        np.testing.assert_array_equal(found["raw"], function({"rows": ids, "raw": [["ann"], ["bob"]]})["raw"])


class Bags(list):
    """A list by another name."""


def test_rows_of_any_kind_in_any_order(lookup):
    lists = [[3, 4], [], [5, 6, 7, 8]]
    inputs = requests.random_inputs(0, 3)

    def answer(items, weights=None):
        weights = weights and requests.nest({"items/history": weights})
        return lookup(inputs | {"items": {"history": items, "recent": items}}, weights)

    def kinds(entries):
        for make in (tuple, Bags, np.array, jnp.array):
            made = [make(row) for row in entries]
            yield from (made, Bags(made), [made[0], *entries[1:]], [*entries[:2], made[2]])

    expected = answer(lists)
    for leaf in (Bags(lists), *kinds(lists)):
        jax.tree.map(np.testing.assert_array_equal, answer(leaf), expected)
    weights = [[0.5, 2.0], [], [1.0, 1.0, 2.0, 4.0]]
    expected = answer(lists, weights)
    for ids in kinds(lists):
        for parallel in (weights, *kinds(weights)):
            jax.tree.map(np.testing.assert_array_equal, answer(ids, parallel), expected)


def test_weights_of_no_ids(lookup):
    """There are none of any type."""
    ragged = RaggedTensor.from_lists([[], []])
    sparse = SparseTensor([], [], (2, 1))
    inputs = requests.random_inputs(0, 2)
    for ids, weights in ((ragged, ragged), (sparse, sparse), (ragged, [[], []])):
        items = inputs["items"] | {"history": ids}
        found = lookup(inputs | {"items": items}, requests.nest({"items/history": weights}))
        np.testing.assert_array_equal(found["items"]["history"], np.zeros((2, 8)))


@pytest.mark.parametrize("rows", [3, 19])
def test_results_are_read_only(lookup, rows):
    result = lookup(requests.random_inputs(0, rows))
    assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be an int of at least 1, got 0"),
        ({"batch_sizes": (4, 1)}, "batch_sizes must be rising ints of at least 1"),
        ({"max_ids_per_row": 0}, "max_ids_per_row of 'items/history' must be an int of at least 1 .*, got 0"),
        ({"max_ids_per_row": 2**31}, rf"'items/history' must be .* below 2\*\*31, got {2**31}"),
        ({"max_ids_per_row": {"nope": 3}}, "max_ids_per_row has no feature 'nope'"),
        ({"max_ids_per_row": 10**8}, r"fewer than 2\*\*31 ids"),
        ({"weighted": ["nope"]}, "weighted has no feature 'nope'; features are"),
        ({"weighted": "user"}, "weighted must be a list of paths"),
        ({"weighted": ["items/recent"]}, "'items/recent', which is a sequence feature"),
        ({"dense_inputs": {"x": 3}}, r"dense_inputs \['x'\] need a model"),
        ({"dense_inputs": {"x": (-1,)}}, r"dense_inputs\['x'\] must be the shape of one row"),
    ],
)
def test_construction_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        ServingFunction(EMBEDDING, **arguments)


def test_output_shape_is_refused():
    feature = FeatureConfig(requests.USERS, output_shape=(2, 3))
    embedding = EmbeddingForServing({"user": feature}, TABLES)
    with pytest.raises(
        ValueError, match=r"feature 'user' has output_shape \[2, 3\], which fixes the batch size"
    ):
        ServingFunction(embedding)


def test_model_must_return_rows():
    function = ServingFunction(EMBEDDING, lambda params, activations, dense: {"x": jnp.ones(3)}, **SIZES)
    with pytest.raises(ValueError, match=r"leading dimension B, got shape \[3\] for B = 1 at output\['x'\]"):
        function(requests.random_inputs(0, 1))


def test_row_splits_that_changed_after_they_were_checked(lookup):
    inputs = requests.random_inputs(0, 2)
    ragged = {path: RaggedTensor.from_lists(requests.feature(path, inputs)) for path in requests.PATHS}
    path = next(iter(ragged))
    ragged[path].row_splits[:] = [1, 1, 1]
    with pytest.raises(ValueError, match="row_splits must start at 0, got 1"):
        lookup(requests.nest(ragged))
