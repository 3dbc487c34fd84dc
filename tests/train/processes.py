"""Starts the programs of the tests as processes of their own, all stopped at the end."""

import contextlib
import os
import pathlib
import secrets
import socket
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


@contextlib.contextmanager
def started(commands, **changes):
    """The commands as running processes, output and errors as text in pipes; killed at the end."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GLOG_minloglevel": "2", **changes}
    running = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def outputs(commands, timeout=300, **changes):
    """Runs the commands side by side and returns their outputs; fails where one fails."""
    with started(commands, **changes) as running:
        found = [process.communicate(timeout=timeout) for process in running]
        for process, (_, errors) in zip(running, found, strict=True):
            assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in found]


def free_port():
    """A port that nothing listens on, below those that the system gives to others before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("localhost", port))
            return port
