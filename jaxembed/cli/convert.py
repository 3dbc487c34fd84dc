"""Converts a checkpoint into another form.

jaxembed convert runs/movielens/checkpoints --to serving bundles --quantize int8
"""

import argparse
import pathlib

from jaxembed.checkpoint import convert_to_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed convert`."""
    parser.add_argument("checkpoint")
    parser.add_argument("--to", choices=["serving"], required=True)
    parser.add_argument("out", help="folder of the versions")
    parser.add_argument("--step", type=int, help="default: the latest whole one")
    parser.add_argument("--version", type=int, help="default: the step")
    parser.add_argument(
        "--quantize",
        choices=["bfloat16", "int8", "int4"],
        help="tables without a quantization_config; those with one become what training looked up",
    )
    parser.add_argument(
        "--delta-from", type=int, metavar="VERSION", help="write only the rows that changed since"
    )
    parser.add_argument("--model-key", help="keep this part of the dense model only, such as params")
    parser.add_argument(
        "--exported", type=pathlib.Path, metavar="FILE", help="what jaxembed.serve.export_model returned"
    )
    parser.add_argument("--dry-run", action="store_true")


def run(options: argparse.Namespace) -> int:
    """Converts, and prints what was written, by table."""

    def select(model):
        if not isinstance(model, dict) or options.model_key not in model:
            raise ValueError(f"the dense model has no part {options.model_key!r}, it has {sorted(model)}.")
        return model[options.model_key]

    report = convert_to_bundle(
        options.checkpoint,
        options.out,
        step=options.step,
        version=options.version,
        quantize=options.quantize,
        delta_from=options.delta_from,
        select_model=select if options.model_key else None,
        exported=options.exported and options.exported.read_bytes(),
        dry_run=options.dry_run,
    )
    print(f"{'would write' if options.dry_run else 'wrote'} {report.path}")
    for table in report.tables:
        error = f", max error {table.max_error:.3g}, mean {table.mean_error:.3g}" if table.max_error else ""
        changed = "" if table.num_changed is None else f", {table.num_changed:,} rows changed"
        print(f"  {table.name}: {list(table.shape)} {table.dtype}, {table.num_bytes:,} bytes{error}{changed}")
    return 0
