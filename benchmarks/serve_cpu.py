"""Processor time of the server for one request: a figure that holds on a machine that others use, too.

python benchmarks/serve_cpu.py [--rows 1 16 128] [--seconds 0.8] [--rounds 2]
    [--only ours memory torch TensorFlow]
"""

import argparse
import contextlib
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Sequence, Set

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
    parser.add_argument("--rounds", type=int, default=1, help="of each; the least counts")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the bundle and the SavedModel, to use again")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(folder, "TensorFlow" in options.only)
        servers = {}
        for name in options.only:
            others = set(psutil.Process().children(recursive=True))
            ports = stack.enter_context(server(name, folder))
            servers[name] = ports, set(psutil.Process().children(recursive=True)) - others
        for transport, rows in itertools.product(("json", "binary", "grpc"), options.rows):
            least = dict.fromkeys(servers, float("inf"))
            # In turns: what else the host does meets all of them.
            for _, (name, (ports, processes)) in itertools.product(range(options.rounds), servers.items()):
                found = uvloop.run(measure(ports, processes, transport, rows, options.seconds))
                least[name] = min(least[name], found)
            texts = (f"{name} {seconds * 1e6:,.0f} us" for name, seconds in least.items())
            print(f"{transport}, B = {rows}: " + ", ".join(texts), flush=True)
    return 0


async def measure(
    ports: tuple[int, int], processes: Set[psutil.Process], transport: str, rows: int, seconds: float
) -> float:
    """Seconds of all processes of the server, for one request."""
    bodies = [dlrm.request(rows, seed) for seed in range(8)]
    async with senders(ports, transport, bodies, UNDER_WAY) as (sends, _):
        await run_load(sends, 0.5)
        before = spent(processes)
        load = await run_load(sends, seconds)
        return (spent(processes) - before) / load.good


def spent(processes: Set[psutil.Process]) -> float:
    """Seconds that they have computed for."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
