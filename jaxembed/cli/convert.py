"""Converts tables and slots from one form into another; forms that are not given are guessed, and shown.

jaxembed convert runs/movielens/checkpoints --to serving bundles --quantize int8
jaxembed convert dlrm.pt --from torchrec checkpoints --feature-config features.json
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from typing import Any

from jaxembed.checkpoint import convert_to_bundle
from jaxembed.checkpoint.bundle import BundleReport, plan_bundle, refuse_bundle
from jaxembed.checkpoint.files import read_named
from jaxembed.checkpoint.reading import open_checkpoint
from jaxembed.checkpoint.scratch import scratch_folder
from jaxembed.cli.importing import add_import
from jaxembed.config import COMBINERS
from jaxembed.convert import FORMATS, ConversionReport
from jaxembed.convert.conversion import DTYPES, Conversion, plan_conversion
from jaxembed.convert.formats import guess_source, guess_target
from jaxembed.convert.interface import path_of
from jaxembed.convert.keys import keys_in_file
from jaxembed.convert.progress import progress_bar
from jaxembed.convert.reporting import report_json, report_lines
from jaxembed.serialization import feature_config_from_json, strict_json

SERVING = "serving"
MAX_JSON = 64 << 20
#: Of what `export_model` returned: tables are not in it.
MAX_EXPORTED = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed convert`."""
    about = "; ".join(f"{name}: {form.about}" for name, form in FORMATS.items())
    parser.add_argument("source", help="file or folder")
    parser.add_argument("--from", dest="source_format", choices=[*FORMATS], help=about)
    parser.add_argument(
        "--to",
        dest="target_format",
        choices=[SERVING, *FORMATS],
        help="default: as the suffix of `out` says, else jaxembed",
    )
    parser.add_argument(
        "out", help="new file or folder; of a checkpoint its steps' folder, of bundles their versions'"
    )
    parser.add_argument(
        "--step", type=int, help="of a checkpoint: default the latest whole one; of others: what it becomes"
    )
    parser.add_argument("--dry-run", action="store_true", help="read what there is, write nothing")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.add_argument("--no-progress", action="store_true", help="no bar, even on a terminal")
    add_import(parser)
    foreign = parser.add_argument_group("between frameworks")
    foreign.add_argument(
        "--feature-config", metavar="FILE", help="JSON of jaxembed.serialization.feature_config_to_json"
    )
    foreign.add_argument(
        "--keys", metavar="FILE", help='JSON {"name in the file": "table" or ["table", "slot"]}; else guessed'
    )
    foreign.add_argument("--dtype", choices=DTYPES, help="round the tables to it")
    foreign.add_argument("--combiner", choices=COMBINERS, help="where no feature configuration is known")
    foreign.add_argument(
        "--combiner-weights",
        metavar="FILE",
        help='JSON {"table": [weights]} of CustomCombiners, where the source has none',
    )
    foreign.add_argument(
        "--layout",
        metavar="FILE",
        help="of jax-tpu-embedding: its EmbeddingSpecProto, serialized; to write keras-rs: a weights file of the model to "
        "fill; to write tensorflow in SparseCore's stacks: SparseCoreTableLayouts, serialized, or a checkpoint that has them",
    )
    serving = parser.add_argument_group("to serving")
    serving.add_argument("--version", type=int, help="default: the step")
    serving.add_argument(
        "--quantize",
        choices=["bfloat16", "int8", "int4"],
        help="tables without a quantization_config; those with one become what training looked up",
    )
    serving.add_argument(
        "--delta-from", type=int, metavar="VERSION", help="write only the rows that changed since"
    )
    serving.add_argument(
        "--model-key",
        action="append",
        metavar="KEY",
        help="keep this part of the dense model only, such as params; if repeated, as for model_state, in one",
    )
    serving.add_argument(
        "--exported", type=pathlib.Path, metavar="FILE", help="what jaxembed.serve.export_model returned"
    )


def run(options: argparse.Namespace) -> int:
    """Converts, and prints what was written, by table."""
    source_format = options.source_format or guess_source(path_of(options.source))
    target_format = options.target_format or guess_target(path_of(options.out))
    if target_format != SERVING:
        for name in ("version", "quantize", "delta_from", "model_key", "exported"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --to serving, not --to {target_format}.")
        return _convert(options, source_format, target_format)
    foreign = ("feature_config", "keys", "dtype", "combiner", "combiner_weights", "layout")
    refuse_bundle(path_of(options.source))
    if source_format == "jaxembed" and not any(getattr(options, name) for name in foreign):
        return _to_serving(options, options.source)
    return _import(options, source_format)


def _convert(options: argparse.Namespace, source_format: str, target_format: str) -> int:
    planned = _planned(options, source_format, target_format, options.out)
    report = planned.report() if options.dry_run else planned.run(_progress(options))
    print(report_json(report) if options.json else "\n".join(report_lines(report, options.dry_run)))
    return 0


def _planned(
    options: argparse.Namespace, source_format: str, target_format: str, out: str | pathlib.Path
) -> Conversion:
    config = options.feature_config
    return plan_conversion(
        options.source,
        out,
        source_format=source_format,
        target_format=target_format,
        step=options.step,
        feature_config=config
        and feature_config_from_json(
            read_named(config, MAX_JSON).decode(errors="replace"), keep_unregistered=True
        ),
        keys=options.keys and keys_in_file(options.keys),
        dtype=options.dtype,
        combiner=options.combiner,
        combiner_weights=options.combiner_weights and _weights(options.combiner_weights),
        layout=options.layout,
    )


def _progress(options: argparse.Namespace) -> bool | None:
    return False if options.no_progress or options.json or options.dry_run else None


def _weights(file: str) -> dict[str, list[float]]:
    data = strict_json(read_named(file, MAX_JSON))
    if not isinstance(data, dict) or not all(
        isinstance(values, list) and all(type(value) in (int, float) for value in values)
        for values in data.values()
    ):
        raise ValueError(f'--combiner-weights must be JSON {{"table": [weights]}}, got {data!r:.80}.')
    return data


def _import(options: argparse.Namespace, source_format: str) -> int:
    """Another framework's tables, by way of a checkpoint; what can be refused is before it is written."""
    if options.model_key is not None:
        raise ValueError(
            f"{options.source} is read as tables alone, without a dense model; leave --model-key out."
        )
    out = path_of(options.out)
    with tempfile.TemporaryDirectory() as nowhere:
        planned = _planned(options, source_format, "jaxembed", nowhere)
    plan = plan_bundle(
        out,
        planned.contents.step if options.version is None else options.version,
        planned.tables(),
        planned.contents.feature_config,
        quantize=options.quantize,
        delta_from=options.delta_from,
        exported=_exported(options),
        read_rows=options.dry_run,
    )
    if plan is not None:
        _print_bundle(options, plan, planned.report())
        return 0
    with scratch_folder(out, "import") as scratch:
        imported = _planned(options, source_format, "jaxembed", scratch).run(_progress(options))
        return _to_serving(options, scratch, imported)


def _to_serving(
    options: argparse.Namespace, checkpoint: str | pathlib.Path, imported: ConversionReport | None = None
) -> int:
    def select(model):
        found: Any = {}
        for key in options.model_key:
            if not isinstance(model, dict) or key not in model:
                raise ValueError(f"the dense model has no part {key!r}, it has {sorted(model)}.")
            found = _together(found, model[key], key) if found else model[key]
        return found

    step = options.step if imported is None else None
    total = sum(array.num_bytes for array in open_checkpoint(checkpoint, step).tables.values())
    with progress_bar(total, _progress(options)) as advance:
        report = convert_to_bundle(
            checkpoint,
            options.out,
            step=step,
            version=options.version,
            quantize=options.quantize,
            delta_from=options.delta_from,
            select_model=None if options.model_key is None else select,
            exported=_exported(options),
            advance=advance,
            dry_run=options.dry_run,
        )
    _print_bundle(options, report, imported)
    return 0


def _together(one: Any, other: Any, key: str) -> Any:
    """The entries of two parts of a dense model, of one layer side by side."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        raise ValueError(
            f"--model-key {key}: it has an entry that a part before it has, too; keep one of them."
        )
    both = {name: _together(one[name], other[name], key) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _exported(options: argparse.Namespace) -> bytes | None:
    return None if options.exported is None else read_named(options.exported, MAX_EXPORTED)


def _print_bundle(options: argparse.Namespace, report: BundleReport, imported: ConversionReport | None) -> None:
    notes = [] if imported is None else list(imported.notes)
    if imported is not None and any(array.slot is not None for array in imported.arrays):
        notes.append("left out: slots, which serving has no use for")
    read_as = "jaxembed" if imported is None else imported.source_format
    if options.json:
        tables = [dataclasses.asdict(table) for table in report.tables]
        print(
            json.dumps({"path": str(report.path), "source_format": read_as, "tables": tables, "notes": notes})
        )
        return
    if imported is not None:
        print(f"read as {read_as}, {'to be ' if options.dry_run else ''}written as {SERVING}")
    for note in notes:
        print(f"  {note}")
    print(f"{'would write' if options.dry_run else 'wrote'} {report.path}")
    for table in report.tables:
        error = f", max error {table.max_error:.3g}, mean {table.mean_error:.3g}" if table.max_error else ""
        changed = "" if table.num_changed is None else f", {table.num_changed:,} rows changed"
        digest = f", xxh3-128 {table.digest}" if table.digest else ""
        print(
            f"  {table.name}: {table.shape[0]:,} rows, {list(table.shape)} {table.dtype}, {table.num_bytes:,} bytes"
            f"{error}{changed}{digest}"
        )
    print(f"{len(report.tables)} tables, {sum(table.num_bytes for table in report.tables):,} bytes")
