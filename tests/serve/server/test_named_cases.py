"""The cases that a server meets, in every form that a request has: each refused with its place, and the next one served."""

import asyncio
import gzip
import json

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("grpc")

from jaxembed.serve.server.grpc_server import Methods
from jaxembed.serve.server.messages import METHODS
from jaxembed.serve.server.v2_grpc import _FIELDS
from tests.serve.server import bundles, fuzz
from tests.serve.server.servers import client_of
from tests.serve.server.test_fuzz import Context

NAN, INF, V = float("nan"), float("inf"), bundles.ITEMS
DTYPES = {"INT64": "<i8", "INT32": "<i4", "UINT64": "<u8", "FP64": "<f8", "FP32": "<f4", "FP16": "<f2"}
DTYPES |= {"BF16": ml_dtypes.bfloat16}
#: (datatype, shape, values) of inputs; bad ones come in row 1, position 1 of `history`.
GOOD = {
    "user": ("INT64", [2], [3, 7]),
    "history": ("INT64", [3], [1, 2, 4]),
    "history.row_splits": ("INT64", [3], [0, 1, 3]),
    "history.weights": ("FP32", [3], [1.0, 1.0, 1.0]),
    "dense": ("FP32", [2, 2], [0.0, 0.0, 0.0, 0.0]),
}
WANT = {"history": [1.0, 6.0], "user": [3.0, 7.0], "version": [0.0, 0.0]}
PREDICT, INFER = fuzz.PREDICT, fuzz.INFER


def nested(shape, values):
    """Values in lists of this shape, if they are as many as it has."""
    for size in shape[:0:-1]:
        values = [values[at : at + size] for at in range(0, len(values), size)] if size else [[]] * shape[0]
    return values


def as_predict(tensors):
    columns = {name: nested(shape, values) for name, (_, shape, values) in tensors.items()}
    return PREDICT, json.dumps({"inputs": columns}).encode(), {}


def as_json(tensors):
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": values}
        for name, (datatype, shape, values) in tensors.items()
    ]
    return INFER, json.dumps({"inputs": inputs}).encode(), {}


def raw(datatype, values):
    if datatype == "BYTES":
        return b"".join(len(value).to_bytes(4, "little") + value.encode() for value in values)
    with np.errstate(over="ignore"):
        return np.array(values, DTYPES[datatype]).tobytes()


def as_binary(tensors):
    inputs, data = [], b""
    for name, (datatype, shape, values) in tensors.items():
        part = raw(datatype, values)
        size = {"binary_data_size": len(part)}
        inputs.append({"name": name, "datatype": datatype, "shape": shape, "parameters": size})
        data += part
    head = json.dumps({"inputs": inputs}).encode()
    return INFER, head + data, {"inference-header-content-length": str(len(head))}


def as_contents(tensors):
    message = METHODS["ModelInfer"][0](model_name="model")
    for name, (datatype, shape, values) in tensors.items():
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
        values = [value.encode() for value in values] if datatype == "BYTES" else values
        getattr(tensor.contents, _FIELDS.get(datatype, "fp32_contents")).extend(values)
    return message.SerializeToString()


def as_raw(tensors):
    message = METHODS["ModelInfer"][0](model_name="model")
    for name, (datatype, shape, values) in tensors.items():
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw(datatype, values))
    return message.SerializeToString()


FORMS = {"predict": as_predict, "json": as_json, "binary": as_binary, "contents": as_contents, "raw": as_raw}


@pytest.fixture(scope="module")
def send(shared_folder):
    """Sends something made by one of FORMS: (status of HTTP or name of the code, outputs or error)."""
    with asyncio.Runner() as runner:
        serving = client_of(shared_folder)
        client, service = runner.run(serving.__aenter__())

        async def ask(made):
            if isinstance(made, bytes):
                context = Context()
                answer = await Methods(service).ModelInfer(made, context)
                return (context.code, context.details) if answer is None else (200, fuzz.grpc_outputs(answer))
            path, body, headers = made
            answer = await client.post(path, content=body, headers=headers)
            if answer.status_code == 200:
                return 200, fuzz.http_outputs(answer)
            return answer.status_code, answer.json()["error"]

        yield lambda made: runner.run(asyncio.wait_for(ask(made), 60))
        runner.run(serving.__aexit__(None, None, None))


def with_change(change):
    """The good request, with other inputs, or without those that are None."""
    return {name: tensor for name, tensor in {**GOOD, **change}.items() if tensor is not None}


def check_refused(send, made, message, status=400):
    codes = {400: "INVALID_ARGUMENT", 413: "INVALID_ARGUMENT"}
    found = send(made)
    assert found[0] == (codes[status] if isinstance(made, bytes) else status), found
    assert message in found[1]
    for form in FORMS.values():
        assert send(form(GOOD)) == (200, WANT)


def history(bad, datatype="INT64", **further):
    return {"history": (datatype, [3], [1, 2, bad]), **further}


def weights(bad, datatype="FP32"):
    return {"history.weights": (datatype, [3], [1.0, 1.0, bad])}


PLAIN = {"history.weights": None}  # which native code reads
OUTSIDE = "Feature 'history', row 1, position 1: id {} is outside of table 'items'"
BAD = {
    **{f"id {bad}": (history(bad), OUTSIDE.format(bad)) for bad in (-5, V, 2**31 - 1, 2**40, -(2**63))},
    **{f"plain id {bad}": (history(bad, **PLAIN), OUTSIDE.format(bad)) for bad in (-5, V, 2**31 - 1, 2**40)},
    "id 2^63 + 7": (history(2**63 + 7, "UINT64"), str(2**63 + 7)),
    "dense ids": ({"user": ("INT64", [2, 1], [3, 50])}, "Feature 'user', row 1, position 0: id 50 is outside"),
    "weight 1e39": (weights(1e39, "FP64"), "Weight for 'history', row 1, position 1 must be a finite float32"),
    "weight 1e39 in float32": (
        weights(1e39),
        "Weight for 'history', row 1, position 1 must be a finite float32",
    ),
    "fewer weights": ({"history.weights": ("FP32", [2], [1.0, 1.0])}, "Weight for 'history' must be "),
    "rows disagree": (
        {"user": ("INT64", [3], [1, 2, 3])},
        "All features must have the same number of rows: 'history' has 2, 'user' has 3",
    ),
    "rows of dense inputs": (
        {"dense": ("FP32", [1, 2], [0.0, 0.0])},
        "dense input 'dense' must be of shape [2, 2]",
    ),
    "decreasing splits": (
        {"history.row_splits": ("INT64", [4], [0, 2, 1, 3])},
        "input 'history.row_splits' must not decrease, got 2, 1 at row 1",
    ),
    "decreasing splits, plain": (
        {"history.row_splits": ("INT32", [3], [0, -1, 3]), **PLAIN},
        "input 'history.row_splits' must not decrease, got 0, -1 at row 0",
    ),
    "splits beyond the ids": (
        {"history.row_splits": ("INT64", [3], [0, 1, 4])},
        "input 'history.row_splits' must go from 0 to N = 3, got 0 to 4",
    ),
    "too many ids": (
        {"history": ("INT64", [10], [1] * 10), "history.row_splits": ("INT64", [3], [0, 1, 10]), **PLAIN},
        "Feature 'history', row 1 has 9 ids; at most 8 are served",
    ),
    "null bytes": ({"us\0er": ("INT64", [2], [3, 7])}, "input 'us\\x00er' is unknown"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD)
def test_bad_in_every_form(send, form, name):
    change, message = BAD[name]
    check_refused(send, FORMS[form](with_change(change)), message)


@pytest.mark.parametrize("form", FORMS)
def test_strings_for_weights(send, form):
    message = "input 'history.weights' must be numbers, got BYTES"
    if form == "predict":
        message = "Weight for 'history', row 0, position 0 must be a finite float32, got '1'"
    check_refused(send, FORMS[form](with_change({"history.weights": ("BYTES", [3], ["1", "1", "1"])})), message)


def rows_of(inputs):
    """Columns, not ragged, as rows."""
    return {"instances": [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]}


#: The ways to send `NUMBERS` in JSON, as a dense input and a weight of row 1, position 1.
NESTED = {"user": [3, 7], "history": [[1], [2, 4]], "dense": [[0.0, 0.0], [0.0, 0.0]]}
WEIGHTED = {**NESTED, "history.weights": [[1.0], [1.0, 1.0]]}
NUMBERS = {10**20: True, -(10**20): True, 10**400: False, True: False, False: False, None: False}


def with_number(form, what, number, other):
    """A request with `number` beside another one, both of the same kind of JSON or not."""
    row = [other, number]
    if form == "v2":
        name, size = ("dense", 4) if what == "dense" else ("history.weights", 3)
        shape = [2, 2] if what == "dense" else [3]
        return as_json(with_change({name: ("FP32", shape, [other] * (size - 1) + [number])}))
    if what == "dense":
        inputs = {**NESTED, "dense": [[other, other], row]}
    else:
        inputs = {**NESTED, "history.weights": [[other], row]}
    if form == "ragged":
        flat = {"history": [1, 2, 4], "history.row_splits": [0, 1, 3]}
        weights = {"history.weights": [other, *row]} if what == "weights" else {}
        inputs = {**inputs, **flat, **weights}
    return PREDICT, json.dumps(rows_of(inputs) if form == "rows" else {"inputs": inputs}).encode(), {}


@pytest.mark.parametrize("form", ["rows", "columns", "ragged", "v2"])
@pytest.mark.parametrize("what", ["dense", "weights"])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("other", [1, 0.5, 10**20])
def test_what_is_a_number(send, form, what, number, other):
    status, found = send(with_number(form, what, number, other))
    assert (status == 200) == NUMBERS[number], found
    if status == 200:
        weights = [other, number] if what == "weights" else [1, 1]
        dense = other + number if what == "dense" else 0
        want = np.float32(2 * weights[0] + 4 * weights[1] + dense)
        np.testing.assert_allclose(found["history"][1], want, rtol=1e-6)
    elif form != "v2":
        place = "row 1, position [1]" if what == "dense" else "row 1, position 1"
        name = "dense input 'dense'" if what == "dense" else "Weight for 'history'"
        assert status == 400
        assert f"{name}, {place}" in found
        assert f"got {number!s:.80}." in found
    else:
        assert status == 400
        place = f"position {3 if what == 'dense' else 2}: FP32 expected, got '{number}'"
        assert ("FP32 cannot hold" if number == 10**400 else place) in found


def test_booleans_of_dense_inputs_in_any_place(send):
    for dense, place in (
        ([[True, 1], [1, 1]], "row 0, position [0]"),
        ([[1, 0.5], [False, 1]], "row 1, position [0]"),
    ):
        for encoding in ("utf-8", "utf-16", "utf-32"):
            body = json.dumps({"inputs": {**NESTED, "dense": dense}}).encode(encoding)
            status, found = send((PREDICT, body, {}))
            assert (status, f"dense input 'dense', {place}: must hold numbers" in found) == (400, True), found
    for dense in (True, [True], [True, 1], [[True], [1, 1, 1]], [[[True, 1], [1, 1]]], [{"a": True}, [1, 1]]):
        assert send((PREDICT, json.dumps({"inputs": {**NESTED, "dense": dense}}).encode(), {}))[0] == 400
    words = {**WEIGHTED, "true": 1}
    status, found = send((PREDICT, json.dumps({"inputs": words}).encode(), {}))
    assert (status, found[:23]) == (400, "input 'true' is unknown")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("datatype", "bad"), [("FP32", 1.0), ("FP32", 1.5), ("FP32", NAN), ("BYTES", "7")])
def test_ids_that_are_no_integers(send, form, datatype, bad):
    values = ["1", "2", bad] if datatype == "BYTES" else [1.0, 2.0, bad]
    message = f"Feature 'history': ids must be integers, got {datatype}"
    if bad is NAN and form in ("predict", "json"):
        message = "the body is not valid JSON: NaN is not JSON"
    elif form == "predict":
        message = "input 'history' must be a list of ints, got "
    check_refused(send, FORMS[form](with_change({"history": (datatype, [3], values)})), message)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_numbers_that_are_not_finite(send, form, bad, datatype):
    """JSON has none; of weights and of dense inputs."""
    dense = {"dense": (datatype, [2, 2], [0.0, 0.0, 0.0, bad])}
    for change, message in (
        (
            weights(bad, datatype),
            f"Weight for 'history', row 1, position 1 must be a finite float32, got {bad}",
        ),
        (dense, "dense input 'dense', row 1, position [1]: must be a finite float32"),
        ({**dense, **PLAIN}, "dense input 'dense', row 1, position [1]: must be a finite float32"),
    ):
        if form in ("predict", "json"):
            message = "Infinity is not JSON" if bad in (INF, -INF) else "NaN is not JSON"
        elif form == "contents" and datatype in ("FP16", "BF16"):
            message = f"{datatype} must be sent in raw_input_contents"
        check_refused(send, FORMS[form](with_change(change)), message)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "predict"])
def test_lengths_that_are_not_those_of_the_shape(send, form):
    for datatype, shape, values in (("INT64", [3], [3, 7]), ("INT64", [1], [3, 7]), ("INT64", [2, 2], [3, 7])):
        size = f"shape {shape} {{}} {{}}, got {{}}"
        bytes_ = size.format("is", f"{8 * np.prod(shape)} bytes", 16)
        holds = size.format("holds", f"{np.prod(shape)} values", 2)
        change = {"user": (datatype, shape, values)}
        check_refused(send, FORMS[form](with_change(change)), bytes_ if form in ("binary", "raw") else holds)


@pytest.mark.parametrize("form", ["json", "binary", "contents", "raw"])
def test_a_million_ids_in_one_row(send, form):
    change = {
        "history": ("INT32", [10**6 + 1], [1] * (10**6 + 1)),
        "history.row_splits": ("INT32", [3], [0, 1, 10**6 + 1]),
    }
    message = "Feature 'history', row 1 has 1000000 ids; at most 8 are served. Cut the row"
    check_refused(send, FORMS[form](with_change({**change, **PLAIN})), message)


VALID = {
    "no ids": (
        {"history": ("INT64", [0], []), "history.row_splits": ("INT64", [3], [0, 0, 0]), **PLAIN},
        {"history": [0.0, 0.0]},
    ),
    "no ids, weighted": (
        {
            "history": ("INT64", [0], []),
            "history.row_splits": ("INT32", [3], [0, 0, 0]),
            "history.weights": ("FP32", [0], []),
        },
        {"history": [0.0, 0.0]},
    ),
    "rectangles": (
        {"history": ("INT32", [2, 2], [1, 2, 3, V - 1]), "history.row_splits": None, **PLAIN},
        {"history": [3.0, V + 2.0]},
    ),
    "all that a row may have": (
        {"history": ("INT64", [9], [1] * 9), "history.row_splits": ("INT64", [3], [0, 1, 9]), **PLAIN},
        {"history": [1.0, 8.0]},
    ),
    "weights of 0 and below": (
        weights(-1.0) | {"user": ("INT64", [2], [0, 49])},
        {"history": [1.0, -2.0], "user": [0.0, 49.0]},
    ),
    "integers for weights": ({"history.weights": ("INT64", [3], [0, 3, 1])}, {"history": [0.0, 10.0]}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VALID)
def test_valid_in_every_form(send, form, name):
    change, want = VALID[name]
    assert send(FORMS[form](with_change(change))) == (200, {**WANT, **want})


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "the body is not valid JSON"),
        (b'{"inputs":' * 50_000, "the body is not valid JSON"),
        (b"\0" * 100, "the body is not valid JSON"),
        (b"", "the body is not valid JSON"),
        (b"\xff\xfe", "the body is not valid JSON"),
        (b"[]", "the body must be a JSON object, got list"),
    ],
)
def test_bodies_that_are_no_v2_request(send, binary, body, message):
    """As all of a body, and before the bytes of tensors."""
    headers = {"inference-header-content-length": str(len(body))} if binary else {}
    check_refused(send, (INFER, body + bytes(16) * binary, headers), message)


@pytest.mark.parametrize("headers", [{}, {"inference-header-content-length": "100"}])
def test_bombs(send, headers):
    bomb = gzip.compress(bytes(65 << 20), 9)
    check_refused(send, (INFER, bomb, {**headers, "content-encoding": "gzip"}), "at most", status=413)
