"""A minimal server of the DLRM with TensorFlow or torch: starlette, uvicorn and grpc.aio, and nothing it can do without.

It checks nothing and answers one request after another, as one would write it in an afternoon.

    python benchmarks/serve_peer.py torch PORT GRPC_PORT [SAVED_MODEL]
"""

import asyncio
import concurrent.futures
import json
import sys
from collections.abc import Callable
from typing import Any

import dlrm
import grpc
import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxembed.serve.server.messages import METHODS, SERVICE

Call = Callable[[dict[str, np.ndarray]], np.ndarray]
_TYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


def torch_model() -> Call:
    """F.embedding_bag of every feature and the model, as one frozen TorchScript program."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tables: list[Tensor] = [torch.from_numpy(dlrm.table(i)) for i in range(dlrm.FEATURES)]
            weights = dlrm.parameters()
            self.w0, self.w1, self.w2 = (torch.from_numpy(weights[name]) for name in ("w0", "w1", "w2"))
            self.i, self.j = (torch.from_numpy(part) for part in dlrm.PAIRS)

        def forward(self, ids: list[Tensor], splits: list[Tensor], dense: Tensor) -> Tensor:
            bottom = F.relu(dense @ self.w0)
            rows: list[Tensor] = [bottom]
            for i, table in enumerate(self.tables):
                rows.append(F.embedding_bag(ids[i], table, splits[i], mode="sum", include_last_offset=True))
            x = torch.stack(rows, 1)
            z = torch.bmm(x, x.transpose(1, 2))[:, self.i, self.j]
            return torch.sigmoid(F.relu(torch.cat([bottom, z], 1) @ self.w1) @ self.w2)[:, 0]

    model = torch.jit.freeze(torch.jit.script(Model().eval()))

    def call(tensors: dict[str, np.ndarray]) -> np.ndarray:
        ids = [torch.from_numpy(tensors[name]) for name in dlrm.NAMES]
        splits = [torch.from_numpy(tensors[name + ".row_splits"]).long() for name in dlrm.NAMES]
        with torch.inference_mode():
            return model(ids, splits, torch.from_numpy(tensors["dense"])).numpy()

    return call


def save_tensorflow(path: str) -> None:
    """The model as a SavedModel."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.tables = [tf.Variable(dlrm.table(i), trainable=False) for i in range(dlrm.FEATURES)]
            self.weights = {name: tf.Variable(w, trainable=False) for name, w in dlrm.parameters().items()}

        @tf.function(
            autograph=False,
            input_signature=[
                [tf.TensorSpec([None], tf.int64)] * dlrm.FEATURES,
                [tf.TensorSpec([None], tf.int32)] * dlrm.FEATURES,
                tf.TensorSpec([None, dlrm.DENSE], tf.float32),
            ],
        )
        def __call__(self, ids, splits, dense):
            bottom = tf.nn.relu(dense @ self.weights["w0"])
            rows = [bottom]
            for table, values, place in zip(self.tables, ids, splits, strict=True):
                ragged = tf.RaggedTensor.from_row_splits(values, tf.cast(place, tf.int64), validate=False)
                rows.append(tf.nn.embedding_lookup_sparse(table, ragged, None, combiner="sum"))
            x = tf.stack(rows, 1)
            z = tf.gather(
                tf.reshape(tf.matmul(x, x, transpose_b=True), [-1, (dlrm.FEATURES + 1) ** 2]), PLACES, axis=1
            )
            hidden = tf.nn.relu(tf.concat([bottom, z], 1) @ self.weights["w1"])
            return tf.sigmoid(hidden @ self.weights["w2"])[:, 0]

    PLACES = dlrm.PAIRS[0] * (dlrm.FEATURES + 1) + dlrm.PAIRS[1]
    tf.saved_model.save(Model(), path)


def tensorflow_model(path: str) -> Call:
    """The SavedModel."""
    import tensorflow as tf

    model = tf.saved_model.load(path)

    def call(tensors: dict[str, np.ndarray]) -> np.ndarray:
        ids = [tf.constant(tensors[name]) for name in dlrm.NAMES]
        splits = [tf.constant(tensors[name + ".row_splits"]) for name in dlrm.NAMES]
        return model(ids, splits, tf.constant(tensors["dense"])).numpy()

    return call


def make_app(call: Call, thread: concurrent.futures.Executor) -> Starlette:
    """The application: v2's infer, in JSON and with binary tensors."""

    async def infer(request: Request) -> Response:
        body = await request.body()
        header = request.headers.get("inference-header-content-length")
        data = json.loads(body if header is None else body[: int(header)])
        at, tensors = int(header or 0), {}
        for entry in data["inputs"]:
            dtype = _TYPES[entry["datatype"]]
            if header is None:
                array = np.array(entry["data"], dtype)
            else:
                size = entry["parameters"]["binary_data_size"]
                array = np.frombuffer(bytearray(body[at : at + size]), dtype)
                at += size
            tensors[entry["name"]] = array.reshape(entry["shape"])
        score = await asyncio.get_running_loop().run_in_executor(thread, call, tensors)
        output = {"name": "score", "datatype": "FP32", "shape": list(score.shape)}
        if header is None:
            return Response(json.dumps({"outputs": [{**output, "data": score.tolist()}]}))
        raw = score.tobytes()
        head = json.dumps({"outputs": [{**output, "parameters": {"binary_data_size": len(raw)}}]}).encode()
        return Response(head + raw, headers={"Inference-Header-Content-Length": str(len(head))})

    async def ready(request: Request) -> Response:
        return Response("{}")

    return Starlette(
        routes=[Route("/v2/models/model/infer", infer, methods=["POST"]), Route("/v2/health/ready", ready)]
    )


async def start_grpc(call: Call, thread: concurrent.futures.Executor, port: int) -> grpc.aio.Server:
    """Serves v2's ModelInfer, with raw contents."""
    request_type, response_type = METHODS["ModelInfer"]

    async def infer(request: Any, context: Any) -> Any:
        tensors = {}
        for entry, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            tensors[entry.name] = np.frombuffer(bytearray(raw), _TYPES[entry.datatype]).reshape(entry.shape)
        score = await asyncio.get_running_loop().run_in_executor(thread, call, tensors)
        response: Any = response_type(model_name="model", raw_output_contents=[score.tobytes()])
        response.outputs.add(name="score", datatype="FP32", shape=score.shape)
        return response

    handler = grpc.unary_unary_rpc_method_handler(
        infer, request_type.FromString, lambda message: message.SerializeToString()
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


async def main(kind: str, port: int, grpc_port: int, saved: str) -> None:
    """Serves over both."""
    call = torch_model() if kind == "torch" else tensorflow_model(saved)
    call(dlrm.request(1, 0))
    thread = concurrent.futures.ThreadPoolExecutor(1)
    server = await start_grpc(call, thread, grpc_port)
    config = uvicorn.Config(
        make_app(call, thread), port=port, access_log=False, log_level="error", http="httptools"
    )
    await uvicorn.Server(config).serve()
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
