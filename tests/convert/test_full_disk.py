"""A real disk that is full: every format says so, exits with 1, and leaves nothing."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from jaxembed.cli import main
from jaxembed.convert import convert

ROOT = pathlib.Path(__file__).parents[2]
FORMATS = {
    "jaxembed": None,
    "serving": None,
    "serving of a checkpoint": None,
    "npy": None,
    "npz": None,
    "safetensors": None,
    "html": None,
    "torchrec": "torch",
    "torchrec of shards": "torch",
    "tensorflow": "tensorflow",
    "saved-model": "orbax.export",
}


def command(form: str, folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    if form == "html":
        return ["inspect", str(folder / "steps"), "--html", str(out)]
    source = folder / ("steps" if form.endswith("checkpoint") else "a.npz")
    suffix = ".pt" if form == "torchrec" else ""
    return ["convert", str(source), "--to", form.split()[0], f"{out}{suffix}", "--no-progress"]


def run(form: str, folder: str, disk: str) -> None:
    """What a process of its own does, on a disk that has a few pages left."""
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = main(command(form, pathlib.Path(folder), pathlib.Path(disk) / "new" / "out"))
    left = sorted(str(path.relative_to(disk)) for path in pathlib.Path(disk).rglob("*"))
    print(json.dumps({"code": code, "err": err.getvalue(), "left": left}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    np.savez(folder / "a.npz", t=np.random.default_rng(0).normal(size=(100_000, 8)).astype(np.float32))
    convert(folder / "a.npz", folder / "steps")
    return folder


def marked(form, package):
    few = form in ("jaxembed", "serving", "npz", "html", "torchrec", "tensorflow")
    marks = [pytest.mark.parity] * (package is not None) + [pytest.mark.slow] * (not few)
    return pytest.param(form, marks=marks)


@pytest.mark.parametrize("form", [marked(*item) for item in FORMATS.items()])
def test_full_disk(folder, tmp_path, form):
    if FORMATS[form] is not None:
        pytest.importorskip(FORMATS[form])
    unshare, size = ["unshare", "--mount", "--map-root-user"], "8k" if form == "html" else "1m"
    mount = f"mount -t tmpfs -o size={size} none {tmp_path}"
    if form == "html":
        mount += f" && mkdir {tmp_path}/new"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system in a namespace of its own")
    script = f"{mount} && exec {sys.executable} -m tests.convert.test_full_disk '{form}' {folder} {tmp_path}"
    done = subprocess.run(
        [*unshare, "sh", "-c", script],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 1, found
    assert "No space left on device" in found["err"]
    assert found["err"].count("\n") == 1
    assert found["left"] == (["new"] if form == "html" else [])


if __name__ == "__main__":
    run(*sys.argv[1:])
