"""The OpenAPI page: every address that the application answers, and the requests that it takes."""

import json
import types

import httpx
import pytest

pytest.importorskip("starlette")

from jaxembed import FeatureConfig, TableConfig
from jaxembed.serve.features import served_features
from jaxembed.serve.server import tf_predict
from jaxembed.serve.server.app import make_app
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.openapi import openapi
from jaxembed.serve.server.service import Service
from jaxembed.serve.server.signature import Signature
from tests.serve.server import fuzz
from tests.serve.server.servers import client_of, run
from tests.serve.server.test_rest import v2_tensors


@pytest.fixture(scope="module")
def page(shared_folder):
    """(the page, methods by path of the application)"""

    async def get():
        async with client_of(shared_folder) as (client, _):
            routes = client._transport.app.routes
            served = {route.path: {method.lower() for method in route.methods - {"HEAD"}} for route in routes}
            return (await client.get("/openapi.json")).json(), served

    return run(get())


def test_all_addresses_are_there(page):
    document, served = page
    found = {path: operations.keys() - {"parameters"} for path, operations in document["paths"].items()}
    assert found == served
    for path, operations in document["paths"].items():
        names = [parameter["name"] for parameter in operations.get("parameters", ())]
        assert names == ["version"] * path.count("{version}")


def test_switching_versions_takes_a_token(page):
    document, _ = page
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        (operation,) = (operations[method] for method in ("get", "post") if method in operations)
        switches = path.startswith("/admin/")
        assert operation.get("security") == ([{"token": []}, {}] if switches else None)
        assert {"401", "403"} <= operation["responses"].keys() or not switches


@pytest.mark.parametrize("path", ["/v2/models/model/infer", "/v2/models/model/versions/{version}/infer"])
def test_inference_in_json_and_in_binary(page, path):
    document, _ = page
    operation = document["paths"][path]["post"]
    bodies = operation["requestBody"]["content"]
    assert bodies.keys() == {"application/json", "application/octet-stream"}
    assert operation["responses"]["200"]["content"].keys() == bodies.keys()
    assert [entry["name"] for entry in operation["parameters"]] == ["Inference-Header-Content-Length"]
    validator = pytest.importorskip("jsonschema").Draft202012Validator(bodies["application/json"]["schema"])
    binary, _ = fuzz.in_binary(fuzz.seeded(0))
    assert "binary_data_size" in json.dumps(binary)
    for good in (fuzz.GOOD_V2, binary, {"inputs": v2_tensors(), "outputs": [{"name": "user"}]}):
        validator.validate(good)
    for tensor in ({}, {"parameters": {}}, {"parameters": {"binary_data_size": -1}}, {"data": 1}):
        bad = {"inputs": [{"name": "user", "datatype": "INT64", "shape": [1], **tensor}]}
        assert not validator.is_valid(bad)


def test_routes_that_were_asked_for(tmp_path):
    async def get():
        app = make_app(Service(ServerConfig(str(tmp_path))), predict_route="/ask", health_route="/well")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/openapi.json")).json()["paths"]

    paths = run(get())
    assert paths["/ask"] == paths["/v1/models/model:predict"]
    assert paths["/well"] == paths["/v2/health/ready"]


def model_of(**features):
    """One with these features of at most 2 ids, and no more than its signature."""
    served = {feature.path: feature for feature in served_features(features, 2, ())}
    return types.SimpleNamespace(version=0, signature=Signature(served, {}, (), max_rows=8))


def predictions(model):
    """What instances and inputs of TensorFlow Serving's requests are."""
    post = openapi("model", model)["paths"]["/v1/models/model:predict"]["post"]
    by_row, by_column = post["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    return by_row["properties"]["instances"]["items"], by_column["properties"]["inputs"]


def test_sequences_may_be_longer_than_what_is_used():
    table = TableConfig(8, 1, name="t")
    model = model_of(bag=FeatureConfig(table), sequence=FeatureConfig(table, max_sequence_length=2))
    row, _ = predictions(model)
    bags = {name: feature["anyOf"][1] for name, feature in row["properties"].items()}
    assert bags["bag"]["maxItems"] == 2
    assert "maxItems" not in bags["sequence"]


def test_an_only_input_without_its_name():
    config = FeatureConfig(TableConfig(8, 1, name="t"))
    model = model_of(bag=config)
    row, columns = predictions(model)
    named, alone = row["anyOf"]
    assert named["required"] == ["bag"]
    assert alone == named["properties"]["bag"]
    assert columns["type"] == ["object", "array"]
    for body in ({"instances": [1, [2, 3]]}, {"inputs": [[1], [2, 3]]}):
        tf_predict.read(model.signature, json.dumps(body).encode())
    row, columns = predictions(model_of(bag=config, other=config))
    assert (row["type"], columns["type"]) == ("object", "object")
