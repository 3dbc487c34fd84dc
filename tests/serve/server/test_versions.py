"""Versions: the newest whole one serves, a bad one changes nothing, and requests never notice."""

import asyncio
import errno
import gc
import json
import os
import shutil
import sys
import tempfile
import types

import httpx
import pytest

from jaxembed.serve.server.app import make_app
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.logs import logger
from jaxembed.serve.server.metrics import Metrics
from jaxembed.serve.server.peers import Peers
from jaxembed.serve.server.served import BundleModel
from jaxembed.serve.server.service import Service
from jaxembed.serve.server.shared_memory import is_available
from jaxembed.serve.server.versions import _RETRY_SECONDS, Versions
from tests.serve.server import bundles
from tests.serve.server.servers import Gate, client_of, run
from tests.serve.server.switching import ROW, until, version_of


@pytest.mark.parametrize("tables", ["mapped", "memory"])
def test_newer_versions_deltas_and_rollback(folder, checkpoint, tables, tmp_path, monkeypatch):
    if tables == "memory":  # as if they were large
        monkeypatch.setattr("jaxembed.serve.server.shared_tables.HUGE_PAGE", 1)

    async def check():
        async with client_of(folder, tables=tables, state=str(tmp_path / "state")) as (client, service):

            async def serves(version):
                return await version_of(client) == version

            assert await serves(0)
            first = service.versions.current
            bundles.add(checkpoint, folder, 1, delta_from=0)
            await until(lambda: serves(1))
            assert first.compile_count > 0
            assert service.versions.current.compile_count == 0  # its programs are those of the first
            answer = await client.post("/admin/versions/0:activate")
            assert answer.json() == {"version": 0, "pinned": 0}
            bundles.add(checkpoint, folder, 2)
            await asyncio.sleep(0.2)
            assert await serves(0)  # pinned
            answer = await client.post("/admin/versions:latest")
            assert answer.json() == {"version": 2, "pinned": None}
            assert await serves(2)
            shutil.rmtree(folder / "2")
            await asyncio.sleep(0.2)
            assert await serves(2)  # mapped or copied, and never down by itself
            if tables == "memory" and is_available():
                ledger = json.loads((tmp_path / "state" / "tables.json").read_bytes())
                # Of each version's users, and of the items that all have; the first version is gone by now or not.
                assert 3 <= len(ledger) <= 4

    run(check())


def test_damaged_versions_change_nothing(folder, checkpoint):
    async def check():
        async with client_of(folder) as (client, service):
            # Complete, but one bit of a table is another one.
            staged = folder.parent / "staged"
            bundles.add(checkpoint, staged, 3)
            file = staged / "3" / "tables" / "00000.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
            os.rename(staged / "3", folder / "3")
            (folder / "7").mkdir()  # not finished
            (folder / "8").mkdir()
            (folder / "8" / "manifest.json").write_text("{")
            (folder / "x").mkdir()

            async def noticed():
                return {3, 8} <= service.versions.failed.keys()

            await until(noticed)
            assert await version_of(client) == 0
            assert "damaged" in service.versions.failed[3]
            text = (await client.get("/metrics")).text
            assert 'jaxembed_version_changes_total{result="failed"} 2.0' in text
            answer = await client.post("/admin/versions/3:activate")
            assert (answer.status_code, "damaged" in answer.json()["error"]) == (409, True)
            assert service.versions.pinned is None
            assert (await client.post("/admin/versions/5:activate")).status_code == 404
            assert (await client.post("/admin/versions/x:activate")).status_code == 400
            # Mended, it is tried again.
            shutil.rmtree(folder / "3")
            bundles.add(checkpoint, folder, 3)

            async def mended():
                return await version_of(client) == 3

            await until(mended)

    run(check())


def test_requests_during_a_switch_keep_their_version(folder, checkpoint):
    async def check():
        async with client_of(folder) as (client, _):
            stop, seen = asyncio.Event(), []

            async def load():
                while not stop.is_set():
                    seen.append(await version_of(client))

            tasks = [asyncio.create_task(load()) for _ in range(4)]
            for version in (1, 2, 3):
                bundles.add(checkpoint, folder, version)

                async def serves(version=version):
                    return await version_of(client) == version

                await until(serves)
            stop.set()
            await asyncio.gather(*tasks)
            assert set(seen) >= {0, 3}

    run(check())


def test_loading_beside_requests_is_paced_and_at_the_start_it_is_not(folder, checkpoint):
    async def check():
        paced = {}

        def load(config, version, old):
            paced[version] = sys.getprofile() is not None
            return BundleModel(config, version, old)

        versions = Versions(ServerConfig(str(folder), poll_seconds=60), Metrics(), load)
        await versions.start()
        bundles.add(checkpoint, folder, 1)
        await versions.look()
        assert versions.current.version == 1
        await versions.stop()
        assert paced == {0: False, 1: True}

    run(check())


def test_what_is_kept_without_a_folder_for_it_goes_with_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    versions = Versions(ServerConfig(str(tmp_path)), Metrics())
    assert len(list(tmp_path.iterdir())) == 1
    del versions
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_nothing_to_serve_yet(tmp_path, checkpoint):
    async def check():
        out = tmp_path / "later"
        async with client_of(out) as (client, _):
            answer = await client.post("/v1/models/model:predict", json={"instances": [ROW]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert (await client.get("/v2/health/ready")).status_code == 503
            assert (await client.get("/v2/models/model")).status_code == 503
            for path in ("/", "/status", "/openapi.json", "/metrics", "/v2/health/live"):
                assert (await client.get(path)).status_code == 200
            bundles.add(checkpoint, out, 1)

            async def ready():
                return (await client.get("/v2/health/ready")).status_code == 200

            await until(ready)
            assert await version_of(client) == 1

    run(check())


def test_who_may_switch(folder):
    async def check():
        async with client_of(folder, admin_token="s3cret") as (client, _):
            for headers, status in (({}, 401), ({"authorization": "Bearer s3cre"}, 401)):
                assert (await client.post("/admin/versions/0:activate", headers=headers)).status_code == status
            headers = {"authorization": "Bearer s3cret"}
            assert (await client.post("/admin/versions/0:activate", headers=headers)).status_code == 200
        async with client_of(folder, admin_token="sécret") as (client, _):
            for encoding, status in (("utf-8", 200), ("latin-1", 401)):
                headers = {b"authorization": "Bearer sécret".encode(encoding)}
                assert (await client.post("/admin/versions/0:activate", headers=headers)).status_code == status
        async with client_of(folder) as (client, service):
            evil = "http://evil.example"
            foreign: list = [
                {"origin": evil},
                {"origin": evil, "host": "evil.example"},
            ]  # as of a name that leads here
            foreign += [
                {"host": host} for host in ("evil.example", "localhost.evil.example:8000", "10.0.0.1", "[", "")
            ]
            foreign += [{"x-forwarded-for": "10.0.0.1"}, {"forwarded": "for=10.0.0.1"}, {"via": "1.1 proxy"}]
            for headers in foreign:
                answer = await client.post("/admin/versions/0:activate", headers=headers)
                assert answer.status_code == 403, headers
            assert service.versions.pinned is None
            for host in ("LOCALHOST:8000", "127.0.0.1", "127.0.1.1:80", "[::1]:8000"):
                for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
                    answer = await client.post("/admin/versions/0:activate", headers=headers)
                    assert answer.status_code == 200, headers
            assert (await client.post("/admin/versions:latest")).status_code == 200
            app = client._transport.app
            transport = httpx.ASGITransport(app, client=("10.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as other:
                assert (await other.post("/admin/versions/0:activate")).status_code == 403
            assert service.versions.pinned is None
            transport = httpx.ASGITransport(app, client=("::ffff:127.0.0.1", 1))  # over IPv4, where `--host ::`
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as other:
                assert (await other.post("/admin/versions:latest")).status_code == 200

    run(check())


def test_rows_that_wait_are_counted_whichever_worker_is_asked_for_metrics(folder, monkeypatch):
    async def check():
        async with client_of(folder) as (client, service):
            gate = Gate(service.versions.current, monkeypatch)
            try:
                asked = asyncio.create_task(version_of(client))

                async def counted():  # as `/metrics` of another worker reads it
                    return b"jaxembed_queued_rows 1.0\n" in service.metrics.text()

                await until(counted)
            finally:
                gate.open()
            assert await asked == 0

    run(check())


def test_an_application_has_started_once_a_version_serves(tmp_path, checkpoint):
    """In servers that are not ours: they send requests from then on."""
    (tmp_path / "bundles").mkdir()

    async def check():
        service = Service(ServerConfig(str(tmp_path / "bundles"), **bundles.OPTIONS, poll_seconds=0.02))
        app = make_app(service, lifespan=True)
        started = asyncio.Event()

        async def live():
            async with app.router.lifespan_context(app):
                started.set()

        task = asyncio.create_task(live())
        await asyncio.sleep(0.3)
        assert not started.is_set()
        await asyncio.to_thread(bundles.add, checkpoint, tmp_path / "bundles", 0)
        await task
        assert started.is_set()
        assert service.versions.current.version == 0

    run(check())


def test_options_that_do_not_fit_a_version_are_one_line(folder, caplog, monkeypatch):
    monkeypatch.setattr(logger(), "propagate", True)

    async def check():
        versions = Versions(ServerConfig(str(folder), weighted=("nope",)), Metrics())
        await versions.look()
        await versions.stop()

    run(check())
    (record,) = caplog.records
    assert record.exc_info is None
    assert record.version == 0
    assert record.reason == (
        "the options do not fit this version: weighted has no feature 'nope'; features are ['history', 'user']."
    )


def test_what_is_no_version_is_named(tmp_path, caplog, monkeypatch):
    """Folders of other names, an empty one, and one that cannot be read, each told once."""
    monkeypatch.setattr(logger(), "propagate", True)

    def load(config, version, previous):
        return types.SimpleNamespace(version=version)

    def said():
        found = [(r.getMessage(), r.reason) for r in caplog.records if hasattr(r, "reason")]
        caplog.clear()
        return found

    async def check():
        versions = Versions(ServerConfig(str(tmp_path)), Metrics(), load)
        await versions.look()
        ((what, why),) = said()
        assert what == "no version to serve yet"
        assert why.endswith("the folder is empty")
        for name in ("0000000005", "v1"):
            (tmp_path / name).mkdir()
        await versions.look()
        assert "there are '0000000005', 'v1', without one" in said()[0][1]
        (tmp_path / ".5-scratch").mkdir()
        for name in ("0000000005", "v1", ".5-scratch"):
            (tmp_path / name / "manifest.json").write_text("{}")
        await versions.look()
        await versions.look()
        ((what, why),) = said()
        assert what == "no version to serve yet"
        assert "bundles in '0000000005', 'v1' are passed over" in why
        assert versions.failed == {}
        (tmp_path / "v1").rename(tmp_path / "1")
        await versions.look()
        assert versions.current.version == 1
        assert "bundles in '0000000005' are passed over" in said()[0][1]
        (tmp_path / "0000000005").rename(tmp_path / "5")
        await versions.look()
        assert versions.current.version == 5
        shutil.move(tmp_path / "1", tmp_path.parent / "1")
        tmp_path.rename(tmp_path.parent / "gone")
        await versions.look()
        assert versions.current.version == 5
        assert "No such file or directory" in said()[0][1]
        await versions.stop()

    run(check())


def make_two_versions(folder):
    for version in ("1", "2"):
        (folder / version).mkdir()
        (folder / version / "manifest.json").write_text("{}")


def versions_beside(others, folder, load):
    """Those of a worker beside `others`, by process the versions that they serve."""
    peers = types.SimpleNamespace(others=lambda: others, serve=lambda version: None)
    return Versions(ServerConfig(str(folder)), Metrics(), load, peers)


@pytest.fixture
def later(monkeypatch):
    """Called in an event loop, gives what puts its clock forward by so many seconds."""

    def make():
        loop, passed = asyncio.get_running_loop(), 0.0
        real = loop.time

        def forward(seconds):
            nonlocal passed
            passed += seconds

        monkeypatch.setattr(loop, "time", lambda: real() + passed)
        return forward

    return make


def test_a_worker_serves_no_version_below_those_of_others(tmp_path, later):
    """It waits for theirs; tries that one again, which fails for a reason of its own; and takes a lower one alone."""
    make_two_versions(tmp_path)
    others, attempts = {7: 2}, []

    def load(config, version, previous):
        attempts.append(version)
        if attempts.count(2) < 2:
            raise MemoryError("for the moment")
        return types.SimpleNamespace(version=version)

    async def check():
        versions, forward = versions_beside(others, tmp_path, load), later()
        await versions.look()
        await versions.look()
        assert (attempts, versions.current) == ([2], None)
        forward(_RETRY_SECONDS)
        await versions.look()
        assert versions.current.version == 2
        await versions.stop()
        shutil.rmtree(tmp_path / "2")
        versions = versions_beside(others, tmp_path, load)
        await versions.look()
        assert versions.current is None
        others.clear()
        await versions.look()
        assert versions.current.version == 1
        await versions.stop()

    run(check())


def test_a_version_that_one_worker_failed_to_load_is_tried_again_where_others_serve_it(tmp_path, later):
    make_two_versions(tmp_path)
    others, attempts = {7: 1}, []

    def load(config, version, previous):
        attempts.append(version)
        if version == 2 and attempts.count(2) < 3:
            raise MemoryError("for the moment")
        return types.SimpleNamespace(version=version)

    async def check():
        versions, forward = versions_beside(others, tmp_path, load), later()
        await versions.look()
        assert (attempts, versions.current.version) == ([2, 1], 1)
        forward(_RETRY_SECONDS)
        await versions.look()
        assert attempts == [2, 1]  # nobody serves it
        others[7] = 2
        await versions.look()
        assert attempts == [2, 1, 2]
        forward(_RETRY_SECONDS)
        await versions.look()
        assert attempts == [2, 1, 2]  # less and less often
        forward(_RETRY_SECONDS)
        await versions.look()
        assert versions.current.version == 2
        await versions.stop()

    run(check())


def test_configurations_that_are_of_no_use():
    for options, message in (
        ({"name": "a/b"}, "name must be letters"),
        ({"model": "x"}, "model must be MODULE:NAME"),
        ({"dense_inputs": {"a": 1}}, "need a model"),
        ({"workers": 0}, "workers must be an int of at least 1"),
        ({"body_timeout": float("inf")}, "body_timeout must be seconds above 0"),
        ({"batch_wait_ms": -1}, "batch_wait_ms must be at least 0"),
        ({"http_port": 70000}, "http_port must be a port"),
        ({"admin_token": ""}, "admin_token is '', which anyone may send; unset JAXEMBED_ADMIN_TOKEN"),
        ({"admin_token": " "}, "admin_token is ' ', which"),
        ({"admin_token": "secret\n"}, "admin_token begins or ends with blanks or line ends"),
        ({"admin_token": "sec\nret"}, "or holds one, which no header can carry"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerConfig("x", **options)


def test_peers(tmp_path, monkeypatch):
    one, other = Peers(tmp_path), Peers(tmp_path)
    assert one.others() == {}  # somebody may clean the folder up
    one.clear()
    pid = os.getpid()
    assert not other.has_begun(pid)
    one.begin()
    one.serve(3)
    assert one.others() == {}
    assert other.has_begun(pid)
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert other.others() == {pid: 3}
    with monkeypatch.context() as failing:

        def fail(_):
            raise OSError(errno.EIO, "Input/output error")

        failing.setattr("jaxembed.serve.server.peers.os.listdir", fail)
        assert other.others() == {pid: 3}
        assert Peers(tmp_path).others() == {}
        with pytest.raises(OSError, match="Input/output error"):
            other.look()
    other.serve(4)
    other.withdraw()
    other.serve(5)  # it leaves, and stays gone
    monkeypatch.setattr(os, "getpid", lambda: pid)
    assert one.others() == {}
    other.forget(pid)
    assert not other.has_begun(pid)
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert other.others() == {}
