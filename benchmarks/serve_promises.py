"""What the server promises, measured: swaps of versions under load, twice the load it can take, growth.

python benchmarks/serve_promises.py swaps --count 1000
python benchmarks/serve_promises.py swaps --new-models --count 10
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

from jaxembed.serve.server.config import ServerConfig
from serve import INFER, prepare, server

UNDER_WAY = 4
SPARE = 56  # connections that find the server full
PARTS = 5
SAMPLE_SECONDS = 0.02
ONSET = 0.25  # seconds of an overload, in which the server finds out that it is one


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures one promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promise", choices=["swaps", "overload", "growth"])
    parser.add_argument("--count", type=int, help="default: 1000, and 10 with --new-models")
    parser.add_argument(
        "--new-models",
        action="store_true",
        help="of swaps: each version is of another model, and compiled beside requests",
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5, help="of overload, between which peaks are measured")
    parser.add_argument(
        "--cores-apart", action="store_true", help="half of the cores for the server, half for clients"
    )
    parser.add_argument(
        "--max-queue-requests",
        type=int,
        default=ServerConfig.max_queue_requests,
        help="of the server in overload; the default is its own",
    )
    parser.add_argument("--max-queue-ms", type=float, default=ServerConfig.max_queue_ms, help="the same")
    parser.add_argument(
        "--at-peak",
        type=int,
        default=2 * UNDER_WAY,
        help="requests under way where the peak of overload is measured",
    )
    parser.add_argument(
        "--connections", type=int, help="of overload, which take turns; default: 56 more than there is room for"
    )
    parser.add_argument("--tables", choices=["mapped", "memory"], default="mapped")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the bundle, to use again")
    options = parser.parse_args(arguments)
    options.count = options.count or (10 if options.new_models else 1000)
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # Several versions, of which serve.py would serve the last.
        folder /= "models" if options.new_models else "promises"
        prepare(folder, tensorflow=False)
        flags = ["--tables", options.tables]
        for version in range(1, options.count + 1 if options.new_models else 2):
            if not (folder / "bundles" / str(version)).exists():
                hidden = dlrm.HIDDEN + (8 * version if options.new_models else 0)
                dlrm.write_bundle(folder, version, hidden)
        if options.new_models:
            flags += ["--compile-cache", str(stack.enter_context(tempfile.TemporaryDirectory()))]
        if options.promise == "overload":
            flags += ["--max-queue-requests", str(options.max_queue_requests)]
            flags += ["--max-queue-ms", str(options.max_queue_ms)]
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
                    version = number if options.new_models else number % 2
                    await asyncio.to_thread(_post, port, f"/admin/versions/{version}:activate")

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
    promises = [
        Promise(f"{failed} failed requests, wanted 0", failed == 0, always=True),
        Promise(f"p99 {p99 / calm:.2f}x, wanted at most 1.5x", p99 <= 1.5 * calm),
    ]
    if not options.new_models:  # whose programs are no part of these small tables
        promises.append(
            Promise(
                f"{grown / tables:.1%} of the tables, wanted at most 10%", grown <= tables / 10, always=True
            )
        )
    return promises


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
    async with _connections(port, options.connections or room + SPARE) as connections:
        few = [connection.send for connection in connections[: min(room, options.at_peak)]]
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
        for kept in (offered.onset, offered.times):
            answers.update({status: len(times) for status, times in kept.items()})
    print(f"answers {dict(answers)}; {sum(offered.late for offered in rounds)} found no connection")
    for load, shares in clients.items():
        print(f"clients took {_spread(shares, '.1%')} of their cores at {load}")
    goodput = [offered.good / rate for offered, rate in zip(rounds, rates, strict=True)]
    print(f"goodput {_spread(goodput, '.0%')} of the peak")
    admitted = [offered.quantile(200, 0.99) / p99 for offered, p99 in zip(rounds, p99s, strict=True)]
    print(f"p99 of the admitted {_spread(admitted, '.2f')}x, after {ONSET} seconds")
    longest = [max(itertools.chain(*offered.onset.values())) for offered in rounds]
    print(f"the longest before that took {_spread(longest, '.0f', 1e3)} ms")
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
    """What came of requests at a steady pace: seconds of the answers by status; of those at its onset apart."""

    rate: float
    good: float
    late: int
    times: dict[int, list[float]]
    onset: dict[int, list[float]]

    def quantile(self, status: int, q: float) -> float:
        return float(np.quantile(self.times[status], q))


async def _offer(connections: Sequence[Connection], rate: float, seconds: float) -> _Offered:
    # The one that waited longest comes first, so that none is closed as idle.
    idle, times = collections.deque(connections), collections.defaultdict(list)
    late, number = 0, 0
    lost: list[Exception] = []
    onset = collections.defaultdict(list)

    def start(connection: Connection, number: int) -> None:
        begin = time.perf_counter()

        def answered(status: int | Exception) -> None:
            if isinstance(status, int):
                kept = onset if begin < first + ONSET else times
                kept[status].append(time.perf_counter() - begin)
                idle.append(connection)
            else:
                lost.append(status)

        connection.start(number, answered)

    first = time.perf_counter()
    while (now := time.perf_counter() - first) < seconds:
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
    taken = time.perf_counter() - first
    return _Offered(number / taken, (len(onset[200]) + len(times[200])) / taken, late, times, onset)


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
