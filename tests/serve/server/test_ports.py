"""Ports that are taken and folders that are not there, before any worker starts."""

import socket

import pytest

from jaxembed.cli import main

pytest.importorskip("uvicorn")


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
