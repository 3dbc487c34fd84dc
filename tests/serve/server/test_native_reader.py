"""The native reader gives what the readers in Python give, or leaves a request alone."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.serve.features import ServedFeature
from jaxembed.serve.native_library import library
from jaxembed.serve.packing import Packer
from jaxembed.serve.server import native_reader, v2_binary, v2_grpc, v2_json
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.messages import METHODS
from jaxembed.serve.server.native_reader import make_reader
from jaxembed.serve.server.request import Flat
from jaxembed.serve.server.signature import Signature

pytestmark = pytest.mark.skipif(
    library() is None and "JAXEMBED_SANITIZED" not in os.environ, reason="the native code was not built"
)

FEATURES = {
    name: ServedFeature(name, FeatureConfig(TableConfig(size, 2, name=name)), limit, False)
    for name, size, limit in (("a", 10, 3), ("b/c", 2**31 - 1, 5))
}
SIGNATURE = Signature(FEATURES, {"d": (2,), "e": ()}, (), max_rows=64, takes_flat=True)
PACKER = Packer(list(FEATURES.values()))
READER = make_reader(SIGNATURE)
READER_WITHOUT_DENSE = make_reader(dataclasses.replace(SIGNATURE, dense={}))
MESSAGE = METHODS["ModelInfer"][0]


@pytest.fixture(params=["small", "large"])
def room(request, monkeypatch):
    """Requests are read and written in one call, or in two as they find no room."""
    if request.param == "large":
        monkeypatch.setattr(native_reader, "_ROOM", 0)
        monkeypatch.setattr(native_reader, "_SHORT", 0)
        monkeypatch.setitem(globals(), "READER", make_reader(SIGNATURE))


def tensors(rng, rows):
    found = {}
    for name, feature in FEATURES.items():
        lengths = rng.integers(0, feature.max_ids + 1, rows)
        ids = rng.integers(0, feature.config.table.vocabulary_size, lengths.sum())
        found[name] = ids.astype(rng.choice([np.int32, np.int64]))
        found[name + ".row_splits"] = np.concatenate([[0], np.cumsum(lengths)]).astype(
            rng.choice([np.int32, np.int64])
        )
    found["d"] = rng.normal(size=(rows, 2)).astype(np.float32)
    found["e"] = rng.integers(-3, 3, rows).astype(np.float32)
    return found


def head(name, array):
    kind = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}[array.dtype.name]
    return {"name": name, "datatype": kind, "shape": list(array.shape)}


def json_body(arrays, nested=False, **further):
    inputs = [
        {**head(name, array), "data": (array if nested else array.ravel()).tolist()}
        for name, array in arrays.items()
    ]
    return json.dumps({"inputs": inputs, **further}).encode()


def binary_body(arrays, **further):
    inputs = [{**head(name, a), "parameters": {"binary_data_size": a.nbytes}} for name, a in arrays.items()]
    data = json.dumps({**further, "inputs": inputs}).encode()
    return data + b"".join(array.tobytes() for array in arrays.values()), len(data)


def message_body(arrays, **further):
    message = MESSAGE(model_name="model", **further)
    for name, array in arrays.items():
        message.inputs.add(name=name, datatype=head(name, array)["datatype"], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def in_python(body, size):
    """(ids, splits, dense) as the readers in Python have them; None for what they refuse, or read otherwise."""
    try:
        if size < 0:
            read = v2_grpc.read(SIGNATURE, MESSAGE.FromString(body))
        else:
            read = v2_json.read(SIGNATURE, v2_json.read_object(body[:size]), memoryview(body)[size:])
    except RequestError:
        return None
    if isinstance(read.inputs, Flat):
        packed = PACKER.pack_flat(read.inputs.ids, read.inputs.lengths)
    else:
        request = PACKER.measure([read.inputs[name] for name in FEATURES], None)
        packed = PACKER.write(request, np.empty(int(request.lengths.sum()), np.int32), None, request.rows)
    rows = packed.rows
    dense = []
    for name, shape in SIGNATURE.dense.items():
        array = np.asarray(read.dense[name]).astype(np.float32)
        assert array.shape == (rows, *shape)
        assert np.isfinite(array).all()
        dense.append(array)
    assert not read.weights
    return packed.ids, packed.splits, dense


def native(body, size):
    return READER.message(body) if size < 0 else READER.json(body, size)


def check(body, size):
    """Whether the reader took it, and gave the same."""
    found = native(body, size)
    if found is None:
        return False
    rows, _ = found
    want = in_python(body, size)
    assert want is not None
    np.testing.assert_array_equal(rows.packed.ids, want[0])
    np.testing.assert_array_equal(rows.packed.splits, want[1])
    for got, array in zip(rows.dense, want[2], strict=True):
        np.testing.assert_array_equal(got, array)
    return True


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("seed", range(20))
def test_same_as_python(seed):
    rng = np.random.default_rng(seed)
    arrays = tensors(rng, int(rng.integers(1, 9)))
    names = list(arrays)
    rng.shuffle(names)
    for given in (arrays, {name: arrays[name] for name in names}):
        body = json_body(given)
        assert check(body, len(body))
        body = json_body(given, nested=True, id="7")
        assert check(body, len(body))
        assert check(*binary_body(given, parameters={"binary_data_output": True}))
        assert check(message_body(given), -1)


def test_one_id_or_as_many_a_row():
    arrays = {"a": np.array([1, 9]), "b/c": np.array([[1, 2], [3, 4]]), "d": np.zeros((2, 2), np.float32)}
    arrays["e"] = np.ones(2, np.float32)
    body = json_body(arrays, nested=True)
    assert check(body, len(body))
    assert check(*binary_body(arrays))
    assert check(message_body(arrays), -1)


UNEVEN = pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a", [[1, 2, 3], [4]]),
        ("a", [[1], [2, 3, 4]]),
        ("a", [[1, 2, 3, 4]]),
        ("a", [[1], [2], [3], [4]]),
        ("d", [[1.5, 2], [3, 4, 5]]),
        ("d", [[1.5, 2, 3], [4]]),
    ],
)


def uneven_bodies(name, data):
    """Of shape [2, 2], with data that is not; whichever of the two comes first."""
    arrays = {"a": np.array([[1, 2], [3, 4]]), "b/c": np.array([1, 2]), "d": np.zeros((2, 2), np.float32)}
    inputs = json.loads(json_body({**arrays, "e": np.ones(2, np.float32)}, nested=True))["inputs"]
    good = json.dumps({"inputs": inputs}).encode()
    assert check(good, len(good))
    changed = [{**entry, "data": data} if entry["name"] == name else entry for entry in inputs]
    return [
        json.dumps({"inputs": entries}).encode()
        for entries in (changed, [dict(reversed(entry.items())) for entry in changed])
    ]


@UNEVEN
def test_lists_of_other_lengths_than_the_shape_has_are_refused(name, data):
    """As many values altogether, they would be those of other rows."""
    for body in uneven_bodies(name, data):
        with pytest.raises(
            RequestError, match=rf"input '{name}': data has a list of .* or send it flat"
        ) as caught:
            v2_json.read(SIGNATURE, json.loads(body), memoryview(b""))
        assert caught.value.status == 400


@UNEVEN
def test_lists_of_other_lengths_than_the_shape_has_are_left_alone(name, data):
    for body in uneven_bodies(name, data):
        assert native(body, len(body)) is None


def test_numbers_of_json():
    arrays = tensors(np.random.default_rng(0), 1)
    template = json_body({**arrays, "e": np.float32([12345])}).decode()
    texts = ["0", "-0", "1.5", "-2.5e-3", "1E5", "1e+2", "0.1", "123456789012345678", "3.4028234e38", "1e-50"]
    for text in texts:
        body = template.replace("12345.0", text).encode()
        assert check(body, len(body)), text
    for text in [
        "1.",
        ".5",
        "01",
        "+1",
        "1e",
        "NaN",
        "Infinity",
        "1e999",
        "1e39",
        "true",
        "null",
        '"1"',
        "--1",
        "",
    ]:
        body = template.replace("12345.0", text).encode()
        assert native(body, len(body)) is None, text


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    "change",
    [
        {"a": np.array([10])},
        {"a": np.array([-1])},
        {"a": np.array([2**32])},
        {"a": np.array([1.0], np.float32)},
        {"a.row_splits": np.array([0, 2])},
        {"a.row_splits": np.array([1, 1])},
        {"a.row_splits": np.array([0, 1, 1])},
        {"a": np.array([1, 1, 1, 1]), "a.row_splits": np.array([0, 4])},
        {"d": np.zeros((2, 2), np.float32)},
        {"d": np.zeros(2, np.float32)},
        {"d": np.float32([[np.nan, 0]])},
        {"d": np.float32([[np.inf, 0]])},
        {"d": np.array([[1, 2]])},
        {"a.weights": np.float32([1])},
        {"other": np.array([1])},
        {"a": None},
        {"d": None},
    ],
)
def test_leaves_alone_what_is_wrong(change):
    arrays = {
        "a": np.array([1]),
        "a.row_splits": np.array([0, 1]),
        "b/c": np.array([1]),
        "d": np.zeros((1, 2), np.float32),
        "e": np.zeros(1, np.float32),
    }
    assert check(*binary_body(arrays))
    changed = {name: value for name, value in {**arrays, **change}.items() if value is not None}
    assert native(*binary_body(changed)) is None
    assert native(message_body(changed), -1) is None
    body = json_body(changed)
    assert native(body, len(body)) is None


def test_too_many_rows_are_refused_before_anything_is_made_for_them():
    for rows in (65, 2**31 - 1):
        inputs = [{"name": name, "datatype": "INT64", "shape": [rows, 0], "data": []} for name in FEATURES]
        body = json.dumps({"inputs": inputs}).encode()
        with pytest.raises(RequestError, match=f"at most 64 rows, got {rows}") as caught:
            READER_WITHOUT_DENSE.json(body, len(body))
        assert caught.value.status == 413
        message = MESSAGE()
        for name in FEATURES:
            message.inputs.add(name=name, datatype="INT64", shape=[rows, 0])
            message.raw_input_contents.append(b"")
        with pytest.raises(RequestError, match=f"got {rows}"):
            READER_WITHOUT_DENSE.message(message.SerializeToString())
        # And by those in Python, where there is no native code.
        with pytest.raises(RequestError, match=f"got {rows}"):
            v2_json.read(SIGNATURE, json.loads(body), memoryview(b""))
        with pytest.raises(RequestError, match=f"got {rows}"):
            v2_grpc.read(SIGNATURE, message)
    arrays = tensors(np.random.default_rng(0), 65)
    with pytest.raises(RequestError, match="got 65"):
        native(*binary_body(arrays))
    assert check(*binary_body(tensors(np.random.default_rng(0), 64)))


def test_rest_of_a_request():
    arrays = tensors(np.random.default_rng(0), 2)
    body = json_body(arrays, id="x,}]", parameters={"timeout": [1, {"a": '\\"'}]}, outputs=[{"name": "o"}])
    found = READER.json(body, len(body))
    assert found is not None
    assert json.loads(found[1]) == {k: v for k, v in json.loads(body).items() if k != "inputs"}
    body = message_body(arrays, id="9", model_version="3")
    found = READER.message(body)
    assert found is not None
    rest = MESSAGE.FromString(found[1])
    assert (rest.model_name, rest.id, rest.model_version, len(rest.inputs)) == ("model", "9", "3", 0)
    twice = body[:-1] + b',"inputs":[]}'
    assert READER.json(twice, len(twice)) is None


def test_requests_with_just_the_room_that_there_is(monkeypatch):
    arrays = tensors(np.random.default_rng(0), 3)
    needed = len(arrays["a"]) + len(arrays["b/c"]) + 2 * 4 + 3 * 2 + 3
    for room in (needed - 1, needed, needed + 1):
        monkeypatch.setattr(native_reader, "_ROOM", room)
        reader = make_reader(SIGNATURE)
        monkeypatch.setitem(globals(), "READER", reader)
        monkeypatch.setattr(reader, "_fill", None if room >= needed else reader._fill)
        assert check(*binary_body(arrays))
        assert check(*binary_body(arrays))


def test_rows_are_writable_and_kept_apart():
    arrays = tensors(np.random.default_rng(0), 2)
    first, second = (READER.message(message_body(arrays))[0] for _ in range(2))
    for array in (first.packed.ids, first.packed.splits, *first.dense):
        array[...] = 7
    assert READER.message(message_body(tensors(np.random.default_rng(1), 2))) is not None
    np.testing.assert_array_equal(second.packed.ids, np.concatenate([arrays["a"], arrays["b/c"]]))
    np.testing.assert_array_equal(second.dense[0], arrays["d"])


def test_dense_inputs_of_no_numbers_and_weights_of_one():
    features = {name: dataclasses.replace(feature, weighted=True) for name, feature in FEATURES.items()}
    reader = make_reader(dataclasses.replace(SIGNATURE, features=features, dense={"none": (0,), "e": ()}))
    arrays = tensors(np.random.default_rng(0), 2)
    arrays["none"] = np.zeros((2, 0), np.float32)
    rows, rest = reader.message(message_body({n: a for n, a in arrays.items() if n != "d"}))
    assert [array.tolist() for array in rows.dense] == [[[], []], arrays["e"].tolist()]
    assert rows.packed.weights.tolist() == [1] * len(rows.packed.ids)
    assert MESSAGE.FromString(rest).model_name == "model"


def test_what_a_request_says_beside_its_tensors_comes_again():
    """It is remembered, and the rows are not; what is wrong is said each time."""

    def read(rows, **further):
        body, size = binary_body(tensors(np.random.default_rng(rows), rows), **further)
        return v2_binary.read_natively(READER, body, str(size))

    said = {"outputs": [{"name": "o", "parameters": {"binary_data": True}}, {"name": "p"}], "id": "7"}
    for rows in (1, 2):
        found, binary = read(rows, parameters={"timeout": 2e6}, **said)
        assert (len(found.inputs), found.outputs, found.id, found.timeout) == (rows, ("o", "p"), "7", 2)
        assert (found.weights, found.dense, binary) == ({}, {}, {"o"})
        found, binary = read(rows, parameters={"binary_data_output": True, "long": "x" * 300})
        assert (len(found.inputs), found.outputs, found.id, found.timeout) == (rows, None, None, None)
        assert binary is True
        for wrong in ({"timeout": 0}, 3):
            with pytest.raises(RequestError):
                read(rows, parameters=wrong)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("seed", range(8))
def test_mutations(seed):
    rng, py = np.random.default_rng(seed), random.Random(seed)
    arrays = tensors(rng, int(rng.integers(1, 4)))
    json_ = json_body(arrays, nested=bool(seed % 2))
    cases = [(json_, len(json_)), binary_body(arrays), (message_body(arrays), -1)]
    taken = 0
    for _ in range(400):
        body, size = cases[py.randrange(3)]
        mutated = bytearray(body)
        for _ in range(py.choice([1, 1, 1, 2, 5])):
            at = py.randrange(len(mutated))
            kind = py.randrange(4)
            if kind == 0:
                mutated[at] = py.randrange(256)
            elif kind == 1:
                mutated[at] = py.choice(b'0123456789-.e,:[]{}" ntf')
            elif kind == 2:
                del mutated[at : at + py.choice([1, 2, 8])]
            else:
                mutated[at:at] = mutated[py.randrange(len(mutated)) :][: py.choice([1, 4, 30])]
            if not mutated:
                break
        if size >= 0:
            size = len(mutated) if size == len(body) else min(size, len(mutated))
        taken += check(bytes(mutated), size)
    assert taken > 0
