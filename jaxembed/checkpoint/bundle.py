"""Converts a checkpoint into a serving bundle: one file per table, which is mapped instead of read.

    OUT/VERSION/
      manifest.json             format, step, feature configuration, metadata, files, digests
      tables/00000.safetensors  one tensor "rows" [V, D], its data 4096 bytes into the file; or "codes" and
                                maybe "codebook": the arrays of a QuantizedTable
      model.safetensors         dense parameters; may be absent
      vocabularies/DIGEST.txt   vocabulary files of the feature configuration, if it names any
      model.stablehlo           the model as `jax.export` serializes it, tables as arguments; may be absent

A version may be a delta of an earlier one beside it: a table that did not change then has no file, and one
that did holds its changed rows, "ids" [n] and "rows" [n, D], or "codes" [n, ...].
The digests are always those of the whole table.

A version is written beside its place and renamed, and never changed afterwards: those who map it rely on that.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sized
from typing import Any

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_model import model_file, write_model
from jaxembed.checkpoint.bundle_reading import (
    EXPORTED_FILE,
    FORMAT,
    MANIFEST_FILE,
    MAX_DELTAS,
    MODEL_FILE,
    Bundle,
    is_bundle,
    open_bundle,
    read_bundle,
)
from jaxembed.checkpoint.bundle_tables import TableReport, plan_table, write_table
from jaxembed.checkpoint.digests import digest_bytes
from jaxembed.checkpoint.files import absolute_path, sync_folder, write_file
from jaxembed.checkpoint.reading import OpenedCheckpoint, open_checkpoint
from jaxembed.checkpoint.scratch import check_place, publish, scratch_folder
from jaxembed.checkpoint.stored import StoredArray, WatchedArray
from jaxembed.checkpoint.table_form import QUANTIZATIONS, Form, forms_of
from jaxembed.checkpoint.vocabularies import copy_vocabularies, read_vocabularies
from jaxembed.features import feature_tables

_TAKEN = "{} exists, and may be in use; pass another version or remove it."


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
        In a delta None stores each table as the earlier version does.
      delta_from: an earlier version in `out`; only rows that differ from it are written, of codes the rows of codes.
        Needs that version to stay, and copies changed tables into memory when opened.
      select_model: called with the dense model, nested dicts and lists of arrays, to return what serving
        needs of it, such as `lambda model: model["params"]`. None keeps all.
      exported: the model as `jax.export` serializes it, with tables as arguments; or called with the bundle
        as it is written, before it is published, to return that. `Bundle.exported` gives it back.
      advance: called with the number of bytes of tables that were converted, now and then.
      dry_run: write nothing, and report what would be written, without digests and errors of rounding; tables are read
        for a delta alone, so that damage and NaN in them are found by the run.

    Raises:
      FileNotFoundError: if there is no such whole step.
      ValueError: if the checkpoint is damaged, the version is there already, a table cannot be quantized,
        `quantize` is not how `delta_from` stores one, or that one holds an exported model and this one is given none.
    """
    refuse_bundle(checkpoint)
    opened = open_checkpoint(checkpoint, step)
    number = opened.manifest["step"] if version is None else version
    target, base = check_version(out, number, quantize, delta_from)
    model = _selected_model(opened, select_model)
    forms = _checked_forms(opened.tables, opened.feature_config, quantize, base, model, exported)
    if dry_run:
        return _plan(target, opened.tables, forms, base)
    with scratch_folder(target.parent, str(number)) as scratch:
        (scratch / "tables").mkdir()
        reports, manifest = _write_arrays(scratch, opened, forms, base, model, advance)
        if exported is not None:
            manifest["exported"] = _write_exported(scratch, exported, manifest, base)
        write_file(scratch / MANIFEST_FILE, [json.dumps(layout.seal(manifest)).encode()])
        sync_folder(scratch / "tables")
        sync_folder(scratch)
        publish(scratch, target, ValueError(_TAKEN.format(target)))
    return BundleReport(target, tuple(reports))


def refuse_bundle(path: str | pathlib.Path) -> None:
    """Raises:
    ValueError: if there is a bundle already, rather than a checkpoint to make one of.
    """
    if is_bundle(path):
        raise ValueError(
            f"{path} is a serving bundle, and --to serving makes one of a checkpoint: pass the checkpoint that it was "
            "made from, or copy the folder to have it elsewhere."
        )


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
    if delta_from is not None and not 0 <= delta_from < number:
        raise ValueError(f"delta_from must be a version below {number}, got {delta_from!r}.")
    target = absolute_path(out) / str(number)
    if os.path.lexists(target):
        raise ValueError(_TAKEN.format(target))
    check_place(target)
    base = None if delta_from is None else open_bundle(target.parent, delta_from)
    if base is not None and base.deltas >= MAX_DELTAS:
        raise ValueError(
            f"version {delta_from} ends a chain of {base.deltas} deltas, and all are opened with the last; leave "
            "delta_from out to write all rows again."
        )
    return target, base


def plan_bundle(
    out: str | pathlib.Path,
    number: int,
    tables: Mapping[str, StoredArray],
    feature_config: Any,
    *,
    quantize: str | None = None,
    delta_from: int | None = None,
    exported: bytes | None = None,
    read_rows: bool = True,
) -> BundleReport | None:
    """What `convert_to_bundle` would write of a checkpoint of these tables, without digests and errors of rounding.

    Args:
      out: as `convert_to_bundle`.
      number: of the version.
      tables: by name; they are read for a delta alone.
      feature_config: of the tables.
      quantize: as `convert_to_bundle`.
      delta_from: likewise.
      exported: likewise.
      read_rows: False only looks for what would be refused, whatever is in the rows, and returns None.

    Raises:
      ValueError: as `convert_to_bundle`.
    """
    target, base = check_version(out, number, quantize, delta_from)
    forms = _checked_forms(tables, feature_config, quantize, base, None, exported)
    return _plan(target, tables, forms, base) if read_rows else None


def _checked_forms(
    tables: Mapping[str, StoredArray],
    feature_config: Any,
    quantize: str | None,
    base: Bundle | None,
    model: Any,
    exported: Any,
) -> dict[str, Form]:
    """The form of each table, once nothing but the rows could be refused."""
    read_vocabularies(feature_config)
    if model is not None:
        model_file(model)
    if exported is not None and not callable(exported):
        _check_exported(exported)
    if exported is None and base is not None and base.has_exported:
        raise ValueError(
            f"version {base.directory.name} holds an exported model, and a delta takes over rows alone: this one would serve "
            "embeddings in its place. Pass exported=... (--exported FILE) again, or leave delta_from out."
        )
    forms = forms_of(tables, feature_tables(feature_config), quantize, base)
    layout.check_digests(
        part for name, array in tables.items() for part in forms[name].arrays(array.shape[0]).values()
    )
    return forms


def _plan(
    target: pathlib.Path, tables: Mapping[str, StoredArray], forms: Mapping[str, Form], base: Bundle | None
) -> BundleReport:
    return BundleReport(target, tuple(plan_table(array, forms[name], base) for name, array in tables.items()))


def _write_arrays(
    scratch: pathlib.Path,
    opened: OpenedCheckpoint,
    forms: Mapping[str, Form],
    base: Bundle | None,
    model: Any,
    advance: Callable[[int], Any],
) -> tuple[list[TableReport], dict[str, Any]]:
    """Writes tables and dense model; the reports, and the manifest of them."""
    copy_vocabularies(opened.feature_config, scratch)
    reports, tables = [], {}
    for i, (name, array) in enumerate(opened.tables.items()):
        watched = WatchedArray(array.what, array.source, array.digests, advance)
        report, tables[name] = write_table(scratch, f"tables/{i:05d}.safetensors", watched, forms[name], base)
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
        "model": None if model is None else write_model(scratch / MODEL_FILE, model),
    }


def _selected_model(opened: OpenedCheckpoint, select_model: Callable[[Any], Any] | None) -> Any:
    model = opened.model()
    if select_model is None:
        return model
    if model is None:
        raise ValueError(
            f"{opened.directory} has no dense model to take a part of; leave select_model (--model-key) out."
        )
    return select_model(model)


def _write_exported(
    scratch: pathlib.Path,
    exported: bytes | Callable[[Bundle], bytes],
    manifest: dict[str, Any],
    base: Bundle | None,
) -> dict[str, Any]:
    content = exported(read_bundle(scratch, manifest, base)) if callable(exported) else exported
    _check_exported(content)
    write_file(scratch / EXPORTED_FILE, [content])
    return {"bytes": len(content), "digest": digest_bytes(bytes(content))}


def _check_exported(content: Any) -> None:
    if not isinstance(content, bytes | bytearray) or not content:
        raise ValueError(
            "exported must be, or return, the bytes that jax.export's Exported.serialize() gives, got "
            f"{type(content).__name__} of length {len(content) if isinstance(content, Sized) else 'none'}."
        )
