"""How long bodies near the limit of 64 MB keep a worker from everybody else.

While one client sends such a body, others ask for liveness and for predictions of one row: the longest that one of
them waited is the longest that the worker stood still, give or take what the two cores did meanwhile.

    python benchmarks/serve_large.py [--only NAME ...] [--repeat 1] [--folder FOLDER]
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import gzip
import http.client
import itertools
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import dlrm
import grpc
import numpy as np
import uvloop
from load import Connection, http_request

from serve import INFER, MODEL_INFER, prepare, server

PREDICT = "/v1/models/model:predict"
SIZE = 60 << 20
PAUSE = 0.005
ROWS, IDS = 8000, 24
_ready: dict[str, Any] = {}  # in the process that sends


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a line a body."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names that begin so")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the bundle, to use again")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(folder, tensorflow=False)
        ports = stack.enter_context(server("ours", folder))
        print(
            f"{'body':28} {'MB':>5} {'answer':>22} {'s':>6} {'longest wait, ms: live':>24} {'row':>6} {'idle client':>12}"
        )
        # A client of such a body would keep this process from seeing when answers come.
        sender = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        )
        for name in bodies():
            if options.only and not name.startswith(tuple(options.only)):
                continue
            size = sender.submit(made, name).result()
            for _ in range(options.repeat):
                line = uvloop.run(watch(ports, sender, name))
                print(f"{name:28} {size / 2**20:5.1f}", line, flush=True)
    return 0


def made(name: str) -> int:
    """Makes a body; its size."""
    _ready[name] = bodies()[name]()
    return _ready[name][1]


def sent(name: str, ports: tuple[int, int]) -> tuple[str, float]:
    """Sends a body that was made; the answer, and after how many seconds it came."""
    begin = time.perf_counter()
    return _ready[name][0](ports), time.perf_counter() - begin


async def watch(ports: tuple[int, int], sender: concurrent.futures.Executor, name: str) -> str:
    """Sends a body beside small requests; what they waited."""
    live = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    small = [http_request(INFER, *dlrm.as_binary(dlrm.request(1, seed))) for seed in range(8)]
    waits: dict[str, list[float]] = {"live": [], "row": [], "idle": []}
    async with Connection(ports[0], [live]) as health, Connection(ports[0], small) as rows:

        async def ask(name: str, connection: Connection) -> None:
            for number in itertools.count():
                begin = time.perf_counter()
                if await connection.send(number) != 200:
                    raise RuntimeError(f"a small request failed beside a large one: {connection.body[:200]!r}")
                waits[name].append(time.perf_counter() - begin)
                await asyncio.sleep(PAUSE)

        async def idle() -> None:
            while True:
                begin = time.perf_counter()
                await asyncio.sleep(PAUSE)
                waits["idle"].append(time.perf_counter() - begin - PAUSE)

        tasks = [asyncio.create_task(task) for task in (ask("live", health), ask("row", rows), idle())]
        await asyncio.sleep(0.3)
        for times in waits.values():
            times.clear()
        answer, seconds = await asyncio.wrap_future(sender.submit(sent, name, ports))
        await asyncio.sleep(0.2)
        broken = [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        if broken:
            raise RuntimeError("the connection of a small request broke") from broken[0]
    longest = {name: max(times) * 1e3 for name, times in waits.items()}
    return (
        f"{answer:>22.22} {seconds:6.2f} {longest['live']:24.0f} {longest['row']:6.0f} {longest['idle']:12.0f}"
    )


def bodies() -> dict[str, Callable[[], tuple[Callable[[tuple[int, int]], str], int]]]:
    """By name, what makes a way to send it, and its size."""

    def rest(path: str, body: bytes, headers: dict[str, str] | None = None):
        def send(ports: tuple[int, int]) -> str:
            connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=120)
            connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
            connection.close()
            return f"{answer.status} {'' if answer.status == 200 else text[10:].decode()}"

        return send, len(body)

    def rpc(body: bytes):
        def send(ports: tuple[int, int]) -> str:
            with grpc.insecure_channel(
                f"127.0.0.1:{ports[1]}", [("grpc.max_send_message_length", -1)]
            ) as channel:
                try:
                    channel.unary_unary(MODEL_INFER)(body, timeout=120)
                except grpc.RpcError as e:
                    return f"{e.code().name} {e.details()}"  # type: ignore[attr-defined]
            return "OK"

        return send, len(body)

    def v2(**changes: Any):
        body, headers = dlrm.as_json(_full(**changes))
        return rest(INFER, body + b" " * (SIZE - len(body)), headers)

    def binary(**changes: Any):
        return rest(INFER, *dlrm.as_binary(_full(**changes)))

    many = np.arange(SIZE // 8, dtype=np.int64)
    one_row = {"f00": many, "f00.row_splits": np.array([0, len(many)])}
    no_ids = {"f00": np.zeros(0, np.int64), "f00.row_splits": np.zeros(SIZE // 4, np.int32)}
    return {
        "json, good": v2,
        "json, a bad id": lambda: v2(f25=-1),
        "json, 20 M row splits": lambda: rest(INFER, dlrm.as_json(_few(no_ids, 0, SIZE // 3))[0]),
        "json, one row": lambda: rest(INFER, dlrm.as_json(_few(one_row, 1))[0]),
        "json, deep": lambda: rest(INFER, b"[" * SIZE),
        "json, empty lists": lambda: rest(INFER, _filled(b'{"inputs": [', b"[],", b"[]]}")),
        "json, objects": lambda: rest(INFER, _filled(b'{"inputs": [', b'{"a":1},', b"{}]}")),
        "json, a string": lambda: rest(INFER, _filled(b'{"id": "', b"x", b'"}')),
        "json, gzip": lambda: rest(INFER, gzip.compress(v2_text(), 1), {"Content-Encoding": "gzip"}),
        "gzip, 64 GB": lambda: rest(INFER, gzip.compress(bytes(1 << 30), 1), {"Content-Encoding": "gzip"}),
        "gzip, 64 MB of blanks": lambda: rest(INFER, gzip.compress(b" " * SIZE), {"Content-Encoding": "gzip"}),
        "binary, good": binary,
        "binary, a bad id": lambda: binary(f25=-1),
        "binary, 15 M row splits": lambda: rest(INFER, *dlrm.as_binary(no_ids)),
        "binary, one row": lambda: rest(INFER, *dlrm.as_binary(one_row)),
        "binary, strings": lambda: rest(INFER, *_strings()),
        "grpc, good": lambda: rpc(dlrm.as_grpc(_full())),
        "grpc, a bad id": lambda: rpc(dlrm.as_grpc(_full(f25=-1))),
        "grpc, 15 M row splits": lambda: rpc(dlrm.as_grpc(no_ids)),
        "grpc, contents": lambda: rpc(_contents()),
        "grpc, damaged": lambda: rpc(b"\x2a" * SIZE),
        "predict rows, good": lambda: rest(PREDICT, predict_rows(_full())),
        "predict rows, a bad id": lambda: rest(PREDICT, predict_rows(_full(f25=-1))),
        "predict rows, too many": lambda: rest(PREDICT, _filled(b'{"instances": [', b'{"a":1},', b"{}]}")),
        "predict rows, one": lambda: rest(PREDICT, _filled(b'{"instances": [{"f00": [', b"1234,", b"1]}]}")),
        "predict columns, good": lambda: rest(PREDICT, predict_columns(_full())),
        "predict columns, one row": lambda: rest(
            PREDICT, _filled(b'{"inputs": {"f00": [[', b"1234,", b"1]]}}")
        ),
    }


def v2_text() -> bytes:
    """A good request."""
    return dlrm.as_json(_full())[0]


def _full(**changes: int) -> dict[str, np.ndarray]:
    """A request of many rows; changes of the last id, by name."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {"dense": rng.normal(size=(ROWS, dlrm.DENSE)).astype(np.float32)}
    for name in dlrm.NAMES:
        tensors[name] = rng.integers(10_000, dlrm.VOCABULARY, ROWS * IDS)
        tensors[name + ".row_splits"] = np.arange(ROWS + 1, dtype=np.int32) * IDS
    for name, value in changes.items():
        tensors[name][-1] = value
    return tensors


def _few(tensors: dict[str, np.ndarray], rows: int, splits: int | None = None) -> dict[str, np.ndarray]:
    """The same rows, and all else that a request must have."""
    if splits is not None:
        tensors = {**tensors, "f00.row_splits": np.zeros(splits, np.int32)}
    return {**{k: v for k, v in dlrm.request(max(rows, 1), 0).items() if k not in tensors}, **tensors}


def predict_rows(tensors: dict[str, np.ndarray]) -> bytes:
    """As rows of TensorFlow Serving's predict."""
    columns = _nested(tensors)
    return json.dumps(
        {"instances": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}
    ).encode()


def predict_columns(tensors: dict[str, np.ndarray]) -> bytes:
    """As columns of TensorFlow Serving's predict."""
    return json.dumps({"inputs": _nested(tensors)}).encode()


def _nested(tensors: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {
        "dense": tensors["dense"].tolist(),
        **{n: tensors[n].reshape(ROWS, IDS).tolist() for n in dlrm.NAMES},
    }


def _filled(begin: bytes, part: bytes, end: bytes) -> bytes:
    return begin + part * ((SIZE - len(begin) - len(end)) // len(part)) + end


def _strings() -> tuple[bytes, dict[str, str]]:
    data = b"\1\0\0\0a" * (SIZE // 5)
    entry = {"name": "f00", "datatype": "BYTES", "shape": [SIZE // 5]}
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": len(data)}}]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def _contents() -> bytes:
    from jaxembed.serve.server.messages import METHODS

    message = METHODS["ModelInfer"][0](model_name="model")
    values = np.random.default_rng(0).integers(20_000, dlrm.VOCABULARY, SIZE // 3)
    message.inputs.add(name="f00", datatype="INT64", shape=[len(values)]).contents.int64_contents.extend(
        values.tolist()
    )
    return message.SerializeToString()


if __name__ == "__main__":
    sys.exit(main())
