"""Requests that come in a few pieces, one soon after the other, are answered as if they had come at once."""

import asyncio
import functools
import itertools
import socket

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

import uvloop

from jaxembed.serve.server.whole import WholeProtocol
from tests.serve.server.servers import counts, on, until
from tests.serve.server.sockets import answer_of, one_that_runs, post, serving_bundles, whole_answer
from tests.serve.server.test_whole import INFER, PREDICT, ROWS, V2

run = functools.partial(on, uvloop.new_event_loop)
SENT = post(INFER, V2)
HEAD = SENT.find(b"\r\n\r\n") + 4


@pytest.fixture
def waiting(monkeypatch):
    """The connections that wait for the rest of a request; they do for long."""
    found, wait = [], WholeProtocol._wait_for_rest

    def wait_for_rest(self, data, size):
        found.append(self)
        wait(self, data, size)

    monkeypatch.setattr(WholeProtocol, "_wait_for_rest", wait_for_rest)
    monkeypatch.setattr("jaxembed.serve.server.whole._PIECES_SECONDS", 20)
    return found


async def send(writer, waiting, *pieces):
    """Each piece is read by itself, of which all but the last leave the server waiting."""
    for piece in pieces[:-1]:
        writer.write(piece)
        seen = sum(map(len, pieces[: pieces.index(piece) + 1]))
        assert await until(lambda seen=seen: waiting and sum(map(len, waiting[-1]._pieces)) == seen)
    writer.write(pieces[-1])


@pytest.mark.parametrize("cuts", [[HEAD], [HEAD + 1], [len(SENT) - 1], [HEAD, HEAD + 9, len(SENT) - 3]])
def test_answers_are_those_to_requests_that_came_at_once(shared_folder, begun, waiting, cuts):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(SENT)
            whole = await whole_answer(reader)
            for _ in range(3):
                ends = [0, *cuts, len(SENT)]
                pieces = [SENT[begin:end] for begin, end in itertools.pairwise(ends)]
                await send(writer, waiting, *pieces)
                assert await whole_answer(reader) == whole
            assert begun == 4 * [INFER]
            assert not waiting[0]._pieces
            assert waiting[0]._piecing is None
            assert counts(service) == {'jaxembed_requests_total{protocol="v2_rest",status="200"} 4.0'}
            writer.close()

    run(check())


def test_what_follows_the_rest_is_answered_after_it(shared_folder, begun, waiting):
    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await send(
                writer, waiting, SENT[:HEAD], SENT[HEAD:] + post(PREDICT, ROWS) + post(b"/nowhere", b"abc")
            )
            answers = [await asyncio.wait_for(answer_of(reader), 20) for _ in range(3)]
            assert [status for status, _ in answers] == [200, 200, 404]
            assert b"outputs" in answers[0][1]
            assert b"predictions" in answers[1][1]
            assert not begun
            writer.write(SENT)
            assert await asyncio.wait_for(answer_of(reader), 20) == answers[0]
            assert begun == [INFER]
            writer.close()

    run(check())


def test_a_rest_that_is_late_is_for_the_parser(shared_folder, begun, waiting, monkeypatch):
    monkeypatch.setattr("jaxembed.serve.server.whole._PIECES_SECONDS", 0.001)

    async def check():
        async with serving_bundles(shared_folder, idle_timeout=0.4) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(SENT[: HEAD + 5])
                assert await until(lambda: service.admitted)
                await asyncio.sleep(0.5)  # it is not idle
                writer.write(SENT[HEAD + 5 :])
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            assert len(waiting) == 2
            assert not begun
            assert await asyncio.wait_for(reader.read(), 20) == b""  # now it is
            writer.close()

    run(check())


@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_end_without_the_rest_leave_nothing(shared_folder, waiting, reset):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(SENT[:-1])
            assert await until(lambda: waiting)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            assert await until(lambda: waiting[0].transport.is_closing())
            assert await until(lambda: waiting[0]._piecing is None)
            assert not waiting[0]._pieces
            assert await until(lambda: not service.admitted and not service.shedding.under_way)
            assert not service._rooms

    run(check())


def test_a_request_whose_head_came_before_the_server_stops_is_answered(shared_folder, waiting):
    async def check():
        async with serving_bundles(shared_folder) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await send(writer, waiting, SENT[:HEAD], b"")
            waiting[0].shutdown()
            await asyncio.sleep(0.05)
            writer.write(SENT[HEAD:])
            lines, _ = await whole_answer(reader)
            assert lines[0] == b"HTTP/1.1 200 OK"
            assert b"connection: close" in lines
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()

    run(check())


def test_a_request_whose_head_came_before_the_server_leaves_is_answered(shared_folder, waiting):
    """As before a worker drains, of which those with a head that comes while it leaves are no less."""

    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await send(clients[0][1], waiting, SENT[:HEAD], b"")
            service.leaving = True
            waiting[0].leave()
            clients[1][1].write(SENT[:HEAD])
            assert await until(lambda: service.admitted == 2)
            service.draining = True
            for reader, writer in clients:
                writer.write(SENT[HEAD:])
                lines, _ = await whole_answer(reader)
                assert lines[0] == b"HTTP/1.1 200 OK"
                assert b"connection: close" in lines
                writer.close()
            assert len(waiting) == 1

    run(check())


def test_a_server_that_is_full_by_then_refuses_them(shared_folder, begun, waiting, monkeypatch):
    """And at their heads, if it is before; what waits takes no room."""

    async def check():
        async with one_that_runs(shared_folder, monkeypatch) as (port, service, gate, first, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await send(writer, waiting, SENT[:HEAD], b"")
            assert service.admitted == service.shedding.under_way == 1
            service.shedding.limit = 1
            writer.write(SENT[HEAD:])
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            writer.write(SENT[:HEAD])
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            assert len(waiting) == 1
            writer.write(SENT[HEAD:])
            gate.open()
            assert (await asyncio.wait_for(answer_of(first), 20))[0] == 200
            await send(writer, waiting, SENT[:HEAD], SENT[HEAD:])
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            assert begun == [INFER, INFER]
            assert counts(service) == {
                'jaxembed_requests_total{protocol="v2_rest",status="200"} 2.0',
                'jaxembed_requests_total{protocol="v2_rest",status="429"} 2.0',
            }
            writer.close()

    run(check())
