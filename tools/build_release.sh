#!/usr/bin/env bash
# The source and the wheel without a kernel, in dist/: what a release has beside the wheels of cibuildwheel.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m build --sdist --outdir dist
# Without a compiler the build goes on without the kernel, and the wheel is for any platform.
CC=/nonexistent CXX=/nonexistent "$PYTHON" -m pip wheel --no-deps --wheel-dir dist dist/jaxembed-*.tar.gz
ls dist/jaxembed-*-py3-none-any.whl
