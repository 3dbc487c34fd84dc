"""A SavedModel that TensorFlow loads and runs, in a process of its own, with our outputs and one copy of the tables."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig, serve, serving_embedding_lookup
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.convert import convert
from jaxembed.convert.saved_model import export_saved_model
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.initializers import RandomUniform
from tests.lazy import lazily

pytestmark = pytest.mark.parity
lazily("tensorflow")
lazily("orbax.export")

SHAPES = {"films/a.b": (20_000, 16), "users": (70, 8)}
IDS = {
    "x": [[1, 2, 19_999, 2], [], [7]],
    "list/0": [[3, 5, 6], [69, 69, 4], [0]],
    "list/1": [[3], [69, 69], []],
    "list/2": [[0], [19_998, 1], [0, 0]],
}
PROGRAM = """
import json, sys
import numpy as np
import tensorflow as tf
path, ids = sys.argv[1], json.loads(sys.argv[2])
module = tf.saved_model.load(path)
ragged = {name: tf.ragged.constant(bags, tf.int64) for name, bags in ids.items()}
flat = {}
for name, bags in ragged.items():
    flat[name], flat[name + "_row_splits"] = bags.values, bags.row_splits
served = module.signatures["serving_default"](**flat)
for name, value in module.lookup(ragged).items():
    assert np.array_equal(value, served[name])
ids["x"][0][0] = 20_000
flat["x"] = tf.ragged.constant(ids["x"], tf.int64).values
try:
    module.signatures["serving_default"](**flat)
except tf.errors.InvalidArgumentError as e:
    assert "outside of [0, 20000)" in str(e), e
else:
    raise SystemExit("a bad id was served")
np.savez(sys.argv[3], **served)
"""


#: Runs one program after another and says what each printed, and how it failed.
RUNNER = """
import contextlib, io, json, sys, traceback
import tensorflow
for line in sys.stdin:
    program, *sys.argv[1:] = json.loads(line)
    printed, failed = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {})
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failed]), flush=True)
"""


@pytest.fixture(scope="module")
def tensorflow():
    """Runs a program with arguments in a process that has TensorFlow, one for all: importing it takes long."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUNNER], **pipes) as process:

        def run(program, *arguments):
            process.stdin.write(json.dumps([program, *map(str, arguments)]) + "\n")
            process.stdin.flush()
            printed, failed = json.loads(process.stdout.readline())
            assert failed is None, failed
            return printed

        yield run


def config():
    films = TableConfig(*SHAPES["films/a.b"], name="films/a.b", combiner="sqrtn")
    users = TableConfig(*SHAPES["users"], name="users")
    return {
        "x": FeatureConfig(films),
        "list": [FeatureConfig(users), FeatureConfig(users, max_sequence_length=2), FeatureConfig(films)],
    }


def test_tensorflow_serves_our_outputs(tensorflow, tmp_path):
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez(tmp_path / "a.npz", **tables)
    convert(tmp_path / "a.npz", tmp_path / "ckpt", feature_config=config())
    report = convert(tmp_path / "ckpt", tmp_path / "model" / "1", target_format="saved-model")
    assert "feature 'list/0' -> inputs list_0, list_0_row_splits; output list_0" in report.notes
    ids = {name.replace("/", "_"): bags for name, bags in IDS.items()}
    tensorflow(PROGRAM, report.path, json.dumps(ids), tmp_path / "out.npz")
    ragged = {name: RaggedTensor.from_lists(bags) for name, bags in IDS.items()}
    ours = serve.load(tmp_path / "ckpt").embedding(
        {"x": ragged["x"], "list": [ragged[f"list/{i}"] for i in range(3)]}
    )
    expected = {"x": ours["x"], **{f"list_{i}": ours["list"][i] for i in range(3)}}
    with np.load(tmp_path / "out.npz") as theirs:
        assert sorted(theirs) == sorted(expected)
        for name, activations in expected.items():
            np.testing.assert_allclose(theirs[name], activations, rtol=1e-6, atol=1e-6)
    size = sum(file.stat().st_size for file in report.path.rglob("*") if file.is_file())
    table_bytes = sum(table.nbytes for table in tables.values())
    assert table_bytes < size < 1.5 * table_bytes


MODEL_PROGRAM = """
import sys
import numpy as np
import tensorflow as tf
module = tf.saved_model.load(sys.argv[1])
bags = tf.ragged.constant([[1, 2], [], [3], [0]], tf.int64)
dense = tf.reshape(tf.range(12, dtype=tf.float32), [4, 3])
out = module.signatures["serving_default"](x=bags.values, x_row_splits=bags.row_splits, price=dense)
ragged = module.lookup({"x": bags, "price": dense})
assert sorted(out) == sorted(ragged) == ["click", "deep_0"]
np.savez(sys.argv[2], **out)
"""


def test_with_the_dense_model(tensorflow, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 4)).astype(np.float32)
    params = {"w": rng.normal(size=(7, 2)).astype(np.float32), "layers": [np.ones(2, np.float32)]}
    features = {"x": FeatureConfig(TableConfig(20, 4, name="t"))}

    def model(params, activations, dense):
        joined = jnp.concatenate([activations["x"], dense["price"]], axis=1) @ params["w"] + params["layers"][0]
        return {"click": jax.nn.sigmoid(joined[:, 0]), "deep": [joined]}

    out = export_saved_model(
        tmp_path / "1", features, {"t": rows}, model=model, params=params, dense={"price": (3,)}
    )
    tensorflow(MODEL_PROGRAM, out, tmp_path / "out.npz")
    activations = serving_embedding_lookup(
        {"x": RaggedTensor.from_lists([[1, 2], [], [3], [0]])}, None, {"t": rows}, features
    )
    expected = model(params, activations, {"price": np.arange(12, dtype=np.float32).reshape(4, 3)})
    with np.load(tmp_path / "out.npz") as theirs:
        np.testing.assert_allclose(theirs["click"], expected["click"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(theirs["deep_0"], expected["deep"][0], rtol=1e-6, atol=1e-6)
    for message, arguments in (
        ("exists; pass another path", {"out": tmp_path / "1"}),
        ("cannot be named 'x'", {"model": model, "dense": {"x": (3,)}}),
        ("need a model that takes them", {"dense": {"price": (3,)}}),
        (
            r"must be one of \('float32', 'bfloat16', 'float16'\) in a SavedModel, got float64",
            {"tables": {"t": rows.astype(np.float64)}},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_saved_model(
                **{"out": tmp_path / "2", "feature_config": features, "tables": {"t": rows}, **arguments}
            )
    assert not (tmp_path / "2").exists()


@register_combiner("saved_model_test_scaled_sum")
def scaled_sum(valency, vectors, weights):
    return jnp.sum(vectors, axis=0) * weights[0] + valency.astype(jnp.float32) * weights[1]


ALL_PROGRAM = """
import sys
import numpy as np
import tensorflow as tf
module = tf.saved_model.load(sys.argv[1])
given = dict(np.load(sys.argv[2]))
signature = sys.argv[3]
inputs = {name.split(":")[1]: tf.constant(value) for name, value in given.items() if name.split(":")[0] == signature}
np.savez(sys.argv[4], **module.signatures[signature](**inputs))
for name, bad in {
    "i_row_splits": [0, 2, 9, 9], "v": [b"no", b"b", b"a"], "i_indices": [[0, 0], [5, 0], [2, 1]], "i_weights": [1.0],
}.items():
    if name in inputs:
        try:
            module.signatures[signature](**{**inputs, name: tf.constant(bad, inputs[name].dtype)})
        except tf.errors.InvalidArgumentError as e:
            said = ("must rise from 0", "not in its vocabulary", "must lie in", "must have a weight for each")
            assert any(text in str(e) for text in said), e
        else:
            raise SystemExit(f"bad {name} was served")
"""


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param("serving_default", marks=pytest.mark.slow),
        pytest.param("weighted", marks=pytest.mark.slow),
        pytest.param("sparse", marks=pytest.mark.slow),
        "sparse_weighted",
    ],
)
def test_raw_ids_weights_sparse_ids_and_custom_combiners(tensorflow, tmp_path, signature):
    rng = np.random.default_rng(0)
    (tmp_path / "words.txt").write_bytes(b"a\r\nb\nc\n")
    (tmp_path / "numbers.txt").write_text("7\n-5\n90000000000\n")
    words = VocabularyFile(str(tmp_path / "words.txt"), num_oov_buckets=0)
    numbers = VocabularyFile(str(tmp_path / "numbers.txt"), num_oov_buckets=4, dtype="int64")
    combiner = CustomCombiner(scaled_sum, 2, num_weights=2, initializer=RandomUniform())
    features = {
        "h": FeatureConfig(TableConfig(9, 4, name="h"), preprocessing=HashBuckets(9, seed=3)),
        "v": FeatureConfig(TableConfig(3, 4, name="v", combiner="sqrtn"), preprocessing=words),
        "i": FeatureConfig(TableConfig(7, 4, name="i", combiner="sum"), preprocessing=numbers),
        "c": FeatureConfig(TableConfig(5, 4, name="c", combiner=combiner)),
        "s": FeatureConfig(TableConfig(5, 4, name="s"), max_sequence_length=2),
    }
    tables = {
        name: rng.normal(size=(f.table.vocabulary_size, 4)).astype(np.float32) for name, f in features.items()
    }
    combiner_weights = {"c": np.array([0.5, -2.0], np.float32)}
    out = export_saved_model(tmp_path / "1", features, tables, combiner_weights=combiner_weights)
    bags = {
        "h": [[2**40, -1], [], [5]],
        "v": [["a", "c"], [], ["b"]],
        "i": [[90000000000], [], [1, -5]],
        "c": [[0], [1, 2, 3], []],
        "s": [[4, 1, 2], [], [3]],
    }
    sparse, weighted = signature.startswith("sparse"), signature.endswith("weighted")
    flat, inputs, weights = {}, {}, {}
    for name, lists in bags.items():
        ids = np.array([x for row in lists for x in row])
        ids = ids if ids.dtype.kind == "U" else ids.astype(np.int64)
        splits = np.cumsum([0, *map(len, lists)])
        values = rng.random(len(ids)).astype(np.float32) + 0.5
        indices = np.array([[b, i] for b, row in enumerate(lists) for i in range(len(row))])
        parts = {"indices": indices, "dense_shape": np.array([3, 3])} if sparse else {"row_splits": splits}
        make = (lambda x: SparseTensor(indices, x, (3, 3))) if sparse else (lambda x: RaggedTensor(x, splits))  # noqa: B023
        rows = ids if features[name].preprocessing is None else features[name].preprocessing.rows(ids)
        inputs[name], weights[name] = make(np.asarray(rows)), None
        if weighted and name != "s":
            weights[name], parts["weights"] = make(values), values
        flat |= {f"{signature}:{name}_{end}": value for end, value in parts.items()}
        flat[f"{signature}:{name}"] = ids.astype("S") if ids.dtype.kind == "U" else ids
    np.savez(tmp_path / "in.npz", **flat)
    tensorflow(ALL_PROGRAM, out, tmp_path / "in.npz", signature, tmp_path / "out.npz")
    expected = serving_embedding_lookup(
        inputs, weights if weighted else None, tables, features, combiner_weights=combiner_weights
    )
    with np.load(tmp_path / "out.npz") as theirs:
        assert sorted(theirs) == sorted(expected)
        for name, activations in expected.items():
            np.testing.assert_allclose(theirs[name], activations, rtol=1e-6, atol=1e-6)


SHAPED_PROGRAM = """
import sys
import numpy as np
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
for last in (9, 999_999):
    bags = tf.ragged.constant([[0, 1, last], [], [2], []], tf.int64)
    try:
        np.save(sys.argv[2], served(x=bags.values, x_row_splits=bags.row_splits)["x"])
    except tf.errors.InvalidArgumentError as e:
        assert last == 999_999 and "outside of [0, 10)" in str(e), e
    else:
        assert last == 9, "a bad id was served"
"""


def test_output_shape_goes_before_max_sequence_length(tensorflow, tmp_path):
    """All ids of a bag are looked up, and so are checked, beyond the length, too."""
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", t=rows)
    features = {"x": FeatureConfig(TableConfig(10, 4, name="t"), max_sequence_length=2, output_shape=(2, 2))}
    report = convert(tmp_path / "a.npz", tmp_path / "1", target_format="saved-model", feature_config=features)
    assert any("takes ragged batches of 4 bags, combined to its output_shape [2, 2]" in n for n in report.notes)
    tensorflow(SHAPED_PROGRAM, report.path, tmp_path / "out.npy")
    bags = {"x": RaggedTensor.from_lists([[0, 1, 9], [], [2], []])}
    expected = serving_embedding_lookup(bags, None, {"t": rows}, features)["x"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-6, atol=1e-6)


def test_what_it_has_no_place_for_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", t=np.ones((4, 2), np.float32))
    table = TableConfig(4, 2, name="t")
    for features, message in (
        (
            {"x": FeatureConfig(table, preprocessing=HashBuckets(4, "string"))},
            "'x' hashes strings by XXH3, which TensorFlow has no operation for",
        ),
        (
            {"a/b": FeatureConfig(table), "a_b": FeatureConfig(table)},
            "'a/b' and 'a_b' would share the input 'a_b' in a signature; rename one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a.npz", tmp_path / "out", target_format="saved-model", feature_config=features)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"a\.npz is no SavedModel: it has no saved_model\.pb"):
        convert(tmp_path / "a.npz", tmp_path / "out", source_format="saved-model")


TYPES_PROGRAM = """
import sys
import numpy as np
import tensorflow as tf
module = tf.saved_model.load(sys.argv[1])
bags = tf.ragged.constant([[1, 2, 3], [], [19], [0, 0]], tf.int64)
out = module.signatures["serving_default"](x=bags.values, x_row_splits=bags.row_splits)
print(out["x"].dtype.name)
np.save(sys.argv[2], tf.cast(out["x"], tf.float32))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types(tensorflow, tmp_path, dtype):
    """TensorFlow serves our outputs of a table in half precision, which lies on disk as it is."""
    rows = np.random.default_rng(0).normal(size=(20, 4000)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=rows)
    convert(tmp_path / "a.npz", tmp_path / "ckpt", dtype=dtype, combiner="sqrtn")
    report = convert(tmp_path / "ckpt", tmp_path / "1", target_format="saved-model")
    printed = tensorflow(TYPES_PROGRAM, report.path, tmp_path / "out.npy")
    bags = RaggedTensor.from_lists([[1, 2, 3], [], [19], [0, 0]])
    expected = serve.load(tmp_path / "ckpt").embedding({"x": bags})["x"]
    assert printed.split() == [expected.dtype.name]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.asarray(expected, np.float32))
    size = sum(file.stat().st_size for file in report.path.rglob("*") if file.is_file())
    assert rows.nbytes / 2 < size < rows.nbytes
