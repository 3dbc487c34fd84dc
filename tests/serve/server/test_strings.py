"""Features whose ids are strings, in every protocol."""

import base64
import json
import pathlib
import pickle
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, HashBuckets, TableConfig, VocabularyFile
from jaxembed.optimizers import SGD
from jaxembed.serve.features import ServedFeature
from jaxembed.serve.server import tf_predict, v2_grpc
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.messages import METHODS
from jaxembed.serve.server.openapi import openapi
from jaxembed.serve.server.request import LARGE
from jaxembed.serve.server.request_packer import RequestPacker
from jaxembed.serve.server.signature import Signature
from jaxembed.train import Checkpointer, ShardedEmbedding
from tests.serve.server import bundles
from tests.serve.server.servers import client_of, run

INFER, PREDICT = "/v2/models/model/infer", "/v1/models/model:predict"
OPTIONS = {"model": None, "dense_inputs": {}, "weighted": ("hashed",)}
HASHED, NAMED, NUMBERED = [["ann", ""], ["b\u00e9a"]], [["heat"], ["casino", "odd"]], [[30], []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle whose activations are the sums of the numbers of the rows, and nothing else."""
    folder = tmp_path_factory.mktemp("strings")
    (folder / "names").write_text("heat\ncasino\n")
    (folder / "numbers").write_text("30\n20\n")
    preprocessing = {
        "hashed": HashBuckets(64, dtype="string"),
        "named": VocabularyFile(str(folder / "names"), num_oov_buckets=1),
        "numbered": VocabularyFile(str(folder / "numbers"), num_oov_buckets=0, dtype="int64"),
    }
    tables = {
        name: TableConfig(ids.num_rows, 1, combiner="sum", name=name) for name, ids in preprocessing.items()
    }
    config = {name: FeatureConfig(tables[name], preprocessing=ids) for name, ids in preprocessing.items()}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    _, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    rows = {name: jnp.arange(float(ids.num_rows))[:, None] for name, ids in preprocessing.items()}
    with Checkpointer(folder / "checkpoint", own) as checkpointer:
        checkpointer.save(own.from_canonical(rows, slots, 0))
    bundles.add(folder / "checkpoint", folder / "bundles", 0)
    return folder / "bundles"


def expected():
    rows = [sum(HashBuckets(64, dtype="string").rows(bag).tolist()) for bag in HASHED]
    return {"hashed": rows, "named": [0, 1 + 2], "numbered": [0, 0]}


def tensors():
    found = []
    for name, bags, datatype in (
        ("hashed", HASHED, "BYTES"),
        ("named", NAMED, "BYTES"),
        ("numbered", NUMBERED, "INT64"),
    ):
        flat, splits = [x for bag in bags for x in bag], np.cumsum([0, *map(len, bags)]).tolist()
        found.append({"name": name, "datatype": datatype, "shape": [len(flat)], "data": flat})
        found.append(
            {"name": f"{name}.row_splits", "datatype": "INT64", "shape": [len(splits)], "data": splits}
        )
    return found


def check(answer):
    assert answer.status_code == 200, answer.text
    found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert found == expected()


def test_v2_json(folder):
    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, _):
            check(await client.post(INFER, json={"inputs": tensors()}))
            metadata = (await client.get("/v2/models/model")).json()["inputs"]
            assert {entry["name"]: entry["datatype"] for entry in metadata} == {
                "hashed": "BYTES",
                "hashed.row_splits": "INT64",
                "hashed.weights": "FP32",
                "named": "BYTES",
                "named.row_splits": "INT64",
                "numbered": "INT64",
                "numbered.row_splits": "INT64",
            }

    run(check_all())


def test_v2_binary(folder):
    triton = pytest.importorskip("tritonclient.http")
    inputs = []
    for tensor in tensors():
        array = np.array(tensor["data"], object if tensor["datatype"] == "BYTES" else np.int64)
        inputs.append(triton.InferInput(tensor["name"], tensor["shape"], tensor["datatype"]))
        inputs[-1].set_data_from_numpy(array, binary_data=True)
    outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in expected()]
    body, size = triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
    head = {"inference-header-content-length": str(size)}

    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, _):
            check(await client.post(INFER, content=body, headers=head))
            changed = body[:-1].replace(b"heat", b"hea\xff", 1) + body[-1:]  # no UTF-8, so no word of the file
            answer = await client.post(INFER, content=changed, headers=head)
            assert answer.status_code == 200
            assert answer.json()["outputs"][1]["data"][0] == 2

    run(check_all())


def test_v2_grpc(folder):
    async def check_all():
        async with client_of(folder, **OPTIONS) as (_, service):
            model = service.versions.current
            for raw in (False, True):
                message = METHODS["ModelInfer"][0]()
                for tensor in tensors():
                    entry = message.inputs.add(
                        name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
                    )
                    strings = [x.encode() for x in tensor["data"]] if tensor["datatype"] == "BYTES" else None
                    if raw and strings is not None:
                        content = b"".join(len(x).to_bytes(4, "little") + x for x in strings)
                        message.raw_input_contents.append(content)
                    elif raw:
                        message.raw_input_contents.append(np.array(tensor["data"], np.int64).tobytes())
                    elif strings is not None:
                        entry.contents.bytes_contents.extend(strings)
                    else:
                        entry.contents.int64_contents.extend(tensor["data"])
                request = v2_grpc.read(model.signature, message)
                rows = model.pack(request.inputs, request.weights, request.dense)
                outputs, _ = model.run([rows])
                found = [output[:, 0].tolist() for output in outputs]
                assert dict(zip(model.signature.output_names, found, strict=True)) == expected()

    run(check_all())


def test_tensorflow_serving(folder):
    columns = {"hashed": HASHED, "named": NAMED, "numbered": NUMBERED}
    flat = {tensor["name"]: tensor["data"] for tensor in tensors()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, _):
            for inputs in (columns, flat):
                answer = await client.post(PREDICT, json={"inputs": inputs})
                assert answer.status_code == 200, answer.text
                assert {k: np.ravel(v).tolist() for k, v in answer.json()["outputs"].items()} == expected()
            answer = (await client.post(PREDICT, json={"instances": rows})).json()["predictions"]
            assert [row["named"] for row in answer] == [[0.0], [3.0]]
            example = (await client.get("/status")).json()["example"]
            answer = await client.post(PREDICT, json=example)
            assert answer.status_code == 200, answer.text
            metadata = (await client.get("/v1/models/model/metadata")).json()["metadata"]["signature_def"]
            types = metadata["signature_def"]["serving_default"]["inputs"]
            assert [types[name]["dtype"] for name in columns] == ["DT_STRING", "DT_STRING", "DT_INT64"]

    run(check_all())


def encoded(value):
    """With {"b64": ...} for every string in it."""
    if isinstance(value, str):
        return {"b64": base64.b64encode(value.encode()).decode()}
    return [encoded(entry) for entry in value] if isinstance(value, list) else value


def test_strings_in_base64(folder):
    flat = {tensor["name"]: tensor["data"] for tensor in tensors()}
    columns = {"hashed": HASHED, "named": NAMED, "numbered": NUMBERED}
    mixed = {**columns, "named": [["heat"], [encoded("casino"), "odd"]]}
    single = {"hashed": ["ann", "bob"], "named": ["heat", "casino"], "numbered": [30, 20]}

    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, _):

            async def post(body):
                answer = await client.post(PREDICT, json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            for inputs in (flat, columns, single):
                other = {name: encoded(value) for name, value in inputs.items()}
                assert await post({"inputs": other}) == await post({"inputs": inputs})
            assert await post({"inputs": mixed}) == await post({"inputs": columns})
            rows = [dict(zip(single, row, strict=True)) for row in zip(*single.values(), strict=True)]
            other = [{name: encoded(value) for name, value in row.items()} for row in rows]
            assert await post({"instances": other}) == await post({"instances": rows})
            for odd in ({"b64": "a"}, {"b64": 1}, {"b64": "\u00e9"}, {"b64": "YQ==", "c": 1}, {}):
                for wrong in ([odd, "heat"], [[odd], []]):
                    answer = await client.post(PREDICT, json={"inputs": {**single, "named": wrong}})
                    said = f"input 'named': an object must be {{\"b64\": a string in base64}}, got {odd}."
                    assert (answer.status_code, answer.json()["error"]) == (400, said)

    run(check_all())


def test_the_only_input_in_base64():
    """Rows are strings then, and not objects by name."""
    table = TableConfig(64, 1, name="t")
    config = FeatureConfig(table, preprocessing=HashBuckets(64, dtype="string"))
    for name, want in (("words", [b"ann", b"bob"]), ("b64", ["YW5u", "Ym9i"])):
        signature = Signature({name: ServedFeature(name, config, 3, False)}, {}, (), max_rows=64)
        body = json.dumps({"instances": encoded(["ann", "bob"])}).encode()
        request, by_row = tf_predict.read(signature, body)
        assert by_row
        assert request.inputs == {name: want}


def test_ids_of_a_vocabulary_are_named_as_they_were_sent(folder):
    inputs = {"hashed": HASHED, "named": NAMED, "numbered": [[30, 5], []]}

    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, service):
            answer = await client.post(PREDICT, json={"inputs": inputs})
            assert answer.status_code == 400
            said = "Feature 'numbered', row 0, position 1: id 5 is not in the vocabulary of 2 ids"
            assert answer.json()["error"].startswith(said)
            answer = await client.post(PREDICT, json={"inputs": {**inputs, "numbered": [[30], 20]}})
            assert answer.json()["error"].startswith(
                "Feature 'numbered', row 1 must be a list of ids or one id"
            )
            lines = service.metrics.text().decode().splitlines()
            bad = [line for line in lines if line.startswith("jaxembed_bad_ids_total{")]
            assert bad == ['jaxembed_bad_ids_total{feature="numbered"} 1.0']
            kinds = (await client.get("/openapi.json")).json()["paths"]["/v1/models/model:predict"]["post"]
            content = kinds["requestBody"]["content"]["application/json"]["schema"]["oneOf"][0]
            row = content["properties"]["instances"]["items"]["properties"]
            assert row["named"]["anyOf"][0]["anyOf"][0] == {"type": "string"}
            assert row["numbered"]["anyOf"][0] == {"type": "integer"}

    run(check_all())


def test_a_version_without_its_folder(folder, tmp_path):
    """Large requests, too, are read with the vocabularies that it was loaded with."""
    own = pathlib.Path(shutil.copytree(folder, tmp_path / "bundles"))
    small = json.dumps({"inputs": tensors()}).encode()
    large = small + b" " * LARGE

    async def check_all():
        async with client_of(own, **OPTIONS) as (client, _):
            shutil.rmtree(own / "0")
            check(await client.post(INFER, content=small))
            check(await client.post(INFER, content=large))

    run(check_all())


def test_a_vocabulary_that_cannot_be_read_is_no_fault_of_the_request(tmp_path):
    (tmp_path / "names").write_text("heat\n")
    mapping = pickle.loads(pickle.dumps(VocabularyFile(str(tmp_path / "names"))))
    config = FeatureConfig(TableConfig(2, 1, name="t"), preprocessing=mapping)
    packer = RequestPacker(Signature({"w": ServedFeature("w", config, 3, False)}, {}, (), max_rows=64))
    (tmp_path / "names").unlink()
    with pytest.raises(RequestError, match=r"the ids of feature 'w' have no rows: .*cannot be read") as caught:
        packer.pack({"w": [["heat"]]}, {}, {})
    assert (caught.value.status, caught.value.feature) == (503, None)


def test_ids_below_0_are_announced_where_they_are_served():
    table = TableConfig(64, 1, name="t")
    features = {
        "rows": FeatureConfig(table),
        "hashed": FeatureConfig(table, preprocessing=HashBuckets(64)),
    }
    served = {name: ServedFeature(name, config, 3, False) for name, config in features.items()}
    model = types.SimpleNamespace(version=0, signature=Signature(served, {}, (), max_rows=64))
    post = openapi("model", model)["paths"]["/v1/models/model:predict"]["post"]  # pyright: ignore[reportArgumentType]
    content = post["requestBody"]["content"]["application/json"]["schema"]["oneOf"][0]
    row = content["properties"]["instances"]["items"]["properties"]
    assert row["rows"]["anyOf"][0] == {"type": "integer", "minimum": 0}
    assert row["hashed"]["anyOf"][0] == {"type": "integer"}


def changed(at, **changes):
    found = tensors()
    found[at].update(changes)
    return found


WRONG = {
    "ints": (changed(0, datatype="INT64", data=[1, 2, 3]), "'hashed': ids must be BYTES, got INT64"),
    "ints as strings": (changed(0, data=[1, 2, 3]), "position 0: BYTES expected, got '1'"),
    "strings for ints": (
        changed(4, datatype="BYTES", data=["30"]),
        "ids must be integers, got BYTES; look strings",
    ),
    "splits": (changed(1, datatype="BYTES", data=["0", "2", "3"]), "must be integers [B + 1], got BYTES [3]"),
    "number": (changed(0, shape=[4]), "shape [4] holds 4 values, got 3"),
    "surrogate": (changed(0, data=["\ud800", "", ""]), "whole characters"),
    "weights": (
        [*tensors(), {"name": "hashed.weights", "datatype": "BYTES", "shape": [3], "data": ["a", "b", "c"]}],
        "'hashed.weights' must be numbers, got BYTES",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(folder, case):
    inputs, message = WRONG[case]

    async def check_all():
        async with client_of(folder, **OPTIONS) as (client, _):
            answer = await client.post(INFER, content=json.dumps({"inputs": inputs}))
            assert answer.status_code == 400
            assert message in answer.json()["error"]

    run(check_all())


@pytest.mark.parametrize(
    "data",
    [b"", b"\1\0\0\0", b"\1\0\0\0a\0", b"\1\0\0\0a\1\0\0\0b", b"\xff\xff\xff\xffa", b"\0\0\0\0\0\0\0\0"],
)
def test_bytes_that_are_no_string(data):
    from jaxembed.serve.server.tensors import from_bytes

    assert from_bytes("x", "BYTES", [1], b"\1\0\0\0a").array.tolist() == [b"a"]
    with pytest.raises(RequestError, match=r"input 'x': 1 BYTES are each a length of 4 bytes"):
        from_bytes("x", "BYTES", [1], data)
