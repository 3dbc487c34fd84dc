"""Programs that compile for TPUs, each in a process of its own: JAX must not know of 8 CPU devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxembed[tpu]'"
)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def start(program, *arguments):
    """A process that runs `program`, in which the modules of the benchmarks can be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    """The JSON that it printed last."""
    try:
        output, errors = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])
