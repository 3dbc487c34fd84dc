"""Compressed bodies: what they unpack to, and what is refused."""

import gzip
import zlib

import pytest

pytest.importorskip("starlette")

from starlette.requests import Request

from jaxembed.serve.server.body import decompress, read_body
from jaxembed.serve.server.errors import RequestError
from tests.serve.server.servers import client_of, run

DATA = bytes(range(256)) * 1000


def members(*sizes):
    """gzip of DATA, cut into members of such sizes and one of the rest."""
    parts, at = [], 0
    for size in (*sizes, len(DATA)):
        parts.append(gzip.compress(DATA[at : at + size]))
        at += size
    return b"".join(parts)


@pytest.mark.parametrize("sizes", [(), (100,), (0,), (0, 1, 0, 70_000, 0), (100,) * 2000])
def test_gzip_of_any_number_of_members(sizes):
    assert decompress(members(*sizes), "gzip", len(DATA)) == DATA
    assert decompress(members(*sizes), "x-gzip", len(DATA)) == DATA


def test_large_members():
    large = [bytes([i]) * 300_000 for i in range(3)] + [DATA]
    assert decompress(b"".join(map(gzip.compress, large)), "gzip", 2_000_000) == b"".join(large)
    stored = [gzip.compress(part, 0) for part in large]  # larger than what is read at once
    assert decompress(b"".join(stored), "gzip", 2_000_000) == b"".join(large)


def test_deflate():
    assert decompress(zlib.compress(DATA), "deflate", len(DATA)) == DATA


@pytest.mark.parametrize("sizes", [(), (100,), (len(DATA) - 1,), (len(DATA),)])
def test_all_members_together_are_bounded(sizes):
    with pytest.raises(RequestError, match="at most") as caught:
        decompress(members(*sizes), "gzip", len(DATA) - 1)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"", "gzip"),
        (b"{}", "gzip"),
        (members()[:-1], "gzip"),
        (members(100)[:-1], "gzip"),
        (members() + b"x", "gzip"),
        (members() + bytes(20), "gzip"),
        (zlib.compress(DATA) * 2, "deflate"),
        (zlib.compress(DATA)[:-1], "deflate"),
        (gzip.compress(b"") * 10_000, "gzip"),
    ],
)
def test_damaged_bodies_are_refused(body, encoding):
    with pytest.raises(RequestError, match=f"the body is not {encoding}") as caught:
        decompress(body, encoding, 2 * len(DATA))
    assert caught.value.status == 400


@pytest.mark.parametrize("zeros", [0, 1, 20, 5000])
def test_lengths_with_zeros_before_them(tmp_path, zeros):
    """As HTTP allows them."""

    async def check():
        async with client_of(tmp_path, max_body_bytes=9) as (_, service):
            for length, fits in (("3", True), ("10", False), ("9" * 5000, False)):
                received = []

                async def receive(received=received):
                    received.append(1)
                    return {"type": "http.request", "body": b"abc"}

                headers = [(b"content-length", b"0" * zeros + length.encode())]
                request = Request({"type": "http", "headers": headers}, receive)
                with service.large.hold() as hold:
                    if fits:
                        assert await read_body(request, service, hold) == b"abc"
                    else:
                        with pytest.raises(RequestError, match="at most 9 bytes") as caught:
                            await read_body(request, service, hold)
                        assert (caught.value.status, received) == (413, [])

    run(check())
