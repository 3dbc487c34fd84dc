"""Mutates good requests of both protocols; what comes back must be an answer or a refusal, and nothing else."""

import copy
import json
import random

from jaxembed.serve.server.messages import METHODS

ODD = [
    None, True, False, 0, -1, -5, 1, 50, 70, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 0.0, 1.5,
    -0.0, 1e308, "", "1", "\0", "NaN", "é\ud800", "x" * 2000, [], [[]], [1], [[1], [2]], [0, 2], [3, 1], {}, {"a": 1},
    "user", "history", "history.row_splits", "history.weights", "dense", "INT64", "INT32", "FP32", "FP16", "BYTES",
]  # fmt: skip

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


def http_case(rng):
    """(path, body, headers) of a bad request, or at least an odd one."""
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


def good_message():
    """A good ModelInferRequest."""
    message = METHODS["ModelInfer"][0](model_name="model")
    for entry in GOOD_V2["inputs"]:
        contents = {"INT64": "int64_contents", "INT32": "int_contents", "FP32": "fp32_contents"}[
            entry["datatype"]
        ]
        tensor = message.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        getattr(tensor.contents, contents).extend(entry["data"])
    return message


def grpc_case(rng):
    """Bytes of a bad message, or at least an odd one."""
    message = good_message()
    for _ in range(rng.randint(0, 3)):
        tensor = rng.choice(message.inputs)
        action = rng.randrange(5)
        if action == 0:
            tensor.shape.append(rng.choice([0, -1, 2, 2**40]))
        elif action == 1:
            tensor.name = rng.choice(["user", "history", "odd", "", "x" * 2000])
        elif action == 2:
            tensor.datatype = rng.choice(["INT64", "FP16", "BYTES", "FP32", "", "BOOL"])
        elif action == 3:
            tensor.contents.int64_contents.append(rng.choice([-5, 50, 70, 2**31 - 1, 2**40, 2**62]))
        else:
            message.raw_input_contents.append(rng.randbytes(rng.randint(0, 20)))
    data = message.SerializeToString()
    return damage(rng, data) if rng.random() < 0.5 else data


def seeded(seed):
    return random.Random(seed)
