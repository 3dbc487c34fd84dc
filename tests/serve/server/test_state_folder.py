"""The folder that workers share: of one server at a time, and what killed servers leave."""

import os
import socket
import subprocess
import sys
import tempfile

import pytest

from jaxembed.cli import main
from jaxembed.serve.server.config import CONFIG_VARIABLE, ServerConfig
from jaxembed.serve.server.state_folder import StateFolder

HOLD = """
import sys
from jaxembed.serve.server.state_folder import StateFolder
print(StateFolder(sys.argv[1] or None, 1).path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Starts a process that holds a folder, and gives it and the path."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    processes = []

    def start(path=""):
        command = [sys.executable, "-c", HOLD, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_one_server_at_a_time(tmp_path, hold, capsys):
    state = tmp_path / "state"
    process, _ = hold(state)
    (state / "metrics").mkdir()
    (state / "metrics" / "counter_1.db").touch()
    arguments = ["serve", str(tmp_path), "--http-port", "0", "--grpc-port", "0", "--state", str(state)]
    assert main(arguments) == 2
    said = f"--state {state} is that of a server that runs (process {process.pid}); end that one, or name another folder."
    assert said in capsys.readouterr().err
    assert (state / "metrics" / "counter_1.db").exists()
    process.kill()
    process.wait()
    StateFolder(str(state), 1).close()
    assert state.is_dir()


def test_folders_of_servers_that_were_killed_are_removed(tmp_path, hold):
    """Not those of servers that run or begin, those that were named, or those that others made."""
    killed, young, running = (hold() for _ in range(3))
    named = hold(tmp_path / "temporary" / "jaxembed-named")
    for process, folder in (killed, running, named):
        os.utime(os.path.join(folder, "server.lock"), (0, 0))
        if folder != running[1]:
            process.kill()
            process.wait()
    young[0].kill()
    young[0].wait()
    (tmp_path / "temporary" / "jaxembed-other").mkdir()
    state = StateFolder(None, 1)
    left = {str(path) for path in (tmp_path / "temporary").iterdir()}
    kept = {young[1], running[1], named[1], str(tmp_path / "temporary" / "jaxembed-other")}
    assert left == {*kept, str(state.path)}
    state.close()
    assert {str(path) for path in (tmp_path / "temporary").iterdir()} == kept


def test_a_worker_whose_supervisor_ended_before_it_began(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "bundles").mkdir()
    config = ServerConfig(str(tmp_path / "bundles"), grpc_port=None, state=str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-P", "-m", "jaxembed.serve.server.worker"]
        worker = subprocess.Popen(
            [*command, str(listener.fileno()), "-1", str(ended.pid), "0"],
            pass_fds=[listener.fileno()],
            env={**os.environ, CONFIG_VARIABLE: config.to_json()},
            stderr=subprocess.PIPE,
        )
        try:
            _, said = worker.communicate(timeout=60)
        finally:
            worker.kill()
    assert worker.returncode == 0, said
    assert b'"stopped"' in said
