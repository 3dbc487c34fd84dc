"""Large requests: read elsewhere than in the event loop, with the same answers as small ones, a few at a time."""

import asyncio
import gc
import gzip
import json
import os
import pickle
import signal
import threading
import weakref
from time import monotonic

import numpy as np
import pytest

pytest.importorskip("starlette")

from jaxembed import FeatureConfig, TableConfig, VocabularyFile
from jaxembed.combiners import CustomCombiner
from jaxembed.serve.features import ServedFeature
from jaxembed.serve.native_library import library
from jaxembed.serve.server import inference, large, tensors, tf_predict, v2_binary, v2_grpc, v2_json
from jaxembed.serve.server.apart import Apart
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.grpc_server import Methods
from jaxembed.serve.server.large import Large
from jaxembed.serve.server.messages import METHODS
from jaxembed.serve.server.metrics import Metrics
from jaxembed.serve.server.native_reader import NativeReader
from jaxembed.serve.server.request import LARGE, InferenceRequest
from jaxembed.serve.server.signature import Signature
from tests.serve.server import fuzz
from tests.serve.server.servers import client_of, counts, until
from tests.serve.server.test_fuzz import Context
from tests.serve.server.test_rest import BAD_TF, BAD_V2, ROW


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 300))  # a process is started, which imports jax


INFER, PREDICT = "/v2/models/model/infer", "/v1/models/model:predict"
BLANKS = b" " * LARGE
#: A field that the protocol does not have, as large as it takes.
UNKNOWN = b"\x7a" + bytes([LARGE & 0x7F | 0x80, LARGE >> 7 & 0x7F | 0x80, LARGE >> 14]) + bytes(LARGE)


@pytest.fixture(autouse=True)
def _nothing_large_is_read_here(monkeypatch):
    """Python reads large requests in another process, native code on another thread."""
    loop_thread = threading.get_ident()
    strict_json, message_of, json_, message = (
        *(v2_json.strict_json, v2_grpc.message_of),
        *(NativeReader.json, NativeReader.message),
    )

    def small(call):
        def checked(data):
            assert len(data) < LARGE, "Python reads it here"
            return call(data)

        return checked

    def elsewhere(call):
        def checked(self, data, *arguments):
            assert len(data) < LARGE or threading.get_ident() != loop_thread, "the event loop reads it"
            return call(self, data, *arguments)

        return checked

    monkeypatch.setattr(v2_json, "strict_json", small(strict_json))
    monkeypatch.setattr(v2_grpc, "message_of", small(message_of))
    monkeypatch.setattr(NativeReader, "json", elsewhere(json_))
    monkeypatch.setattr(NativeReader, "message", elsewhere(message))


def test_same_answers_as_small_ones(shared_folder):
    good = json.dumps(fuzz.GOOD_V2).encode()
    strange = good.replace(b'"user"', b'"us\\u0065r"')  # which native code leaves to Python
    bodies = [(INFER, good), (INFER, strange), (PREDICT, json.dumps(fuzz.GOOD_ROWS).encode())]
    bodies += [(PREDICT, json.dumps(fuzz.GOOD_COLUMNS).encode())]
    bodies += [(INFER, json.dumps(body).encode()) for body, _ in BAD_V2.values()]
    rows = [{**ROW, **change} for change, _ in BAD_TF.values()]
    bodies += [(PREDICT, json.dumps({"instances": [row]}).encode()) for row in rows]
    bodies += [(PREDICT, body) for body in (b"[" * 5000, b"[]", b"\xff", b'{"instances": [], "instances": []}')]

    async def check_all():
        async with client_of(shared_folder, max_ids_per_row=8) as (client, service):
            seen = set()
            for path, body in bodies:
                one, other = [await client.post(path, content=content) for content in (body, body + BLANKS)]
                assert (one.status_code, one.content) == (other.status_code, other.content), body
                seen.add(one.status_code)
            for path, body in bodies[:4]:
                packed = gzip.compress(body + BLANKS, 0)
                other = await client.post(path, content=packed, headers={"content-encoding": "gzip"})
                assert other.status_code == 200
            assert seen == {200, 400}
            assert service.large.held == 0
            check_bad_ids(service)

    run(check_all())


def check_bad_ids(service):
    """Some are counted, of each request as often small as large."""
    service.metrics.flush()
    lines = service.metrics.text().decode().splitlines()
    bad = [line for line in lines if "jaxembed_bad_ids_total{" in line]
    assert bad
    assert all(float(line.split()[-1]) % 2 == 0 for line in bad)


def test_same_answers_over_grpc(shared_folder):
    rng = fuzz.seeded(5)
    good, bad = [fuzz.good_message(rng, raw=False) for _ in range(2)]
    bad.inputs[0].contents.int64_contents[0] = 2**40
    messages = [message.SerializeToString() for message in (good, bad, fuzz.good_message(rng, raw=True))]
    messages += [fuzz.grpc_case(rng) for _ in range(60)]

    async def outcome(methods, message):
        context = Context()
        answer = await methods.ModelInfer(message, context)
        if answer is None:
            return context.code, context.details
        return answer.SerializeToString(deterministic=True)

    async def check_all():
        async with client_of(shared_folder) as (_, service):
            methods, seen = Methods(service), []
            for message in messages:
                # Damaged ones may end in the middle of a field, of which what is added would be a part.
                try:
                    METHODS["ModelInfer"][0].FromString(message)
                except Exception:
                    continue
                one = await outcome(methods, message)
                assert await outcome(methods, message + UNKNOWN) == one
                seen.append(type(one))
            assert set(seen) == {bytes, tuple}
            check_bad_ids(service)
            assert await outcome(methods, b"\x2a" * LARGE) == (
                "INVALID_ARGUMENT",
                "the message cannot be read.",
            )

    run(check_all())


@pytest.mark.skipif(library() is None, reason="the native code was not built")
def test_usual_requests_need_no_process(shared_folder, monkeypatch):
    monkeypatch.setattr(Apart, "read", None)
    rows = 8000
    arrays = {
        "user": np.arange(rows) % 50,
        "history": np.arange(8 * rows) % 70,
        "history.row_splits": np.arange(rows + 1) * 8,
        "dense": np.zeros((rows, 2), np.float32),
    }
    message = METHODS["ModelInfer"][0](model_name="model")
    head, raw = [], []
    for name, array in arrays.items():
        kind = {"int64": "INT64", "float32": "FP32"}[array.dtype.name]
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        head.append({"name": name, "datatype": kind, "shape": list(array.shape)})
        raw.append(array.tobytes())
    message.raw_input_contents.extend(raw)
    listed = [{**h, "data": a.ravel().tolist()} for h, a in zip(head, arrays.values(), strict=True)]
    sized = [{**h, "parameters": {"binary_data_size": len(r)}} for h, r in zip(head, raw, strict=True)]
    text = json.dumps({"inputs": sized}).encode()

    async def check_all():
        async with client_of(shared_folder) as (client, service):
            answers = [
                await client.post(INFER, content=json.dumps({"inputs": listed}).encode() + BLANKS),
                await client.post(
                    INFER, content=text + b"".join(raw), headers={v2_binary.HEADER: str(len(text))}
                ),
            ]
            for answer in answers:
                outputs = {o["name"]: o["data"] for o in answer.json()["outputs"]}
                assert outputs["user"] == (np.arange(rows) % 50).tolist()
            answer = await Methods(service).ModelInfer(message.SerializeToString(), Context())
            assert [list(output.shape) for output in answer.outputs] == [[rows]] * 3

    run(check_all())


def test_rows_are_counted_before_a_value_is_read(monkeypatch):
    features = {"a": ServedFeature("a", FeatureConfig(TableConfig(10, 2, name="a")), 3, False)}
    signature = Signature(features, {}, (), max_rows=64)
    for module in (v2_json, v2_grpc):
        for name in ("from_list", "from_bytes"):
            monkeypatch.setattr(module, name, None)
    for declared in ({"a": [65]}, {"a": [65, 7]}, {"a": [9], "a.row_splits": [66]}):
        entries = [{"name": name, "shape": shape, "datatype": "INT64"} for name, shape in declared.items()]
        message = METHODS["ModelInfer"][0]()
        for entry in entries:
            message.inputs.add(**entry)
        with pytest.raises(RequestError, match="at most 64 rows, got 65"):
            v2_json.read(signature, {"inputs": entries}, memoryview(b""))
        with pytest.raises(RequestError, match="at most 64 rows, got 65"):
            v2_grpc.read(signature, message)
    tensors.check_rows(signature, {"a": [64], "b": [10**6]})
    tensors.check_rows(signature, {"a": [10**6], "a.row_splits": [65]})


def test_inputs_are_counted_before_anything_is_made_of_them(monkeypatch):
    features = {"a": ServedFeature("a", FeatureConfig(TableConfig(10, 2, name="a")), 3, False)}
    signature = Signature(features, {"d": (2,)}, (), max_rows=64)
    for module in (v2_json, v2_grpc):
        monkeypatch.setattr(module, "text_from", None)
    monkeypatch.setattr(tf_predict, "_request", None)
    message = METHODS["ModelInfer"][0]()
    for at in range(5):
        message.inputs.add(name=f"x{at}", datatype="INT64", shape=[1])
    row = {f"x{at}": 1 for at in range(5)}
    reads = [
        lambda: v2_json.read(signature, {"inputs": [{}] * 5}, memoryview(b"")),
        lambda: v2_grpc.read(signature, message),
        lambda: tf_predict.read(signature, json.dumps({"instances": [row]}).encode()),
        lambda: tf_predict.read(signature, json.dumps({"inputs": row}).encode()),
    ]
    for read in reads:
        with pytest.raises(RequestError, match=r"has at most 4 inputs, got 5; inputs are \['a', 'd'\]"):
            read()
    tensors.check_number(signature, 4)


def test_repeated_names_are_found_without_comparing_all_with_all():
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [*(Name(f"x{at}") for at in range(1000)), Name("x999")]
    signature = Signature({}, {}, (), max_rows=64)
    with pytest.raises(RequestError, match="input 'x999' is there twice"):
        tensors.assemble(signature, [tensors.Tensor(name, np.zeros(1)) for name in names])
    assert compared < 10 * len(names)


def test_bodies_together_are_bounded(shared_folder):
    async def check():
        async with client_of(shared_folder, max_body_bytes=LARGE * 2) as (client, service):
            body = json.dumps(fuzz.GOOD_ROWS).encode()
            with service.large.hold() as hold:
                hold.grow(service.large.most - LARGE - 1000)
                assert (await client.post(PREDICT, content=body + BLANKS)).status_code == 200
                refused = await client.post(PREDICT, content=body + BLANKS + b" " * 1000)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"

                async def parts():  # whose length nobody said
                    for _ in range(8):
                        yield BLANKS[: LARGE // 4]

                assert (await client.post(PREDICT, content=parts())).status_code == 429
                context = Context()
                assert await Methods(service).ModelInfer(bytes(LARGE + 2000), context) is None
                assert context.code == "RESOURCE_EXHAUSTED"
                assert (await client.post(PREDICT, content=body)).status_code == 200
            assert service.large.held == 0
            assert (await client.post(PREDICT, content=body + BLANKS + b" " * 1000)).status_code == 200

    run(check())


def test_who_gives_up_waiting_leaves_nothing():
    """What is not read any more is not kept until the thread is free."""

    class Body:
        pass

    async def check():
        lanes = Large(1 << 20, Metrics())
        gate, seen = threading.Event(), []
        first = asyncio.create_task(lanes.run(monotonic() + 60, gate.wait, 30))
        await asyncio.sleep(0.05)
        bodies = [Body() for _ in range(4)]
        kept = [weakref.ref(body) for body in bodies]
        while bodies:
            with pytest.raises(RequestError, match="deadline of the request passed before"):
                await lanes.run(monotonic() + 0.02, seen.append, bodies.pop())
        gc.collect()
        assert sum(ref() is not None for ref in kept) <= 1  # of the last error
        with pytest.raises(RequestError, match="passed before"):
            await lanes.run(monotonic() - 1, seen.append, 1)
        last = asyncio.create_task(lanes.run(monotonic() + 60, seen.append, 2))
        await asyncio.sleep(0.05)
        gate.set()
        assert await first
        await last
        assert seen == [2]
        lanes.stop()

    run(check())


def test_a_thread_that_cannot_be_started_leaves_nothing(monkeypatch):
    async def check():
        lanes, seen = Large(1 << 20, Metrics()), []
        lacks = RuntimeError("can't start new thread")

        def fail(thread):
            raise lacks

        with monkeypatch.context() as lacking:
            lacking.setattr(threading.Thread, "start", fail)
            for _ in range(2):
                with pytest.raises(RequestError, match="no thread for large ones") as caught:
                    await lanes.run(monotonic() + 60, seen.append, 1)
                assert (caught.value.status, caught.value.retry_after) == (503, 1)
            lacks = MemoryError()
            for _ in range(2):
                with pytest.raises(MemoryError):
                    await lanes.run(monotonic() + 5, seen.append, 1)
        await lanes.run(monotonic() + 5, seen.append, 2)
        assert seen == [2]
        lanes.stop()

    run(check())


def test_nothing_is_read_after_the_end():
    """Of what waited: it starts no thread, which nobody would end."""

    async def check():
        lanes, gate = Large(1 << 20, Metrics()), threading.Event()
        calls = [
            asyncio.create_task(lanes.run(monotonic() + 60, function)) for function in (gate.wait, gate.clear)
        ]
        await asyncio.sleep(0.05)
        lanes.stop()
        gate.set()
        assert await calls[0]
        for call in (calls[1], lanes.run(monotonic() + 60, gate.clear)):
            with pytest.raises(RequestError, match="it is stopping") as caught:
                await call
            assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert gate.is_set()

    run(check())


def test_a_process_that_dies_or_is_idle(shared_folder, monkeypatch):
    monkeypatch.setattr(large, "_IDLE_SECONDS", 0.2)
    monkeypatch.setattr(large, "_GRACE_SECONDS", 0.2)
    body = json.dumps(fuzz.GOOD_ROWS).encode() + BLANKS
    deep = b"[" * (1 << 24)

    async def check():
        async with client_of(shared_folder) as (client, service):
            apart = service.large._apart
            assert (await client.post(PREDICT, content=body)).status_code == 200
            os.kill(apart._process.pid, signal.SIGSTOP)
            reading = asyncio.create_task(client.post(PREDICT, content=deep))
            await asyncio.sleep(0.1)
            os.kill(apart._process.pid, signal.SIGKILL)
            answer = await reading
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "died" in answer.json()["error"]
            assert (await client.post(PREDICT, content=body)).status_code == 200
            assert await until(lambda: apart._process is None)
            assert (await client.post(PREDICT, content=body)).status_code == 200
            # A deadline does not wait for it, nor does a request that comes after one that nobody waits for.
            os.kill(apart._process.pid, signal.SIGSTOP)
            late = await client.post(PREDICT, content=body, headers={"x-request-timeout-ms": "50"})
            assert late.status_code == 504
            assert any('status="504"' in line for line in counts(service))
            assert (await client.post(PREDICT, content=body)).status_code == 200
            os.kill(apart._process.pid, signal.SIGSTOP)
            leaving = asyncio.create_task(client.post(PREDICT, content=body))
            await asyncio.sleep(0.1)
            leaving.cancel()
            assert (await client.post(PREDICT, content=body)).status_code == 200
            # Neither does the end of the server.
            os.kill(apart._process.pid, signal.SIGSTOP)
            late = await client.post(PREDICT, content=body, headers={"x-request-timeout-ms": "50"})
            assert late.status_code == 504
        assert apart._process is None

    run(check())


def test_vocabularies_go_to_another_process_as_their_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("drama\ncomedy\n")
    vocabulary = VocabularyFile(str(file), num_oov_buckets=0)
    assert vocabulary.rows(["comedy"]).tolist() == [1]
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary
    assert "_index" in vars(vocabulary)
    assert "_index" not in vars(copy)
    assert copy.rows(["comedy", "drama"]).tolist() == [1, 0]
    config = FeatureConfig(TableConfig(2, 2, name="words"), preprocessing=vocabulary)
    signature = Signature({"w": ServedFeature("w", config, 3, False)}, {}, (), max_rows=64)
    apart = Apart()
    try:
        read, by_row = apart.read("predict", signature, b'{"instances": [{"w": ["comedy", "drama"]}]}')
        assert by_row
        assert read.inputs.packed.ids.tolist() == [1, 0]
        with pytest.raises(RequestError, match="'odd' is not in the vocabulary") as caught:
            apart.read("predict", signature, b'{"instances": [{"w": ["odd"]}]}')
        assert caught.value.status == 400
        with pytest.raises(RuntimeError, match="KeyError"):
            apart.read("nothing", signature)
        assert apart.read("predict", signature, b'{"instances": [{"w": []}]}')[0].inputs.packed.rows == 1
    finally:
        apart.stop()


def test_vocabularies_that_are_gone_are_those_of_this_process(tmp_path):
    """A version may be served after its folder was removed, and every new process gets the signature anew."""
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    features = {}
    for file in files:
        file.write_text("drama\ncomedy\n")
        vocabulary = VocabularyFile(str(file), num_oov_buckets=0)
        vocabulary.load()
        config = FeatureConfig(TableConfig(2, 2, name=file.stem), preprocessing=vocabulary)
        features[file.stem] = ServedFeature(file.stem, config, 3, False)
    signature = Signature(features, {}, (), max_rows=64)
    body = b'{"inputs": {"a": ["comedy", "drama"], "b": ["drama", "comedy"]}}'
    apart = Apart()

    def ids():
        return apart.read("predict", signature, body)[0].inputs.packed.ids.tolist()

    try:
        assert ids() == [1, 0, 0, 1]
        for file in files:
            file.unlink()
        assert ids() == [1, 0, 0, 1]  # which that process has read
        assert apart._unreadable is None
        apart.stop()
        for _ in range(2):
            assert ids() == [1, 0, 0, 1]
            assert apart._unreadable is signature
        with pytest.raises(RequestError, match="'odd' is not in the vocabulary") as caught:
            apart.read("predict", signature, body.replace(b"comedy", b"odd"))
        assert (caught.value.status, caught.value.feature) == (400, "a")
        files[0].write_text("drama\ncomedy\n")
        files[1].write_text("comedy\ndrama\n")  # another one
        apart.stop()
        assert ids() == [1, 0, 0, 1]
        assert apart._unreadable is signature
        files[1].write_text("drama\ncomedy\n")
        apart.stop()
        assert ids() == [1, 0, 0, 1]
        assert apart._unreadable is None
    finally:
        apart.stop()


def test_what_cannot_be_sent_is_read_here():
    combiner = CustomCombiner(lambda valency, vectors: vectors[0], max_valency=2)
    config = FeatureConfig(TableConfig(9, 2, name="t", combiner=combiner))
    signature = Signature({"f": ServedFeature("f", config, 3, False)}, {}, (), max_rows=64)
    apart = Apart()
    read, by_row = apart.read("predict", signature, b'{"instances": [{"f": [7, 3]}]}')
    assert by_row
    assert read.inputs.packed.ids.tolist() == [7, 3]
    with pytest.raises(RequestError, match="9"):
        apart.read("predict", signature, b'{"instances": [{"f": [9]}]}')
    assert apart._process is None


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_large_answers_are_written_in_pieces_and_elsewhere(rows, monkeypatch):
    outputs = [
        ("a", np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)),
        ("b", np.arange(rows)),
        ("c", np.arange(rows * 2, dtype=np.float16).reshape(rows, 2)),
    ]

    def everything():
        yield from (tf_predict.write(by_row, outputs) for by_row in (False, True))
        yield from (tf_predict.write(by_row, [output]) for by_row in (False, True) for output in outputs)
        yield v2_json.write(Model, "m", request, outputs)[0]

    class Model:
        version = 3

    request = InferenceRequest({}, {}, {})
    whole = list(everything())
    monkeypatch.setattr(v2_json, "_PIECE", 7)
    assert list(everything()) == whole
    data = json.loads(whole[1])["predictions"]
    assert data == [{name: array[row].tolist() for name, array in outputs} for row in range(rows)]
    assert json.loads(whole[0])["outputs"] == {name: array.tolist() for name, array in outputs}


def test_large_answers_are_written_on_a_thread(shared_folder, monkeypatch):
    threads = []
    for module in (v2_json, tf_predict):

        def write(*arguments, write=module.write):
            threads.append(threading.get_ident() == threading.main_thread().ident)
            return write(*arguments)

        monkeypatch.setattr(module, "write", write)

    async def check():
        async with client_of(shared_folder) as (client, _):
            for limit, inline in ((LARGE, True), (1, False)):
                monkeypatch.setattr(inference, "LARGE_ANSWER", limit)
                for path, body in ((INFER, fuzz.GOOD_V2), (PREDICT, fuzz.GOOD_ROWS)):
                    threads.clear()
                    assert (await client.post(path, json=body)).status_code == 200
                    assert threads == [inline]

    run(check())


def test_an_answer_that_is_not_written_in_time_was_run(shared_folder, monkeypatch):
    monkeypatch.setattr(inference, "LARGE_ANSWER", 1)
    written = threading.Event()
    monkeypatch.setattr(v2_json, "write", lambda *_: written.wait(30))

    async def check():
        async with client_of(shared_folder) as (client, service):
            in_time = service.large.run

            def late(until, *arguments, **options):
                return in_time(monotonic(), *arguments, **options)

            monkeypatch.setattr(service.large, "run", late)
            answer = await client.post(INFER, json=fuzz.GOOD_V2)
            written.set()
            assert answer.status_code == 504
            assert answer.json()["error"] == "the deadline of the request passed while it ran."

    run(check())
