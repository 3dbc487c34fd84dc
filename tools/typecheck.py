"""Runs pyright over the packages as they are installed, and in strict mode over a program that uses them.

With --public, it counts the public symbols whose types it knows, too.

`train/` and `serve/` install as `jaxembed.train` and `jaxembed.serve`, a mapping that pyright does not
know, so the tree is copied that way into a temporary folder: it does not look into folders that are links.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: A program of a user, in strict types.
PROGRAM = "tests/test_typed_program.py"
#: pyright asks the first `python` of the path where packages are.
PATH = os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")))


def main() -> int:
    """Returns 0 if there is no error and, where asked for, the type of every public symbol is known."""
    with tempfile.TemporaryDirectory() as temporary:
        package = pathlib.Path(temporary) / "jaxembed"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "jaxembed", package, ignore=ignored)
        for name in ("train", "serve"):
            shutil.copytree(ROOT / name, package / name, ignore=ignored)
        shutil.copy(ROOT / "pyrightconfig.json", temporary)
        (pathlib.Path(temporary) / "tests").mkdir()
        shutil.copy(ROOT / PROGRAM, pathlib.Path(temporary) / PROGRAM)
        errors = _pyright(temporary, "--pythonpath", sys.executable, "-p", temporary)
        print(errors.stdout, end="")
        if errors.returncode or "--public" not in sys.argv:
            return errors.returncode
        types = _pyright(temporary, "--verifytypes", "jaxembed", "--ignoreexternal")
    score = re.search(r"Type completeness score: ([\d.]+)%", types.stdout)
    if types.returncode:
        print(types.stdout.partition("Symbols used")[2], types.stderr)
    print(f"public symbols whose types are known: {score[1] if score else 0}%")
    return types.returncode


def _pyright(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": PATH, "PYTHONPATH": folder}
    command = [sys.executable, "-m", "pyright", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
