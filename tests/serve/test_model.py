"""ServingModel: a bundle alone gives what the training code gives, on every thread, without compiling."""

import operator
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jaxembed import RaggedTensor, kernel
from jaxembed.checkpoint import CheckpointError
from jaxembed.serve import EmbeddingForServing, ServingFunction, ServingModel, export_model
from jaxembed.serve.exported import ArraySpec, ExportedModel
from tests.serve import bundles, requests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bundles.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def artefact():
    return bundles.export()


@pytest.fixture(scope="module")
def bundle(checkpoint, artefact, tmp_path_factory):
    return bundles.convert(checkpoint, tmp_path_factory.mktemp("bundle"), exported=artefact)


@pytest.fixture(scope="module")
def served(bundle):
    return ServingModel(bundle, max_batch_size=4).warm_up()


@pytest.fixture(scope="module")
def reference(bundle):
    """The same tables under the model's own code."""
    embedding = EmbeddingForServing.restore(bundle)
    options = {"weighted": requests.WEIGHTED, "max_ids_per_row": requests.MAX_IDS, "batch_sizes": (1, 6)}
    return ServingFunction(embedding, bundles.model, bundles.PARAMS, dense_inputs=bundles.DENSE, **options)


@pytest.fixture
def compilations():
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 11])
def test_gives_what_the_code_of_the_model_gives(served, reference, rows):
    inputs, dense = requests.random_inputs(rows, rows), bundles.dense_rows(rows)
    weights = {"items": {"history": [[0.5] * len(row) for row in inputs["items"]["history"]]}}
    result, expected = (f(inputs, weights, dense) for f in (served, reference))
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert isinstance(mine, np.ndarray)
        assert mine.shape[0] == rows
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def test_lookup(served):
    inputs = requests.random_inputs(5, 3)
    expected = ServingFunction(
        served.embedding, weighted=requests.WEIGHTED, max_ids_per_row=requests.MAX_IDS, batch_sizes=(3,)
    )(inputs)
    jax.tree.map(np.testing.assert_array_equal, served.lookup(inputs), expected)


def test_never_compiles_once_ready(served, compilations):
    assert served.ready
    count = served.compile_count
    assert count == 2 * 4  # batches of 1, 2, 3 and 4, with the model and without
    for rows in [*range(9), 50]:
        inputs = requests.random_inputs(rows, rows)
        served(inputs, dense=bundles.dense_rows(rows))
        served.lookup(inputs)
    assert compilations == []
    assert served.compile_count == count


def test_threads(served, compilations):
    sizes = (1, 2, 3, 4, 9)
    asked = [
        (requests.random_inputs(seed, rows), bundles.dense_rows(rows, seed)) for seed, rows in enumerate(sizes)
    ]
    expected = [(served(inputs, dense=dense), served.lookup(inputs)) for inputs, dense in asked]
    failures, start = [], threading.Barrier(8)

    def work(first):
        start.wait()
        for i in range(first, first + 50):
            inputs, dense = asked[i % 5]
            got = served(inputs, dense=dense), served.lookup(inputs)
            same = jax.tree.map(np.array_equal, got, expected[i % 5])
            if not all(jax.tree.leaves(same)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert compilations == []


def test_signature(served):
    signature = served.signature
    assert [(f.path, f.kind, f.max_ids, f.weighted) for f in signature.features] == [
        ("items/history", "bag", 6, True),
        ("items/recent", "sequence", 3, False),
        ("text/0", "bag", 6, True),
        ("text/1", "bag", 6, True),
        ("user", "bag", 6, False),
    ]
    assert signature.features[-1].vocabulary_size == 50
    assert signature.dense == (ArraySpec("dense", (2,), "float32"), ArraySpec("age", (), "float32"))
    assert signature.outputs == (
        ArraySpec("score", (), "float32"),
        ArraySpec("parts/0", (51,), "float32"),
        ArraySpec("parts/1/0", (2,), "float32"),
    )
    assert (served.version, served.step, served.metadata) == (7, 0, {})


def test_jit_function(served, reference):
    inputs, dense = requests.random_inputs(2, 3), bundles.dense_rows(3)
    ragged = requests.nest(
        {path: RaggedTensor.from_lists(requests.feature(path, inputs)) for path in requests.PATHS}
    )

    @jax.jit
    def doubled(tables, params, inputs, dense):
        return 2 * served.jit_function(tables, params, inputs, dense=dense)["score"]

    result = doubled(served.embedding.embedding_tables, served.params, ragged, dense)
    np.testing.assert_allclose(result, 2 * reference(inputs, dense=dense)["score"], rtol=1e-6)


def test_jit_function_of_other_inputs_than_the_model_has(served):
    ragged = {path: RaggedTensor.from_lists([[1], [2]]) for path in requests.PATHS}
    arguments = served.embedding.embedding_tables, served.params
    inputs, dense = requests.nest(ragged), bundles.dense_rows(2)
    with pytest.raises(ValueError, match=r"takes the features \['items/history', .* got \['user'\]; pass all"):
        served.jit_function(*arguments, {"user": inputs["user"]}, dense=dense)
    for given, message in (
        ({"age": dense["age"]}, r"takes the dense inputs \['dense', 'age'\], got \['age'\]; pass all"),
        (None, r"takes the dense inputs \['dense', 'age'\], got \[\]; pass all"),
        ({**dense, "dense": [[1.0, 2.0]] * 2}, r"dense inputs as arrays, 'dense' as \[B, 2\], got list"),
        ({**dense, "age": dense["dense"]}, r"dense inputs as arrays, 'age' as \[B\], got \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            served.jit_function(*arguments, inputs, dense=given)


def test_without_a_model_gives_activations(checkpoint, tmp_path, compilations):
    with ServingModel(bundles.convert(checkpoint, tmp_path), max_batch_size=1, max_ids_per_row=6) as model:
        model.warm_up()
        assert model.compile_count == len(compilations) == 1
        inputs = requests.random_inputs(0, 1)
        jax.tree.map(np.testing.assert_array_equal, model(inputs), model.lookup(inputs))
        assert [(o.name, o.shape) for o in model.signature.outputs][:2] == [
            ("items/history", (8,)),
            ("items/recent", (3, 8)),
        ]
    assert not model.ready
    for use in (lambda: model(inputs), lambda: model.compile_count):
        with pytest.raises(ValueError, match=r"the ServingModel of .* is closed; open it again"):
            use()


def test_model_of_fixed_batch_sizes(checkpoint, reference, tmp_path):
    def fixed(params, activations, dense):
        operator.index(dense["age"].shape[0])
        return bundles.model(params, activations, dense)["score"] * float(dense["age"].shape[0])

    arguments = (fixed, bundles.PARAMS, requests.FEATURE_CONFIG)
    with pytest.raises(ValueError, match=r"for a batch of any size: .*pass batch_sizes=\[...\]"):
        export_model(*arguments, dense_inputs=bundles.DENSE)
    exported = export_model(*arguments, dense_inputs=bundles.DENSE, batch_sizes=(2, 5), max_ids_per_row=6)
    bundles.convert(checkpoint, tmp_path, exported=exported)
    model = ServingModel(tmp_path).warm_up()
    inputs, dense = requests.random_inputs(0, 5), bundles.dense_rows(5)
    np.testing.assert_allclose(
        model(inputs, dense=dense), 5 * reference(inputs, dense=dense)["score"], rtol=1e-5
    )
    with pytest.raises(ValueError, match="max_batch_size must be at least 2, the smallest batch"):
        ServingModel(tmp_path, max_batch_size=1)


def test_compile_cache(bundle, tmp_path, compilations):
    before = jax.config.jax_compilation_cache_dir
    hits = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    results = []
    # Four rungs and, of the first one, the form that was not kept.
    for expected in (0, 5 if kernel.available() else 4):
        model = ServingModel(bundle, max_batch_size=2, compile_cache=tmp_path / "cache").warm_up()
        assert len(hits) == expected
        results.append(model(requests.random_inputs(0, 2), dense=bundles.dense_rows(2)))
    jax.monitoring.unregister_event_listener(listen)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert any((tmp_path / "cache").iterdir())
    assert jax.config.jax_compilation_cache_dir == before


def test_needs_no_code_of_training(bundle):
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tests", "flax", "optax", "orbax", "tensorflow") or name.startswith("jaxembed.train"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np
from jaxembed.serve import ServingModel
model = ServingModel({str(bundle)!r}, max_batch_size=1).warm_up()
inputs = {requests.random_inputs(0, 1)!r}
print(model(inputs, dense={{"dense": [[1.0, 2.0]], "age": [3.0]}})["score"].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "(1,)\n", done.stderr


def test_damage_is_found(checkpoint, artefact, tmp_path):
    bundles.convert(checkpoint, tmp_path, exported=artefact)
    file = tmp_path / "7" / "model.stablehlo"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.stablehlo is damaged: it does not have the digest"):
        ServingModel(tmp_path, verify=False)


def test_versions_of_one_model_have_equal_programs(artefact):
    one, other = (ExportedModel.from_bytes(data) for data in (artefact, bundles.export()))
    assert one == other
    assert hash(one) == hash(other)
    assert one != ExportedModel.from_bytes(bundles.export(weighted=()))


def test_model_must_fit_the_bundle(checkpoint, tmp_path):
    other = requests.FEATURE_CONFIG | {"text": requests.FEATURE_CONFIG["text"][::-1]}
    exported = export_model(bundles.model, bundles.PARAMS, other, dense_inputs=bundles.DENSE)
    bundles.convert(checkpoint, tmp_path / "a", exported=exported)
    with pytest.raises(ValueError, match="is of another feature configuration: they differ in"):
        ServingModel(tmp_path / "a")
    params = {"top": {"w": np.zeros(51, np.float32)}, "bias": np.zeros(2, np.float32)}
    exported = export_model(
        lambda p, a, d: d["age"] * p["bias"][0], params, requests.FEATURE_CONFIG, dense_inputs=bundles.DENSE
    )
    bundles.convert(checkpoint, tmp_path / "b", exported=exported)
    with pytest.raises(ValueError, match=r"needs parameter 'bias' of float32\[2\], got float32\[\]"):
        ServingModel(tmp_path / "b")


@pytest.mark.parametrize("data", [b"", b"JAXEMBED", b"nonsense" * 9, b"JAXEMBED" + b"\2" + b"\0" * 7 + b"{}"])
def test_bytes_that_are_no_model(data):
    with pytest.raises(
        ValueError, match=r"not an exported model: .*pass what jaxembed.serve.export_model returns"
    ):
        ExportedModel.from_bytes(data)


def test_artefact_round_trip(artefact):
    assert ExportedModel.from_bytes(artefact).to_bytes() == artefact
    with pytest.raises(ValueError, match="its header says"):
        ExportedModel.from_bytes(artefact + b"x")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda p, a, d: {"x": None},
            "must return arrays in dicts, lists and tuples to be exported, got NoneType at 'x'",
        ),
        (lambda p, a, d: a["user"].T, "leading dimension B alone, got shape"),
        (lambda p, a, d: p["top"]["w"], "leading dimension B alone, got shape"),
        (lambda p, a, d: a["nothing"], "cannot be exported for a batch of any size: KeyError"),
    ],
)
def test_models_that_cannot_be_exported(model, message):
    with pytest.raises(ValueError, match=message):
        export_model(model, bundles.PARAMS, requests.FEATURE_CONFIG)
    for sizes in ((), (0,), (True,), np.array([1, 2])):
        with pytest.raises(ValueError, match="batch_sizes must be None or ints of at least 1, got"):
            export_model(bundles.model, bundles.PARAMS, requests.FEATURE_CONFIG, batch_sizes=sizes)


def test_tables_of_another_type_below_a_model(checkpoint, artefact, reference, tmp_path):
    """What they are stored as is not what the model was exported for."""
    bundles.convert(checkpoint, tmp_path / "bundle", exported=artefact, quantize="bfloat16")
    inputs, dense = requests.random_inputs(1, 3), bundles.dense_rows(3)
    model = ServingModel(tmp_path / "bundle", max_batch_size=4).warm_up()
    score, expected = model(inputs, dense=dense)["score"], reference(inputs, dense=dense)["score"]
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, expected, rtol=0.05, atol=0.01)
    bundles.convert(checkpoint, tmp_path / "tables", quantize="bfloat16")
    tables = ServingModel(tmp_path / "tables", max_batch_size=4, max_ids_per_row=6)
    outputs = jax.tree.leaves(tables(inputs))
    assert [spec.dtype for spec in tables.signature.outputs] == [out.dtype.name for out in outputs]


def test_a_closed_model_says_so(bundle):
    model = ServingModel(bundle)
    model.close()
    assert not model.ready
    for use in (lambda: model.embedding, lambda: model({}), lambda: model.lookup({}), model.export):
        with pytest.raises(ValueError, match="is closed; open it again"):
            use()


def test_limits_of_some_features_leave_the_others(bundle):
    exported = ServingModel(bundle).signature.features
    changed = ServingModel(bundle, max_ids_per_row={exported[0].path: 5}).signature.features
    assert [f.max_ids for f in changed] == [5, *(f.max_ids for f in exported[1:])]
