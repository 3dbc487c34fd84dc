"""The image of deploy/Dockerfile, built and run, and the pods of deploy/gke.yaml.

Needs `JAXEMBED_CONTAINERS`, the command of Docker or podman; `JAXEMBED_BUILD_OPTIONS` are added to its `build`.
"""

import json
import os
import pathlib
import shlex
import subprocess
import time
import uuid

import httpx
import pytest

from tests.serve.server import bundles
from tests.serve.server.servers import free_port

ENGINE = shlex.split(os.environ.get("JAXEMBED_CONTAINERS", ""))
ROOT = pathlib.Path(__file__).resolve().parents[3]
IMAGE = "localhost/jaxembed-server:test"
INSTANCE = {"user": 3, "history": [2, 5]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENGINE, reason="name the command of Docker or podman in JAXEMBED_CONTAINERS"),
]


def engine(*arguments, **options):
    done = subprocess.run([*ENGINE, *arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image():
    options = shlex.split(os.environ.get("JAXEMBED_BUILD_OPTIONS", ""))
    engine("build", *options, "-f", "deploy/Dockerfile", "-t", IMAGE, ".", cwd=ROOT)
    return IMAGE


@pytest.fixture
def versions(checkpoint, tmp_path):
    """A folder that any user may read, with version 0."""
    out = tmp_path / "bundles"
    bundles.add(checkpoint, out, 0)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    return out


class Container:
    """One on this machine's network, removed at the end."""

    def __init__(self, image, versions, *arguments, environment=None):
        self.name = f"jaxembed-{uuid.uuid4().hex[:8]}"
        options = [f"--env={name}={value}" for name, value in (environment or {}).items()]
        options += ["--network=host", f"--volume={versions}:/bundles:ro", f"--name={self.name}"]
        engine("run", "--detach", *options, image, *map(str, arguments))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        engine("rm", "--force", self.name)

    def wait_ready(self, url):
        try:
            until(lambda: ready(url), 90)
        except AssertionError as e:
            raise AssertionError(f"not ready: {engine('logs', self.name)}") from e

    def exit_code(self):
        return int(engine("inspect", "--format={{.State.ExitCode}}", self.name))


def ready(url):
    try:
        return httpx.get(f"{url}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def predictions(url, path="/v1/models/model:predict"):
    answer = httpx.post(url + path, json={"instances": [INSTANCE]})
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["predictions"]
    return row["user"], row["history"]


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_image_serves_switches_and_drains(image, versions, checkpoint):
    http, grpc = free_port(), free_port()
    url = f"http://127.0.0.1:{http}"
    with Container(image, versions, "/bundles", "--http-port", http, "--grpc-port", grpc) as container:
        container.wait_ready(url)
        assert engine("exec", container.name, "id", "-u") == "10001"
        assert predictions(url) == ([3.0] * 4, [7.0] * 4)
        bundles.add(checkpoint, versions, 1)
        until(lambda: predictions(url) == ([1003.0] * 4, [7.0] * 4))
        engine("stop", "--time=30", container.name)  # SIGTERM, and SIGKILL after so many seconds
        assert container.exit_code() == 0
        logged = engine("logs", container.name)
        assert "Traceback" not in logged


def test_variables_of_vertex(image, versions):
    http = free_port()
    url = f"http://127.0.0.1:{http}"
    environment = {
        "AIP_HTTP_PORT": http,
        "AIP_HEALTH_ROUTE": "/v2/health/ready",
        "AIP_PREDICT_ROUTE": "/predict",
    }
    with Container(
        image, versions, "/bundles", "--grpc-port", free_port(), environment=environment
    ) as container:
        container.wait_ready(url)
        assert predictions(url, "/predict") == ([3.0] * 4, [7.0] * 4)


def test_pods_of_the_deployment(image, versions, tmp_path):
    """By podman, which runs pods without a cluster; the bucket is a folder, and the container that copies from it
    one beside the server, as podman waits for those of the start to end."""
    if "podman" not in ENGINE[0]:
        pytest.skip("Docker runs no pods")
    yaml = pytest.importorskip("yaml")
    deployment = next(yaml.safe_load_all((ROOT / "deploy" / "gke.yaml").read_text()))
    pod = deployment["spec"]["template"]["spec"]
    pod["containers"] += [
        {k: v for k, v in c.items() if k != "restartPolicy"} for c in pod.pop("initContainers")
    ]
    http, grpc = free_port(), free_port()
    for container in pod["containers"]:
        container["image"] = image
        container["resources"].pop("requests", None)
        if container["name"] == "server":
            del container["ports"]  # podman maps none on this machine's network
            container["args"] += ["--workers", "2", "--http-port", str(http), "--grpc-port", str(grpc)]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                container[probe]["httpGet"]["port"] = http
    for volume in pod["volumes"]:
        if "csi" in volume:
            volume.clear()
            volume |= {"name": "bucket", "hostPath": {"path": str(versions), "type": "Directory"}}
    pod["hostNetwork"] = True
    changed = tmp_path / "deployment.yaml"
    changed.write_text(json.dumps(deployment))
    engine("play", "kube", "--network=host", str(changed))
    url = f"http://127.0.0.1:{http}"
    try:
        until(lambda: ready(url), 120)
        assert predictions(url) == ([3.0] * 4, [7.0] * 4)
    finally:
        engine("play", "kube", "--down", str(changed))
