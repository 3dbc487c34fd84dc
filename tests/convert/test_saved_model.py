"""A SavedModel that TensorFlow loads and runs, in a process of its own, with our outputs and one copy of the tables."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, TableConfig, serve, serving_embedding_lookup
from jaxembed.convert import convert
from jaxembed.convert.saved_model import export_saved_model
from jaxembed.id_mapping import HashBuckets

pytestmark = pytest.mark.parity
pytest.importorskip("tensorflow")

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


def config():
    films = TableConfig(*SHAPES["films/a.b"], name="films/a.b", combiner="sqrtn")
    users = TableConfig(*SHAPES["users"], name="users")
    return {
        "x": FeatureConfig(films),
        "list": [FeatureConfig(users), FeatureConfig(users, max_sequence_length=2), FeatureConfig(films)],
    }


def test_tensorflow_serves_our_outputs(tmp_path):
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez(tmp_path / "a.npz", **tables)
    convert(tmp_path / "a.npz", tmp_path / "ckpt", feature_config=config())
    report = convert(tmp_path / "ckpt", tmp_path / "model" / "1", target_format="saved-model")
    assert "feature 'list/0' -> inputs list_0, list_0_row_splits; output list_0" in report.notes
    ids = {name.replace("/", "_"): bags for name, bags in IDS.items()}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(report.path), json.dumps(ids), str(tmp_path / "out.npz")],
        check=True,
    )
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
    assert table_bytes < size < table_bytes + 200_000


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


def test_with_the_dense_model(tmp_path):
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
    subprocess.run([sys.executable, "-c", MODEL_PROGRAM, str(out), str(tmp_path / "out.npz")], check=True)
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
        ("must be float32 in a SavedModel, got float64", {"tables": {"t": rows.astype(np.float64)}}),
    ):
        with pytest.raises(ValueError, match=message):
            export_saved_model(
                **{"out": tmp_path / "2", "feature_config": features, "tables": {"t": rows}, **arguments}
            )
    assert not (tmp_path / "2").exists()


def test_what_it_has_no_place_for_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", t=np.ones((4, 2), np.float32))
    table = TableConfig(4, 2, name="t")
    for features, message in (
        ({"x": FeatureConfig(table, preprocessing=HashBuckets(4))}, "'x' has preprocessing"),
        (
            {"a/b": FeatureConfig(table), "a_b": FeatureConfig(table)},
            "has the name of another in a signature, 'a_b'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "a.npz", tmp_path / "out", target_format="saved-model", feature_config=features)
    with pytest.raises(ValueError, match="a SavedModel for TensorFlow Serving cannot hold bfloat16"):
        convert(tmp_path / "a.npz", tmp_path / "out", target_format="saved-model", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="jaxembed writes saved-model, and does not read it"):
        convert(tmp_path / "a.npz", tmp_path / "out", source_format="saved-model")
