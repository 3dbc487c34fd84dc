"""Requests that are sent one after the other without waiting: read in any pieces, answered in order, in little memory."""

import asyncio
import contextlib
import gc
import logging
import socket
import weakref

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")


from jaxembed.serve.server.http_protocol import DeadlineProtocol
from jaxembed.serve.server.pipelining import MAX_HEAD_BYTES
from tests.serve.server.servers import LOOPS, on, run, until
from tests.serve.server.sockets import H2C, answer_of, connect_slowly, echo, post, serving


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_upgrades_of_the_last_request_are_ignored(version):
    data = post(b"/x", b"abc", b"Connection: close, Upgrade", b"Upgrade: h2c").replace(b"HTTP/1.1", version)

    async def check():
        async with serving() as (port, _):
            for size in (7, len(data)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for at in range(0, len(data), size):
                    writer.write(data[at : at + size])
                    await asyncio.sleep(0)
                assert await asyncio.wait_for(answer_of(reader), 10) == (200, b"POST /x abc")
                assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()

    run(check())


def test_upgrades_are_ignored():
    """As Java's HttpClient asks for them; with the next request on the same connection, and in any pieces."""
    data = post(b"/one?a=b", b"0123456789", *H2C) + post(b"/two", b"abc")
    chunked = b"\r\n".join(
        [b"POST /three HTTP/1.1", *H2C, b"Transfer-Encoding: chunked", b"", b"3\r\nabc\r\n0\r\n\r\n"]
    )
    get = b"\r\n".join([b"GET /four HTTP/1.1", b"Connection: Upgrade", b"Upgrade: websocket", b"", b""])
    want = [
        b"POST /one 0123456789",
        b"POST /two abc",
        b"POST /three abc",
        b"GET /four ",
        b"POST /one 0123456789",
    ]
    stream = data + chunked + get + data

    async def check():
        async with serving() as (port, _):
            for size in (1, 7, 60, len(stream)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for at in range(0, len(stream), size):
                    writer.write(stream[at : at + size])
                    await asyncio.sleep(0)
                for body in want:
                    assert await asyncio.wait_for(answer_of(reader), 10) == (200, body), size
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get * 2000)
            for _ in range(2000):
                assert await asyncio.wait_for(answer_of(reader), 10) == (200, b"GET /four ")
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await answer_of(reader))[0] == 400
            writer.close()

    run(check())


async def send_until_closed(port, start, part, times):
    """(bytes sent, all that came back)"""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received, sent = asyncio.create_task(reader.read()), len(start)
    with contextlib.suppress(ConnectionError):
        writer.write(start)
        for _ in range(times):
            await asyncio.sleep(0)
            await writer.drain()
            if received.done():
                break
            writer.write(part)
            sent += len(part)
    try:
        return sent, await asyncio.wait_for(received, 10)
    except ConnectionResetError:
        return sent, b""
    finally:
        writer.close()


def test_heads_without_end_are_refused():
    line = b"a: " + b"x" * 995 + b"\r\n"
    chunked = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    cases = [
        (b"GET /", b"x" * 1000),
        (b"POST /x HTTP/1.1\r\n", line),
        (b"POST /x HTTP/1.1\r\na: ", b"x" * 1000),
        (post(b"/x", b"abc") + b"POST /x HTTP/1.1\r\n", line),
        (chunked + b"0\r\n", line),  # trailers
        (chunked + b"3;", b"x" * 1000),
    ]

    async def check():
        async with serving() as (port, state):
            for start, part in cases:
                sent, answer = await send_until_closed(port, start, part, 10_000)
                assert sent < 9_000_000, start  # closed on us
                assert not state.connections
            for start, part in cases[:3]:
                _, answer = await send_until_closed(port, start, part, MAX_HEAD_BYTES // 1000 + 1)
                assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n"), start

    run(check())


def test_heads_as_large_as_they_may_be_and_bodies_of_any_size():
    def head(size):
        start = b"POST /x HTTP/1.1\r\nContent-Length: 200000\r\na: "
        return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"

    body = b"0123456789" * 20_000
    good = head(MAX_HEAD_BYTES) + body
    padded = head(1000).replace(b": 200000", b": " + b"0" * 5000 + b"200000") + body
    many = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"

    async def check():
        async with serving() as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(good + many + padded + good)
            for want in (body, b"x" * 50_000, body, body):
                assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x " + want)
            writer.write(post(b"/x", b"abc") * 3000)  # many heads, none of them large
            for _ in range(3000):
                assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x abc")
            writer.write(head(MAX_HEAD_BYTES + 1))
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 431
            assert await reader.read() == b""
            writer.close()

    run(check())


class Recorded(DeadlineProtocol):
    """Keeps what is written."""

    def connection_made(self, transport):
        self.written, write = [], transport.write

        class Transport:
            def __getattr__(self, name):
                return getattr(transport, name)

            def write(_, data):
                self.written.append(bytes(data))
                write(data)

        super().connection_made(Transport())


def test_an_answer_leaves_in_one_piece_and_continue_before_it():
    async def check():
        async with serving(protocol=Recorded) as (port, state):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for size in (0, 3, 300_000, 700_000):
                body = b"x" * size
                writer.write(post(b"/x", body))
                assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x " + body)
            head, _, body = post(b"/x", b"abc", b"Expect: 100-continue").partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert await asyncio.wait_for(answer_of(reader), 20) == (200, b"POST /x abc")
            (connection,) = state.connections
            assert [data.count(b"POST") for data in connection.written] == [1, 1, 1, 1, 0, 1]
            writer.close()

    run(check())


class Waiting:
    """`app`, once `open` is set; keeps which paths began."""

    def __init__(self, app=echo):
        self.app, self.open, self.begun = app, asyncio.Event(), []

    async def __call__(self, scope, receive, send):
        self.begun.append(scope["path"])
        await self.open.wait()
        await self.app(scope, receive, send)


@LOOPS
@pytest.mark.parametrize("body", [b"", b"x" * 3000, b"x" * 100_000])
def test_requests_without_end_are_not_read_without_end(loop, body):
    """What waits of one connection is bounded; all of it is answered, in its order."""
    start = (
        b"" if not body else post(b"/start", bytes(20_000))
    )  # of which the parser sees the end in the midst of others

    async def check():
        app = Waiting()
        async with serving(app) as (port, state):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            count = (1 << 20) // len(post(b"/1000000", body))
            writer.write(start + b"".join(post(b"/%d" % i, body) for i in range(count)))
            assert await until(lambda: app.begun)
            await asyncio.sleep(0.3)
            (connection,) = state.connections
            assert connection.flow.read_paused
            assert connection._unparsed
            seen = []

            async def read():
                if start:
                    await answer_of(reader)
                for i in range(count):
                    seen.append(len(connection.pipeline))
                    assert len(connection._unparsed or b"") <= 1 << 18
                    assert (await answer_of(reader))[1] == b"POST /%d %b" % (i, body)

            seen.append(len(connection.pipeline))
            app.open.set()
            await asyncio.wait_for(read(), 50)
            assert 0 < max(seen) <= 16384 / (len(body) + 40) + 1  # of one piece
            assert len(app.begun) == count + bool(start)
            writer.close()

    on(loop, check())


@LOOPS
def test_requests_without_end_whose_answers_nobody_reads(loop):
    async def check():
        async with serving() as (port, state):
            connection = await connect_slowly(port, post(b"/large") * 1000)
            sending = asyncio.create_task(
                asyncio.get_running_loop().sock_sendall(connection, post(b"/large") * 200_000)
            )
            assert await until(lambda: state.connections)
            await asyncio.sleep(0.5)
            (served,) = state.connections
            assert not sending.done()
            assert served.flow.read_paused
            assert len(served.pipeline) < 400
            assert served.transport.get_write_buffer_size() <= 8 << 20 | 1 << 16
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            connection.close()

    on(loop, check())


async def send(port, *parts, half_close=False, pause=0.0):
    """All that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    if half_close:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def statuses(stream):
    return [int(part.split(b" ", 1)[0]) for part in stream.split(b"HTTP/1.1 ")[1:]]


GARBAGE = b"no HTTP\r\n\r\n"
TORN = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n"


@LOOPS
@pytest.mark.parametrize("bad", [GARBAGE, TORN, b"GET /" + b"x" * (MAX_HEAD_BYTES + 18_000)])
@pytest.mark.parametrize("good", [0, 1, 3])
def test_what_is_no_request_is_refused_after_those_before_it(loop, bad, good):
    last = 431 if len(bad) > 1000 else 400

    async def check():
        async with serving() as (port, state):
            for parts in ([post(b"/x", b"abc") * good + bad], [*[post(b"/x", b"abc")] * good, bad]):
                for pause in (0, 0.02):
                    stream = await send(port, *parts, pause=pause)
                    assert statuses(stream) == [200] * good + [last]
                    assert stream.count(b"POST /x abc") == good
                    assert not state.tasks
            assert await until(lambda: not state.connections)

    on(loop, check())


@LOOPS
def test_clients_that_end_what_they_send_and_read_on(loop):
    async def check():
        app = Waiting()
        async with serving(app) as (port, state):
            for data, want in (
                (post(b"/x", b"abc"), [200]),
                (post(b"/x", b"abc") * 3, [200] * 3),
                (post(b"/x", b"abc") + post(b"/y", b"abc")[:-1], [200]),
                (post(b"/x", b"abc") + b"POST /y", [200]),
                (post(b"/x", b"abc")[:-1], []),
                (b"", []),
            ):
                app.open.clear()
                answer = asyncio.create_task(send(port, data, half_close=True))
                await asyncio.sleep(0.1)
                app.open.set()
                assert [status for status in statuses(await answer) if status != 100] == want, data
                assert await until(lambda: not state.connections)
            old = b"GET /z HTTP/1.0\r\n\r\n"  # which knows no answers before the answer
            app.open.clear()
            answer = asyncio.create_task(send(port, old, half_close=True))
            await asyncio.sleep(0.1)
            app.open.set()
            assert statuses(await answer) == [200]
            assert (await send(port, post(b"/large"), half_close=True)).endswith(bytes(8 << 20))

    on(loop, check())


@LOOPS
@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_leave_requests_behind(loop, reset, caplog):
    """What they wait for ends without a word."""

    async def slowly(scope, receive, send):
        await receive()
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"abc"})

    async def check():
        for data in (
            post(b"/x", b"abc"),
            post(b"/x", b"abc") * 2,
            post(b"/x", b"abc") * 5,
            b"GET /x HTTP/1.1\r\n\r\n" * 5,
        ):
            app = Waiting(slowly)
            async with serving(app) as (port, state):
                for _ in range(5):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    if reset:
                        linger = b"\1\0\0\0\0\0\0\0"
                        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.write(data)
                    await asyncio.sleep(0.02)
                    writer.close()
                assert await until(lambda: len(app.begun) == 5)  # noqa: B023
                await asyncio.sleep(0.05)
                app.open.set()
                assert await until(lambda: not state.connections and not state.tasks)

    with caplog.at_level(logging.WARNING):
        on(loop, check())
    assert not caplog.records


@LOOPS
def test_a_connection_that_is_lost_leaves_nothing(loop):
    """Neither it nor its request waits for the collector of garbage."""
    kept = []

    class Watched(DeadlineProtocol):
        def data_received(self, data):
            super().data_received(data)
            kept.extend(weakref.ref(found) for found in (self, self.cycle))

    async def check():
        app = Waiting()
        app.open.set()
        async with serving(app, Watched) as (port, state):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b"/x", bytes(100_000))[:-1])
            assert await until(lambda: app.begun)
            writer.close()
            assert await until(lambda: not state.connections and not state.tasks)
            assert await until(lambda: kept and not any(found() for found in kept))

    gc.disable()
    try:
        on(loop, check())
    finally:
        gc.enable()


@LOOPS
def test_answers_without_a_body(loop):
    """HEAD, and what has none by its status, are answered at once, and what follows them after them."""

    async def app(scope, receive, send):
        status = int(scope["path"][1:])
        headers = [] if status in (204, 304) else [(b"content-length", b"3" if status == 200 else b"0")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"abc" if status == 200 else b""})

    async def check():
        async with serving(app) as (port, _):
            for request in (b"HEAD /200", b"GET /204", b"GET /304", b"HEAD /404", b"POST /405"):
                line, status = request + b" HTTP/1.1\r\n", int(request[-3:])
                for data, want in (
                    (line + b"Connection: close\r\n\r\n", [status]),
                    (line + b"\r\n" + b"GET /200 HTTP/1.1\r\nConnection: close\r\n\r\n", [status, 200]),
                ):
                    stream = await send(port, data)
                    assert statuses(stream) == want
                    assert stream.count(b"abc") == len(want) - 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(line + b"\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert statuses(head) == [status]
                writer.close()

    on(loop, check())
