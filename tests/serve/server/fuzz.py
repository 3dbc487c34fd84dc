"""Mutates good requests of both protocols; what comes back must be an answer or a refusal, and nothing else."""

import copy
import json
import random

import numpy as np

from jaxembed.serve.server.messages import METHODS

ODD = [
    None, True, False, 0, -1, -5, 1, 50, 70, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 0.0, 1.5,
    -0.0, 1e308, "", "1", "\0", "NaN", "é\ud800", "x" * 2000, [], [[]], [1], [[1], [2]], [0, 2], [3, 1], {}, {"a": 1},
    "user", "history", "history.row_splits", "history.weights", "dense", "INT64", "INT32", "FP32", "FP16", "BF16", "BYTES",
]  # fmt: skip

#: Numbers as tensors have them in bytes.
ODD_BYTES = [np.int64(number).tobytes() for number in (-(2**63), -5, -1, 50, 70, 2**31 - 1, 2**40)]
ODD_BYTES += [np.float32(number).tobytes() for number in (np.nan, np.inf, -np.inf, 3e38, -0.0)]

GOOD_ROWS = {
    "instances": [
        {"user": 3, "history": [1, 2], "dense": [0.5, 1.0]},
        {"user": 7, "history": [], "dense": [0, 0]},
    ]
}
GOOD_V2 = {
    "id": "x",
    "inputs": [
        {"name": "user", "datatype": "INT64", "shape": [2], "data": [3, 7]},
        {"name": "history", "datatype": "INT64", "shape": [2], "data": [1, 2]},
        {"name": "history.row_splits", "datatype": "INT32", "shape": [3], "data": [0, 2, 2]},
        {"name": "dense", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 1.0, 0, 0]},
    ],
}
GOOD_COLUMNS = {
    "inputs": {
        "user": [3, 7],
        "history": [1, 2],
        "history.row_splits": [0, 2, 2],
        "history.weights": [1.0, 1.0],
        "dense": [[0.5, 1.0], [0, 0]],
    }
}
#: Further in some requests; their answers are the same.
ONES = {"name": "history.weights", "datatype": "FP32", "shape": [2], "data": [1.0, 1.0]}
WANT = {"history": [4.5, 0.0], "user": [3.0, 7.0], "version": [0.0, 0.0]}
PREDICT, INFER = "/v1/models/model:predict", "/v2/models/model/infer"


def places(value, path=()):
    """The paths of all values in a structure."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def mutate(rng, value):
    """A copy with one to three things replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in places(value) if p] or [()])
        if not path:
            return rng.choice(ODD)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = rng.randrange(4)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.insert(rng.randint(0, len(parent)), copy.deepcopy(rng.choice([*parent, *ODD])))
        elif action == 2 and isinstance(parent, dict):
            parent[str(rng.choice(ODD))[:2000]] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return value


def damage(rng, data):
    """Some bytes replaced, removed or added."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(4)
        if action == 0:
            data[at : at + rng.randint(1, 8)] = b""
        elif action == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif action == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        else:
            data = data[: max(at, 1)]
    return bytes(data)


def odd_numbers(rng, data):
    """Some numbers in the bytes of tensors replaced, which keep their length."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        value, at = rng.choice(ODD_BYTES), 4 * rng.randrange(len(data) // 4 or 1)
        data[at : at + len(value)] = value[: len(data) - at]
    return bytes(data)


def inputs(rng):
    """Of a good v2 request."""
    return copy.deepcopy(GOOD_V2["inputs"] + [ONES] * (rng.random() < 0.5))


def bytes_of(tensor):
    """Its data, as v2 has it in binary."""
    dtype = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4"}[tensor["datatype"]]
    return np.array(tensor["data"], dtype).tobytes()


def in_binary(rng):
    """(JSON, what follows it) of a good v2 request with most of its tensors in binary."""
    tensors, parts = inputs(rng), []
    for tensor in tensors:
        if rng.random() < 0.8:
            parts.append(bytes_of(tensor))
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
    head = {"id": "x", "inputs": tensors, "parameters": {"binary_data_output": rng.random() < 0.5}}
    return head, b"".join(parts)


def binary_case(rng):
    """`http_case` of a request that is not all JSON."""
    head, data = in_binary(rng)
    head = json.dumps(mutate(rng, head) if rng.random() < 0.5 else head).encode()
    head = damage(rng, head) if rng.random() < 0.2 else head
    data = odd_numbers(rng, data) if rng.random() < 0.5 else data
    data = damage(rng, data) if rng.random() < 0.3 else data
    size = rng.choice([0, 1, len(head) - 1, len(head) + 1, len(head) + len(data) + 1, "x", -1])
    size = size if rng.random() < 0.1 else len(head)
    return INFER, head + data, {"inference-header-content-length": str(size)}


def good_http(rng):
    """(path, body, headers) of a good request."""
    kind = rng.randrange(4)
    if kind < 3:
        path, body = [(PREDICT, GOOD_ROWS), (PREDICT, GOOD_COLUMNS), (INFER, {"inputs": inputs(rng)})][kind]
        return path, json.dumps(body).encode(), {}
    head, data = in_binary(rng)
    head = json.dumps(head).encode()
    return INFER, head + data, {"inference-header-content-length": str(len(head))}


def http_outputs(answer):
    """The outputs of an answer with status 200, by name."""
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    body, data = json.loads(answer.content[:size]), answer.content[size:]
    if "predictions" in body:
        return {name: [row[name] for row in body["predictions"]] for name in body["predictions"][0]}
    if isinstance(body["outputs"], dict):
        return body["outputs"]
    found = {}
    for output in body["outputs"]:
        length = output.get("parameters", {}).get("binary_data_size", 0)
        found[output["name"]] = (
            output["data"] if "data" in output else np.frombuffer(data[:length], "<f4").tolist()
        )
        data = data[length:]
    assert not data
    return found


def http_case(rng):
    """(path, body, headers) of a bad request, or at least an odd one."""
    if rng.random() < 0.3:
        return binary_case(rng)
    path, good = rng.choice([(PREDICT, GOOD_ROWS), (PREDICT, GOOD_COLUMNS), (INFER, GOOD_V2)])
    headers = {}
    body = json.dumps(mutate(rng, good) if rng.random() < 0.7 else good).encode()
    if rng.random() < 0.4:
        body = damage(rng, body)
    if rng.random() < 0.1:
        headers["inference-header-content-length"] = str(rng.choice([0, 1, len(body), len(body) + 1, "x", -1]))
    if rng.random() < 0.05:
        headers["content-encoding"] = rng.choice(["gzip", "deflate", "br", "identity"])
    return path, body, headers


def good_message(rng, raw):
    """A good ModelInferRequest, raw or in contents."""
    message = METHODS["ModelInfer"][0](model_name="model")
    for entry in inputs(rng):
        contents = {"INT64": "int64_contents", "INT32": "int_contents", "FP32": "fp32_contents"}[
            entry["datatype"]
        ]
        tensor = message.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        if raw:
            message.raw_input_contents.append(bytes_of(entry))
        else:
            getattr(tensor.contents, contents).extend(np.ravel(entry["data"]).tolist())
    return message


def grpc_outputs(answer):
    """The outputs of a ModelInferResponse, by name."""
    raw = [np.frombuffer(part, "<f4").tolist() for part in answer.raw_output_contents]
    return dict(zip([output.name for output in answer.outputs], raw, strict=True))


def grpc_case(rng):
    """Bytes of a bad message, or at least an odd one."""
    message = good_message(rng, raw=rng.random() < 0.5)
    raw = message.raw_input_contents
    for _ in range(rng.randint(0, 3)):
        tensor = rng.choice(message.inputs)
        action = rng.randrange(5)
        if action == 0:
            tensor.shape.append(rng.choice([0, -1, 2, 2**40]))
        elif action == 1:
            tensor.name = rng.choice(["user", "history", "odd", "", "x" * 2000])
        elif action == 2:
            tensor.datatype = rng.choice(["INT64", "FP16", "BYTES", "FP32", "", "BOOL"])
        elif action == 3 and raw:
            at = rng.randrange(len(raw))
            raw[at] = rng.choice([odd_numbers, damage])(rng, raw[at])
        elif action == 3:
            tensor.contents.int64_contents.append(rng.choice([-5, 50, 70, 2**31 - 1, 2**40, 2**62]))
        else:
            raw.append(rng.randbytes(rng.randint(0, 20)))
    data = message.SerializeToString()
    return damage(rng, data) if rng.random() < 0.5 else data


def seeded(seed):
    return random.Random(seed)
