"""kill -9 in the middle of conversions: every version that has a number is whole, and what is left makes way."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import convert_to_bundle, files, open_bundle, scratch
from jaxembed.checkpoint.digests import digest_bytes
from jaxembed.checkpoint.files import replace_file
from jaxembed.optimizers import SGD
from jaxembed.train import Checkpointer, ShardedEmbedding

PROGRAM = """
import sys
from jaxembed.checkpoint import convert_to_bundle
for version in range(100_000):
    delta = version - 1 if version % 2 else None
    convert_to_bundle(sys.argv[1], sys.argv[2], version=version, delta_from=delta, exported=b"model")
    print(version, flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    config = {
        "x": FeatureConfig(TableConfig(50_000, 16, name="a")),
        "y": FeatureConfig(TableConfig(9, 4, name="b")),
    }
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)), model={"w": np.arange(3.0)})
    return directory


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_every_version_is_whole(checkpoint, tmp_path, monkeypatch, count):
    rng = np.random.default_rng(0)
    for round in range(count):
        out = tmp_path / str(round)
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(checkpoint), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "1":
                break
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        versions = sorted(int(path.name) for path in out.iterdir() if path.name.isdecimal())
        assert versions[:2] == [0, 1]
        for version in versions:
            bundle = open_bundle(out, version)
            bundle.verify()
            assert bundle.exported == b"model"
        monkeypatch.setattr(scratch, "GRACE_SECONDS", -1)
        convert_to_bundle(checkpoint, out, version=10**6)
        assert all(path.name.isdecimal() for path in out.iterdir())


def test_a_folder_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "GRACE_SECONDS", -1)
    with scratch.scratch_folder(tmp_path, "1") as first:
        with scratch.scratch_folder(tmp_path, "2") as second:
            assert first.is_dir()
            assert second.is_dir()
        assert [path for path in tmp_path.iterdir()] == [first]
    assert not list(tmp_path.iterdir())


def test_the_folder_of_another_host_stays(tmp_path, monkeypatch):
    """Where each host has locks of its own, this one gets the lock of what the other one is writing."""
    monkeypatch.setattr(scratch, "GRACE_SECONDS", -1)
    monkeypatch.setattr(scratch.fcntl, "flock", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(scratch.socket, "gethostname", lambda: "elsewhere-2.net")
        theirs = scratch.scratch_folder(tmp_path, "1")
        folder = theirs.__enter__()
    with scratch.scratch_folder(tmp_path, "2"):
        assert folder.is_dir()
    monkeypatch.setattr(scratch.socket, "gethostname", lambda: "elsewhere-2.net")
    with scratch.scratch_folder(tmp_path, "2"):
        assert not folder.exists()
    theirs.__exit__(None, None, None)


def test_what_another_host_left_goes_in_the_end(tmp_path):
    """Each container is a host of a new name, which never comes back for it; a host may be at work in it still."""
    theirs, others = tmp_path / ".writing-1-0@elsewhere", tmp_path / ".writing-novel"
    for folder in (theirs, others):
        folder.mkdir()
        (folder / "rows").write_bytes(bytes(9))
    long_ago = time.time() - scratch.OTHERS_SECONDS - 60
    for path in (theirs, others / "rows", others):
        os.utime(path, (long_ago, long_ago))
    with scratch.scratch_folder(tmp_path, "2"):
        assert theirs.is_dir()
    os.utime(theirs / "rows", (long_ago, long_ago))
    with scratch.scratch_folder(tmp_path, "2"):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == [others]


def test_a_young_folder_stays(tmp_path, monkeypatch):
    """It may be of a process that has not locked it yet."""
    young = tmp_path / f".writing-1-1{scratch._of_host()}"
    young.mkdir()
    with scratch.scratch_folder(tmp_path, "2"):
        assert young.is_dir()
    monkeypatch.setattr(scratch, "GRACE_SECONDS", -1)
    with scratch.scratch_folder(tmp_path, "2"):
        assert not young.exists()


def test_an_old_file_goes(tmp_path, monkeypatch):
    """One that a process was killed over, while it replaced another."""
    left: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", lambda file, parts: left.append(file.name))
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                files.replace_file(tmp_path / "page", b"")
    old, young = left
    for name in (old, young, ".writing-mine"):
        (tmp_path / name).write_bytes(b"")
    for name in (old, ".writing-mine"):
        os.utime(tmp_path / name, (0, 0))
    with scratch.scratch_folder(tmp_path, "2") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {young, ".writing-mine", folder.name}


def test_what_a_process_of_this_number_left_is_not_in_the_way(tmp_path):
    """In a container every process that converts has the number 1, also the one that was killed a second ago."""
    left = scratch.scratch_folder(tmp_path, "1")
    folder = left.__enter__()
    with scratch.scratch_folder(tmp_path, "1") as again:
        assert again != folder
        assert folder.is_dir()
    left.__exit__(None, None, None)
    umask = os.umask(0o027)
    try:
        with scratch.scratch_folder(tmp_path, "x" * 400) as folder:
            assert folder.stat().st_mode & 0o777 == 0o750
            assert len(os.fsencode(folder.name)) < 255
        (tmp_path / f".writing-{digest_bytes(b'page')}-{os.getpid()}").write_bytes(b"left")
        replace_file(tmp_path / "page", b"content")
    finally:
        os.umask(umask)
    assert (tmp_path / "page").read_bytes() == b"content"
