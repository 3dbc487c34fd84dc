"""Versions that cannot be served: tried again once what is in the folder changed, and not before."""

import asyncio
import shutil

import pytest

from jaxembed.serve.server.logs import logger
from jaxembed.serve.server.served import BundleModel
from tests.serve.server import bundles
from tests.serve.server.servers import client_of, run
from tests.serve.server.switching import until, version_of


async def at_rest(service, attempts):
    """Polls go by, and nothing is loaded."""
    before = list(attempts)
    await asyncio.sleep(0.3)
    assert attempts == before
    assert service.versions.current.version == 0


@pytest.fixture
def attempts(monkeypatch):
    """Versions in the order in which they are loaded."""
    found, load = [], BundleModel.__init__

    def count(self, config, version, previous=None):
        found.append(version)
        load(self, config, version, previous)

    monkeypatch.setattr(BundleModel, "__init__", count)
    return found


def test_versions_that_are_completed_after_their_manifest(
    folder, checkpoint, tmp_path, attempts, caplog, monkeypatch
):
    """As `cp -r` does it; they are read again once files came to rest, and said to fail once a reason."""
    monkeypatch.setattr(logger(), "propagate", True)
    bundles.add(checkpoint, tmp_path / "staged", 1)
    staged, out = tmp_path / "staged" / "1", folder / "1"

    async def check():
        async with client_of(folder) as (client, service):

            async def failed():
                return 1 in service.versions.failed

            async def serves():
                return await version_of(client) == 1

            out.mkdir()
            shutil.copy(staged / "manifest.json", out)
            await until(failed)
            await at_rest(service, attempts)
            shutil.copy(staged / "model.safetensors", out)
            (out / "tables").mkdir()
            for file in (staged / "tables").iterdir():
                (out / "tables" / file.name).write_bytes(file.read_bytes()[:-100])
            await asyncio.sleep(0.5)
            await at_rest(service, attempts)
            for _ in range(10):  # in place, and never at rest
                (out / "tables" / "00000.safetensors").touch()
                await asyncio.sleep(0.005)
            for file in (staged / "tables").iterdir():
                shutil.copy(file, out / "tables")
            await until(serves)
            assert service.versions.failed == {}
            return (await client.get("/metrics")).text

    text = run(check())
    reasons = [
        record.reason for record in caplog.records if record.getMessage() == "a version cannot be served"
    ]
    assert len(reasons) == len(set(reasons)) >= 2
    assert f'jaxembed_version_changes_total{{result="failed"}} {len(reasons)}.0' in text
    assert attempts.count(1) <= 6


def test_a_delta_that_comes_before_its_base(folder, checkpoint, tmp_path, attempts):
    staged = tmp_path / "staged"
    for version, base in ((0, None), (1, 0), (2, 1), (3, 2)):
        bundles.add(checkpoint, staged, version, delta_from=base)

    async def check():
        async with client_of(folder) as (client, service):

            async def fails():
                return 3 in service.versions.failed

            async def serves():
                return await version_of(client) == 3

            (staged / "3").rename(folder / "3")
            await until(fails)
            (staged / "2").rename(folder / "2")
            await asyncio.sleep(0.3)
            assert {2, 3} <= service.versions.failed.keys()
            await at_rest(service, attempts)
            # The base of both, whose manifest comes first.
            (folder / "1").mkdir()
            shutil.copy(staged / "1" / "manifest.json", folder / "1")
            await asyncio.sleep(0.3)
            assert {1, 2, 3} <= service.versions.failed.keys()
            shutil.copytree(staged / "1", folder / "1", dirs_exist_ok=True)
            await until(serves)

    run(check())


def test_versions_that_are_gone_did_not_fail(folder):
    async def check():
        async with client_of(folder) as (client, _):
            (folder / "7").mkdir()
            (folder / "7" / "manifest.json").write_text("{")

            async def status():
                return (await client.get("/status")).json()["failed"]

            async def fails():
                return "7" in await status()

            async def gone():
                return await status() == {}

            await until(fails)
            folder.rename(folder.parent / "aside")  # nothing can be said of what is in it
            await asyncio.sleep(0.2)
            assert await fails()
            (folder.parent / "aside").rename(folder)
            await asyncio.sleep(0.2)
            shutil.rmtree(folder / "7")
            await until(gone)

    run(check())
