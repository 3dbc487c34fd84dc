"""Converts tables and slots from one format into another, by blocks of rows."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed import structure
from jaxembed.combiners import CustomCombiner
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.convert import formats
from jaxembed.convert.interface import ArrayReport, Contents, Options, Place, Source, Stream, path_of
from jaxembed.convert.progress import progress_bar
from jaxembed.convert.publishing import published
from jaxembed.features import feature_tables

DTYPES = ("float32", "float16", "bfloat16")
COMBINER = "mean"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote, or would write.

    Attributes:
      path: the new file or folder.
      source_format: it was read as.
      target_format: it was written as.
      arrays: tables, then slots.
      feature_config: that goes with them.
      notes: what was guessed, derived or left out.
    """

    path: pathlib.Path
    source_format: str
    target_format: str
    arrays: tuple[ArrayReport, ...]
    feature_config: Any
    notes: tuple[str, ...]


def convert(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    step: int | None = None,
    feature_config: Any = None,
    keys: Mapping[str, Place] | None = None,
    dtype: str | None = None,
    combiner: str | None = None,
    combiner_weights: Mapping[str, Any] | None = None,
    layout: str | pathlib.Path | None = None,
    progress: bool | None = False,
    dry_run: bool = False,
) -> ConversionReport:
    """Writes the tables and slots of `source` as `out`; no table is in memory as a whole.

    Args:
      source: a file or folder of one of `formats.FORMATS`.
      out: a new file or folder; of a checkpoint the directory of its steps.
      source_format: a name of `formats.FORMATS`; None takes what it looks like.
      target_format: likewise; None takes what the suffix of `out` says, else "jaxembed".
      step: of a checkpoint, which one to read, default the latest; of other formats, the step that it becomes.
      feature_config: of the tables. None takes that of the source, else one feature for each table.
      keys: (table, slot or None) of the arrays by their names in the foreign file; None guesses, and says so.
      dtype: to round tables to; None keeps their type.
      combiner: of the features that are made up for a source without a feature configuration.
      combiner_weights: by table, the [num_weights] of its CustomCombiner; where given, in place of the source's.
      layout: see `Options`; of what is written, if that takes one, else of what is read.
      progress: whether to draw a bar; None on a terminal.
      dry_run: write nothing and read no rows, and report what would be written, without digests; what cannot be
        written is refused as without it.

    Raises:
      FileNotFoundError: if there is nothing at `source`.
      ValueError: if it cannot be read as that format, does not fit the feature configuration, or `out` is there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}.")
    path, target = path_of(source), path_of(out)
    source_format = source_format or formats.guess_source(path)
    target_format = target_format or formats.guess_target(target)
    writer = formats.load(target_format)
    options = Options(step, keys, None if layout is None else path_of(layout))
    found = _open_for(path, source_format, target_format, options)
    config, notes = _fit(found, source_format, feature_config, combiner, dtype)
    place = target / str(found.step) if target_format == "jaxembed" else target
    if os.path.lexists(place):
        raise ValueError(f"{place} exists; pass another path or remove it.")
    tables = feature_tables(config)
    arrays = [(name, None, found.tables[name]) for name in tables]
    slots = found.slots
    why = getattr(writer, "without_slots", lambda out: None)(target)
    if slots and why is not None:
        notes.append(f"left out: slots, {why}")
        slots = {}
    stored_weights = {name: value for name, value in found.combiner_weights.items() if name in tables}
    weights = _combiner_weights(tables, {**stored_weights, **(combiner_weights or {})}, path)
    if weights and not getattr(writer, "COMBINER_WEIGHTS", True):
        notes.append(f"left out: the weights of custom combiners, which {target_format} has no place for")
    arrays += [(n, slot, array) for n in tables for slot, array in sorted(slots.get(n, {}).items())]
    with progress_bar(
        sum(array.num_bytes for _, _, array in arrays), False if dry_run else progress
    ) as advance:
        streams = [
            Stream(name, slot, array, tables[name].dtype if slot is None else array.dtype, advance)
            for name, slot, array in arrays
        ]
        contents = Contents(
            tuple(streams[: len(tables)]),
            tuple(streams[len(tables) :]),
            found.step,
            config,
            found.metadata,
            weights,
            {name: optimizer for name, optimizer in found.optimizers.items() if name in tables},
            options,
        )
        writer.check(place, contents)
        if not dry_run:
            with published(place) as scratch:
                notes += writer.write(scratch, contents)
    reports = tuple(stream.report() for stream in streams)
    return ConversionReport(place, source_format, target_format, reports, config, tuple(notes))


def open_source(
    path: str | pathlib.Path, source_format: str | None = None, options: Options | None = None
) -> Source:
    """Opens a file or folder of any format, to be read by blocks of rows.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: if it cannot be read as that format.
    """
    path = path_of(path)
    name = source_format or formats.guess_source(path)
    return formats.load(name).read(path, options or Options())


def _open_for(path: pathlib.Path, source_format: str, target_format: str, options: Options) -> Source:
    """The source, with the layout if it is for reading, and at the step that it becomes."""
    step, layout = options.step, options.layout
    if step is not None and not 0 <= step < 2**31:
        raise ValueError(f"step must be in [0, 2**31), got {step}.")
    if "write" in getattr(formats.load(target_format), "LAYOUT", ()):
        options = dataclasses.replace(options, layout=None)
    elif layout is not None and "read" not in getattr(formats.load(source_format), "LAYOUT", ()):
        raise ValueError(
            f"layout is neither for reading {source_format} nor for writing {target_format}; leave it out."
        )
    found = open_source(path, source_format, options)
    return found if source_format == "jaxembed" or step is None else dataclasses.replace(found, step=step)


def plain_feature_config(source: Source, combiner: str) -> dict[str, FeatureConfig]:
    """One feature for each table, of its name."""
    return {
        name: FeatureConfig(
            TableConfig(array.shape[0], array.shape[1], name=name, combiner=combiner, dtype=array.dtype)
        )
        for name, array in source.tables.items()
    }


def _fit(
    source: Source, source_format: str, given: Any, combiner: str | None, dtype: str | None
) -> tuple[Any, list[str]]:
    """The feature configuration of what is written, and notes."""
    notes = list(source.notes)
    config = given if given is not None else source.feature_config
    if config is None:
        combiner = combiner or str(getattr(formats.load(source_format), "COMBINER", COMBINER))
        config = plain_feature_config(source, combiner)
        notes.append(
            f"no feature configuration given: one feature for each table, of its name, combiner {combiner!r}, "
            "no optimizer"
        )
    elif combiner is not None:
        raise ValueError("combiner is for a source without a feature configuration; this one has one.")
    tables = feature_tables(config)
    for name, table in tables.items():
        if name not in source.tables:
            raise ValueError(
                f"the feature configuration names table {name!r}; there are {sorted(source.tables)}."
            )
        shape = source.tables[name].shape
        if shape != (table.vocabulary_size, table.dim):
            raise ValueError(
                f"table {name!r} must be [{table.vocabulary_size}, {table.dim}] by its feature configuration, "
                f"got {list(shape)}."
            )
        found = source.tables[name].dtype
        if dtype is None and given is not None and found != table.dtype:
            raise ValueError(
                f"table {name!r} must be {table.dtype.name} by its feature configuration, got {found.name}; "
                f"pass dtype={table.dtype.name!r} (--dtype) to round it, or change the configuration."
            )
    left_out = sorted(source.tables.keys() - tables.keys())
    if left_out:
        notes.append(f"left out, not in the feature configuration: {', '.join(left_out)}")
    types = {name: np.dtype(dtype or array.dtype) for name, array in source.tables.items()}
    return _with_types(config, types), notes


def _combiner_weights(
    tables: Mapping[str, TableConfig], given: Mapping[str, Any], path: pathlib.Path
) -> dict[str, np.ndarray]:
    """Those of the tables, float32."""
    weights = {}
    for name, table in tables.items():
        count = table.combiner.num_weights if isinstance(table.combiner, CustomCombiner) else 0
        found = np.asarray(given[name], np.float32) if name in given else None
        if found is None and count:
            raise ValueError(
                f"the CustomCombiner of table {name!r} has {count} weights of its own, which {path} has not; pass "
                f"combiner_weights={{{name!r}: ...}} (--combiner-weights), or a combiner with num_weights=0."
            )
        if found is not None and found.shape != (count,):
            raise ValueError(
                f"combiner_weights of table {name!r} must have the shape [{count}] by its combiner, got "
                f"{list(found.shape)}."
            )
        if found is not None:
            weights[name] = found
    unknown = sorted(given.keys() - tables.keys())
    if unknown:
        raise ValueError(f"combiner_weights are of {unknown}, but the tables are {sorted(tables)}.")
    return weights


def _with_types(config: Any, types: Mapping[str, np.dtype]) -> Any:
    for name, dtype in types.items():
        if dtype.itemsize > 4 or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"table {name!r} is {dtype.name}, which JAX does not train by default; round it with dtype='float32' "
                "(--dtype float32)."
            )

    def change(_, feature: FeatureConfig) -> FeatureConfig:
        table = feature.table
        if table.dtype == types[table.name]:
            return feature
        return dataclasses.replace(feature, table=dataclasses.replace(table, dtype=types[table.name]))

    return structure.map_leaves(change, config)


def report_lines(report: ConversionReport, dry_run: bool) -> list[str]:
    """The report as text."""
    lines = [f"read as {report.source_format}, {'to be ' if dry_run else ''}written as {report.target_format}"]
    lines += [f"  {note}" for note in report.notes]
    lines.append(f"{'would write' if dry_run else 'wrote'} {report.path}")
    for array in report.arrays:
        slot = "" if array.slot is None else f" slot {array.slot}"
        error = f", max error {array.max_error:.3g}" if array.max_error else ""
        digest = f", xxh3-128 {array.digest}" if array.digest else ""
        lines.append(
            f"  {array.table}{slot}: {array.shape[0]:,} rows, {list(array.shape)} {array.dtype}, "
            f"{array.num_bytes:,} bytes{error}{digest}"
        )
    total = sum(array.num_bytes for array in report.arrays)
    tables = sum(array.slot is None for array in report.arrays)
    lines.append(f"{tables} tables, {len(report.arrays) - tables} slots, {total:,} bytes")
    return lines


def report_json(report: ConversionReport) -> str:
    """The report as JSON."""
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    fields.pop("feature_config")
    fields["path"] = str(report.path)
    fields["arrays"] = [dataclasses.asdict(array) for array in report.arrays]
    return json.dumps(fields)
