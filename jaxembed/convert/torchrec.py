"""TorchRec EmbeddingBagCollection state dicts: a torch checkpoint, a safetensors file, or a sharded checkpoint's folder.

A table is `embedding_bags.NAME.weight`, behind whatever prefix the model gives it (`embeddings.NAME.weight` of
an EmbeddingCollection); a fused optimizer's state is beside it, `....NAME.weight.NAME.momentum1`.

| optimizer | first state | second state |
|---|---|---|
| Adagrad | momentum1 (of FBGEMM sum): accumulators | |
| Row-wise Adagrad | momentum1 (sum), [V]: row_accumulators | |
| Adam | momentum1 (exp_avg): momenta | exp_avg_sq (momentum2): velocities |

References:
  `EmbeddingFusedOptimizer` of TorchRec; `SplitTableBatchedEmbeddingBagsCodegen.get_optimizer_state` of FBGEMM;
  `torch.distributed.checkpoint.save`.
"""

import importlib
import itertools
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.files import write_file
from jaxembed.checkpoint.safetensors_file import header_of, map_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.arrays import bits, refuse_types
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream
from jaxembed.convert.keys import key_for, place_arrays
from jaxembed.convert.mapped import mapped_rows
from jaxembed.convert.torch_distributed import is_folder, read_folder
from jaxembed.convert.torch_file import read_file

COMBINER_WEIGHTS = False
KEYS = True
COMBINER = "sum"
SUFFIXES = (".pt", ".pth")
#: One value a row, as row-wise Adagrad has; the slot of a CustomOptimizer of its rule, and TorchRec gets it back.
ROW_ACCUMULATORS = "row_accumulators"
MODEL, OPTIMIZER = "model", "optimizer"
_TABLE = re.compile(r"(?:^|\.)(?:embedding_bags|embeddings)\.([^.]+)\.weight(?:\.\1\.(\w+))?$")
_FIRST, _ADAGRAD = ("momentum1", "momentum_1", "sum"), ("accumulators", ROW_ACCUMULATORS)
_ADAM = {"momentum1": "momenta", "exp_avg": "momenta", "exp_avg_sq": "velocities", "momentum2": "velocities"}
#: By the slots of a table.
_STATES = {
    ("accumulators",): {"accumulators": "momentum1"},
    (ROW_ACCUMULATORS,): {ROW_ACCUMULATORS: "momentum1"},
    ("momenta", "velocities"): {"momenta": "momentum1", "velocities": "exp_avg_sq"},
}


def without_slots(out: pathlib.Path) -> str | None:
    """Fused optimizers keep their state sharded, and read it in no other form."""
    if _is_file(out):
        return "which torchrec reads from a sharded checkpoint only: a name without a suffix makes one"
    return None


def _is_file(out: pathlib.Path) -> bool:
    return out.suffix in (*SUFFIXES, ".safetensors")


def matches(path: pathlib.Path) -> bool:
    """Whether it is a torch checkpoint, a sharded one, or a safetensors file with such names."""
    if is_folder(path):
        return True
    if path.suffix in SUFFIXES:
        return path.is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return any(_TABLE.search(name) for name in map_file(path)[0])
    except ValueError:
        return False


def read(path: pathlib.Path, options: Options) -> Source:
    """Maps the file, or the files of a sharded checkpoint."""
    if is_folder(path):
        arrays, others = read_folder(path)
    elif path.suffix == ".safetensors":
        tensors, _, others = map_file(path)
        arrays = {name: StoredArray(f"{path}: {name}", tensor) for name, tensor in tensors.items()}
    else:
        arrays, others = read_file(path)
    shapes = {
        found[1]: array.shape for key, array in arrays.items() if (found := _TABLE.search(key)) and not found[2]
    }

    def guess(key: str, array: StoredArray) -> Place | None:
        found = _TABLE.search(key)
        if found is None or found[2] is None:
            return found and (found[1], None)
        beside = {other.removeprefix(key[: -len(found[2])]) for other in arrays}
        shape = shapes.get(found[1], ())
        if array.shape not in (shape, shape[:1]):
            return None
        if beside & {"exp_avg_sq", "momentum2"}:
            slot = _ADAM.get(found[2]) if array.shape == shape else None
        else:
            slot = _ADAGRAD[array.shape != shape] if found[2] in _FIRST else None
        return (found[1], slot) if slot else None

    tables, slots, notes = place_arrays(path, arrays, options, guess, others)
    if any(ROW_ACCUMULATORS in of_table for of_table in slots.values()):
        notes += (
            f"{ROW_ACCUMULATORS} are of row-wise Adagrad, one a row: to train on from them takes a CustomOptimizer with its "
            "rule, which docs/tutorials/torchrec.md has",
        )
    if options.step is None and any("velocities" in of_table for of_table in slots.values()):
        notes += (
            "velocities are of Adam, whose bias correction starts anew from step 0; give the number of steps taken with "
            "--step",
        )
    return Source(tables, slots, notes=notes)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that torch shares with numpy and bfloat16; of names, those of modules; of slots, those of its optimizers."""
    refuse_types(contents, "torch", ("float32", "float16", "bfloat16", "float64"))
    _names(contents)
    if out.suffix != ".safetensors":
        needed("torch", "torchrec")
    if not _is_file(out):
        _slots(contents)


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a state dict that `load_state_dict` of the collection takes; without a suffix a sharded checkpoint, with slots."""
    names = _names(contents)
    notes = [f"table {stream.table!r} -> {name}" for name, stream in names.items()]
    if out.suffix == ".safetensors":
        write_file(out, _safetensors(names))
    elif _is_file(out):
        torch: Any = needed("torch", "torchrec")
        torch.save({name: _tensor(out, i, stream) for i, (name, stream) in enumerate(names.items())}, out)
    else:
        notes += _save_sharded(out, contents, names)
    return notes


def _names(contents: Contents) -> dict[str, Stream]:
    """The tables by their names in a state dict."""
    names: dict[str, Stream] = {}
    for stream in contents.tables:
        key = key_for(contents.options, (stream.table, None))
        if key is None and "." in stream.table:
            raise ValueError(f"table {stream.table!r} cannot be a module of torch, for its '.'; give it a key.")
        name = key or f"embedding_bags.{stream.table}.weight"
        if name in names:
            raise ValueError(
                f"tables {names[name].table!r} and {stream.table!r} would both be {name}; give one a key."
            )
        names[name] = stream
    return names


def _slots(contents: Contents) -> dict[str, dict[str, Stream]]:
    """The slots by table and name, each table with those of an optimizer that TorchRec has."""
    slots: dict[str, dict[str, Stream]] = {}
    for stream in contents.slots:
        slots.setdefault(stream.table, {})[str(stream.slot)] = stream
    for table, of_table in slots.items():
        if tuple(sorted(of_table)) not in _STATES:
            raise ValueError(
                f"table {table!r} has the slots {sorted(of_table)}, which no fused optimizer of TorchRec has (Adagrad and "
                "Adam do); write a .pt or .safetensors file, which has the tables alone."
            )
    return slots


def _save_sharded(out: pathlib.Path, contents: Contents, names: Mapping[str, Stream]) -> list[str]:
    checkpoint: Any = importlib.import_module("torch.distributed.checkpoint")
    slots = _slots(contents)
    count = itertools.count()
    state: dict[str, Any] = {MODEL: {name: _tensor(out, next(count), stream) for name, stream in names.items()}}
    notes = []
    for name, table in names.items():
        module = found[1] if (found := _TABLE.search(name)) else table.table
        for slot, stream in slots.get(table.table, {}).items():
            key = f"{module}.{_STATES[tuple(sorted(slots[table.table]))][slot]}"
            of_key = state.setdefault(OPTIMIZER, {"state": {}})["state"].setdefault(name, {})
            of_key[key] = _tensor(out, next(count), stream)
            notes.append(f"slot {slot!r} of table {table.table!r} -> {OPTIMIZER}.state.{name}.{key}")
    with warnings.catch_warnings():
        # It says that it saves in one process.
        warnings.simplefilter("ignore")
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(out), no_dist=True)
    wanted = (
        f'{{"{MODEL}": model.state_dict()' + (f', "{OPTIMIZER}": optimizer.state_dict()' if slots else "") + "}"
    )
    notes.append(f"load it with torch.distributed.checkpoint.load({wanted}, checkpoint_id=...)")
    if names.keys() - (contents.options.keys or {}):
        notes.append(
            "model is an EmbeddingBagCollection by itself: keys (--keys) name the arrays of a model around it, or of an "
            "EmbeddingCollection"
        )
    return notes


def _safetensors(names: Mapping[str, Stream]) -> Iterator[Any]:
    yield header_of({name: (stream.dtype, stream.shape) for name, stream in names.items()}, {"format": "pt"})
    for stream in names.values():
        for _, rows in stream.blocks():
            yield rows.reshape(-1).view(np.uint8).data


def _tensor(out: pathlib.Path, i: int, stream: Stream) -> Any:
    """The i-th array to be written: torch saves whole tensors, so these are mapped files and need no memory."""
    torch: Any = needed("torch", "torchrec")
    tensor = torch.from_numpy(
        mapped_rows(out.parent / f"rows-{i}", stream, stream.blocks(), bits(stream.dtype))
    )
    return tensor.view(torch.bfloat16) if stream.dtype == ml_dtypes.bfloat16 else tensor
