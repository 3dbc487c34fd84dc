"""Opens a serving bundle: tables are mapped, at no cost in time or memory, and verified when asked."""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_tables import CODES, ROWS
from jaxembed.checkpoint.delta import apply_delta
from jaxembed.checkpoint.digests import CheckpointError, Digests, digest_bytes
from jaxembed.checkpoint.files import read_regular
from jaxembed.checkpoint.safetensors_file import map_tensors
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.stored_quantized import StoredQuantized
from jaxembed.checkpoint.vocabularies import load_vocabularies, locate_vocabularies
from jaxembed.config import TableConfig
from jaxembed.features import feature_tables
from jaxembed.quantized_table import QuantizedTable

FORMAT = "jaxembed-bundle"
MANIFEST_FILE, MODEL_FILE, EXPORTED_FILE = "manifest.json", "model.safetensors", "model.stablehlo"


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle.

    Attributes:
      directory: of the version.
      step: number of training steps taken.
      feature_config: the feature configuration it was trained with.
      tables: by name, [V, D] arrays or QuantizedTables, read-only and (unless changed by a delta) mapped on
        64-byte boundaries: `jax.device_put` to a CPU device uses them in place.
      model: nested dicts and lists of mapped arrays, or None.
      metadata: what the trainer put in.
      digest: of its manifest, and so of everything in it.
      table_digests: by name, of the whole table: those of a chain of deltas are those of a full bundle.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      base_version: of which this is a delta, or None.
    """

    directory: pathlib.Path
    step: int
    feature_config: Any
    tables: dict[str, np.ndarray | QuantizedTable]
    model: Any
    metadata: dict[str, Any]
    digest: str
    table_digests: dict[str, str]
    _digests: list[tuple[str, np.ndarray, Digests]] = dataclasses.field(repr=False)
    _exported: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    combiner_weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base_version: int | None = None

    @functools.cached_property
    def exported(self) -> bytes | None:
        """The model as `jax.export` serialized it, tables as arguments; None if the bundle has none.

        Raises:
          CheckpointError: if it cannot be read, or is not what was written.
        """
        if self._exported is None:
            return None
        content = read_regular(self.directory / EXPORTED_FILE, self._exported["bytes"])
        if digest_bytes(content) != self._exported["digest"]:
            raise CheckpointError(
                f"{self.directory / EXPORTED_FILE} is damaged: it does not have the digest it was written with."
            )
        return content

    def stored(self) -> dict[str, StoredArray]:
        """The tables to be read by verified blocks of rows, codes as their values."""
        by_array = {id(array): (what, digests) for what, array, digests in self._digests}
        found: dict[str, StoredArray] = {}
        for name, table in self.tables.items():
            codes = table.codes if isinstance(table, QuantizedTable) else table
            what, digests = by_array[id(codes)]
            if isinstance(table, QuantizedTable):
                found[name] = StoredQuantized(what, codes, digests, table)
            else:
                found[name] = StoredArray(what, codes, digests)
        return found

    def verify(self, rest: float | None = None) -> None:
        """Compares all of it with its digests, on several threads; may run while it is in use.

        Args:
          rest: use one thread alone, which sleeps so many seconds for each second that it works, so that what
            else the process does comes first.

        Raises:
          CheckpointError: naming the first array and the rows that are damaged.
        """
        if rest is not None:
            for what, array, digests in self._digests:
                begin = time.perf_counter()
                digests.check(array, what, threads=1)
                time.sleep(rest * (time.perf_counter() - begin))
        else:
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                # Small arrays beside each other; a large one is spread over threads by itself.
                for _ in pool.map(lambda check: check[2].check(check[1], check[0]), self._digests):
                    pass
        _ = self.exported
        load_vocabularies(self.feature_config)


def is_bundle(path: str | pathlib.Path) -> bool:
    """Whether there is a bundle, or a folder of their versions, rather than a checkpoint."""
    path = pathlib.Path(path)
    return (path / MANIFEST_FILE).exists() or bool(_versions(path))


def open_bundle(path: str | pathlib.Path, version: int | None = None) -> Bundle:
    """Maps a bundle without reading its tables; `Bundle.verify` compares them with their digests.

    Args:
      path: of one version, or of the folder of versions.
      version: default: the latest.

    Raises:
      FileNotFoundError: if there is no such version.
      CheckpointError: if it is damaged or not a bundle.
    """
    directory = _directory(pathlib.Path(path).expanduser().absolute(), version)
    manifest = layout.read_manifest(directory, MANIFEST_FILE, FORMAT)
    try:
        base = _base(directory, manifest["base"])
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"the manifest of {directory} is incomplete: {type(e).__name__}: {e}.") from e
    return read_bundle(directory, manifest, base)


def read_bundle(directory: pathlib.Path, manifest: dict[str, Any], base: Bundle | None) -> Bundle:
    """The bundle in a folder, given its manifest and the version that it is a delta of.

    Raises:
      CheckpointError: if it is damaged.
    """
    try:
        feature_config = locate_vocabularies(layout.read_feature_config(manifest, directory), directory)
        if (directory / "tables").is_symlink():
            raise CheckpointError(f"{directory / 'tables'} is a symbolic link; a bundle holds its own files.")
        checks, tables = [], {}
        for name, config in feature_tables(feature_config).items():
            entry, what = manifest["tables"][name], f"bundle {directory}: table {name!r}"
            if entry.get("quantized") is not None:
                tables[name], parts = _quantized(directory, what, entry, config)
                checks += parts
                continue
            digests = Digests.from_json(entry["rows"])
            if digests.shape != _shape(config):
                raise CheckpointError(
                    f"{what} must be [{config.vocabulary_size}, {config.dim}], got {list(digests.shape)}."
                )
            tables[name] = _fit(what, _table(directory, what, entry, base and base.tables[name]), digests)
            checks.append((what, tables[name], digests))
        model = None
        if manifest["model"] is not None:
            leaves, mapped = manifest["model"]["leaves"], map_tensors(directory / MODEL_FILE)
            for key in leaves:
                what, digests = f"bundle {directory}: model leaf {key!r}", Digests.from_json(leaves[key])
                checks.append((what, _fit(what, mapped.get(key), digests), digests))
            model = _build(manifest["model"]["structure"], mapped)
        return Bundle(
            directory,
            manifest["step"],
            feature_config,
            tables,
            model,
            manifest["metadata"],
            layout.digest(manifest),
            {
                name: layout.table_digest(
                    manifest["tables"][name]["rows"], manifest["tables"][name].get("quantized")
                )
                for name in tables
            },
            checks,
            _exported_entry(manifest.get("exported")),
            layout.combiner_weights(manifest),
            None if base is None else int(base.directory.name),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"the manifest of {directory} is incomplete: {type(e).__name__}: {e}.") from e


def _base(directory: pathlib.Path, stored: Any) -> Bundle | None:
    """The version that a delta builds on."""
    if stored is None:
        return None
    version = stored["version"]
    # Versions that go down cannot run in a circle.
    if not isinstance(version, int) or not directory.name.isdecimal() or not 0 <= version < int(directory.name):
        raise CheckpointError(
            f"bundle {directory} is a delta of version {version!r:.40}, which is not below its own."
        )
    base = open_bundle(directory.parent, version)
    if base.digest != stored["digest"]:
        raise CheckpointError(
            f"bundle {directory} is a delta of another version {version} than the one beside it."
        )
    return base


def _exported_entry(stored: Any) -> dict[str, Any] | None:
    if stored is None:
        return None
    entry = {"bytes": stored["bytes"], "digest": stored["digest"]}
    if not isinstance(entry["bytes"], int) or not isinstance(entry["digest"], str):
        raise TypeError("exported must have its bytes and its digest")
    return entry


def _quantized(
    directory: pathlib.Path, what: str, entry: dict[str, Any], config: TableConfig
) -> tuple[QuantizedTable, list[tuple[str, np.ndarray, Digests]]]:
    """A table of codes, and what to compare its arrays with."""
    kind, mapped = entry["quantized"]["kind"], map_tensors(directory / _file(what, entry["file"]))
    stored, arrays, checks = {CODES: entry["rows"], **entry["quantized"]["arrays"]}, {}, []
    for name, (shape, dtype) in QuantizedTable.array_shapes(kind, *_shape(config)).items():
        part, digests = f"{what}, {name}", Digests.from_json(stored[name])
        if (digests.shape, digests.dtype) != (shape, dtype.name):
            raise CheckpointError(
                f"{part} must be {dtype.name}{list(shape)}, got {digests.dtype}{list(digests.shape)}."
            )
        arrays[name] = _fit(part, mapped.get(name), digests)
        checks.append((part, arrays[name], digests))
    return QuantizedTable(kind, config.dim, **arrays, dtype=config.dtype), checks


def _table(directory: pathlib.Path, what: str, entry: dict[str, Any], base: Any) -> Any:
    file = entry["file"] or entry.get("delta")
    mapped = {} if file is None else map_tensors(directory / _file(what, file))
    if entry["file"] is not None:
        return mapped.get(ROWS)
    if base is None or isinstance(base, QuantizedTable):
        reason = "the bundle is not a delta" if base is None else "the version below stores codes"
        raise CheckpointError(f"{what} has no file, and {reason}.")
    return base if file is None else apply_delta(directory / file, base, mapped)


def _shape(config: TableConfig) -> tuple[int, int]:
    return config.vocabulary_size, config.dim


def _file(what: str, file: str) -> str:
    if not re.fullmatch(r"tables/\d+\.safetensors", file):
        raise CheckpointError(f"{what} lies in {file!r:.80}, which is not a file of a bundle.")
    return file


def _directory(path: pathlib.Path, version: int | None) -> pathlib.Path:
    if version is None and (path / MANIFEST_FILE).exists():
        return path
    versions = _versions(path)
    if version is None and versions:
        version = versions[-1]
    if version not in versions:
        wanted = "bundle" if version is None else f"version {version} of a bundle"
        raise FileNotFoundError(f"no {wanted} at {path}; versions there are {versions}.")
    return path / str(version)


def _versions(path: pathlib.Path) -> list[int]:
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal() and (p / MANIFEST_FILE).is_file())


def _fit(what: str, array: Any, digests: Digests) -> np.ndarray:
    found = "nothing" if array is None else f"{array.dtype.name}{list(array.shape)}"
    if found != f"{digests.dtype}{list(digests.shape)}":
        raise CheckpointError(
            f"{what} is damaged: saved as {digests.dtype}{list(digests.shape)}, the file has {found}."
        )
    assert array is not None
    return array


def _build(structure: Any, leaves: dict[str, np.ndarray]) -> Any:
    if structure is None:
        return None
    if "dict" in structure:
        return {key: _build(child, leaves) for key, child in structure["dict"].items()}
    if "list" in structure:
        return [_build(child, leaves) for child in structure["list"]]
    return leaves[structure["leaf"]]
