"""The HTTP protocol over sockets, in this process: before a small application, or the server's own."""

import asyncio
import contextlib
import json
import socket

import uvicorn
from uvicorn.server import ServerState

from jaxembed.serve.server.app import make_app
from jaxembed.serve.server.http_protocol import DeadlineProtocol, make_protocol
from tests.serve.server import fuzz
from tests.serve.server.servers import Gate, client_of, until

#: How Java's HttpClient asks for HTTP/2.
H2C = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"]


async def echo(scope, receive, send):
    """Answers with method, path and body; of `/large`, with 8 MiB."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = b"%b %b %b" % (scope["method"].encode(), scope["path"][:100].encode(), body)
    if scope["path"] == "/large":
        answer = bytes(8 << 20)
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@contextlib.asynccontextmanager
async def serving(app=echo, protocol=DeadlineProtocol, idle_timeout=20.0):
    """(port, state of the server)"""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, timeout_keep_alive=idle_timeout)
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, state, {}, _loop=loop), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], state
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving_bundles(folder, idle_timeout=20.0, predict_route=None, **options):
    """(port, service) of a server of versions."""
    async with client_of(folder, **options) as (_, service):
        app = make_app(service, predict_route=predict_route)
        async with serving(app, make_protocol(service, app), idle_timeout) as (port, _):
            yield port, service


@contextlib.asynccontextmanager
async def one_that_runs(folder, monkeypatch, **options):
    """(port, service, gate, reader, writer) of a server that runs the request that the writer sent, until the gate is open."""
    async with serving_bundles(folder, **options) as (port, service):
        gate = Gate(service.versions.current, monkeypatch)
        service.batcher._seconds.clear()  # so that it runs on a thread
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(fuzz.INFER.encode(), json.dumps(fuzz.GOOD_V2).encode()))
        assert await until(gate.running.is_set)
        yield port, service, gate, reader, writer
        writer.close()


async def answer_of(reader):
    """(status, body)"""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split()[0])
    return int(head.split()[1]), await reader.readexactly(size)


async def whole_answer(reader):
    """(head without its date, body)"""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    size = int(head.lower().partition(b"\r\ncontent-length:")[2].split()[0])
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"date:")]
    return lines, await reader.readexactly(size)


def post(path=b"/x", body=b"", *fields):
    return b"\r\n".join(
        [b"POST %b HTTP/1.1" % path, b"Host: x", *fields, b"Content-Length: %d" % len(body), b"", body]
    )


async def connect_slowly(port, data):
    """A socket that takes little without being read, and has sent `data`."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.sock_sendall(connection, data)
    return connection
