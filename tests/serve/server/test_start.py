"""What is said before any worker starts: ports that are taken, folders and packages that are not there."""

import argparse
import importlib.util
import os
import socket
import subprocess
import sys

import jax
import prometheus_client
import pytest

from jaxembed.cli import main
from jaxembed.serve.server.config import CONFIG_VARIABLE, MISTAKE, MISTAKE_STATUS, ServerConfig

pytest.importorskip("uvicorn")

from jaxembed.serve.server import command, worker


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_in_use_is_named(tmp_path, capsys, flag, shared):
    with socket.socket() as other:
        if shared:  # as the workers of another server share theirs
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        ports = {"--http-port": 0, "--grpc-port": 0, flag: taken}
        assert main(["serve", str(tmp_path), *(str(part) for pair in ports.items() for part in pair)]) != 0
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1 port {taken}: Address already in use; pass another {flag}." in error
    assert "Traceback" not in error


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "bundels"), "--http-port", "0", "--grpc-port", "0"]) != 0
    assert f"there is no folder at {tmp_path / 'bundels'}; name the one" in capsys.readouterr().err


def test_a_single_version_is_not_a_folder_of_versions(tmp_path, capsys):
    (tmp_path / "314").mkdir()
    (tmp_path / "314" / "manifest.json").write_text("{}")
    assert main(["serve", str(tmp_path / "314"), "--http-port", "0", "--grpc-port", "0"]) != 0
    assert f"is one version of a bundle; name the folder that it is in, {tmp_path}." in capsys.readouterr().err


def test_a_model_whose_module_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here_only.py").write_text("")
    assert ServerConfig(str(tmp_path), model="here_only:f").model == "here_only:f"
    assert main(["serve", str(tmp_path), "--model", "nosuch:f"]) != 0
    assert "there is no module 'nosuch'; install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (["dense=-3"], "--dense must be NAME=SIZE, such as dense=13 or dense=4,8, got 'dense=-3'"),
        (["dense=4,-1"], "got 'dense=4,-1'"),
        (["dense=x"], "got 'dense=x'"),
        (["=3"], "got '=3'"),
        (["dense=3", "dense=4"], "--dense names 'dense' twice, the second time as 'dense=4'"),
    ],
)
def test_dense_inputs_that_cannot_be(tmp_path, capsys, dense, said):
    options = [part for text in dense for part in ("--dense", text)]
    arguments = ["serve", str(tmp_path), "--http-port", "0", "--grpc-port", "0", "--model", "json:loads"]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_dense_inputs_of_a_configuration_are_checked():
    assert ServerConfig("b", model="json:loads", dense_inputs={"a": 3, "b": [4, 8], "c": []}).dense_inputs
    with pytest.raises(ValueError, match=r"dense_inputs\['a'\] must be the shape of one row, got \(-3,\)"):
        ServerConfig("b", model="json:loads", dense_inputs={"a": -3})


def test_a_model_that_its_module_has_not(tmp_path):
    """Only workers import it; one line, from a server that ends."""
    command = [sys.executable, "-c", "import sys; from jaxembed.cli import main; sys.exit(main())", "serve"]
    command += [
        str(tmp_path),
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        "--workers",
        "2",
        "--model",
        "json:nope",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "jaxembed: model 'json:nope'" in done.stderr
    assert "has no attribute 'nope'" in done.stderr
    assert "Traceback" not in done.stderr


def test_defaults_of_the_command_line_are_those_of_the_configuration():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.config_from(parser.parse_args(["bundles"]), {}) == ServerConfig("bundles")


def test_workers_import_the_modules_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "imported_by_workers.py").write_text("import pathlib; pathlib.Path('imported').touch()\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = ["--import", "imported_by_workers", "--state", str(tmp_path)]
    config = command.config_from(parser.parse_args(["bundles", *options]), {})
    worker._import_modules(ServerConfig.from_json(config.to_json()))
    assert (tmp_path / "imported").exists()
    with pytest.raises(SystemExit) as stopped:
        worker._import_modules(ServerConfig("bundles", imports=("nosuch",), state=str(tmp_path)))
    assert stopped.value.code == MISTAKE_STATUS
    assert (tmp_path / MISTAKE).read_text("utf-8").startswith("--import nosuch cannot be imported: No module")


def test_what_modules_make_at_import_is_of_a_worker(tmp_path, monkeypatch):
    """Metrics are in the files of its number, which are cleaned up when it dies, and arrays of its options."""
    (tmp_path / "makes_metrics.py").write_text(
        "import jax\nimport prometheus_client\n"
        "prometheus_client.Gauge('mine', '', multiprocess_mode='livesum').set(7)\n"
        "dispatches_apart = jax.config.read('jax_cpu_enable_async_dispatch')\n"
    )
    config = ServerConfig("bundles", imports=("makes_metrics", "nosuch"), state=str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["worker", "0", "-1", "0", "3"])
    monkeypatch.setattr(worker.logs, "configure", lambda: None)
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv(CONFIG_VARIABLE, config.to_json())
    before = jax.config.read("jax_cpu_enable_async_dispatch")
    try:
        with pytest.raises(SystemExit):
            worker.main()
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", before)
    assert b'"mine"' in (tmp_path / "gauge_livesum_3.db").read_bytes()
    assert not sys.modules.pop("makes_metrics").dispatches_apart


@pytest.mark.parametrize("flag", ["--state", "--compile-cache"])
def test_folders_that_cannot_be_written(tmp_path, capsys, flag):
    (tmp_path / "file").touch()
    wrong = tmp_path / "file" / "folder"
    arguments = ["serve", str(tmp_path), "--http-port", "0", "--grpc-port", "0", flag, str(wrong)]
    assert main(arguments) == 2
    assert f"{flag} {wrong} cannot be written: Not a directory; name another folder." in capsys.readouterr().err


def test_a_package_that_is_not_there(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else found(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "jaxembed.serve.server.command", raising=False)
    assert main(["serve", str(tmp_path)]) != 0
    message = "`jaxembed serve` needs the package 'uvicorn'; install it with pip install 'jaxembed[server]'."
    assert message in capsys.readouterr().err


def test_workers_that_never_start_are_given_up(tmp_path):
    """A package that is there but broken, say: a supervisor that started workers for ever would hide it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['uvicorn'] = None\n")
    (tmp_path / "bundles").mkdir()
    program = """
import sys
from jaxembed.serve.server import workers
from jaxembed.serve.server.config import ServerConfig
workers._SLOWEST_RESTART, workers._HOPELESS = 0.0, 2
sys.exit(workers.Supervisor(ServerConfig("bundles", http_port=0, grpc_port=0)).run())
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "giving up: every worker dies when it starts" in done.stderr
    assert "import of uvicorn halted" in done.stderr
