"""A DLRM of 26 features for the serving benchmark: its weights, its bundle, and its requests.

bottom = relu(dense @ w0); x = [bottom, 26 bags]; z = pairs of rows of x, multiplied and summed
score = sigmoid(relu([bottom, z] @ w1) @ w2)
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FEATURES, VOCABULARY, DIM, DENSE, HIDDEN, VALENCY, MAX_IDS = 26, 100_000, 32, 13, 128, 8, 24
NAMES = [f"f{i:02d}" for i in range(FEATURES)]
PAIRS = np.triu_indices(FEATURES + 1, 1)


def parameters(seed: int = 0, hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    """The dense weights."""
    rng = np.random.default_rng(seed)
    shapes = {"w0": (DENSE, DIM), "w1": (DIM + len(PAIRS[0]), hidden), "w2": (hidden, 1)}
    return {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def table(feature: int, version: int = 0) -> np.ndarray:
    """The table of a feature."""
    return (
        np.random.default_rng(100 + feature + FEATURES * version)
        .normal(0, 0.1, (VOCABULARY, DIM))
        .astype(np.float32)
    )


def forward(params: Any, activations: Any, dense: Any) -> Any:
    """The model that jaxembed serves."""
    bottom = jax.nn.relu(dense["dense"] @ params["w0"])
    x = jnp.stack([bottom, *(activations[name] for name in NAMES)], axis=1)
    z = jnp.einsum("bid,bjd->bij", x, x)[:, PAIRS[0], PAIRS[1]]
    hidden = jax.nn.relu(jnp.concatenate([bottom, z], axis=1) @ params["w1"])
    return {"score": jax.nn.sigmoid(hidden @ params["w2"])[:, 0]}


def write_bundle(folder: pathlib.Path, version: int = 0, hidden: int = HIDDEN) -> None:
    """The bundle of the model, with other tables in each version, and with `hidden` another model."""
    from jaxembed import FeatureConfig, TableConfig
    from jaxembed.checkpoint import convert_to_bundle
    from jaxembed.optimizers import SGD
    from jaxembed.train import Checkpointer, ShardedEmbedding

    config = {n: FeatureConfig(TableConfig(VOCABULARY, DIM, combiner="sum", name=n)) for n in NAMES}
    own = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",)))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    tables = {name: jnp.asarray(table(i, version)) for i, name in enumerate(NAMES)}
    checkpoint = folder / f"checkpoint{version}"
    with Checkpointer(checkpoint, own) as checkpointer:
        checkpointer.save(own.from_canonical(tables, slots, version), model=parameters(hidden=hidden))
    convert_to_bundle(checkpoint, folder / "bundles")


def request(rows: int, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a request; 1 to 15 ids a row, 8 on average."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {"dense": rng.normal(size=(rows, DENSE)).astype(np.float32)}
    for name in NAMES:
        splits = np.concatenate([[0], np.cumsum(rng.integers(1, 2 * VALENCY, rows))]).astype(np.int32)
        tensors[name] = rng.integers(0, VOCABULARY, splits[-1]).astype(np.int64)
        tensors[name + ".row_splits"] = splits
    return tensors


def as_json(tensors: dict[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """The body of a v2 request in JSON, and its headers."""
    inputs = [{**_head(name, array), "data": array.ravel().tolist()} for name, array in tensors.items()]
    return json.dumps({"inputs": inputs}).encode(), {}


def as_binary(tensors: dict[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """The body of a v2 request with binary tensors, and its headers."""
    inputs = [
        {**_head(name, array), "parameters": {"binary_data_size": array.nbytes}}
        for name, array in tensors.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return head + b"".join(array.tobytes() for array in tensors.values()), headers


def as_grpc(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of a ModelInferRequest."""
    from jaxembed.serve.server.messages import METHODS

    message = METHODS["ModelInfer"][0](model_name="model")
    for name, array in tensors.items():
        head = _head(name, array)
        message.inputs.add(name=name, datatype=head["datatype"], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def _head(name: str, array: np.ndarray) -> dict[str, Any]:
    kinds = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}
    return {"name": name, "datatype": kinds[array.dtype.name], "shape": list(array.shape)}
