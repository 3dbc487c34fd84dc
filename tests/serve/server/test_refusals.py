"""Refusals of one turn of the event loop, and what a connection keeps of a request that was answered."""

import asyncio
import socket
import time
import weakref
from typing import ClassVar

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

from jaxembed.serve.server.http_protocol import DeadlineProtocol
from jaxembed.serve.server.metrics import Refusals
from jaxembed.serve.server.refusals import Turn, usual_request
from tests.serve.server.servers import LOOPS, counts, on, run
from tests.serve.server.sockets import answer_of, connect_slowly, echo, post, serving, serving_bundles
from tests.serve.server.test_http_protocol import PREDICT


class Logged(DeadlineProtocol):
    """Logs the statuses of what it sends."""

    room_left, log = 0, []
    counted = Refusals()
    refusals = staticmethod({b"/x": counted}.get)
    heads: ClassVar = {}
    turn = Turn()

    full = staticmethod(lambda: Logged.room_left == 0)

    @staticmethod
    def room(path):
        Logged.room_left -= 1

    def connection_made(self, transport):
        write = transport.write

        class Transport:
            def __getattr__(self, name):
                return getattr(transport, name)

            def write(_, data):
                Logged.log.append(data.split(b"\r\n")[0].split()[1])
                write(data)

        super().connection_made(Transport())


async def logging(scope, receive, send):
    Logged.log.append(b"begins")
    await echo(scope, receive, send)


def test_refusals_are_sent_before_the_requests_of_their_turn_are_handled():
    async def check():
        async with serving(logging, Logged) as (port, _):
            clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            await asyncio.sleep(0.05)
            Logged.room_left, Logged.log = 1, []
            for _, writer in clients:  # at once, so that one turn reads all of them
                writer.write(post(b"/x", b"abc"))
            statuses = [(await asyncio.wait_for(answer_of(reader), 20))[0] for reader, _ in clients]
            assert sorted(statuses) == [200, 429, 429, 429]
            assert Logged.log == [b"429", b"429", b"429", b"begins", b"200"]
            for _, writer in clients:
                writer.close()

    run(check())


@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_end_what_they_send_after_a_request_that_is_refused(reset):
    """They get their refusal, unless they are gone; others are not hurt."""

    async def check():
        loop = asyncio.get_running_loop()
        async with serving(protocol=Logged) as (port, state):
            for _ in range(5):
                Logged.room_left = 0
                client = socket.create_connection(("127.0.0.1", port))
                client.sendall(post(b"/x", b"abc"))
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.close()
                    await asyncio.sleep(0.05)
                else:
                    client.shutdown(socket.SHUT_WR)
                    client.setblocking(False)
                    answer = b""
                    while part := await asyncio.wait_for(loop.sock_recv(client, 4096), 20):
                        answer += part
                    client.close()
                    assert answer.startswith(b"HTTP/1.1 429 ")
                    assert answer.count(b"HTTP/1.1") == 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                Logged.room_left = 1
                writer.write(post(b"/x", b"abc"))
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
                writer.close()
            async with asyncio.timeout(20):
                while state.connections:
                    await asyncio.sleep(0.01)

    run(check())


@LOOPS
def test_a_deadline_that_passes_while_a_refusal_is_due_does_not_come_before_it(loop):
    async def check():
        idle = 0.5
        async with serving(protocol=Logged, idle_timeout=idle) as (port, _):
            Logged.room_left, Logged.counted.count = 0, 0
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b"/x", b"abc"))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            began = time.monotonic()
            writer.write(post(b"/x", b"abc"))
            time.sleep(idle + 0.05)  # so that the loop reads it and sees the deadline in one turn
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
            assert Logged.counted.count == 2
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert time.monotonic() - began > 2 * idle - 0.05  # it has all of its time again
            writer.close()

    on(loop, check())


@LOOPS
def test_refusals_that_cannot_be_sent_are_not_counted(loop):
    """A client that sends requests and reads no answers is closed."""

    async def check():
        async with serving(protocol=Logged) as (port, state):
            Logged.room_left, Logged.counted.count = 1, 0
            client = await connect_slowly(port, post(b"/large"))
            async with asyncio.timeout(20):
                while not any(connection.flow.write_paused for connection in state.connections):
                    await asyncio.sleep(0.01)
            Logged.room_left = 0
            await asyncio.get_running_loop().sock_sendall(client, post(b"/x", b"abc"))
            (connection,) = state.connections
            async with asyncio.timeout(20):
                while not connection.transport.is_closing():
                    await asyncio.sleep(0.01)
            assert Logged.counted.count == 0
            client.close()

    on(loop, check())


LAST = PREDICT.replace(b"Host: x", b"Host: x\r\nConnection: close")
OLD = PREDICT.replace(b"HTTP/1.1", b"HTTP/1.0")
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "leaving"),
    [
        (LAST, False),
        (OLD, False),
        (OLD.replace(b"Host: x", b"Host: x\r\nConnection: keep-alive"), False),
        (HEALTH + PREDICT, False),  # at its headers, an answer is due
        (PREDICT, True),
    ],
)
def test_what_is_not_refused_at_its_headers_finds_no_more_room_than_there_is(shared_folder, sent, leaving):
    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=1) as (port, service):

            async def ask():
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                for _ in range(sent.count(b" HTTP/1.")):
                    status, body = await asyncio.wait_for(answer_of(reader), 20)
                writer.close()
                return status, body

            service.leaving = leaving
            with service.admission():
                status, body = await ask()
                assert (status, b"1 requests are served or wait already" in body) == (429, True)
                assert service.admitted == 1
            assert (await ask())[0] == 200
            assert not service.full
            assert counts(service) == {
                'jaxembed_requests_total{protocol="tf_rest",status="200"} 1.0',
                'jaxembed_requests_total{protocol="tf_rest",status="429"} 1.0',
            }

    run(check())


@pytest.mark.parametrize(("head", "leaving"), [(LAST, False), (OLD, False), (PREDICT, True)])
def test_a_refusal_that_ends_the_connection_reaches_who_still_sends(shared_folder, head, leaving):
    """What is unread when a connection is closed resets it."""
    body = bytes(8 << 20)
    head = head.partition(b"Content-Length")[0] + b"Content-Length: %d\r\n\r\n" % len(body)

    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=1) as (port, service):
            service.leaving = leaving
            with service.admission():
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head + body)
                await asyncio.wait_for(writer.drain(), 20)
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
                assert await asyncio.wait_for(reader.read(), 20) == b""
                writer.close()
            assert not service.admitted

    run(check())


@LOOPS
@pytest.mark.parametrize("rest", [b"abc", b"abc" + HEALTH, b""])
def test_the_body_of_the_last_request_ends_the_connection(loop, rest):
    """It was answered before; what follows is not, and it has so much time to come."""
    begun = []

    async def answering(scope, receive, send):
        begun.append(scope["path"])
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def check():
        async with serving(answering, idle_timeout=20.0 if rest else 0.1) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b"/x", b"abc", b"Connection: close")[:-3])
            assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"ok")
            writer.write(rest)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            assert begun == ["/x"]

    on(loop, check())


class Connection:
    """Sends refusals nowhere."""

    def __init__(self):
        self.sent = 0

    def send_refusal(self):
        self.sent += 1


@LOOPS
def test_a_loop_that_ended_within_a_turn_does_not_keep_the_next_one_from_ending_it(loop):
    turn, connection = Turn(), Connection()
    for _ in range(2):
        ended = loop()
        turn.begin(ended)
        turn.refused.append(connection)
        ended.close()

    async def one_turn():
        turn.begin(asyncio.get_running_loop())
        turn.refused.append(connection)
        assert connection.sent == 0
        await asyncio.sleep(0)
        assert connection.sent == 3
        assert turn.loop is None
        assert not turn.refused

    on(loop, one_turn())


def test_an_idle_connection_keeps_nothing_of_what_was_answered():
    seen = []

    class Marker:
        pass

    async def app(scope, receive, send):
        scope["marker"] = marker = Marker()
        seen.append(weakref.ref(marker))
        await echo(scope, receive, send)

    async def check():
        async with serving(app) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for sent in range(1, 4):
                writer.write(post(b"/x", b"abc"))
                assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x abc")
                async with asyncio.timeout(20):
                    while seen[-1]() is not None:
                        await asyncio.sleep(0.01)
                assert len(seen) == sent
            writer.close()

    run(check())


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\n", (b"/x", 3)),
        (b"POST /x HTTP/1.1\r\ncontent-length: 12\r\nA: b\r\n\r\n", (b"/x", 12)),
        (b"POST /x HTTP/1.1\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\n", (b"/x", 3)),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nconnection: keep-alive\r\n\r\n", (b"/x", 3)),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nConnection: keep-alive, x\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nConnection: keep-alive\r\nContent-Length: 3\r\nConnection: x\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nA: b\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 1234567890\r\n\r\n", None),
        (b"POST /x HTTP/1.0\r\nContent-Length: 3\r\n\r\n", None),
        (b"GET /x HTTP/1.1\r\nContent-Length: 3\r\n\r\n", None),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", None),
    ],
)
def test_requests_like_most(head, found):
    assert usual_request(head) == (None if found is None else (found[0], len(head) + found[1]))
