"""deploy/ray_serve.py under Ray Serve, with Ray's own command, proxy and replica."""

import asyncio
import contextlib
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import httpx
import pytest

from tests.serve.server import bundles
from tests.serve.server.servers import free_port

ROOT = pathlib.Path(__file__).resolve().parents[3]
MANIFEST = ROOT / "deploy" / "ray_serve.yaml"
PREDICT = "/v1/models/model:predict"
ROW = {"user": 3, "history": [1, 2], "dense": [0.0, 1.0]}
OPTIONS = f"--model {bundles.MODEL} --dense dense=2 --weighted history --max-ids-per-row 8 --max-batch-rows 8"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@contextlib.contextmanager
def running(folder, scratch, **limits):
    """URL of the manifest's application, with another folder and, for the deployment, other limits."""
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(MANIFEST.read_text())
    port = free_port()
    manifest["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = manifest["applications"]
    application["args"] = {"bundles": str(folder), "options": OPTIONS}
    (deployment,) = application["deployments"]
    deployment.update(limits)
    del deployment["autoscaling_config"]
    (scratch / "ray.yaml").write_text(yaml.safe_dump(manifest))
    scratch_of_ray = tempfile.mkdtemp(prefix="ray")  # paths of sockets must be short
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": scratch_of_ray,  # a Ray of its own
        "RAY_raylet_start_wait_time_s": "120",
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(scratch / "ray.yaml")]
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/v2/health/ready").status_code == 200:
                    break
            assert process.poll() is None, (scratch / "log").read_text()[-4000:]
            assert time.monotonic() < until, (scratch / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(scratch_of_ray, ignore_errors=True)


def test_serves_and_refuses_what_has_no_room(shared_folder, tmp_path):
    with running(shared_folder, tmp_path, max_ongoing_requests=1, max_queued_requests=1) as url:
        answer = httpx.post(url + PREDICT, json={"instances": [ROW]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"] == [{"history": 4.0, "user": 3.0, "version": 0.0}]
        bad = httpx.post(url + PREDICT, json={"instances": [{**ROW, "user": 99}]})
        assert bad.status_code == 400
        assert "id 99 is outside" in bad.json()["error"]
        answers = asyncio.run(flood(url))
        counts = {status: sum(a.status_code == status for a in answers) for status in (200, 503)}
        # One runs and one waits; the proxy refuses others.
        assert counts[200] + counts[503] == len(answers)
        assert counts[200] > 0
        assert counts[503] > 0
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["predictions"] == [{"history": 4.0, "user": 3.0, "version": 0.0}] * 200


async def flood(url):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"instances": [ROW] * 200}
        return await asyncio.gather(*(client.post(PREDICT, json=body) for _ in range(40)))


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_arguments(tmp_path):
    specification = importlib.util.spec_from_file_location("ray_serve", ROOT / "deploy" / "ray_serve.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    application = module.app({"bundles": str(tmp_path), "options": "--max-batch-rows 8"})
    deployment = application._bound_deployment
    assert deployment._deployment_config.max_queued_requests == module.MAX_QUEUED_REQUESTS > 0
    assert deployment._deployment_config.max_ongoing_requests == module.MAX_ONGOING_REQUESTS
    for arguments in ({}, {"bundles": "x", "port": "1"}):
        with pytest.raises(ValueError, match="arguments are bundles and options"):
            module.app(arguments)
