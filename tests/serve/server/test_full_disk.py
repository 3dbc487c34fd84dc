"""A real disk that is full: a server does not start on it, and one that serves goes on."""

import contextlib
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

ROOT = pathlib.Path(__file__).parents[3]
ROW = {"user": 1, "history": [2], "dense": [0.0, 0.0]}
KIB = 1 << 10


def on_disk(tmp_path, size, case, *arguments):
    """Runs a function of this module in a process of its own, with a disk of that size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare, mount = ["unshare", "--mount", "--map-root-user"], f"mount -t tmpfs -o size={size} none {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system in a namespace of its own")
    words = " ".join(map(str, (case.__name__, disk, *arguments)))
    done = subprocess.run(
        [
            *unshare,
            "sh",
            "-c",
            f"{mount} && exec {sys.executable} -m tests.serve.server.test_full_disk {words}",
        ],
        env={**os.environ, "XLA_FLAGS": "", "PROMETHEUS_MULTIPROC_DIR": str(disk)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])


def fill(disk):
    with contextlib.suppress(OSError), open(pathlib.Path(disk) / "rest", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4 * KIB))


def test_metrics_end_no_process(tmp_path):
    on_disk(tmp_path, "512k", metrics)


def metrics(disk):
    """A disk that is full from the start, one that fills up, and features of which there is no end."""
    from jaxembed.serve.server import metric_files
    from jaxembed.serve.server.metrics import Metrics

    counted = Metrics()
    fill(disk)
    for i in range(2000):
        counted.bad_id(f"feature {i}")
    counted.request("tf_rest", 200, 0.1)
    counted.flush()
    text = counted.text().decode()
    assert 'feature 9"' in text
    assert "feature 1999" not in text
    assert 'status="200"} 1.0' in text
    files = sorted(pathlib.Path(disk).glob("*.db"))
    assert len(files) * 64 * KIB == metric_files.METRIC_BYTES
    os.remove(pathlib.Path(disk) / "rest")  # room again
    for i in range(700):
        counted.bad_id(f"feature {i}")
        assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in files)
    assert 'feature 699"' in counted.text().decode()
    fill(disk)
    for file in files:
        file.unlink()
    fill(disk)
    missing = Metrics()
    missing.bad_id("feature")
    missing.request("tf_rest", 200, 0.1)
    missing.flush()
    missing.text()
    assert not list(pathlib.Path(disk).glob("*.db"))


def test_a_server_does_not_start(tmp_path):
    (tmp_path / "bundles").mkdir()
    on_disk(tmp_path, "64k", start, tmp_path / "bundles")


def start(disk, folder):
    from jaxembed.cli import main

    arguments = ["serve", folder, "--http-port", "0", "--grpc-port", "0"]
    for rest in (["--state", f"{disk}/state"], []):
        os.environ["TMPDIR"], error = disk, io.StringIO()
        with contextlib.redirect_stderr(error):
            assert main([*arguments, *rest]) == 1
        said = error.getvalue()
        assert (
            "cannot be written: No space left on device; the server needs 320 KiB there. Make room, or" in said
        )
        assert said.count("\n") == 1
    assert os.listdir(disk) == ["state"]


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["mapped", "memory"])
def test_a_server_goes_on(tmp_path, shared_folder, tables):
    on_disk(tmp_path, "4m", serve, shared_folder, tables)


def serve(disk, folder, tables):
    from tests.serve.server.servers import Process

    with Process(folder, "--state", f"{disk}/state", "--tables", tables) as server:

        def predicts():
            answer = httpx.post(f"{server.url}/v1/models/model:predict", json={"instances": [ROW]})
            return answer.json()["predictions"] == [{"history": 2.0, "user": 1.0, "version": 0.0}]

        assert predicts()
        fill(disk)
        for _ in range(3):
            assert predicts()
            answer = httpx.post(
                f"{server.url}/v1/models/model:predict", json={"instances": [{**ROW, "user": 99}]}
            )
            assert answer.status_code == 400
        for path in ("metrics", "status", "v2/health/ready"):
            assert httpx.get(f"{server.url}/{path}").status_code == 200
        answer = httpx.post(f"{server.url}/admin/versions/0:activate")
        assert (answer.status_code, "No space left on device" in answer.text) == (503, True)
        (victim,) = server.workers()
        os.kill(victim, signal.SIGKILL)
        server.wait_for(lambda: victim not in server.workers() and len(server.workers()) == 1)
        assert predicts()
        for path in ("metrics", "status", "v2/health/ready"):
            assert httpx.get(f"{server.url}/{path}").status_code == 200
        assert not [entry for entry in server.lines if "traceback" in entry]
        assert server.terminate() == 0


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
