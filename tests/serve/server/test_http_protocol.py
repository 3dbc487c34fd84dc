"""Deadlines of connections, and requests that are refused, or whose client left."""

import asyncio
import json
from typing import ClassVar

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

from jaxembed.serve.server import errors
from jaxembed.serve.server.http_protocol import DeadlineProtocol
from jaxembed.serve.server.metrics import Refusals
from tests.serve.server import fuzz
from tests.serve.server.servers import LOOPS, Gate, client_of, counts, on, run, until
from tests.serve.server.sockets import H2C, answer_of, connect_slowly, post, serving, serving_bundles


class Refusing(DeadlineProtocol):
    """Has no room for `/x`; counts how many requests it refuses, and how many of them the parser never saw."""

    is_full, begun = True, 0
    full = staticmethod(lambda: Refusing.is_full)
    counted = Refusals()
    refusals = staticmethod({b"/x": counted}.get)
    heads: ClassVar = {}

    def on_message_begin(self):
        Refusing.begun += 1
        super().on_message_begin()


def test_a_connection_whose_requests_are_refused_is_not_idle():
    """Neither after an answer nor after nothing; once they end, it is."""

    async def check():
        for answered in (True, False):
            async with serving(protocol=Refusing, idle_timeout=0.5) as (port, _):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                Refusing.is_full = not answered
                if answered:
                    writer.write(post(b"/x", b"abc"))
                    assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x abc")
                    Refusing.is_full = True
                for _ in range(10):
                    writer.write(post(b"/x", b"abc"))
                    assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
                    await asyncio.sleep(0.1)
                assert await asyncio.wait_for(reader.read(), 20) == b""
                writer.close()

    run(check())


CHUNKED = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "refused", "seen"),
    [
        (post(b"/x", b"abc"), 1, 0),
        (post(b"/x", b"", b"inference-header-content-length: 7"), 1, 0),
        (post(b"/x", bytes(100_000)), 1, 0),
        (post(b"/x", b"abc") * 3, 3, 3),
        (post(b"/x", b"POST /x HTTP/1.1\r\nContent-Length: 1\r\n\r\n"), 1, 0),
        (CHUNKED, 1, 1),
        (post(b"/x", b"abc", b"Connection: Keep-Alive"), 1, 0),
        (post(b"/x", b"abc", b"Connection: keep-alive", b"Connection: x"), 1, 1),
        (post(b"/x", b"abc", b"Connection: close"), 0, 1),
        (post(b"/x", b"abc", b"X: \xe9"), 1, 1),
        (post(b"/x", b"abc", *H2C), 1, 2),
        (post(b"/y", b"abc"), 0, 1),
        (post(b"/x", b"abc").replace(b"POST", b"PUT"), 0, 1),
    ],
)
def test_requests_for_which_there_is_no_room(sent, refused, seen):
    """However they are sent, they are refused, or not, and leave the connection as it should be."""

    async def check():
        for sizes in ([len(sent)], [5, 30, 40, 1 << 20]):
            async with serving(protocol=Refusing) as (port, _):
                Refusing.is_full, Refusing.counted.count, Refusing.begun = True, 0, 0
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                rest = sent
                for size in sizes:
                    writer.write(rest[:size])
                    rest = rest[size:]
                    await asyncio.sleep(0.01 if rest else 0)
                answers = [await asyncio.wait_for(answer_of(reader), 20) for _ in range(max(refused, 1))]
                assert [status for status, _ in answers] == [429 if refused else 200] * len(answers)
                assert Refusing.counted.count == refused
                if sizes == [len(sent)] and len(sent) < 50_000:  # all of it came at once
                    assert Refusing.begun == seen
                if b"close" not in sent:
                    Refusing.is_full = False
                    writer.write(post(b"/x", b"next"))
                    assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x next")
                writer.close()

    run(check())


def test_what_is_read_at_once_finds_no_more_room_than_there_is(shared_folder, monkeypatch):
    """Room is taken once the headers are there: the handlers that begin later need not refuse anything."""
    refused_late = []

    def overloaded(what):
        refused_late.append(what)
        return errors.overloaded(what)

    monkeypatch.setattr("jaxembed.serve.server.service.overloaded", overloaded)

    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=3) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
            for _ in range(2):
                gate.close()
                service.batcher._seconds.clear()  # so that batches run on a thread
                for _, writer in connections:  # none of them is read meanwhile
                    writer.write(PREDICT)
                tasks = [asyncio.create_task(answer_of(reader)) for reader, _ in connections]
                assert await until(lambda: sum(task.done() for task in tasks) == 5)  # noqa: B023
                assert service.admitted == 3
                gate.open()
                answers = await asyncio.wait_for(asyncio.gather(*tasks), 20)
                assert sorted(status for status, _ in answers) == [200] * 3 + [429] * 5
                assert await until(lambda: not service.admitted)
            assert not service.full
            assert not refused_late
            for _, writer in connections:
                writer.close()

    run(check())


def test_clients_that_never_read_are_closed():
    """Whether they wait for an answer, keep sending requests, or have said that there will be none."""
    large = post(b"/large")
    cases = [large, large * 3, post(b"/large", b"", b"Connection: close"), large + b"GET /"]

    async def check():
        async with serving(idle_timeout=0.2) as (port, state):
            for data in cases:
                connection = await connect_slowly(port, data)
                assert await until(lambda: state.connections)
                assert await until(lambda: not state.connections and not state.tasks), data
                connection.close()

    run(check())


def test_clients_that_read_slowly_are_not_closed():
    async def check():
        async with serving(idle_timeout=0.4) as (port, state):
            loop, received = asyncio.get_running_loop(), 0
            connection = await connect_slowly(port, post(b"/large"))
            for _ in range(15):  # 1.5 s, and a little in each timeout
                received += len(await loop.sock_recv(connection, 1 << 12))
                await asyncio.sleep(0.1)
            while received < 8 << 20:
                part = await loop.sock_recv(connection, 1 << 20)
                assert part
                received += len(part)
            assert await until(lambda: not state.connections)  # idle now
            connection.close()

    run(check())


ROW = {"user": 1, "history": [2], "dense": [0.0, 0.0]}
PREDICT = post(b"/v1/models/model:predict", json.dumps({"instances": [ROW]}).encode())


def test_what_clients_that_left_wait_for_is_not_run(shared_folder, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            connections = []
            try:
                for _ in range(4):
                    connections.append(await asyncio.open_connection("127.0.0.1", port))
                    connections[-1][1].write(PREDICT)
                    assert await until(gate.running.is_set)
                assert await until(lambda: service.batcher.queued_rows == 4)
                half = await asyncio.open_connection("127.0.0.1", port)
                half[1].write(PREDICT[:-1])
                assert await until(lambda: service.admitted == 5)
                for _, writer in (*connections[1:], half):
                    writer.close()
                # Their room is free at once.
                assert await until(lambda: service.admitted == 1)
            finally:
                gate.open()
            assert (await asyncio.wait_for(answer_of(connections[0][0]), 10))[0] == 200
            assert await until(lambda: service.batcher.queued_rows == 0)
            assert gate.rows == 1
            # The connection goes on.
            connections[0][1].write(PREDICT)
            assert (await asyncio.wait_for(answer_of(connections[0][0]), 10))[0] == 200
            connections[0][1].close()
            assert counts(service) == {
                'jaxembed_requests_total{protocol="tf_rest",status="200"} 2.0',
                'jaxembed_requests_total{protocol="tf_rest",status="499"} 4.0',
            }

    run(check())


@LOOPS
@pytest.mark.parametrize("size", [540_000, 1_200_000])
def test_clients_that_leave_after_a_large_body_are_noticed(shared_folder, monkeypatch, loop, size):
    """Uvicorn stops reading until its reader asks for more, and of a whole body nobody does."""
    body = json.dumps({**fuzz.GOOD_V2, "parameters": {"x": "y" * size}}).encode()

    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            service.batcher._seconds.clear()
            try:
                first = await asyncio.open_connection("127.0.0.1", port)
                first[1].write(PREDICT)
                assert await until(gate.running.is_set)
                for head in (100, 200):
                    sent = post(b"/v2/models/model/infer", body)
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(sent[:head])
                    await asyncio.sleep(0.02)
                    writer.write(sent[head:])
                    await writer.drain()
                    assert await until(lambda: service.batcher.queued_rows == 3)
                    writer.transport.abort()
                    assert await until(lambda: service.admitted == 1)
                    assert service.large.held == 0
            finally:
                gate.open()
            assert (await asyncio.wait_for(answer_of(first[0]), 20))[0] == 200
            assert gate.rows == 1
            first[1].close()

    on(loop, check())


@LOOPS
def test_what_came_after_an_answer_is_not_kept(shared_folder, monkeypatch, loop):
    """Of a body that was too slow, of one of another kind, or of a request that was refused."""
    seen, found, made = [], [], DeadlineProtocol.connection_made

    def connection_made(self, transport):
        found.append(self)
        made(self, transport)

    monkeypatch.setattr(DeadlineProtocol, "connection_made", connection_made)

    async def check():
        async with serving_bundles(shared_folder, body_timeout=0.2) as (port, service):
            body = bytes(500_000)
            late, unread = post(b"/v1/models/model:predict", body), b"Content-Encoding: br"
            for sent, status in ((late, 408), (post(b"/v1/models/model:predict", body, unread), 415)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent[:-1])
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == status
                writer.write(sent[-1:] + PREDICT)
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
                writer.write(PREDICT)
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
                seen.append(writer)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            service.shedding.limit = 0
            writer.write(post(b"/v1/models/model:predict", b"abc", b"X: " + b"y" * 60_000))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            seen.append(writer)
            for writer in seen:
                (connection,) = (each for each in found if each.client == writer.get_extra_info("sockname")[:2])
                assert not connection._parts
                assert connection.cycle is connection.headers is connection.scope is None
                writer.close()

    on(loop, check())


@pytest.mark.parametrize("pause", [0, 0.05])
def test_trailers_are_no_fields_of_the_header(shared_folder, pause):
    """Whether they came with it or not."""
    body = json.dumps({"instances": [ROW]}).encode()
    head = b"POST /v1/models/model:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    rest = b"%x\r\n%b\r\n0\r\nX-Request-Timeout-Ms: soon\r\nContent-Encoding: br\r\n\r\n" % (len(body), body)

    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(head if pause else head + rest)
                await asyncio.sleep(pause)
                writer.write(rest if pause else b"")
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            writer.close()

    run(check())


def test_requests_that_end_in_an_error_of_ours_are_counted(shared_folder, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            monkeypatch.setattr(service, "infer", None)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(PREDICT)
            assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 500
            writer.close()
            assert counts(service) == {'jaxembed_requests_total{protocol="tf_rest",status="500"} 1.0'}

    run(check())


def test_requests_that_other_servers_cancel_are_counted_as_given_up(shared_folder, monkeypatch):
    """As Ray Serve's does once the client left."""

    async def check():
        async with client_of(shared_folder) as (client, service):
            gate = Gate(service.versions.current, monkeypatch)
            try:
                asked = asyncio.create_task(client.post("/v1/models/model:predict", json={"instances": [ROW]}))
                assert await until(gate.running.is_set)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
            finally:
                gate.open()
            assert counts(service) == {'jaxembed_requests_total{protocol="tf_rest",status="499"} 1.0'}

    run(check())


def test_a_head_that_was_read_before_says_nothing_about_what_follows_it():
    """Remembered heads are used for whole requests only, and every refusal is counted once."""
    head = post(b"/x", b"abc")[:-3]
    cases = [
        ([head + b"abc"], 1, 0),
        ([head + b"xyz"], 1, 0),
        ([head, b"abc"], 1, 1),
        ([head + b"a", b"bc"], 1, 1),
        ([head + b"abc" + head + b"xyz"], 2, 2),
        ([head + b"abc" + head, b"xyz"], 2, 2),
        ([head + b"abcP", post(b"/x", b"abc")[1:]], 2, 2),
        ([head[:-2] + b"Connection: keep-alive\r\n\r\nabc"], 1, 0),
        ([head[:-2] + b"Content-Length: 3\r\n\r\nabc"], 0, 1),
        ([head.replace(b"Length: 3", b"Length: 5") + b"abc\r\n"], 1, 0),
        ([b"X" + head + b"abc"], 0, 1),
    ]

    async def check():
        Refusing.heads.clear()
        async with serving(protocol=Refusing) as (port, _):
            for _turn in range(2):  # the second time, all that can be is remembered
                for parts, refused, seen in cases:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    Refusing.is_full, Refusing.counted.count, Refusing.begun = True, 0, 0
                    for part in parts:
                        writer.write(part)
                        await asyncio.sleep(0.02)
                    answers = [await asyncio.wait_for(answer_of(reader), 20) for _ in range(refused)]
                    assert [status for status, _ in answers] == [429] * refused, parts
                    if not refused:
                        assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 400
                    assert (Refusing.counted.count, Refusing.begun) == (refused, seen), parts
                    Refusing.is_full = False
                    if refused:  # the connection is as it should be
                        writer.write(head + b"xyz")
                        assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x xyz")
                    writer.close()
            longer, kept = (
                head.replace(b"Length: 3", b"Length: 5"),
                head[:-2] + b"Connection: keep-alive\r\n\r\n",
            )
            assert set(Refusing.heads) == {head, longer, kept}

    run(check())


def test_only_so_many_heads_are_remembered_and_none_that_is_large():
    async def check():
        Refusing.heads.clear()
        async with serving(protocol=Refusing) as (port, _):
            Refusing.is_full, Refusing.counted.count = True, 0
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sizes = set()
            for i in range(1100):
                writer.write(post(b"/x", b"abc", b"Traceparent: %d" % i))
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
                sizes.add(len(Refusing.heads))
            assert max(sizes) == 512
            before = dict(Refusing.heads)
            writer.write(post(b"/x", b"abc", b"X: " + b"x" * 2048))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            assert Refusing.heads == before
            assert Refusing.counted.count == 1101
            writer.close()

    run(check())


def test_refusals_are_in_the_metrics(shared_folder, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=1) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            gate.close()
            waiting, kept = await connect_and_send(port, PREDICT)
            assert await until(lambda: service.admitted == 1)
            for count in (3, 5):
                for data in (PREDICT, PREDICT[:-1]):  # whole, and read by the parser
                    for _ in range(count):
                        reader, writer = await connect_and_send(port, data)
                        assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
                        writer.close()
                counts(service)  # hands them on
            gate.open()
            assert (await asyncio.wait_for(answer_of(waiting), 20))[0] == 200
            kept.close()
            assert counts(service) == {
                'jaxembed_requests_total{protocol="tf_rest",status="200"} 1.0',
                'jaxembed_requests_total{protocol="tf_rest",status="429"} 16.0',
            }

    run(check())


async def connect_and_send(port, data):
    """(reader, writer)"""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer
