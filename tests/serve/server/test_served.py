"""What a version is made of: the exported model, raw ids, and programs of the version before."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, HashBuckets, TableConfig, combiners
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.initializers import RandomUniform
from jaxembed.optimizers import SGD
from jaxembed.serve import export_model
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.errors import OptionError
from jaxembed.serve.server.served import BundleModel, find_model
from jaxembed.serve.server.signature import check_names
from jaxembed.train import Checkpointer, ShardedEmbedding
from tests.serve.server import bundles
from tests.serve.server.servers import client_of, run


@pytest.fixture(scope="module")
def artefact():
    params = {"version": jnp.zeros(1)}
    return export_model(
        bundles.model,
        params,
        bundles.CONFIG,
        dense_inputs={"dense": 2},
        weighted=("history",),
        max_ids_per_row=8,
    )


def test_the_exported_model_serves_without_its_code(checkpoint, artefact, tmp_path):
    for version in (0, 1):
        bundles.add(checkpoint, tmp_path, version, exported=artefact)
    nothing = {"model": None, "dense_inputs": {}, "weighted": (), "max_ids_per_row": None}
    row = {"user": 3, "history": [1, 2], "history.weights": [2.0, 1.0], "dense": [0.5, 1.0]}

    async def check():
        async with client_of(tmp_path, **nothing) as (client, service):
            body = {"instances": [row]}
            answer = await client.post("/v1/models/model:predict", json=body)
            assert answer.json()["predictions"] == [{"history": 5.5, "user": 1003.0, "version": 1.0}]
            await service.versions.pin(0)
            answer = await client.post("/v1/models/model:predict", json=body)
            assert answer.json()["predictions"] == [{"history": 5.5, "user": 3.0, "version": 0.0}]
            assert service.versions.current.compile_count == 0  # those of version 1
            body = {"instances": [{**row, "history": [1] * 9, "history.weights": [1.0] * 9}]}
            assert "at most 8" in (await client.post("/v1/models/model:predict", json=body)).json()["error"]

    run(check())


def test_weighted_adds_to_what_was_exported(checkpoint, artefact, tmp_path):
    bundles.add(checkpoint, tmp_path, 0, exported=artefact)
    config = ServerConfig(str(tmp_path), weighted=("user",), max_batch_rows=1)
    features = BundleModel(config, 0).signature.features
    assert {path for path, feature in features.items() if feature.weighted} == {"user", "history"}


def test_raw_ids_are_hashed_in_every_protocol(tmp_path):
    """Also in v2 with row splits, where rows are otherwise read without looking at one feature after the other."""
    table, hashing = TableConfig(64, 2, combiner="sum", name="t"), HashBuckets(64)
    config = {"x": FeatureConfig(table, preprocessing=hashing)}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    _, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    rows = jnp.repeat(jnp.arange(64.0)[:, None], 2, axis=1)
    with Checkpointer(tmp_path / "checkpoint", own) as checkpointer:
        checkpointer.save(own.from_canonical({"t": rows}, slots, 0))
    bundles.add(tmp_path / "checkpoint", tmp_path / "bundles", 0)
    raw = [10**12, -7, 5]
    options = {"model": None, "dense_inputs": {}, "weighted": ()}

    async def check():
        async with client_of(tmp_path / "bundles", **options) as (client, _):
            answer = await client.post("/v1/models/model:predict", json={"inputs": {"x": [[i] for i in raw]}})
            rows = np.array(answer.json()["outputs"])[:, 0]
            assert (rows < 64).all()
            assert not np.array_equal(rows, raw)
            tensors = [
                {"name": "x", "datatype": "INT64", "shape": [3], "data": raw},
                {"name": "x.row_splits", "datatype": "INT64", "shape": [4], "data": [0, 1, 2, 3]},
            ]
            answer = await client.post("/v2/models/model/infer", json={"inputs": tensors})
            (output,) = answer.json()["outputs"]
            np.testing.assert_array_equal(np.reshape(output["data"], output["shape"])[:, 0], rows)

    run(check())


@pytest.mark.parametrize("suffix", ["row_splits", "weights"])
def test_features_that_a_request_could_not_tell_apart(tmp_path, suffix):
    names = ["user", f"user.{suffix}"]
    config = {name: FeatureConfig(TableConfig(5, 1, name=name)) for name in names}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(tmp_path / "checkpoint", own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)))
    bundles.add(tmp_path / "checkpoint", tmp_path / "bundles", 0)
    what = suffix.replace("_", " ")
    said = f"both the {what} of feature 'user' and the ids of feature 'user.{suffix}'; rename one of them"
    with pytest.raises(OptionError, match=said):
        BundleModel(ServerConfig(str(tmp_path / "bundles")), 0)


def test_dense_inputs_that_a_request_could_not_tell_from_features():
    check_names(["user", "item"], ["dense"])
    for name, said in (
        ("user", "the ids of feature 'user'"),
        ("item.weights", "the weights of feature 'item'"),
    ):
        with pytest.raises(OptionError, match=f"both {said} and dense input {name!r}"):
            check_names(["user", "item"], [name])


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float8_e4m3fn, jnp.int4])
def test_outputs_that_no_answer_could_hold(shared_folder, monkeypatch, dtype):
    whole = bundles.model

    def model(params, activations, dense):
        return {**whole(params, activations, dense), "user": activations["user"][:, 0].astype(dtype)}

    monkeypatch.setattr(bundles, "model", model)
    config = ServerConfig(str(shared_folder), **bundles.OPTIONS, max_batch_rows=1)
    said = rf"output 'user' of the model must be of one of \['BOOL', .*, got {jnp.dtype(dtype).name}; cast it"
    with pytest.raises(OptionError, match=said):
        BundleModel(config, 0)


@register_combiner("test_served_scaled")
def scaled(valency, vectors, weights):
    """Rows times the weight of their position, summed up."""
    return jnp.sum(vectors * weights[:, None], axis=0)


def test_weights_of_combiners_are_those_of_the_version(tmp_path):
    combiner = CustomCombiner(scaled, max_valency=2, num_weights=2, initializer=RandomUniform(-1, 1))
    config = {"x": FeatureConfig(TableConfig(9, 3, combiner=combiner, name="t"))}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    _, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    rows = jnp.repeat(jnp.arange(9.0)[:, None], 3, axis=1)
    learnt = {0: [1.0, 10.0], 1: [2.0, -1.0]}
    with Checkpointer(tmp_path / "checkpoint", own) as checkpointer:
        for step, weights in learnt.items():
            checkpointer.save(own.from_canonical({"t": rows}, slots, step, {"t": jnp.array(weights)}))
    for step in learnt:
        bundles.add(tmp_path / "checkpoint", tmp_path / "bundles", step)
    options = {"model": None, "dense_inputs": {}, "weighted": (), "max_batch_rows": 2}

    async def check():
        async with client_of(tmp_path / "bundles", **options) as (client, service):
            for step, (first, second) in learnt.items():
                await service.versions.pin(step)
                body = {"inputs": {"x": [[3, 4], [5]]}}
                answer = await client.post("/v1/models/model:predict", json=body)
                want = [[3 * first + 4 * second] * 3, [5 * first] * 3]
                np.testing.assert_allclose(answer.json()["outputs"], want)
                answer = await client.post("/v1/models/model:predict", json={"inputs": {"x": [3, 5]}})
                np.testing.assert_allclose(answer.json()["outputs"], [[3 * first] * 3, [5 * first] * 3])
            assert service.versions.current.compile_count == 0  # weights are arguments of the same programs

    run(check())


def test_a_combiner_whose_module_is_not_imported(tmp_path, monkeypatch):
    """What the command line lacks is an OptionError, whose message is all that is logged."""
    combiner = CustomCombiner(scaled, max_valency=2, num_weights=2, initializer=RandomUniform(-1, 1))
    config = {"x": FeatureConfig(TableConfig(9, 3, combiner=combiner, name="t"))}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(tmp_path / "checkpoint", own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)))
    bundles.add(tmp_path / "checkpoint", tmp_path / "bundles", 0)
    monkeypatch.setattr(combiners, "_REGISTRY", {})
    with pytest.raises(OptionError, match=r"unknown combiner 'test_served_scaled'.*--import MODULE"):
        BundleModel(ServerConfig(str(tmp_path / "bundles")), 0)


def test_the_second_start_compiles_nothing(shared_folder, tmp_path):
    options = {**bundles.OPTIONS, "max_batch_rows": 3, "compile_cache": str(tmp_path / "programs")}
    hits = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    first = BundleModel(ServerConfig(str(shared_folder), **options), 0)
    kept = sorted((tmp_path / "programs").iterdir())
    assert kept
    jax.monitoring.register_event_listener(listen)
    try:
        jax.clear_caches()
        second = BundleModel(ServerConfig(str(shared_folder), **options), 0)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert len(hits) >= second.compile_count == first.compile_count == 3
    assert sorted((tmp_path / "programs").iterdir()) == kept


def test_models_that_cannot_be_found():
    for name, message in (("no.such:f", "No module"), ("math:no", "has no attribute"), ("math:pi", "callable")):
        with pytest.raises(ValueError, match=message):
            find_model(name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_tables_are_mapped_and_not_copied(shared_folder):
    model = BundleModel(ServerConfig(str(shared_folder), **bundles.OPTIONS, max_batch_rows=1), 0)
    where = np.asarray(model._function._constants[0]).view(np.uint64)[:, 0].tolist()
    with open("/proc/self/maps") as maps:
        spans = [line.split() for line in maps if str(shared_folder) in line]
    ranges = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans]
    assert where
    for address in where:
        assert any(low <= address < high for low, high in ranges)
