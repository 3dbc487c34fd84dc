"""Bodies that are announced, and come slowly or never, keep nobody else out."""

import asyncio
import json

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

from jaxembed.serve.server import service as service_module
from jaxembed.serve.server.request import LARGE
from tests.serve.server.servers import Gate, counts, run, until
from tests.serve.server.sockets import answer_of, post, serving_bundles
from tests.serve.server.test_http_protocol import PREDICT, ROW, connect_and_send

BODY = json.dumps({"instances": [ROW]}).encode()
BLANKS = b" " * LARGE


def predict(body):
    return post(b"/v1/models/model:predict", body)


async def ask(port, *parts):
    """The status of the answer to what is sent in such parts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.02)
    try:
        return (await asyncio.wait_for(answer_of(reader), 10))[0]
    finally:
        writer.close()


@pytest.mark.parametrize("count", [4, 100])
def test_bodies_that_are_announced_hold_no_bytes(shared_folder, count):
    async def check():
        options = {"max_body_bytes": 4 * LARGE, "max_queue_requests": 200}
        async with serving_bundles(shared_folder, **options) as (port, service):
            head = predict(bytes(4 * LARGE))[: -4 * LARGE]
            connections = [await connect_and_send(port, head) for _ in range(count)]
            assert await until(lambda: service.admitted == count)
            assert service.large.held == 0
            assert await ask(port, predict(BODY + BLANKS)) == 200
            connections[0][1].write(bytes(3 * LARGE))
            assert await until(lambda: service.large.held > LARGE)  # what came counts
            with service.large.hold() as hold:
                hold.grow(service.large.most - service.large.held)
                assert await ask(port, head) == 429  # at once, without its body
                assert await ask(port, predict(BODY)) == 200
            for _, writer in connections:
                writer.close()
            assert await until(lambda: not service.large.held and not service.admitted)

    run(check())


def test_slow_bodies_take_no_room(shared_folder, monkeypatch):
    """Neither of requests that are whole, nor, once they are slow, of others whose body is under way."""

    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=4) as (port, service):
            monkeypatch.setattr(service_module, "_ARRIVING_SECONDS", 60)
            slow = [await connect_and_send(port, PREDICT[:-1]) for _ in range(4)]
            assert await until(lambda: service.admitted == 4)
            assert not service.full
            assert await ask(port, PREDICT) == 200
            assert await ask(port, PREDICT[:-1]) == 429  # the others are not slow yet
            monkeypatch.setattr(service_module, "_ARRIVING_SECONDS", 0)
            assert await ask(port, PREDICT[:-1], PREDICT[-1:]) == 200
            first, kept = slow[0]
            status, error = await asyncio.wait_for(answer_of(first), 10)
            assert (status, b"the body did not arrive in " in error) == (408, True)
            assert float(error.split()[-2]) < service.config.body_timeout
            kept.close()
            for reader, writer in slow[1:]:  # which were not needed
                writer.write(PREDICT[-1:])
                assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
                writer.close()
            assert await until(lambda: not service.admitted)
            statuses = {'200"} 5.0', '408"} 1.0', '429"} 1.0'}
            assert counts(service) == {
                f'jaxembed_requests_total{{protocol="tf_rest",status="{status}' for status in statuses
            }

    run(check())


def test_a_full_server_refuses_at_once(shared_folder, monkeypatch):
    """Bodies that do not come hold all room; others need not send theirs."""
    monkeypatch.setattr(service_module, "_ARRIVING_SECONDS", 60)

    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=4) as (port, service):
            held = [await connect_and_send(port, PREDICT[:-1]) for _ in range(4)]
            assert await until(lambda: service.admitted == 4)
            assert await ask(port, predict(bytes(1 << 20))[: -1 << 20]) == 429
            reader, writer = await connect_and_send(port, predict(bytes(10))[:-10])
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert head.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nretry-after: 1\r\n" in head.lower()
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            # Its connection goes on after its body, which nobody looks at.
            writer.write(b"x" * 10 + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
            for _, other in (*held, (reader, writer)):
                other.close()

    run(check())


def test_bodies_that_come_when_there_is_no_room_are_refused(shared_folder, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=2) as (port, service):
            gate = Gate(service.versions.current, monkeypatch)
            late = [await connect_and_send(port, PREDICT[:-1]) for _ in range(2)]
            assert await until(lambda: service.admitted == 2)
            gate.close()
            whole = [await connect_and_send(port, PREDICT) for _ in range(2)]
            assert await until(lambda: service.full)
            for reader, writer in late:
                writer.write(PREDICT[-1:])
                assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 429
                writer.close()
            assert await ask(port, PREDICT[:-1]) == 429  # at its headers
            gate.open()
            for reader, writer in whole:
                assert (await asyncio.wait_for(answer_of(reader), 10))[0] == 200
                writer.close()

    run(check())
