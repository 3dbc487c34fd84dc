"""The OpenAPI page: routes, requests and answers, with the inputs of the model that serves."""

from collections.abc import Mapping
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
_ADMIN_ERRORS = {
    "400": "The version is no number.",
    "401": "The token is missing, or another one.",
    "403": "The server has no token, and takes these from its own machine alone.",
    "404": "There is no such version.",
    "409": "The version cannot be served.",
    "503": "What was asked for cannot be written down; see Retry-After.",
}
_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "Of JAXEMBED_ADMIN_TOKEN; a server without it takes requests from its own machine alone.",
}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
_OF_VERSION = "/versions/{version}"
_BINARY, _LENGTH = "application/octet-stream", "Inference-Header-Content-Length"
_LENGTH_IS = {
    "description": "Bytes of the JSON before the bytes of tensors.",
    "schema": {"type": "integer", "minimum": 0},
}
_STRING = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"b64": {"type": "string"}}, "required": ["b64"], "maxProperties": 1},
    ]
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def openapi(name: str, model: ServedModel | None, further: Mapping[str, str] | None = None) -> dict[str, Any]:
    """An OpenAPI 3.1 document.

    Args:
      name: of the model.
      model: the version that serves, for the names of its inputs; None before there is one.
      further: paths of which each is another one of a path that is here.
    """
    v1, v2 = f"/v1/models/{name}", f"/v2/models/{name}"
    paths: dict[str, Any] = {
        "/": {"get": _get("A page with what is served", content="text/html")},
        "/status": {"get": _get("What the page at / shows")},
        "/metrics": {"get": _get("For Prometheus", content="text/plain")},
        "/openapi.json": {"get": _get("This document")},
        "/v2": {"get": _get("Name and version of the server")},
        "/v2/health/live": {"get": _get("Whether the process answers")},
        "/v2/health/ready": {"get": _get("Whether requests are served", "503")},
        **_model_paths(v1, v2, model),
        **{
            path: {**operations, "parameters": [_VERSION]}
            for path, operations in _model_paths(v1 + _OF_VERSION, v2 + _OF_VERSION, model, "404").items()
        },
        "/admin/versions/{version}:activate": {
            "post": _admin("Serves a version until told otherwise", *_ADMIN_ERRORS),
            "parameters": [_VERSION],
        },
        "/admin/versions:latest": {"post": _admin("Follows the newest version again", "401", "403", "503")},
    }
    for path, other in (further or {}).items():
        paths[path] = {**paths.get(path, {}), **paths[other]}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"jaxembed serves {name}", "version": str(model.version) if model else "none"},
        "paths": paths,
        "components": {"securitySchemes": {"token": _TOKEN}},
    }


def _model_paths(v1: str, v2: str, model: ServedModel | None, *errors: str) -> dict[str, Any]:
    """Those of the model, or of one version of it, below two paths."""
    errors = (*errors, "503")
    return {
        v2: {"get": _get("Inputs and outputs", *errors)},
        v2 + "/ready": {"get": _get("Whether the model is served", *errors)},
        v2 + "/infer": {"post": _post_infer(model)},
        v1: {"get": _get("The version that serves", *errors)},
        v1 + "/metadata": {"get": _get("Inputs and outputs, as TensorFlow Serving says them", *errors)},
        v1 + ":predict": {
            "post": _post(
                "TensorFlow Serving's predict", _predict(model), {"type": "object"}, example_of(model)
            )
        },
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
    errors = {code: _error(text) for code, text in _ERRORS.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}},
            **errors,
        },
    }


def _post_infer(model: ServedModel | None) -> dict[str, Any]:
    """In JSON, or with tensors in binary after it; so are the answers, as the request says."""
    found = _post("Open Inference Protocol v2", _infer(model), _infer_answer())
    schema = {
        "type": "string",
        "format": "binary",
        "description": f"JSON as of application/json, of {_LENGTH} bytes, and the bytes of the tensors with a "
        "binary_data_size, one after the other.",
    }
    found["parameters"] = [{"name": _LENGTH, "in": "header", "required": False, **_LENGTH_IS}]
    found["requestBody"]["content"][_BINARY] = {"schema": schema}
    answer = found["responses"]["200"]
    answer["content"][_BINARY] = {"schema": {"type": "string", "format": "binary"}}
    answer["headers"] = {_LENGTH: _LENGTH_IS}
    return found


def _admin(summary: str, *errors: str) -> dict[str, Any]:
    answer = {
        "type": "object",
        "properties": {"version": {"type": ["integer", "null"]}, "pinned": {"type": ["integer", "null"]}},
        "required": ["version", "pinned"],
    }
    return {
        "summary": summary,
        "security": [{"token": []}, {}],
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}},
            **{code: _error(_ADMIN_ERRORS[code]) for code in errors},
        },
    }


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR}}}


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
            "parameters": {
                "type": "object",
                "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
            },
        },
        "required": ["name", "datatype", "shape"],
        "anyOf": [
            {"required": ["data"]},
            {
                "required": ["parameters"],
                "properties": {"parameters": {"type": "object", "required": ["binary_data_size"]}},
            },
        ],
    }
    output = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
        },
        "required": ["name"],
    }
    return {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor, "minItems": 1},
            "outputs": {"type": "array", "items": output},
            "parameters": {
                "type": "object",
                "properties": {
                    "timeout": {"type": "number", "exclusiveMinimum": 0, "description": "In microseconds."},
                    "binary_data_output": {"type": "boolean"},
                },
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
            # A sequence is cut instead.
            limit = {} if feature.config.max_sequence_length else {"maxItems": feature.max_ids}
            row[path] = {"anyOf": [ids, {"type": "array", "items": ids, **limit}]}
        row.update({name: {} for name in model.signature.dense})
    rows: dict[str, Any] = {"type": "object", "properties": row, "required": list(row)}
    inputs: dict[str, Any] = {"type": "object"}
    if len(row) == 1:  # which goes without its name, too
        rows, inputs = {"anyOf": [rows, *row.values()]}, {"type": ["object", "array"]}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"instances": {"type": "array", "items": rows, "minItems": 1}},
                "required": ["instances"],
            },
            {"type": "object", "properties": {"inputs": inputs}, "required": ["inputs"]},
        ]
    }
