"""Bundles, and servers in this process and in processes of their own."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from tests.serve.server import bundles


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return bundles.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), range(4))


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A folder with version 0."""
    out = tmp_path / "bundles"
    bundles.add(checkpoint, out, 0)
    return out


@pytest.fixture(scope="session")
def shared_folder(checkpoint, tmp_path_factory):
    """A folder with version 0 that no test changes."""
    out = tmp_path_factory.mktemp("bundles")
    bundles.add(checkpoint, out, 0)
    return out


@pytest.fixture
def begun(monkeypatch):
    """The paths of requests that were answered past the parser."""
    from jaxembed.serve.server.whole import WholeProtocol

    paths, begin = [], WholeProtocol._begin_whole

    def begin_whole(self, answers, head, body):
        paths.append(head.path)
        begin(self, answers, head, body)

    monkeypatch.setattr(WholeProtocol, "_begin_whole", begin_whole)
    return paths
