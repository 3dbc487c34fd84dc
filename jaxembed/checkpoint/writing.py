"""Writes a step of a canonical checkpoint from blocks of rows, so that no table is in memory as a whole.

`jaxembed.train.Checkpointer` saves what is on devices; this is for tables that come from elsewhere.
"""

import collections
import errno
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.digests import BlockDigester, Digests, block_rows, num_rows
from jaxembed.checkpoint.files import disk_error, write_file

WRITE_BEHIND = 3
#: Of a chunk on disk, in blocks of one digest: about four megabytes.
CHUNK_BLOCKS = 4

Blocks = Iterable[tuple[int, np.ndarray]]
#: (shape, type, blocks of rows from the first to the last) of an array.
ArrayParts = tuple[tuple[int, ...], np.dtype, Blocks]


def write_step(
    directory: pathlib.Path,
    step: int,
    feature_config: str,
    tables: Mapping[str, ArrayParts],
    slots: Mapping[str, Mapping[str, ArrayParts]],
    metadata: dict[str, Any],
    combiner_weights: Mapping[str, Any],
    optimizers: Mapping[str, Any],
) -> None:
    """Fills a new, empty directory with a step, for the caller to rename into place.

    Args:
      directory: exists, and is empty.
      step: number of training steps taken.
      feature_config: as `feature_config_to_json` gives it; it names the tables.
      tables: by name, [V, D].
      slots: by table and slot name, [V, D] or [V].
      metadata: JSON-able, for the reader.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      optimizers: by table, what trained it, as `layout.optimizers` gives it.

    Raises:
      ValueError: if the blocks of an array are not all of its rows in order.
    """
    import orbax.checkpoint as ocp

    started = time.time_ns()
    slots = {name: arrays for name, arrays in slots.items() if arrays}
    table_paths = {(name,): parts for name, parts in tables.items()}
    slot_paths = {(name, slot): parts for name, arrays in slots.items() for slot, parts in arrays.items()}
    found = write_arrays(directory / layout.TABLES, table_paths, layout.encode_name)
    digests: dict[str, Any] = {layout.TABLES: {n: d.to_json() for (n,), d in found.items()}, layout.SLOTS: {}}
    if slots:
        found = write_arrays(directory / layout.SLOTS, slot_paths, layout.encode_name)
        for (name, slot), digest in found.items():
            digests[layout.SLOTS].setdefault(name, {})[slot] = digest.to_json()
    manifest = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "step": step,
        "feature_config": feature_config,
        "metadata": metadata,
        "combiner_weights": layout.combiner_weights_to_json(combiner_weights),
        "optimizers": dict(optimizers),
        "digests": digests,
    }
    (directory / layout.MANIFEST).mkdir()
    _write_json(directory / layout.MANIFEST / "metadata", layout.seal(manifest))
    array_handler, json_handler = ocp.PyTreeCheckpointHandler.typestr(), ocp.JsonCheckpointHandler.typestr()
    parts = [layout.TABLES, *([layout.SLOTS] if slots else [])]
    _write_json(
        directory / "_CHECKPOINT_METADATA",
        {
            "item_handlers": {layout.MANIFEST: json_handler, **dict.fromkeys(parts, array_handler)},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        },
    )


def write_arrays(
    part: pathlib.Path, arrays: Mapping[tuple[str, ...], ArrayParts], encode: Callable[[str], str] = str
) -> dict[tuple[str, ...], Digests]:
    """Writes nested dicts of arrays as Orbax does, by blocks of rows.

    Args:
      part: the folder; created.
      arrays: by path in the dicts.
      encode: makes the keys of the names in a path.

    Raises:
      ValueError: if the blocks of an array are not all of its rows in order.
    """
    digests = {
        path: _write_array(part, ".".join(map(encode, path)), " ".join(path), parts)
        for path, parts in arrays.items()
    }
    _write_json(part / "_METADATA", _tree({tuple(map(encode, path)): a[0] for path, a in arrays.items()}))
    return digests


def regrouped(blocks: Blocks, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same rows in blocks of `rows`, the last one maybe shorter."""
    start, held, count = 0, [], 0
    for _, block in blocks:
        while block.shape[0]:
            piece = block[: rows - count]
            held.append(piece)
            count += piece.shape[0]
            block = block[piece.shape[0] :]
            if count == rows:
                yield start, held[0] if len(held) == 1 else np.concatenate(held)
                start, held, count = start + count, [], 0
    if count:
        yield start, held[0] if len(held) == 1 else np.concatenate(held)


def _write_array(part: pathlib.Path, key: str, what: str, parts: ArrayParts) -> Digests:
    import tensorstore

    shape, dtype, blocks = parts
    rows = num_rows(shape)
    chunk = min(CHUNK_BLOCKS * block_rows(shape, dtype), rows)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{part}/"}, "path": f"{key}/"},
        "metadata": {
            "shape": list(shape),
            "chunks": [chunk, *shape[1:]],
            "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,
    }
    array = _written(part, tensorstore.open(spec, create=True, open=False))
    digester = BlockDigester(shape, dtype)
    pending: collections.deque[Any] = collections.deque()
    written = 0
    for start, piece in regrouped(blocks, chunk):
        if piece.dtype != dtype or piece.shape[1:] != shape[1:] or start + piece.shape[0] > rows:
            raise ValueError(
                f"{what} must come as {dtype.name}{list(shape)}, got {piece.dtype.name}{list(piece.shape)} at {start}."
            )
        piece = np.ascontiguousarray(piece)
        digester.update(piece)
        pending.append(array[start : start + piece.shape[0]].write(piece))
        if len(pending) > WRITE_BEHIND:
            _written(part, pending.popleft())
        written += piece.shape[0]
    for future in pending:
        _written(part, future)
    digests = digester.digests()
    if digests is None:
        raise ValueError(f"{what} must come with {rows} rows, got {written}.")
    return digests


def _written(part: pathlib.Path, future: Any) -> Any:
    """The result of what tensorstore writes."""
    try:
        return future.result()
    except Exception as e:  # tensorstore raises many types
        raise disk_error(e, part) or OSError(
            errno.EIO, f"tensorstore cannot write it: {str(e)[:300]}", str(part)
        ) from e


def _tree(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> dict[str, Any]:
    """What Orbax stores about nested dicts of arrays."""
    entries = {}
    for keys, shape in shapes.items():
        entries[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
    return {
        "tree_metadata": entries,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    write_file(file, [json.dumps(content).encode()])
