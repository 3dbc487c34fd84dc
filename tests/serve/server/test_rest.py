"""Both REST protocols: what a good request is answered, and what a bad one."""

import gzip
import json
import types

import ml_dtypes
import numpy as np
import pytest

from jaxembed.serve.server import tf_predict
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.signature import Output, Signature
from jaxembed.serve.server.tensors import DATATYPES, from_list
from tests.serve.server import bundles
from tests.serve.server.servers import client_of, run

USERS, HISTORIES = [3, 7], [[1, 2, 3], []]
DENSE = [[0.5, 1.0], [0.0, 2.0]]


def v2_tensors(users=USERS, histories=HISTORIES, dense=DENSE, weights=None):
    flat = [id_ for bag in histories for id_ in bag]
    splits = np.cumsum([0, *map(len, histories)]).tolist()
    tensors = [
        {"name": "user", "datatype": "INT64", "shape": [len(users)], "data": users},
        {"name": "history", "datatype": "INT64", "shape": [len(flat)], "data": flat},
        {"name": "history.row_splits", "datatype": "INT32", "shape": [len(splits)], "data": splits},
        {"name": "dense", "datatype": "FP32", "shape": [len(dense), 2], "data": dense},
    ]
    if weights is not None:
        data = [w for bag in weights for w in bag]
        tensors.append({"name": "history.weights", "datatype": "FP32", "shape": [len(data)], "data": data})
    return tensors


def outputs_of(response):
    assert response.status_code == 200, response.text
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in response.json()["outputs"]}


def check(found, **options):
    want = bundles.expected(0, USERS, HISTORIES, dense=DENSE, **options)
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_v2_json(shared_folder):
    async def check_all():
        async with client_of(shared_folder) as (client, _):
            answer = await client.post("/v2/models/model/infer", json={"id": "x", "inputs": v2_tensors()})
            check(outputs_of(answer))
            assert (answer.json()["id"], answer.json()["model_version"]) == ("x", "0")
            weights = [[0.5, 1.0, 2.0], []]
            answer = await client.post(
                "/v2/models/model/versions/0/infer", json={"inputs": v2_tensors(weights=weights)}
            )
            check(outputs_of(answer), weights=weights)
            body = {"inputs": v2_tensors(), "outputs": [{"name": "user"}]}
            assert list(outputs_of(await client.post("/v2/models/model/infer", json=body))) == ["user"]
            packed = gzip.compress(json.dumps({"inputs": v2_tensors()}).encode())
            headers = {"content-encoding": "gzip"}
            check(outputs_of(await client.post("/v2/models/model/infer", content=packed, headers=headers)))

    run(check_all())


def test_v2_binary(shared_folder):
    def encode(tensors, **more):
        parts = []
        for tensor in tensors:
            dtype = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4"}[tensor["datatype"]]
            parts.append(np.asarray(tensor.pop("data"), dtype).tobytes())
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        head = json.dumps({"inputs": tensors, **more}).encode()
        return head + b"".join(parts), {"Inference-Header-Content-Length": str(len(head))}

    async def check_all():
        async with client_of(shared_folder) as (client, _):
            body, headers = encode(v2_tensors())
            check(outputs_of(await client.post("/v2/models/model/infer", content=body, headers=headers)))
            body, headers = encode(v2_tensors(), parameters={"binary_data_output": True})
            answer = await client.post("/v2/models/model/infer", content=body, headers=headers)
            length = int(answer.headers["Inference-Header-Content-Length"])
            head, rest, found = json.loads(answer.content[:length]), answer.content[length:], {}
            for output in head["outputs"]:
                size = output["parameters"]["binary_data_size"]
                found[output["name"]], rest = np.frombuffer(rest[:size], "<f4"), rest[size:]
            assert not rest
            check(found)
            for wrong in ("x", "-1", str(len(body) + 1), "0"):
                headers = {"Inference-Header-Content-Length": wrong}
                answer = await client.post("/v2/models/model/infer", content=body, headers=headers)
                assert answer.status_code == 400
            twice = [{"name": "user", "parameters": {"binary_data": True}}] * 2
            body, headers = encode(v2_tensors(), outputs=twice)
            answer = await client.post("/v2/models/model/infer", content=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (400, "output 'user' is there twice.")
            body, headers = encode(v2_tensors())
            for content in (body[:-1], body + b"\0"):
                answer = await client.post("/v2/models/model/infer", content=content, headers=headers)
                assert answer.status_code == 400

    run(check_all())


def test_tf_predict(shared_folder):
    rows = [{"user": u, "history": h, "dense": d} for u, h, d in zip(USERS, HISTORIES, DENSE, strict=True)]
    columns = {"user": USERS, "history": HISTORIES, "dense": DENSE}
    flat = {"user": USERS, "history": [1, 2, 3], "history.row_splits": [0, 3, 3], "dense": DENSE}
    weights = [[0.5, 1.0, 2.0], []]

    async def check_all():
        async with client_of(shared_folder) as (client, _):

            async def predict(body, route="/v1/models/model:predict"):
                answer = await client.post(route, json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            found = (await predict({"instances": rows}))["predictions"]
            check({name: [row[name] for row in found] for name in found[0]})
            versioned = "/v1/models/model/versions/0:predict"
            check((await predict({"inputs": columns}, versioned))["outputs"])
            check((await predict({"inputs": flat, "signature_name": "serving_default"}))["outputs"])
            weighted = {**flat, "history.weights": [0.5, 1.0, 2.0]}
            check((await predict({"inputs": weighted}))["outputs"], weights=weights)
            weighted = {**columns, "history.weights": weights}
            check((await predict({"inputs": weighted}))["outputs"], weights=weights)
            weighted = [{**row, "history.weights": w} for row, w in zip(rows, weights, strict=True)]
            found = (await predict({"instances": weighted}))["predictions"]
            check({name: [row[name] for row in found] for name in found[0]}, weights=weights)

    run(check_all())


def test_health_metadata_and_metrics(shared_folder):
    async def check_all():
        async with client_of(shared_folder) as (client, service):

            async def get(path):
                answer = await client.get(path)
                assert answer.status_code == 200, answer.text
                return answer

            for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/model/ready", "/v2", "/"):
                await get(path)
            for path in ("/v2/models/model/ready", "/v2/models/model/versions/0/ready"):
                assert (await get(path)).json() == {"name": "model", "ready": True}
            metadata = (await get("/v2/models/model")).json()
            assert metadata["versions"] == ["0"]
            assert [i["name"] for i in metadata["inputs"]] == [
                "history",
                "history.row_splits",
                "history.weights",
                "user",
                "user.row_splits",
                "dense",
            ]
            assert metadata["outputs"][1] == {"name": "user", "datatype": "FP32", "shape": [-1]}
            inputs = (await get("/v1/models/model/metadata")).json()["metadata"]["signature_def"]
            assert inputs["signature_def"]["serving_default"]["inputs"]["dense"]["dtype"] == "DT_FLOAT"
            assert (await get("/v1/models/model")).json()["model_version_status"][0]["state"] == "AVAILABLE"
            example = (await get("/status")).json()["example"]
            assert (await client.post("/v1/models/model:predict", json=example)).status_code == 200
            bad = {"instances": [{"user": 99, "history": [], "dense": [0, 0]}]}
            assert (await client.post("/v1/models/model:predict", json=bad)).status_code == 400
            text = (await get("/metrics")).text
            assert 'jaxembed_requests_total{protocol="tf_rest",status="200"} 1.0' in text
            assert 'jaxembed_bad_ids_total{feature="user"} 1.0' in text
            assert 'jaxembed_stage_seconds_count{stage="run"} 1.0' in text
            assert (await client.get("/v2/models/other")).status_code == 404
            assert (await client.get("/v2/models/model/versions/7")).status_code == 404
            assert (await client.get("/v2/models/model/infer")).status_code == 405
            service.draining = True
            answer = await client.get("/v2/health/ready")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json() == {"ready": False}
            answer = await client.get("/v2/models/model/ready")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json() == {"name": "model", "ready": False}
            assert (await client.get("/v2/health/live")).status_code == 200

    run(check_all())


def test_types_of_outputs_as_tensorflow_names_them():
    kinds = {
        f"{sign}int{bits}": f"DT_{sign}INT{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)
    }
    kinds |= {"float16": "DT_HALF", "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "bool": "DT_BOOL"}
    outputs = [Output(name, (), np.dtype(name)) for name in kinds]
    outputs.append(Output("bfloat16", (2,), np.dtype(ml_dtypes.bfloat16)))
    model = types.SimpleNamespace(signature=Signature({}, {}, tuple(outputs), max_rows=64), version=3)
    said = tf_predict.metadata(model, "model")["metadata"]["signature_def"]["signature_def"]
    found = {name: info["dtype"] for name, info in said["serving_default"]["outputs"].items()}
    assert found == {**kinds, "bfloat16": "DT_BFLOAT16"}


ROW = {"user": 1, "history": [1], "dense": [0.0, 0.0]}
BIG = "9" * 5000
BAD_TF = {
    "negative id": ({"user": -5}, "row 0, position 0: id -5 is outside"),
    "id V": ({"user": bundles.USERS}, f"id {bundles.USERS} is outside"),
    "id 2^31-1": ({"user": 2**31 - 1}, "id 2147483647 is outside"),
    "id 2^40": ({"history": [0, 2**40]}, "row 0, position 1: id 1099511627776 is outside"),
    "id 2^70": ({"history": [2**70]}, "is outside"),
    "float": ({"history": [1.0]}, "ids must be ints, got 1.0"),
    "float alone": ({"user": 1.5}, "got 1.5"),
    "string": ({"history": ["1"]}, "look strings up in a vocabulary"),
    "long string": ({"user": "x" * 10**5}, "'user', row 0 must be a list of int ids or one int id"),
    "long string in a list": ({"history": ["x" * 10**5]}, "ids must be ints, got 'xxx"),
    "id 10^4000": ({"history": [10**4000]}, "id 1000"),
    "long weight": ({"history.weights": ["x" * 10**5]}, "must be a finite float32, got 'xxx"),
    "bool": ({"history": [True]}, "ids must be ints, got True"),
    "null": ({"user": None}, "got None"),
    "object": ({"history": {"a": 1}}, "'history'"),
    "too deep": ({"history": [[1]]}, "'history'"),
    "too many ids": ({"history": [1] * 9}, "row 0 has 9 ids; at most 8"),
    "10^6 ids": ({"history": [1] * 10**6}, "row 0 has 1000000 ids"),
    "string weight": ({"history.weights": ["1"]}, "Weight for 'history'"),
    "bool weight": ({"history.weights": [True]}, "Weight for 'history'"),
    "infinite weight": ({"history.weights": [1e39]}, "finite float32"),
    "weights too long": ({"history.weights": [1.0, 2.0]}, "Weight for 'history'"),
    "weights unannounced": ({"user": [1], "user.weights": [1.0]}, "not announced"),
    "dense short": ({"dense": [0.0]}, "dense input 'dense' must be of shape [1, 2]"),
    "dense string": ({"dense": ["a", "b"]}, "must hold numbers"),
    "dense infinite": ({"dense": [1e39, 0]}, "must be a finite float32"),
    "unknown input": ({"odd": 1}, "input 'odd' is unknown"),
    "null byte": ({"us\0er": 1}, "is unknown"),
}


@pytest.fixture(scope="module")
def answers(shared_folder):
    """The answers to every bad request, with a good one after each that must not be harmed."""
    raw = {
        "nan weight": json.dumps({"instances": [{**ROW, "history.weights": [float("nan")]}]}),
        "infinity": json.dumps({"instances": [{**ROW, "dense": [float("inf"), 0]}]}),
        "deep json": "[" * 100_000,
        "deep object": '{"instances":' * 50_000,
        "long number": '{"instances": [{"user": ' + BIG + "}]}",
        "twice": '{"instances": [], "instances": []}',
        "not json": "{",
        "empty": "",
        "null bytes": "\0" * 100,
        "list": "[]",
        "no rows": '{"instances": []}',
        "both": '{"instances": [], "inputs": {}}',
        "surrogate": '{"instances": "\\ud800"}',
    }
    bodies = {
        name: json.dumps({"instances": [{**ROW, **change}]}) for name, (change, _) in BAD_TF.items()
    } | raw

    async def send():
        found = {}
        async with client_of(shared_folder, max_ids_per_row=8) as (client, _):
            for name, body in bodies.items():
                found[name] = await client.post("/v1/models/model:predict", content=body)
                good = await client.post("/v1/models/model:predict", json={"instances": [ROW]})
                assert good.json()["predictions"] == [{"history": 1.0, "user": 1.0, "version": 0.0}]
            bad = "\xff\xfe".encode("latin-1")
            found["not utf-8"] = await client.post("/v1/models/model:predict", content=bad)
        return found

    return run(send())


def test_every_bad_request_says_what_is_wrong(answers):
    for name, answer in answers.items():
        assert answer.status_code == 400, (name, answer.text)
        assert answer.json()["error"], name
        assert len(answer.content) < 2000, name
    for name, (_, message) in BAD_TF.items():
        assert message in answers[name].json()["error"], name


def change_v2(at, **changes):
    tensors = v2_tensors()
    tensors[at].update(changes)
    return {"inputs": tensors}


BAD_V2 = {
    "lengths disagree": (change_v2(0, shape=[3]), "shape [3] holds 3 values, got 2"),
    "rows disagree": (change_v2(0, shape=[3], data=[1, 2, 3]), "same number of rows"),
    "decreasing splits": (change_v2(2, shape=[4], data=[0, 3, 2, 3]), "must not decrease, got 3, 2 at row 1"),
    "splits too long": (change_v2(2, data=[0, 3, 4]), "must go from 0 to N = 3, got 0 to 4"),
    "negative splits": (change_v2(2, data=[-1, 3, 3]), "must go from 0"),
    "no splits": (change_v2(2, shape=[0], data=[]), "integers [B + 1]"),
    "float ids": (change_v2(0, datatype="FP32"), "ids must be integers, got FP32"),
    "strings": (change_v2(0, datatype="BYTES", data=["a", "b"]), "look strings up"),
    "float in ints": (change_v2(0, data=[1.0, 2]), "position 0: INT64 expected"),
    "bool in ints": (change_v2(0, data=[1, True]), "position 1: INT64 expected"),
    "beyond int64": (change_v2(0, data=[2**64, 1]), "INT64 cannot hold"),
    "2^40": (change_v2(0, data=[2**40, 1]), "id 1099511627776 is outside"),
    "uint64": (
        change_v2(0, datatype="UINT64", data=[1, 2**63 + 7]),
        "row 1, position 0: id 9223372036854775815 is outside",
    ),
    "huge shape": (change_v2(0, shape=[2**31]), "shape must be"),
    "negative shape": (change_v2(0, shape=[-1]), "shape must be"),
    "bool shape": (change_v2(0, shape=[True]), "shape must be"),
    "three dimensions": (change_v2(0, shape=[1, 1, 2]), "must be [B] or [B, L]"),
    "no data": (change_v2(0, data=None), "data must be a list"),
    "uneven": (change_v2(3, data=[[1, 2], 3]), "mixes lists and values"),
    "unknown": (change_v2(0, name="odd"), "input 'odd' is unknown"),
    "twice": (change_v2(0, name="dense"), "twice"),
    "nothing": ({"inputs": []}, "inputs must be a list of objects"),
    "half a surrogate pair": (
        {"id": "\ud800", "inputs": v2_tensors()},
        "id must have no surrogate without its pair",
    ),
    "unknown output": ({"inputs": v2_tensors(), "outputs": [{"name": "odd"}]}, "output 'odd' is unknown"),
    "output twice": (
        {"inputs": v2_tensors(), "outputs": [{"name": "user"}, {"name": "history"}, {"name": "user"}]},
        "output 'user' is there twice",
    ),
    "timeout": ({"inputs": v2_tensors(), "parameters": {"timeout": -1}}, "timeout must be"),
    "binary size": (
        change_v2(0, parameters={"binary_data_size": 16}),
        "binary_data_size must be at most the 0",
    ),
    "missing": ({"inputs": v2_tensors()[1:]}, "input 'user' is missing"),
}


def test_every_bad_v2_request_says_what_is_wrong(shared_folder):
    async def check_all():
        async with client_of(shared_folder) as (client, _):
            for name, (body, message) in BAD_V2.items():
                answer = await client.post("/v2/models/model/infer", content=json.dumps(body))
                assert answer.status_code == 400, (name, answer.text)
                assert message in answer.json()["error"], (name, answer.text)

    run(check_all())


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("number", [2**63, -(10**30), 10**400])
def test_large_ints_of_any_type(datatype, number):
    """A tensor, or a request that is refused."""
    try:
        found = from_list("x", datatype, [1], [number]).array
    except RequestError:
        return
    assert (found.shape, found.dtype) == ((1,), DATATYPES[datatype])
    if np.isfinite(found[0]):
        np.testing.assert_allclose(float(found[0]), float(number), rtol=1e-2)


def test_ints_that_bfloat16_holds():
    found = from_list("x", "BF16", [4], [10**19, -(2**70), 3, 0.5]).array
    assert found.astype(np.float64).tolist() == [float(ml_dtypes.bfloat16(1e19)), -(2.0**70), 3.0, 0.5]


def test_weights_beside_row_splits_must_be_finite(shared_folder):
    """In float32, too."""
    columns = {
        "user": [3, 7],
        "history": [1, 2],
        "history.row_splits": [0, 2, 2],
        "history.weights": [1.0, 1e39],
        "dense": [[0.0, 0.0]] * 2,
    }

    async def check_all():
        async with client_of(shared_folder) as (client, _):
            answer = await client.post("/v1/models/model:predict", json={"inputs": columns})
            assert answer.status_code == 400, answer.text
            assert "finite float32" in answer.json()["error"]

    run(check_all())


def test_too_many_rows(shared_folder):
    """Also rows of nothing, which take no bytes."""

    def v2(rows, splits=False):
        tensors = [
            {"name": name, "datatype": "INT64", "shape": [rows, 0], "data": []} for name in ("user", "history")
        ]
        if splits:
            tensors[1]["shape"] = [0]
            tensors.append(
                {
                    "name": "history.row_splits",
                    "datatype": "INT32",
                    "shape": [rows + 1],
                    "data": [0] * (rows + 1),
                }
            )
        dense = {"name": "dense", "datatype": "FP32", "shape": [rows, 2], "data": [0.0] * (2 * rows)}
        return {"inputs": [*tensors, dense]}

    def columns(rows):
        return {"inputs": {"user": [1] * rows, "history": [[]] * rows, "dense": [[0.0, 0.0]] * rows}}

    def with_splits(rows):
        flat = {"history": [], "history.row_splits": [0] * (rows + 1)}
        return {"inputs": {**columns(rows)["inputs"], **flat}}

    huge = v2(1)["inputs"][:2]
    for tensor in huge:
        tensor["shape"] = [2**31 - 1, 0]

    async def check_all():
        async with client_of(shared_folder, max_queue_rows=16) as (client, _):
            for path, make in (
                ("/v2/models/model/infer", v2),
                ("/v2/models/model/infer", lambda rows: v2(rows, True)),
                ("/v1/models/model:predict", columns),
                ("/v1/models/model:predict", with_splits),
                ("/v1/models/model:predict", lambda rows: {"instances": [ROW] * rows}),
            ):
                assert (await client.post(path, json=make(16))).status_code == 200
                answer = await client.post(path, json=make(17))
                assert answer.status_code == 413, answer.text
                assert "at most 16 rows, got 17" in answer.json()["error"]
            answer = await client.post("/v2/models/model/infer", json={"inputs": huge})
            assert answer.status_code == 413, answer.text

    run(check_all())


def test_requests_without_memory_are_refused_and_counted(shared_folder, monkeypatch):
    async def check_all():
        async with client_of(shared_folder) as (client, service):

            async def infer(*_):
                raise MemoryError

            monkeypatch.setattr(service, "infer", infer)
            answer = await client.post("/v2/models/model/infer", json={"inputs": v2_tensors()})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "no memory" in answer.json()["error"]
            text = (await client.get("/metrics")).text
            assert 'jaxembed_requests_total{protocol="v2_rest",status="503"} 1.0' in text

    run(check_all())


def test_no_rows_and_no_ids(shared_folder):
    async def check_all():
        async with client_of(shared_folder) as (client, _):
            empty = v2_tensors([], [], [])
            empty[3].update(shape=[0, 2], data=[])
            answer = await client.post("/v2/models/model/infer", json={"inputs": empty})
            assert [o["shape"] for o in answer.json()["outputs"]] == [[0], [0], [0]]
            rows = {"user": [[], []], "history": [[], []], "dense": DENSE}
            answer = await client.post("/v1/models/model:predict", json={"inputs": rows})
            assert answer.json()["outputs"]["user"] == [0.0, 0.0]

    run(check_all())
