"""Batches of requests over both protocols: what the metrics count of them, and that none compiles anything."""

import asyncio

import jax
import numpy as np
import pytest

pytest.importorskip("grpc")

from jaxembed.serve.server.grpc_server import Methods
from jaxembed.serve.server.messages import METHODS
from tests.serve.server import bundles, fuzz
from tests.serve.server.servers import Gate, client_of, run, until
from tests.serve.server.test_fuzz import Context


def metrics(service):
    """All that are counted, by name and labels."""
    service.metrics.flush()
    lines = service.metrics.text().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}


def columns(rng, rows):
    """(users, histories, weights or None) of a request."""
    users = rng.integers(0, bundles.USERS, rows).tolist()
    histories = [rng.integers(0, bundles.ITEMS, rng.integers(0, 9)).tolist() for _ in range(rows)]
    weights = [[float(w) for w in rng.integers(0, 4, len(bag))] for bag in histories]
    return users, histories, weights if rng.random() < 0.5 else None


def tensors(users, histories, weights):
    found = {
        "user": np.array(users, np.int64),
        "history": np.array([id_ for bag in histories for id_ in bag], np.int64),
        "history.row_splits": np.cumsum([0, *map(len, histories)]),
        "dense": np.zeros((len(users), 2), np.float32),
    }
    if weights:
        found["history.weights"] = np.array([w for bag in weights for w in bag], np.float32)
    return found


async def over_http(client, users, histories, weights):
    body = {name: array.tolist() for name, array in tensors(users, histories, weights).items()}
    return fuzz.http_outputs(await client.post(fuzz.PREDICT, json={"inputs": body}))


async def over_grpc(methods, users, histories, weights):
    message = METHODS["ModelInfer"][0](model_name="model")
    for name, array in tensors(users, histories, weights).items():
        kind = {"int64": "INT64", "float32": "FP32"}[array.dtype.name]
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return fuzz.grpc_outputs(await methods.ModelInfer(message.SerializeToString(), Context()))


def test_metrics_count_batches_requests_rows_and_padding(shared_folder, monkeypatch):
    rng = np.random.default_rng(0)

    async def check():
        async with client_of(shared_folder) as (client, service):
            before = metrics(service)
            gate = Gate(service.versions.current, monkeypatch)
            first = asyncio.create_task(over_http(client, *columns(rng, 3)))
            assert await until(gate.running.is_set)
            # They wait for the first, and run together.
            others = [asyncio.create_task(over_http(client, *columns(rng, 2))) for _ in range(2)]
            others.append(asyncio.create_task(over_grpc(Methods(service), *columns(rng, 1))))
            assert await until(lambda: service.batcher.queued_rows == 8)
            gate.open()
            await asyncio.gather(first, *others)
            for rows in (7, 13):
                await over_http(client, *columns(rng, rows))
            after = metrics(service)
            found = {name: after[f"jaxembed_{name}"] - before[f"jaxembed_{name}"] for name in EXPECTED}
            assert found == EXPECTED

    run(check())


#: Of batches of 3, 5, 7 and 13 rows, where 8 may run at once: 5 are padded to 6, 7 to 8, and 13 to 8 + 6.
EXPECTED = {
    "batches_total": 4,
    "batched_requests_total": 6,
    "rows_total": 28,
    "padding_rows_total": 3,
    "batch_fill_count": 4,
    "batch_fill_sum": 3 / 8 + 5 / 8 + 7 / 8 + 1,
    'batch_fill_bucket{le="0.3"}': 0,
    'batch_fill_bucket{le="0.4"}': 1,
    'batch_fill_bucket{le="0.7"}': 2,
    'batch_fill_bucket{le="0.9"}': 3,
    'batch_fill_bucket{le="1.0"}': 4,
}


def test_metrics_say_the_version_that_serves(folder, checkpoint):
    bundles.add(checkpoint, folder, 2)

    async def check():
        async with client_of(folder) as (client, service):
            for version, changes in ((2, 1), (0, 2)):
                if service.versions.current.version != version:
                    assert (await client.post(f"/admin/versions/{version}:activate")).status_code == 200
                found = metrics(service)
                assert found["jaxembed_version"] == version
                assert found['jaxembed_version_changes_total{result="served"}'] == changes

    run(check())


def test_nothing_is_compiled_once_ready(shared_folder):
    """By batches of 1 row to more than run at once, alone and together, over both protocols, with weights and without."""
    rng, compiled = np.random.default_rng(1), []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    async def check():
        async with client_of(shared_folder) as (client, service):
            assert service.ready
            assert compiled  # it was listened to
            compiled.clear()
            methods = Methods(service)

            async def ask(rows):
                users, histories, weights = columns(rng, rows)
                send, where = (over_http, client) if rng.random() < 0.5 else (over_grpc, methods)
                want = bundles.expected(0, users, histories, weights)
                found = await send(where, users, histories, weights)
                assert found == {name: value.tolist() for name, value in want.items()}

            for rows in range(1, 21):
                await ask(rows)
            for _ in range(20):
                await asyncio.gather(*(ask(int(rows)) for rows in rng.integers(1, 6, rng.integers(2, 9))))
            assert compiled == []

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(check())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
