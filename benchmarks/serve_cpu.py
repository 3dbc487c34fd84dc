"""Processor time of the server for one request: a figure that holds on a machine that others use, too.

python benchmarks/serve_cpu.py [--rows 1 16 128] [--seconds 0.8] [--only ours memory torch TensorFlow]
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import dlrm
import psutil
import uvloop
from load import run_load

from serve import CONTENDERS, prepare, senders, server

UNDER_WAY = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the bundle and the SavedModel, to use again")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(folder, "TensorFlow" in options.only)
        for name in options.only:
            with server(name, folder) as ports:
                for transport in ("json", "binary", "grpc"):
                    for rows in options.rows:
                        spent = uvloop.run(measure(ports, transport, rows, options.seconds))
                        print(f"{name}, {transport}, B = {rows}: {spent * 1e6:,.0f} us", flush=True)
    return 0


async def measure(ports: tuple[int, int], transport: str, rows: int, seconds: float) -> float:
    """Seconds of all processes of the server, for one request."""
    bodies = [dlrm.request(rows, seed) for seed in range(8)]
    async with senders(ports, transport, bodies, UNDER_WAY) as (sends, _):
        await run_load(sends, 0.5)
        before = spent()
        load = await run_load(sends, seconds)
        return (spent() - before) / load.good


def spent() -> float:
    """Seconds of the processes that this one started."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    sys.exit(main())
