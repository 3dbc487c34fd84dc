"""What the server promises, measured: swaps of versions under load, twice the load it can take, growth.

python benchmarks/serve_promises.py swaps --count 1000
python benchmarks/serve_promises.py overload --seconds 20
python benchmarks/serve_promises.py growth --count 1000000 --seconds 700

swaps and overload measure for --seconds; growth ends at --count requests, or after --seconds. Ends with 1 if a promise is
missed that holds at any speed of the machine; of the others it is printed whether they are met.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence

import dlrm
import numpy as np
import psutil
import uvloop
from load import Connection, Load, http_request, run_load
from promises import Promise, judge

from serve import INFER, prepare, server

UNDER_WAY = 4
SPARE = 56  # connections that find the server full
PARTS = 5
SAMPLE_SECONDS = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures one promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promise", choices=["swaps", "overload", "growth"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5, help="of overload, between which peaks are measured")
    parser.add_argument(
        "--cores-apart", action="store_true", help="half of the cores for the server, half for clients"
    )
    parser.add_argument(
        "--max-queue-requests", type=int, default=2 * UNDER_WAY, help="of overload; the server's own is 512"
    )
    parser.add_argument("--tables", choices=["mapped", "memory"], default="mapped")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the bundle, to use again")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder /= "promises"  # two versions, of which serve.py would serve the second
        prepare(folder, tensorflow=False)
        if not (folder / "bundles" / "1").exists():
            dlrm.write_bundle(folder, 1)
        flags = ["--tables", options.tables]
        if options.promise == "overload":
            flags += ["--max-queue-requests", str(options.max_queue_requests)]
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2 if options.cores_apart else 0
        os.sched_setaffinity(0, cores[:half] or cores)  # which the server inherits
        ports = stack.enter_context(server("ours", folder, *flags))
        os.sched_setaffinity(0, cores[half:])
        call = {"swaps": swaps, "overload": overload, "growth": growth}[options.promise]
        return judge(uvloop.run(call(ports[0], options)))


async def swaps(port: int, options: argparse.Namespace) -> list[Promise]:
    """Switches from one version to the other and back while requests run, in parts, and between them does not."""
    worker, tables = _worker(port), dlrm.FEATURES * dlrm.VOCABULARY * dlrm.DIM * 4
    steady: list[Load] = []
    loads: list[Load] = []
    numbers = np.array_split(np.arange(options.count), min(PARTS, options.count))
    async with _connections(port, UNDER_WAY) as connections:
        sends = [connection.send for connection in connections]
        await run_load(sends, 2)
        before = _private(worker)
        highest = [before]
        begin = time.perf_counter()
        for part in numbers:
            steady += [await run_load(sends, 1) for _ in range(max(1, round(options.seconds / PARTS)))]

            async def switch(part: np.ndarray = part) -> None:
                for number in part:
                    await asyncio.to_thread(_post, port, f"/admin/versions/{number % 2}:activate")

            task, sampling = asyncio.create_task(switch()), asyncio.create_task(_sample(worker, highest))
            while not task.done():
                loads.append(await run_load(sends, 1))
            await task
            sampling.cancel()
        seconds = time.perf_counter() - begin
    calm, p99 = (float(np.median([load.p99 for load in part])) for part in (steady, loads))
    failed = sum(load.failed + load.refused for load in (*steady, *loads))
    good = sum(load.good for load in loads)
    print(f"{options.count} swaps in {seconds:.1f} s, {good:,} requests beside them, {failed} failed")
    print(f"p99 of a second, steady {calm * 1e3:.2f} ms, during swaps {p99 * 1e3:.2f} ms: {p99 / calm:.2f}x")
    rates = [float(np.median([load.rate for load in part])) for part in (steady, loads)]
    print(f"requests a second, steady {rates[0]:,.0f}, during swaps {rates[1]:,.0f}")
    grown = highest[0] - before
    print(f"private memory grew by at most {grown / 2**20:.0f} MiB, {grown / tables:.1%} of the tables")
    return [
        Promise(f"{failed} failed requests, wanted 0", failed == 0, always=True),
        Promise(f"{grown / tables:.1%} of the tables, wanted at most 10%", grown <= tables / 10, always=True),
        Promise(f"p99 {p99 / calm:.2f}x, wanted at most 1.5x", p99 <= 1.5 * calm),
    ]


async def _sample(worker: int, highest: list[int]) -> None:
    """Keeps the most private memory, also while a version is loaded, until it is cancelled."""
    while True:
        highest[0] = max(highest[0], _private(worker))
        await asyncio.sleep(SAMPLE_SECONDS)


async def overload(port: int, options: argparse.Namespace) -> list[Promise]:
    """Sends twice what the server can answer, at a steady pace, between measurements of what it can answer.

    Both take turns, as the speed of a host changes, and each round is compared with what was measured beside it. The peak
    is that of 8 requests under way, or as many as there is room for; more than have room are offered.
    """
    seconds, room = options.seconds / (2 * options.rounds), options.max_queue_requests
    async with _connections(port, room + SPARE) as connections:
        few = [connection.send for connection in connections[: min(room, 2 * UNDER_WAY)]]
        await run_load(few, 1)
        peaks, rounds = [await run_load(few, seconds)], []
        clients: dict[str, list[float]] = {"the peak": [], "twice that": []}
        for _ in range(options.rounds):
            with _share_of_machine(clients["twice that"]):
                rounds.append(await _offer(connections, 2 * peaks[-1].rate, seconds))
            with _share_of_machine(clients["the peak"]):
                peaks.append(await run_load(few, seconds))
    rates = [(before.rate + after.rate) / 2 for before, after in itertools.pairwise(peaks)]
    p99s = [(before.p99 + after.p99) / 2 for before, after in itertools.pairwise(peaks)]
    print(
        f"peak {_spread(rates, ',.0f')} requests/s, p99 {_spread(p99s, '.2f', 1e3)} ms: median (least to most)"
    )
    print(f"offered {_spread([offered.rate for offered in rounds], ',.0f')} requests/s")
    answers: collections.Counter[int] = collections.Counter()
    for offered in rounds:
        answers.update({status: len(times) for status, times in offered.times.items()})
    print(f"answers {dict(answers)}; {sum(offered.late for offered in rounds)} found no connection")
    for load, shares in clients.items():
        print(f"clients took {_spread(shares, '.1%')} of their cores at {load}")
    goodput = [offered.good / rate for offered, rate in zip(rounds, rates, strict=True)]
    print(f"goodput {_spread(goodput, '.0%')} of the peak")
    admitted = [offered.quantile(200, 0.99) / p99 for offered, p99 in zip(rounds, p99s, strict=True)]
    print(f"p99 of the admitted {_spread(admitted, '.2f')}x")
    good, slowdown = float(np.median(goodput)), float(np.median(admitted))
    wrong = sum(count for status, count in answers.items() if status not in (200, 429))
    promises = [
        Promise(f"{wrong} answers but 200 and 429, wanted none", wrong == 0, always=True),
        Promise(f"goodput {good:.1%}, wanted at least 90%", good >= 0.9),
        Promise(f"p99 of the admitted {slowdown:.2f}x, wanted at most 2x", slowdown <= 2),
    ]
    for q in (0.5, 0.99):
        refused = [offered.quantile(429, q) for offered in rounds if 429 in offered.times]
        if refused:
            text = f"refusals took {_spread(refused, '.2f', 1e3)} ms at quantile {q}, wanted at most 5 ms"
            promises.append(Promise(text, float(np.median(refused)) <= 5e-3))
    return promises


@dataclasses.dataclass(frozen=True)
class _Offered:
    """What came of requests at a steady pace: seconds of the answers by status."""

    rate: float
    good: float
    late: int
    times: dict[int, list[float]]

    def quantile(self, status: int, q: float) -> float:
        return float(np.quantile(self.times[status], q))


async def _offer(connections: Sequence[Connection], rate: float, seconds: float) -> _Offered:
    # The one that waited longest comes first, so that none is closed as idle.
    idle, times = collections.deque(connections), collections.defaultdict(list)
    late, number = 0, 0
    lost: list[Exception] = []

    def start(connection: Connection, number: int) -> None:
        begin = time.perf_counter()

        def answered(status: int | Exception) -> None:
            if isinstance(status, int):
                times[status].append(time.perf_counter() - begin)
                idle.append(connection)
            else:
                lost.append(status)

        connection.start(number, answered)

    begin = time.perf_counter()
    while (now := time.perf_counter() - begin) < seconds:
        due = int(now * rate)
        while number < due:
            number += 1
            if idle:
                start(idle.popleft(), number)
            else:
                late += 1
        await asyncio.sleep(0.001)
    while len(idle) + len(lost) < len(connections):
        await asyncio.sleep(0.001)
    if lost:
        raise lost[0]
    taken = time.perf_counter() - begin
    return _Offered(number / taken, len(times[200]) / taken, late, times)


@contextlib.contextmanager
def _share_of_machine(shares: list[float]) -> Iterator[None]:
    """Appends the share of its cores that this process, the clients, takes meanwhile: a server on them has the rest."""
    used, begin = time.process_time(), time.perf_counter()
    yield
    shares.append((time.process_time() - used) / (time.perf_counter() - begin) / len(os.sched_getaffinity(0)))


def _spread(values: Sequence[float], form: str, unit: float = 1) -> str:
    middle, *ends = (format(unit * float(f(values)), form) for f in (np.median, min, max))
    return f"{middle} ({' to '.join(ends)})"


async def growth(port: int, options: argparse.Namespace) -> list[Promise]:
    """Sends many requests."""
    worker, sent, failed = _worker(port), 0, 0
    async with _connections(port, UNDER_WAY) as connections:
        sends = [connection.send for connection in connections]
        await run_load(sends, 3)
        before, begin = _private(worker), time.perf_counter()
        while sent < options.count and time.perf_counter() - begin < options.seconds:
            load = await run_load(sends, 1)
            sent += load.good
            failed += load.failed + load.refused
        grown = (_private(worker) - before) / 1e6
    print(f"{sent:,} requests: private memory grew by {grown:.1f} MB")
    return [
        Promise(f"{failed} failed requests, wanted 0", failed == 0, always=True),
        Promise(f"{grown:.1f} MB, wanted at most 100 MB", grown <= 100, always=True),
    ]


@contextlib.asynccontextmanager
async def _connections(port: int, count: int):
    requests = [http_request(INFER, *dlrm.as_binary(dlrm.request(1, seed))) for seed in range(32)]
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Connection(port, requests)) for _ in range(count)]


def _worker(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status") as answer:
        return json.load(answer)["pid"]


def _private(pid: int) -> int:
    """Bytes that this process shares with no other and no file."""
    info = psutil.Process(pid).memory_info()
    return info.rss - info.shared


def _post(port: int, path: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="POST")
    with urllib.request.urlopen(request, timeout=120):
        return


if __name__ == "__main__":
    sys.exit(main())
