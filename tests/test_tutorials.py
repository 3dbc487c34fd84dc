"""The tutorials of docs/ as they stand: each page is one program, run in a process and a folder of its own."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.lazy import lazily

DOCS = pathlib.Path(__file__).parents[1] / "docs"
TUTORIALS = [*sorted((DOCS / "tutorials").glob("*.md")), DOCS / "sharding.md"]
# What other tests do as well, with files of their own.
SLOW = ("criteo", "keras_rs", "tensorflow")
NEEDS = {
    "torchrec": ["torch"],
    "tensorflow": ["tensorflow"],
    "keras_rs": ["keras_rs", "h5py", "jax_tpu_embedding"],
}


def test_the_first_example_of_the_readme_gives_what_it_says():
    text = (DOCS.parent / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block
    *lines, call, said = block[1].splitlines()
    names = {}
    exec("\n".join(lines), names)
    found = {name: rows.tolist() for name, rows in eval(call, names).items()}
    assert found == ast.literal_eval(said.removeprefix("# "))


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=p.stem) for p in TUTORIALS]
)
def test_tutorial_runs(page, tmp_path):
    for module in NEEDS.get(page.stem, ()):
        lazily(module)  # the page imports it, in its own process
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    assert program, f"{page} has no python blocks"
    file = tmp_path / "tutorial.py"
    file.write_text(program)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for printed in re.findall(r"^It prints:\n\n```\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        assert printed in result.stdout
