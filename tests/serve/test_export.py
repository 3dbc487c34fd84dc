"""The exported program gives what ServingModel gives, in a process that has JAX alone."""

import pickle
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import RaggedTensor, kernel
from jaxembed.serve import ServingModel, export_model
from tests.serve import bundles, requests

PROGRAM = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jaxembed", "flax", "optax", "orbax", "tensorflow"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import ctypes, pickle
import jax, jax.export
artefact, library, requests = pickle.load(open(sys.argv[1], "rb"))
if library:
    handler = ctypes.CDLL(library).JaxembedEmbeddingBags
    jax.ffi.register_ffi_target("jaxembed_embedding_bags", jax.ffi.pycapsule(handler), platform="cpu")
f = jax.jit(jax.export.deserialize(bytearray(artefact)).call)
pickle.dump([jax.tree.map(jax.device_get, f(*r)) for r in requests], open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return bundles.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=[None, "int8"])
def served(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle")
    bundles.convert(checkpoint, out, exported=bundles.export(), quantize=request.param)
    return ServingModel(out, max_batch_size=8)


def arguments(model, seed, rows):
    """A request for the model, and the same one for the program."""
    inputs, dense = requests.random_inputs(seed, rows), bundles.dense_rows(rows)
    rng = np.random.default_rng(seed)
    ragged, weights, given = {}, {}, {}
    for path in requests.PATHS:
        ids = RaggedTensor.from_lists(requests.feature(path, inputs), np.int32)
        ids = ids.pad(ids.values.size + 1)
        ragged[path] = {"values": ids.values, "row_splits": ids.row_splits}
        if path in requests.WEIGHTED:
            weights[path] = rng.uniform(0.5, 2, ids.values.size).astype(np.float32)
            given[path] = RaggedTensor(weights[path], ids.row_splits).to_lists()
    tables = {
        config.name: {k: np.asarray(v) for k, v in getattr(t, "arrays", {}).items()} or np.asarray(t)
        for config, t in model.embedding.embedding_tables.items()
    }
    params = {"bias": bundles.PARAMS["bias"], "top.w": bundles.PARAMS["top"]["w"]}
    return (inputs, requests.nest(given), dense), (tables, params, ragged, weights, dense)


def run_elsewhere(tmp_path, artefact, library, asked):
    (tmp_path / "in").write_bytes(pickle.dumps((artefact, library, asked)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((tmp_path / "out").read_bytes())


def assert_same(results, model, asked):
    for result, request in zip(results, asked, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, model(*request)
        )


def test_any_batch_without_jaxembed(served, tmp_path):
    artefact = served.export()
    assert len(artefact) < 100_000  # tables are arguments
    assert b"jaxembed_embedding_bags" not in artefact
    asked = [arguments(served, seed, rows) for seed, rows in enumerate((1, 5))]
    results = run_elsewhere(tmp_path, artefact, None, [program for _, program in asked])
    assert_same(results, served, [request for request, _ in asked])


@pytest.mark.skipif(not kernel.available(), reason="no native kernel")
def test_fixed_batch_with_the_kernel(served, tmp_path):
    artefact = served.export(batch_size=3)
    assert b"jaxembed_embedding_bags" in artefact
    asked = [arguments(served, seed, 3) for seed in range(2)]
    results = run_elsewhere(tmp_path, artefact, str(kernel.library()), [program for _, program in asked])
    assert_same(results, served, [request for request, _ in asked])


def test_runs_on_both_platforms(served):
    assert jax.export.deserialize(bytearray(served.export())).platforms == ("cpu", "tpu")


def test_parameters_of_many_layers_keep_their_order(tmp_path):
    """Of dicts JAX makes sorted ones, in which layer 10 comes before layer 2."""
    params = {"layers": [np.float32(i) for i in range(12)]}

    def model(params, activations, dense):
        weights = jnp.stack(params["layers"])
        return activations["user"][:, 0] * 0 + (weights * jnp.arange(12.0) ** 2).sum()

    exported = export_model(model, params, requests.FEATURE_CONFIG, max_ids_per_row=6)
    bundles.make_checkpoint(tmp_path / "many", params=params)
    bundles.convert(tmp_path / "many", tmp_path / "bundle", exported=exported)
    served = ServingModel(tmp_path / "bundle", max_batch_size=2)
    _, (tables, _, inputs, _, _) = arguments(served, 0, 2)
    named = {f"layers.{i}": layer for i, layer in enumerate(params["layers"])}
    result = jax.jit(jax.export.deserialize(bytearray(served.export())).call)(tables, named, inputs, {}, {})
    np.testing.assert_array_equal(result, served(requests.random_inputs(0, 2)))


def test_without_a_model(checkpoint, tmp_path):
    bundles.convert(checkpoint, tmp_path)
    model = ServingModel(tmp_path, max_ids_per_row=6)
    _, (tables, _, inputs, _, _) = arguments(model, 0, 2)
    inputs["user"]["values"] = inputs["user"]["values"] + 50
    call = jax.jit(jax.export.deserialize(bytearray(model.export())).call)
    result = call(tables, {}, inputs, {}, {})
    expected = model.lookup(requests.random_inputs(0, 2))
    np.testing.assert_allclose(result["items"]["recent"], expected["items"]["recent"], rtol=1e-6)
    np.testing.assert_array_equal(result["user"], jnp.zeros((2, 4)))  # ids outside [0, V)


def test_fixed_batch_sizes_of_the_model(checkpoint, tmp_path):
    bundles.convert(checkpoint, tmp_path, exported=bundles.export(batch_sizes=(2, 4)))
    with pytest.raises(ValueError, match=r"was exported for batch sizes \[2, 4\]; pass one of them"):
        ServingModel(tmp_path).export()
