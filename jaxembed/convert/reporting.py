"""What a conversion wrote, or would write, and how it is shown."""

import dataclasses
import json
import pathlib
from typing import Any

from jaxembed.convert.interface import ArrayReport


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
