"""The pinned version: it outlives the server, and a damaged one is none."""

import asyncio
import errno
import json
import logging
import os
import threading

import pytest

from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.logs import logger
from jaxembed.serve.server.metrics import Metrics
from jaxembed.serve.server.pin import Pin
from jaxembed.serve.server.versions import Versions
from tests.serve.server import bundles
from tests.serve.server.servers import client_of, run, until
from tests.serve.server.switching import version_of


def test_the_pin_outlives_a_restart(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "pin.json").write_text(json.dumps({"version": 4}))
    (tmp_path / "5").mkdir()
    (tmp_path / "4").mkdir()
    for version in ("4", "5"):
        (tmp_path / version / "manifest.json").write_text("{}")
    loaded = []

    def load(config, version, previous):
        loaded.append(version)
        raise ValueError("none")

    async def check():
        config = ServerConfig(str(tmp_path), state=str(tmp_path / "state"))
        versions = Versions(config, Metrics(), load)
        await versions.look()
        assert (loaded, versions.pinned) == ([4], 4)
        await versions.pin(None)
        assert loaded == [4, 5]
        await versions.stop()

    run(check())


@pytest.mark.parametrize("content", [b"", b'{"vers', b"5", b'{"version": "1"}', b"\xff", b"[" * 100_000])
def test_what_is_no_pin(tmp_path, content, caplog):
    log = logging.getLogger("test")
    (tmp_path / "pin.json").write_bytes(content)
    pin = Pin(tmp_path, log)
    assert (pin.read(), pin.read()) == (None, None)
    pin.write(3)
    assert (pin.read(), Pin(tmp_path, log).read()) == (3, 3)
    (tmp_path / "pin.json").write_bytes(content)
    assert (pin.read(), Pin(tmp_path, log).read()) == (3, None)
    pin.write(None)
    assert pin.read() is None
    assert len(caplog.records) == 3


def test_a_damaged_pin(folder, checkpoint, tmp_path, caplog, monkeypatch):
    """At the start it is none; later it stays what it was. It is said once."""
    monkeypatch.setattr(logger(), "propagate", True)
    bundles.add(checkpoint, folder, 1)
    file = tmp_path / "state" / "pin.json"
    file.parent.mkdir()
    file.write_bytes(b"")

    def said():
        found = [
            record.levelname for record in caplog.records if not record.getMessage().startswith("version ")
        ]
        caplog.clear()
        return found

    async def check():
        async with client_of(folder, state=str(file.parent)) as (client, _):
            assert await version_of(client) == 1
            assert (await client.get("/status")).json()["pinned"] is None
            await asyncio.sleep(0.1)
            assert said() == ["WARNING"]
            assert (await client.post("/admin/versions/0:activate")).status_code == 200
            file.write_bytes(b"")
            await asyncio.sleep(0.1)
            assert (await client.get("/status")).json()["pinned"] == 0
            assert await version_of(client) == 0
            assert said() == ["WARNING"]
            assert (await client.post("/admin/versions:latest")).status_code == 200
            assert not file.exists()
            assert await version_of(client) == 1
            assert said() == []

    run(check())


def test_a_pin_that_cannot_be_written_changes_nothing(folder, checkpoint, tmp_path, monkeypatch):
    bundles.add(checkpoint, folder, 1)
    state = tmp_path / "state"
    state.mkdir()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def check():
        async with client_of(folder, state=str(state)) as (client, _):
            assert (await client.post("/admin/versions/1:activate")).status_code == 200
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                answer = await client.post("/admin/versions/0:activate")
            assert answer.status_code == 503
            assert "No space left on device; make room" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"].endswith("Version 1 stays pinned.")
            assert await version_of(client) == 1
            assert [file.name for file in state.iterdir() if "pin" in file.name] == ["pin.json"]

    run(check())


def test_what_another_worker_was_told_meanwhile_stays(tmp_path):
    """An activation that fails undoes its own pin alone; one that is overtaken does not say that it succeeded."""
    gate = threading.Event()

    class Model:
        def __init__(self, config, version, previous):
            self.version = version
            if version == 5:
                assert gate.wait(20)
                raise ValueError("damaged")

    for version in ("4", "5", "6", "7"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "manifest.json").write_text("{}")

    async def check():
        (tmp_path / "state").mkdir()
        config = ServerConfig(str(tmp_path), state=str(tmp_path / "state"))
        one, other = (Versions(config, Metrics(), Model) for _ in range(2))
        await asyncio.gather(one.look(), other.look())

        async def overtaken(version):
            """`one` is told to serve it, and meanwhile `other` to serve version 4."""
            task = asyncio.create_task(one.pin(version))
            assert await until(lambda: one.pinned == version)
            await other.pin(4)
            return task

        task = await overtaken(5)
        gate.set()
        with pytest.raises(RequestError, match="cannot be served: ValueError: damaged") as failed:
            await task
        async with one._turn:  # it looks at the folder once this look is over
            task = await overtaken(6)
        with pytest.raises(RequestError, match=r"6 is not served: .* Version 4 stays pinned\.$") as late:
            await task
        assert failed.value.status == late.value.status == 409
        assert (one.pinned, other.pinned) == (4, 4)
        assert (one.current.version, other.current.version) == (4, 4)
        await asyncio.gather(one.stop(), other.stop())

    run(check())
