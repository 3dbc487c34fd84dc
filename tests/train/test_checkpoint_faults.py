"""A disk that is full or broken in the middle of a save or a conversion: an error, and the last good one stays."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxembed.checkpoint import open_bundle, read_checkpoint, whole_steps

from .checkpoint_programs import at_step, embedding

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = ROOT / "tests" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def run_program(faults, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", "tests.train.fault_programs", *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(faults), "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_step(directory, step):
    own = embedding(1)
    tables, slots, _ = own.to_canonical(at_step(own, step, seed=step))
    read = read_checkpoint(directory, step, slots=True)
    assert read.model["step"] == read.step == step
    for name, table in tables.items():
        np.testing.assert_array_equal(read.tables[name], np.asarray(table))
        for slot, values in slots[name].items():
            np.testing.assert_array_equal(read.slots[name][slot], np.asarray(values))


def check(line, fault):
    """An error that says why, unless the disk failed after all was done, or not at all."""
    assert line["error"] or not line["early"], line
    assert line["left"] == [1, 2] or (line["left"] == [1] and line["error"]), line
    if line["error"]:
        expected = "No space left" if fault == "full" else "Input/output error"
        assert expected in line["error"], line


POINTS = [5, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("fault", ["full", "broken", "unsynced"])
def test_save_on_a_failing_disk(faults, tmp_path, fault, points):
    """The last good step stays, and the same process goes on saving once the disk works again."""
    lines = run_program(faults, "save", tmp_path, fault, points)
    assert len(lines) == min(points, lines[0]["total"])
    assert any(line["error"] for line in lines)
    for line in lines:
        check(line, fault)
        directory = tmp_path / str(line["after"])
        assert whole_steps(directory) == [1, 2, 3]
        for step in (1, 2, 3):
            check_step(directory, step)


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("fault", ["full", "broken", "unsynced"])
def test_conversion_on_a_failing_disk(faults, tmp_path, fault, points):
    lines = run_program(faults, "convert", tmp_path, fault, points)
    assert any(line["error"] for line in lines)
    for line in lines:
        check(line, fault)
        for version in (1, 2):
            open_bundle(tmp_path / str(line["after"]), version).verify()


def test_full_file_system(tmp_path):
    """A real one, of 6 MB, where this user may mount it."""
    unshare = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=6m none {tmp_path}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system in a namespace of its own")
    run = subprocess.run(
        [
            *unshare,
            "sh",
            "-c",
            f"{mount} && exec {sys.executable} -m tests.train.fault_programs fill {tmp_path}",
        ],
        env={**os.environ, "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"No space left(.|\n)*restored [1-9] True", run.stdout), run.stdout
