"""Opens a serving bundle: tables are mapped, at no cost in time or memory, and verified when asked."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_table_reading import fitting, map_part, open_table
from jaxembed.checkpoint.digests import CheckpointError, Digests, digest_bytes
from jaxembed.checkpoint.files import absolute_path, is_number, read_regular
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.stored_quantized import StoredQuantized
from jaxembed.checkpoint.table_form import CODES, ROWS
from jaxembed.checkpoint.vocabularies import load_vocabularies, locate_vocabularies
from jaxembed.features import feature_tables
from jaxembed.quantized_table import QuantizedTable

FORMAT = "jaxembed-bundle"
#: In a chain: each is opened with the ones that follow.
MAX_DELTAS = 64
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
      parts: by table and name of the array, what is stored, to be read by verified rows.
      table_digests: by name, of the whole table: those of a chain of deltas are those of a full bundle.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      base_version: of which this is a delta, or None.
      deltas: how long the chain of deltas is that ends here.
    """

    directory: pathlib.Path
    step: int
    feature_config: Any
    tables: dict[str, np.ndarray | QuantizedTable]
    model: Any
    metadata: dict[str, Any]
    digest: str
    table_digests: dict[str, str]
    parts: dict[str, dict[str, StoredArray]] = dataclasses.field(repr=False)
    _leaves: list[StoredArray] = dataclasses.field(repr=False)
    _exported: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    combiner_weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    base_version: int | None = None
    deltas: int = 0

    @property
    def has_exported(self) -> bool:
        """Whether it has the model as `jax.export` serialized it."""
        return self._exported is not None

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
        found: dict[str, StoredArray] = {}
        for name, table in self.tables.items():
            if isinstance(table, QuantizedTable):
                codes = self.parts[name][CODES]
                found[name] = StoredQuantized(codes.what, codes.source, codes.digests, table)
            else:
                found[name] = self.parts[name][ROWS]
        return found

    def verify(self, rest: float | None = None) -> None:
        """Compares all of it with its digests, on several threads; may run while it is in use.

        Args:
          rest: use one thread alone, which sleeps so many seconds for each second that it works, so that what
            else the process does comes first.

        Raises:
          CheckpointError: naming the first array and the rows that are damaged.
        """
        parts = [(name, part) for name, of_table in self.parts.items() for part in of_table.values()]
        checks = [*parts, *((None, leaf) for leaf in self._leaves)]
        if rest is not None:
            for table, part in checks:
                begin = time.perf_counter()
                self._check(table, part, threads=1)
                time.sleep(rest * (time.perf_counter() - begin))
        else:
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                # Small arrays beside each other; a large one is spread over threads by itself.
                for _ in pool.map(lambda check: self._check(*check), checks):
                    pass
        _ = self.exported
        load_vocabularies(self.feature_config)

    def verify_table(self, name: str) -> None:
        """Compares one table with its digests.

        Raises:
          CheckpointError: naming the rows that are damaged.
        """
        for part in self.parts[name].values():
            self._check(name, part)

    def _check(self, table: str | None, part: StoredArray, threads: int | None = None) -> None:
        assert part.digests is not None
        try:
            part.digests.check(part.source, part.what, threads=threads)
        except CheckpointError:
            if table is not None and self.base_version is not None:
                # The rows may be those of the version below: then its folder is the one to replace.
                with contextlib.suppress(FileNotFoundError):  # it may be gone by now
                    base = open_bundle(self.directory.parent, self.base_version)
                    if table in base.tables:
                        base.verify_table(table)
            raise


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
      UnregisteredError: if a combiner is not registered.
    """
    directory = _followed(_directory(absolute_path(path), version))
    (directory, manifest), *deltas = reversed(_chain(directory))
    bundle = read_bundle(directory, manifest, None)
    for directory, manifest in deltas:
        if bundle.digest != manifest["base"].get("digest"):
            raise CheckpointError(
                f"bundle {directory} is a delta of another version {bundle.directory.name} than the one beside it."
            )
        bundle = read_bundle(directory, manifest, bundle)
    return bundle


def read_bundle(directory: pathlib.Path, manifest: dict[str, Any], base: Bundle | None) -> Bundle:
    """The bundle in a folder, given its manifest and the version that it is a delta of.

    Raises:
      CheckpointError: if it is damaged.
      UnregisteredError: if a combiner is not registered.
    """
    try:
        feature_config = locate_vocabularies(layout.read_feature_config(manifest, directory), directory)
        if (directory / "tables").is_symlink():
            raise CheckpointError(f"{directory / 'tables'} is a symbolic link; a bundle holds its own files.")
        parts, tables, leaves, model = {}, {}, [], None
        for name, config in feature_tables(feature_config).items():
            tables[name], parts[name] = open_table(directory, name, manifest["tables"][name], config, base)
        if manifest["model"] is not None:
            stored, mapped = (
                manifest["model"]["leaves"],
                map_part(f"bundle {directory}: model", directory / MODEL_FILE),
            )
            for key in stored:
                what = f"bundle {directory}: model leaf {key!r}"
                leaves.append(fitting(what, mapped.get(key), Digests.from_json(stored[key], what)))
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
            parts,
            leaves,
            _exported_entry(manifest.get("exported")),
            layout.combiner_weights(manifest),
            None if base is None else int(base.directory.name),
            0 if base is None else base.deltas + 1,
        )
    except (LookupError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"the manifest of {directory} is incomplete: {type(e).__name__}: {e}.") from e


def _chain(directory: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """A version and the versions below it, each a delta of the next, with their manifests; the last is whole."""
    chain = [(directory, layout.read_manifest(directory, MANIFEST_FILE, FORMAT))]
    while (below := _below(*chain[-1])) is not None:
        if len(chain) > MAX_DELTAS:
            raise CheckpointError(
                f"bundle {directory} ends a chain of more than {MAX_DELTAS} deltas, which is more than are opened; convert "
                "its checkpoint again, without delta_from (--delta-from)."
            )
        chain.append((below, layout.read_manifest(below, MANIFEST_FILE, FORMAT)))
    return chain


def _below(directory: pathlib.Path, manifest: dict[str, Any]) -> pathlib.Path | None:
    """The folder of the version that a delta builds on."""
    try:
        version = None if manifest["base"] is None else manifest["base"]["version"]
    except (LookupError, TypeError) as e:
        raise CheckpointError(f"the manifest of {directory} is incomplete: {type(e).__name__}: {e}.") from e
    if manifest["base"] is None:
        return None
    # Versions that go down cannot run in a circle.
    if type(version) is not int or not directory.name.isdecimal() or not 0 <= version < int(directory.name):
        raise CheckpointError(
            f"bundle {directory} is a delta of version {version!r:.40}, which is not below its own."
        )
    try:
        return _directory(directory.parent, version)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"bundle {directory} is a delta of version {version}, which is gone: {e}"
        ) from e


def _exported_entry(stored: Any) -> dict[str, Any] | None:
    if stored is None:
        return None
    entry = {"bytes": stored["bytes"], "digest": stored["digest"]}
    if not isinstance(entry["bytes"], int) or not isinstance(entry["digest"], str):
        raise TypeError("exported must have its bytes and its digest")
    return entry


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


def _followed(directory: pathlib.Path) -> pathlib.Path:
    """The folder itself, where links such as "current" lead to it; deltas find what they build on beside it.

    A link that is named by a version stays: it is beside the others.
    """
    while directory.is_symlink() and not is_number(directory.name):
        directory = absolute_path(directory.parent / os.readlink(directory))
    return directory


def _versions(path: pathlib.Path) -> list[int]:
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if is_number(p.name) and (p / MANIFEST_FILE).is_file())


def _build(structure: Any, leaves: dict[str, np.ndarray]) -> Any:
    if structure is None:
        return None
    if "dict" in structure:
        return {key: _build(child, leaves) for key, child in structure["dict"].items()}
    if "list" in structure:
        return [_build(child, leaves) for child in structure["list"]]
    return leaves[structure["leaf"]]
