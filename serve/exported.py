"""The artefact of `export_model`: what is in it, read and called without the code of the model.

    8 bytes   "JAXEMBED"
    8 bytes   length of the header, little endian
    header    JSON: parameters, activations, dense inputs, outputs, programs
    programs  one after the other, each a serialized `jax.export.Exported`

A program takes three lists: parameters, activations in the order of the feature configuration, dense inputs.
"""

import dataclasses
import functools
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export  # not loaded by jax itself
import numpy as np

from jaxembed import structure
from jaxembed.serialization import strict_json

MAGIC = b"JAXEMBED"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array: its name, its shape (without B, except of parameters) and its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A dense model in StableHLO, called as `model(params, activations, dense)` inside of a trace.

    Equal where its artefacts are, so that versions of one model can share compiled programs.

    Attributes:
      params: in the order in which they are passed, named by their path, such as "top.layers.0.kernel".
      activations: one of every feature, named by its path.
      dense: the dense inputs.
      outputs: structure of the result, and its leaves.
      limits: by path of a feature, the largest number of ids of one row.
      weighted: paths of the features that take weights.
      programs: by batch size, or one for all of them under None.
    """

    params: tuple[ArraySpec, ...]
    activations: tuple[ArraySpec, ...]
    dense: tuple[ArraySpec, ...]
    outputs: tuple[Any, tuple[ArraySpec, ...]]
    limits: dict[str, int]
    weighted: tuple[str, ...]
    programs: dict[int | None, bytes]

    def __hash__(self) -> int:
        return hash((self.params, self.activations, self.dense))

    @property
    def batch_sizes(self) -> list[int] | None:
        """The batch sizes that it runs at; None for all."""
        return None if None in self.programs else sorted(size for size in self.programs if size)

    def __call__(self, params: Sequence[Any], activations: Any, dense: Mapping[str, Any]) -> Any:
        """The model's outputs.

        Args:
          params: arrays in the order of `self.params`.
          activations: as the feature configuration; [B, D], or [B, L, D] for sequences. Those of tables that are stored in
            another type, as bundles may have them, become the model's.
          dense: by name, [B, ...] float32 arrays.

        Raises:
          ValueError: if activations or dense inputs are not those that it was exported for, or it does not run at B.
        """
        named = {structure.join(path): leaf for path, leaf in structure.flatten(activations)}
        leaves = _in_order("features", named, self.activations)
        leaves = [leaf.astype(spec.dtype) for leaf, spec in zip(leaves, self.activations, strict=True)]
        numbers = _in_order("dense inputs", dense, self.dense)
        program = self._program(leaves[0].shape[0])
        results: Any = program.call(list(params), leaves, numbers)
        return build(self.outputs[0], results)

    def arrange(self, params: Any) -> list[np.ndarray]:
        """The leaves of nested dicts and lists of parameters, in the order of `self.params`.

        Raises:
          ValueError: if one is missing, or of another shape or type.
        """
        named = flat_params(params)
        for spec in self.params:
            leaf = named.get(spec.name)
            found = "nothing" if leaf is None else f"{leaf.dtype.name}{list(leaf.shape)}"
            if found != f"{spec.dtype}{list(spec.shape)}":
                raise ValueError(
                    f"the exported model needs parameter {spec.name!r} of {spec.dtype}{list(spec.shape)}, got {found}; "
                    "convert with the dense model's parameters at the top: select_model=lambda model: ..."
                )
        return [named[spec.name] for spec in self.params]

    def to_bytes(self) -> bytes:
        """The artefact."""
        programs = list(self.programs.items())
        header = {
            "version": VERSION,
            "params": [dataclasses.asdict(spec) for spec in self.params],
            "activations": [dataclasses.asdict(spec) for spec in self.activations],
            "dense": [dataclasses.asdict(spec) for spec in self.dense],
            "outputs": [self.outputs[0], [dataclasses.asdict(spec) for spec in self.outputs[1]]],
            "limits": self.limits,
            "weighted": list(self.weighted),
            "programs": [[batch, len(program)] for batch, program in programs],
        }
        text = json.dumps(header).encode()
        return b"".join([MAGIC, struct.pack("<Q", len(text)), text, *(program for _, program in programs)])

    @classmethod
    def from_bytes(cls, data: bytes) -> "ExportedModel":
        """The inverse of `to_bytes`.

        Raises:
          ValueError: if `data` is no such artefact, or of another version.
        """
        try:
            (length,) = struct.unpack_from("<Q", data, len(MAGIC))
            start = len(MAGIC) + 8 + length
            header = strict_json(data[len(MAGIC) + 8 : start]) if data.startswith(MAGIC) else {}
            if header["version"] != VERSION:
                raise ValueError(f"it has version {header['version']!r}, this jaxembed reads {VERSION}")
            programs = {}
            for batch, size in header["programs"]:
                programs[batch] = data[start : start + size]
                start += size
            if start != len(data):
                raise ValueError(f"it has {len(data)} bytes, its header says {start}")
            parts = {name: tuple(map(_spec, header[name])) for name in ("params", "activations", "dense")}
            tree, leaves = header["outputs"]
            outputs = (tree, tuple(map(_spec, leaves)))
            return cls(
                **parts,
                outputs=outputs,
                limits=header["limits"],
                weighted=tuple(header["weighted"]),
                programs=programs,
            )
        except (struct.error, KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"not an exported model: {type(e).__name__}: {e}; pass what jaxembed.serve.export_model returns."
            ) from e

    def _program(self, batch: Any) -> jax.export.Exported:
        key = None if None in self.programs else batch
        if key not in self.programs:
            raise ValueError(
                f"the exported model runs at batch sizes {self.batch_sizes}, got {batch}; export it for that one."
            )
        return self._exported[key]

    @functools.cached_property
    def _exported(self) -> dict[int | None, jax.export.Exported]:
        return {key: jax.export.deserialize(bytearray(program)) for key, program in self.programs.items()}


def flat_params(params: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, such as "top.layers.0.kernel".

    Raises:
      ValueError: if two leaves share a path.
    """
    named = {}
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise ValueError(f"params has two leaves at {name!r}; rename a key that holds '.'.")
        named[name] = leaf
    return named


def describe(tree: Any, leaves: list[tuple[str, Any]], path: tuple[str, ...] = ()) -> Any:
    """The structure of dicts, lists and tuples in JSON; its leaves, with their paths, go to `leaves`.

    A namedtuple is described as a dict of its fields.

    Raises:
      ValueError: if it holds anything else.
    """
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()  # type: ignore[attr-defined]
    if isinstance(tree, Mapping):
        return {"dict": {str(k): describe(child, leaves, (*path, str(k))) for k, child in tree.items()}}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [describe(child, leaves, (*path, str(i))) for i, child in enumerate(tree)]}
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype"):
        raise ValueError(
            f"model must return arrays in dicts, lists and tuples to be exported, got {type(tree).__name__} at "
            f"{structure.join(path)!r}."
        )
    leaves.append((structure.join(path), tree))
    return {"leaf": len(leaves) - 1}


def build(described: Any, leaves: Sequence[Any]) -> Any:
    """The inverse of `describe`."""
    if "leaf" in described:
        return leaves[described["leaf"]]
    if "dict" in described:
        return {key: build(child, leaves) for key, child in described["dict"].items()}
    kind, make = ("list", list) if "list" in described else ("tuple", tuple)
    return make(build(child, leaves) for child in described[kind])


def _in_order(what: str, given: Any, specs: Sequence[ArraySpec]) -> list[Any]:
    """The arrays of `given`, by name, in the order of `specs`.

    Raises:
      ValueError: if one is missing or unknown, no array, or of another shape.
    """
    names = [spec.name for spec in specs]
    if not isinstance(given, Mapping) or given.keys() != set(names):
        received = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(
            f"the exported model takes the {what} {names}, got {received}; pass all of them, and no other."
        )
    for spec in specs:
        shape = getattr(given[spec.name], "shape", None)
        if not shape or tuple(shape[1:]) != spec.shape:
            found = type(given[spec.name]).__name__ if shape is None else list(shape)
            wanted = ", ".join(map(str, ("B", *spec.shape)))
            raise ValueError(
                f"the exported model takes the {what} as arrays, {spec.name!r} as [{wanted}], got {found}."
            )
    return [given[name] for name in names]


def _spec(data: dict[str, Any]) -> ArraySpec:
    return ArraySpec(data["name"], tuple(data["shape"]), data["dtype"])
