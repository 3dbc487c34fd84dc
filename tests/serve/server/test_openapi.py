"""The OpenAPI page: every address that the application answers, and the requests that it takes."""

import json

import pytest

pytest.importorskip("starlette")

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
