"""Converts tables and slots from one format into another, by blocks of rows."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert import formats
from jaxembed.convert.configuration import combiner_weights_of, fit
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream, path_of
from jaxembed.convert.keys import show_place
from jaxembed.convert.progress import progress_bar
from jaxembed.convert.publishing import check_new, published
from jaxembed.convert.reporting import ConversionReport
from jaxembed.features import feature_tables

DTYPES = ("float32", "float16", "bfloat16")


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
      keys: (table, slot or None) of arrays by their names in `source`; None guesses, and says so. Where the source is
        jaxembed's own, which says itself what its arrays are, the tables' names in `out`, of torchrec and keras-rs.
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
    planned = plan_conversion(
        source,
        out,
        source_format=source_format,
        target_format=target_format,
        step=step,
        feature_config=feature_config,
        keys=keys,
        dtype=dtype,
        combiner=combiner,
        combiner_weights=combiner_weights,
        layout=layout,
    )
    return planned.report() if dry_run else planned.run(progress)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion that its target can hold; no rows are read yet, and nothing is written.

    Attributes:
      place: the new file or folder.
      source_format: it is read as.
      target_format: it is written as.
      contents: what is written.
      notes: what was guessed, derived or left out.
    """

    place: pathlib.Path
    source_format: str
    target_format: str
    contents: Contents
    notes: tuple[str, ...]

    def tables(self) -> dict[str, StoredArray]:
        """The tables as they would be written, by name."""
        return {stream.table: stream.stored() for stream in self.contents.tables}

    def run(self, progress: bool | None = False) -> ConversionReport:
        """Writes it; arguments as `convert`."""
        total = sum(stream.num_bytes_read for stream in self.contents.streams)
        with progress_bar(total, progress) as advance, published(self.place) as scratch:
            for stream in self.contents.streams:
                stream.watch(advance)
            notes = formats.load(self.target_format).write(scratch, self.contents)
        return self.report(tuple(notes))

    def report(self, notes: tuple[str, ...] = ()) -> ConversionReport:
        """What is written, or would be; digests are of what has been written."""
        return ConversionReport(
            self.place,
            self.source_format,
            self.target_format,
            tuple(stream.report() for stream in self.contents.streams),
            self.contents.feature_config,
            (*self.notes, *notes),
        )


def plan_conversion(
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
) -> Conversion:
    """Opens the source, and refuses what cannot be written; arguments and errors as `convert`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}.")
    path, target = path_of(source), path_of(out)
    source_format = source_format or formats.guess_source(path)
    target_format = target_format or formats.guess_target(target)
    options = Options(step, keys, None if layout is None else path_of(layout))
    found = _open_for(path, source_format, target_format, options)
    config, notes = fit(found, source_format, feature_config, combiner, dtype)
    place = _new_place(target, target_format, found.step)
    tables = feature_tables(config)
    slots = _slots_for(target_format, target, found, notes)
    target_keys = _target_keys(keys, source_format, target_format, tables)
    stored_weights = {name: value for name, value in found.combiner_weights.items() if name in tables}
    weights = combiner_weights_of(tables, {**stored_weights, **(combiner_weights or {})}, path)
    if weights and not getattr(formats.load(target_format), "COMBINER_WEIGHTS", True):
        notes.append(f"left out: the weights of custom combiners, which {target_format} has no place for")
    contents = Contents(
        tuple(Stream(name, None, found.tables[name], table.dtype) for name, table in tables.items()),
        tuple(
            Stream(name, slot, array, array.dtype)
            for name in tables
            for slot, array in sorted(slots.get(name, {}).items())
        ),
        found.step,
        config,
        found.metadata,
        weights,
        {name: optimizer for name, optimizer in found.optimizers.items() if name in tables},
        dataclasses.replace(options, keys=target_keys),
    )
    formats.load(target_format).check(place, contents)
    return Conversion(place, source_format, target_format, contents, tuple(notes))


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


def _target_keys(
    keys: Mapping[str, Place] | None, source_format: str, target_format: str, tables: Mapping[str, Any]
) -> Mapping[str, Place] | None:
    """Those that are of the target: the others have been followed in reading.

    Raises:
      ValueError: if the target takes none, or one is of no table.
    """
    if keys is None or source_format != "jaxembed":
        return None
    if not getattr(formats.load(target_format), "KEYS", False):
        raise ValueError(
            f"keys are neither for reading {source_format}, which says itself what its arrays are, nor for writing "
            f"{target_format}; leave keys (--keys) out."
        )
    for key, (table, slot) in keys.items():
        if table not in tables or slot is not None:
            raise ValueError(
                f"keys[{key!r}] must be one of the tables {sorted(tables)}, which {target_format} is to have by that name, "
                f"got {show_place((table, slot))}."
            )
    return keys


def _new_place(target: pathlib.Path, target_format: str, step: int) -> pathlib.Path:
    """Where it goes; of a checkpoint a step.

    Raises:
      ValueError: if something is there.
      OSError: if nothing can be.
    """
    place = target / str(step) if target_format == "jaxembed" else target
    check_new(place)
    return place


def _slots_for(
    target_format: str, target: pathlib.Path, found: Source, notes: list[str]
) -> dict[str, dict[str, StoredArray]]:
    """Those that the target has a place for; of others a note."""
    why = getattr(formats.load(target_format), "without_slots", lambda out: None)(target)
    if found.slots and why is not None:
        notes.append(f"left out: slots, {why}")
        return {}
    return found.slots
