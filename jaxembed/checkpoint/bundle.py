"""Converts a checkpoint into a serving bundle: one file per table, which is mapped instead of read.

    OUT/VERSION/
      manifest.json             format, step, feature configuration, metadata, files, digests
      tables/00000.safetensors  one tensor "rows" [V, D], its data 4096 bytes into the file; or "codes" and
                                "scale_bias", or "codebook": the arrays of a QuantizedTable
      model.safetensors         dense parameters; may be absent
      vocabularies/DIGEST.txt   vocabulary files of the feature configuration, if it names any
      model.stablehlo           the model as `jax.export` serializes it, tables as arguments; may be absent

A version may be a delta of an earlier one beside it: a table that did not change then has no file, and one
that did holds its changed rows, "ids" [n] and "rows" [n, D]. The digests are always those of the whole table.

A version is written beside its place and renamed, and never changed afterwards: those who map it rely on that.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import (
    EXPORTED_FILE,
    FORMAT,
    MANIFEST_FILE,
    MODEL_FILE,
    Bundle,
    open_bundle,
    read_bundle,
)
from jaxembed.checkpoint.bundle_tables import (
    QUANTIZATIONS,
    TableReport,
    keeps_its_rows,
    plan_report,
    write_table,
)
from jaxembed.checkpoint.delta import changed_rows, delta_bytes, delta_parts
from jaxembed.checkpoint.digests import digest_arrays, digest_bytes
from jaxembed.checkpoint.files import sync_folder, write_file
from jaxembed.checkpoint.reading import OpenedCheckpoint, flat_arrays, open_checkpoint
from jaxembed.checkpoint.safetensors_file import header_of
from jaxembed.checkpoint.scratch import scratch_folder
from jaxembed.checkpoint.stored import StoredArray, WatchedArray
from jaxembed.checkpoint.vocabularies import copy_vocabularies
from jaxembed.config import TableConfig
from jaxembed.features import feature_tables


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """What a conversion wrote: where, and each table."""

    path: pathlib.Path
    tables: tuple[TableReport, ...]


def convert_to_bundle(
    checkpoint: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    step: int | None = None,
    version: int | None = None,
    quantize: str | None = None,
    delta_from: int | None = None,
    select_model: Callable[[Any], Any] | None = None,
    exported: bytes | Callable[[Bundle], bytes] | None = None,
    advance: Callable[[int], Any] = lambda num_bytes: None,
    dry_run: bool = False,
) -> BundleReport:
    """Writes a checkpoint as `out`/`version`/, without slots, to be served from.

    Tables are read, verified and written by blocks of rows; no table is in memory as a whole.

    Args:
      checkpoint: a checkpoint directory, or one step in it.
      out: folder of the versions; created if needed.
      step: default: the latest whole one.
      version: default: the step.
      quantize: for tables without a quantization_config: None keeps their type, "bfloat16" rounds to it,
        "int8" and "int4" store codes with a scale and bias per row. Tables with a quantization_config become
        what training looked up: codes of 8 bits, or 4 for up to 16 buckets; rows of values for more than 256.
      delta_from: an earlier version in `out`; only rows that differ from it are written, and quantized
        tables whole. Needs that version to stay, and copies changed tables into memory when opened.
      select_model: called with the dense model, nested dicts and lists of arrays, to return what serving
        needs of it, such as `lambda model: model["params"]`. None keeps all.
      exported: the model as `jax.export` serializes it, with tables as arguments; or called with the bundle
        as it is written, before it is published, to return that. `Bundle.exported` gives it back.
      advance: called with the number of bytes of tables that were converted, now and then.
      dry_run: write nothing, and report what would be written, without errors of rounding.

    Raises:
      FileNotFoundError: if there is no such whole step.
      ValueError: if the checkpoint is damaged, the version is there already, or a table cannot be quantized.
    """
    opened = open_checkpoint(checkpoint, step)
    configs = feature_tables(opened.feature_config)
    number = opened.manifest["step"] if version is None else version
    target, base = check_version(out, number, quantize, delta_from)
    if dry_run:
        return BundleReport(target, plan_tables(opened.tables, configs, quantize, base))
    with scratch_folder(target.parent, str(number)) as scratch:
        (scratch / "tables").mkdir()
        reports, manifest = _write_arrays(scratch, opened, configs, quantize, base, select_model, advance)
        if exported is not None:
            manifest["exported"] = _write_exported(scratch, exported, manifest, base)
        write_file(scratch / MANIFEST_FILE, [json.dumps(layout.seal(manifest)).encode()])
        sync_folder(scratch / "tables")
        sync_folder(scratch)
        os.rename(scratch, target)
        sync_folder(target.parent)
    return BundleReport(target, tuple(reports))


def check_version(
    out: str | pathlib.Path, number: Any, quantize: str | None, delta_from: int | None
) -> tuple[pathlib.Path, Bundle | None]:
    """Where a new version goes, and the version that it is a delta of; arguments as `convert_to_bundle`.

    Raises:
      ValueError: if it is there already, or the arguments do not fit together.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {QUANTIZATIONS}, got {quantize!r}.")
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"version must be an int of at least 0, got {number!r}.")
    if delta_from is not None and (quantize is not None or not 0 <= delta_from < number):
        raise ValueError(
            f"delta_from must be a version below {number}, and without quantize, got {delta_from!r}, {quantize!r}."
        )
    target = pathlib.Path(out).expanduser().absolute() / str(number)
    if target.exists():
        raise ValueError(f"{target} exists, and may be in use; pass another version or remove it.")
    return target, None if delta_from is None else open_bundle(target.parent, delta_from)


def plan_tables(
    tables: Mapping[str, StoredArray],
    configs: Mapping[str, TableConfig],
    quantize: str | None,
    base: Bundle | None,
) -> tuple[TableReport, ...]:
    """What would be written, without digests and errors of rounding; of a delta the tables are read."""
    reports = []
    for name, array in tables.items():
        ids = _changed_rows(array, configs[name], base)
        if ids is None:
            reports.append(plan_report(name, array, configs[name], quantize))
        else:
            size = delta_bytes(array, ids)
            reports.append(TableReport(name, array.shape, array.dtype.name, size, 0.0, int(ids.size)))
    return tuple(reports)


def _changed_rows(array: StoredArray, config: TableConfig, base: Bundle | None) -> np.ndarray | None:
    if base is None or not keeps_its_rows(config):
        return None
    return changed_rows(array, base.stored().get(config.name))


def _write_arrays(
    scratch: pathlib.Path,
    opened: OpenedCheckpoint,
    configs: Mapping[str, TableConfig],
    quantize: str | None,
    base: Bundle | None,
    select_model: Callable[[Any], Any] | None,
    advance: Callable[[int], Any],
) -> tuple[list[TableReport], dict[str, Any]]:
    """Writes tables and dense model; the reports, and the manifest of them."""
    copy_vocabularies(opened.feature_config, scratch)
    model = opened.model()
    if select_model is not None and model is not None:
        model = select_model(model)
    reports, tables = [], {}
    for i, (name, array) in enumerate(opened.tables.items()):
        watched = WatchedArray(array.what, array.source, array.digests, advance)
        report, tables[name] = _write_table(
            scratch, f"tables/{i:05d}.safetensors", watched, configs[name], quantize, base
        )
        digest = layout.table_digest(tables[name]["rows"], tables[name].get("quantized"))
        reports.append(dataclasses.replace(report, digest=digest))
    return reports, {
        "format": FORMAT,
        "version": layout.VERSION,
        "step": opened.manifest["step"],
        "feature_config": opened.manifest["feature_config"],
        "metadata": opened.manifest["metadata"],
        "combiner_weights": opened.manifest.get("combiner_weights", {}),
        "tables": tables,
        "base": None if base is None else {"version": int(base.directory.name), "digest": base.digest},
        "model": None if model is None else _write_model(scratch / MODEL_FILE, model),
    }


def _write_table(
    scratch: pathlib.Path,
    file: str,
    array: StoredArray,
    config: TableConfig,
    quantize: str | None,
    base: Bundle | None,
) -> tuple[TableReport, dict[str, Any]]:
    ids = _changed_rows(array, config, base)
    if ids is None:
        report, entry = write_table(scratch / file, config.name, array, config, quantize)
        return report, {"file": file, **entry}
    if ids.size:
        unwatched = StoredArray(array.what, array.source, array.digests)  # it was read once already
        write_file(scratch / file, delta_parts(unwatched, ids))
    size = (scratch / file).stat().st_size if ids.size else 0
    assert array.digests is not None
    entry = {"file": None, "delta": file if ids.size else None, "rows": array.digests.to_json()}
    return TableReport(config.name, array.shape, array.dtype.name, size, 0.0, int(ids.size)), entry


def _write_model(file: pathlib.Path, model: Any) -> dict[str, Any]:
    leaves = {key: np.asarray(leaf) for key, leaf in flat_arrays(model).items()}
    header = header_of({key: (leaf.dtype, leaf.shape) for key, leaf in leaves.items()})
    write_file(file, [header, *(np.ascontiguousarray(leaf).tobytes() for leaf in leaves.values())])
    digests = digest_arrays(list(leaves.values()))
    return {
        "structure": _structure(model, ()),
        "leaves": {key: digest.to_json() for key, digest in zip(leaves, digests, strict=True)},
    }


def _write_exported(
    scratch: pathlib.Path,
    exported: bytes | Callable[[Bundle], bytes],
    manifest: dict[str, Any],
    base: Bundle | None,
) -> dict[str, Any]:
    content = exported(read_bundle(scratch, manifest, base)) if callable(exported) else exported
    if not isinstance(content, bytes | bytearray) or not content:
        raise ValueError(
            "exported must be, or return, the bytes that jax.export's Exported.serialize() gives, got "
            f"{type(content).__name__} of length {len(content) if isinstance(content, Sized) else 'none'}."
        )
    write_file(scratch / EXPORTED_FILE, [content])
    return {"bytes": len(content), "digest": digest_bytes(bytes(content))}


def _structure(tree: Any, path: tuple[str, ...]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {"dict": {key: _structure(child, (*path, str(key))) for key, child in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"list": [_structure(child, (*path, str(i))) for i, child in enumerate(tree)]}
    return {"leaf": ".".join(path)}
