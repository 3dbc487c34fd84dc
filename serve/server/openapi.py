"""The OpenAPI page: routes, requests and answers, with the inputs of the model that serves."""

from typing import Any

from jaxembed.serve.features import ServedFeature

from .served import ServedModel
from .status import example
from .strings import takes_strings
from .tensors import DATATYPES

_ERRORS = {
    "400": "The request is not of the form it must be.",
    "404": "The version is not served.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or there are too many rows.",
    "415": "The body is compressed in a way that is not read.",
    "429": "The server is overloaded; see Retry-After.",
    "503": "The server takes no requests; see Retry-After.",
    "504": "The deadline passed before the request was answered.",
}
_STRING = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"b64": {"type": "string"}}, "required": ["b64"], "maxProperties": 1},
    ]
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def openapi(name: str, model: ServedModel | None) -> dict[str, Any]:
    """An OpenAPI 3.1 document.

    Args:
      name: of the model.
      model: the version that serves, for the names of its inputs; None before there is one.
    """
    v1, v2 = f"/v1/models/{name}", f"/v2/models/{name}"
    paths: dict[str, Any] = {
        "/v2": {"get": _get("Name and version of the server")},
        "/v2/health/live": {"get": _get("Whether the process answers")},
        "/v2/health/ready": {"get": _get("Whether requests are served", "503")},
        v2: {"get": _get("Inputs and outputs", "503")},
        v2 + "/ready": {"get": _get("Whether the model is served", "503")},
        v2 + "/infer": {"post": _post("Open Inference Protocol v2", _infer(model), _infer_answer())},
        v1: {"get": _get("The version that serves", "503")},
        v1 + "/metadata": {"get": _get("Inputs and outputs, as TensorFlow Serving says them", "503")},
        v1 + ":predict": {
            "post": _post(
                "TensorFlow Serving's predict", _predict(model), {"type": "object"}, example_of(model)
            )
        },
        "/metrics": {"get": _get("For Prometheus", content="text/plain")},
        "/status": {"get": _get("What the page at / shows")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"jaxembed serves {name}", "version": str(model.version) if model else "none"},
        "paths": paths,
    }


def example_of(model: ServedModel | None) -> dict[str, Any] | None:
    """A request that the model takes."""
    return None if model is None else example(model)


def _get(summary: str, *errors: str, content: str = "application/json") -> dict[str, Any]:
    schema = {"type": "string"} if content.startswith("text") else {"type": "object"}
    answers = {"200": {"description": "The answer.", "content": {content: {"schema": schema}}}}
    return {"summary": summary, "responses": {**answers, **{code: _plain(code) for code in errors}}}


def _plain(code: str) -> dict[str, Any]:
    return {"description": _ERRORS[code], "content": {"application/json": {"schema": {"type": "object"}}}}


def _post(summary: str, request: Any, answer: Any, sample: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": request}
    if sample is not None:
        content["example"] = sample
    errors = {
        code: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for code, text in _ERRORS.items()
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}},
            **errors,
        },
    }


def _infer(model: ServedModel | None) -> dict[str, Any]:
    names: list[str] = []
    if model is not None:
        for path, feature in model.signature.features.items():
            names += [path, path + ".row_splits", *([path + ".weights"] if feature.weighted else [])]
        names += model.signature.dense
    name = {"type": "string", **({"enum": names} if names else {})}
    tensor = {
        "type": "object",
        "properties": {
            "name": name,
            "datatype": {"enum": list(DATATYPES)},
            "shape": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "minItems": 1,
                "maxItems": 8,
            },
            "data": {"type": "array"},
        },
        "required": ["name", "datatype", "shape", "data"],
    }
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1},
            "outputs": {
                "type": "array",
                "items": {"type": "object", "properties": {"name": {"type": "string"}}},
            },
        },
        "required": ["inputs"],
    }


def _infer_answer() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["model_name", "model_version", "outputs"],
    }


def _integer(feature: ServedFeature) -> dict[str, Any]:
    """Rows are not below 0; ids that are made into rows may be."""
    return {"type": "integer", **({"minimum": 0} if feature.config.preprocessing is None else {})}


def _predict(model: ServedModel | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if model is not None:
        for path, feature in model.signature.features.items():
            ids = _STRING if takes_strings(feature) else _integer(feature)
            row[path] = {"anyOf": [ids, {"type": "array", "items": ids, "maxItems": feature.max_ids}]}
        row.update({name: {} for name in model.signature.dense})
    rows = {"type": "object", "properties": row, "required": list(row)}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"instances": {"type": "array", "items": rows, "minItems": 1}},
                "required": ["instances"],
            },
            {"type": "object", "properties": {"inputs": {"type": "object"}}, "required": ["inputs"]},
        ]
    }
