"""The dense model of a bundle: its leaves in a safetensors file, its structure in the manifest."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import digest_arrays
from jaxembed.checkpoint.files import write_file
from jaxembed.checkpoint.reading import flat_arrays
from jaxembed.checkpoint.safetensors_file import header_of


def model_file(model: Any) -> tuple[bytes, dict[str, np.ndarray]]:
    """The beginning of the file of a dense model, and the leaves that follow.

    Raises:
      ValueError: if safetensors cannot hold it, or its structure could not be read back.
    """
    leaves = {key: np.asarray(leaf) for key, leaf in flat_arrays(model).items()}
    if strange := sorted(leaves.keys() ^ set(_leaf_names(_structure(model, ())))):
        raise ValueError(
            "the model must be dicts, lists and tuples of arrays, got another structure around the leaf "
            f"{strange[0]!r:.80}; have select_model return a dict in place of a named tuple or an object."
        )
    if "__metadata__" in leaves:
        raise ValueError("the model has a leaf '__metadata__', which safetensors keeps for itself; rename it.")
    return header_of({key: (leaf.dtype, leaf.shape) for key, leaf in leaves.items()}), leaves


def write_model(file: pathlib.Path, model: Any) -> dict[str, Any]:
    """Writes a dense model; its entry in the manifest."""
    header, leaves = model_file(model)
    write_file(file, [header, *(np.ascontiguousarray(leaf).tobytes() for leaf in leaves.values())])
    digests = digest_arrays(list(leaves.values()))
    return {
        "structure": _structure(model, ()),
        "leaves": {key: digest.to_json() for key, digest in zip(leaves, digests, strict=True)},
    }


def _structure(tree: Any, path: tuple[str, ...]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {"dict": {key: _structure(child, (*path, str(key))) for key, child in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"list": [_structure(child, (*path, str(i))) for i, child in enumerate(tree)]}
    return {"leaf": ".".join(path)}


def _leaf_names(structure: Any) -> Iterator[str]:
    if structure is not None and "leaf" in structure:
        yield structure["leaf"]
    elif structure is not None:
        children = structure["dict"].values() if "dict" in structure else structure["list"]
        for child in children:
            yield from _leaf_names(child)
