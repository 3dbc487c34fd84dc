"""docs/serving.md as it stands: its programs and commands run in their order, beside a server on ports of its own."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import httpx
import pytest

from tests.serve.server.servers import free_port

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "serving.md"
MAIN = "import sys; from jaxembed.cli import main; sys.exit(main())"
SHELL = f"""set -e
jaxembed() {{ {sys.executable} -P -c '{MAIN}' "$@"; }}
curl() {{ command curl -sS --fail "$@"; }}
"""


@contextlib.contextmanager
def serving(arguments, ports):
    options = ["--http-port", ports["8000"], "--grpc-port", ports["8001"]]
    command = [sys.executable, "-P", "-c", MAIN, *arguments, *options, "--max-batch-rows", "2"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        ready = f"http://127.0.0.1:{ports['8000']}/v2/health/ready"
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=60) as client:
            while client.get(ready).status_code != 200:
                assert server.poll() is None
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    names, answered, checked = {}, "", 0
    with contextlib.ExitStack() as stack:
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            for port, own in ports.items():
                block = block.replace(f"localhost:{port}", f"localhost:{own}")
            if kind == "python":
                exec(block, names)
            elif block.startswith("jaxembed serve"):
                stack.enter_context(serving(block.split()[1:], ports))
            elif kind == "sh":
                done = subprocess.run(
                    ["bash", "-c", SHELL + block], capture_output=True, text=True, timeout=120
                )
                assert done.returncode == 0, done.stderr + done.stdout
                answered = done.stdout
            elif kind == "json":
                assert json.loads(answered.splitlines()[-1]) == json.loads(block)
                checked += 1
    assert checked >= 8
    assert names["np"].frombuffer(names["content"][names["size"] :], "<f4").tolist() == [4.0, 1.0]
    assert names["function"]({"user": ["ann", "bob"]})["vector"].tolist() == [[-0.75] * 4, [0.25] * 4]
    assert os.listdir("user-bundles") == ["1"]
