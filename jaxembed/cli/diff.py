"""Says what changed between two checkpoints, bundles or files: tables, slots and how they are looked up; exits with 1 if
anything did. Optimizers and dense models are not compared.

jaxembed diff runs/movielens/checkpoints/160 runs/movielens/checkpoints/320
"""

import argparse

from jaxembed.cli.importing import add_import
from jaxembed.inspection import difference, lookup_difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed diff`."""
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--no-progress", action="store_true", help="no bar, even on a terminal")
    add_import(parser)


def run(options: argparse.Namespace) -> int:
    """Prints a line a table, one for each change of its lookups, and what was not compared."""
    lookups = lookup_difference(options.a, options.b)
    found = difference(options.a, options.b, progress=False if options.no_progress else None)
    for name, table in found.items():
        detail = (
            f"{table.num_rows:,} rows, by up to {table.max_difference:.3g}" if table.num_rows else table.detail
        )
        slots = f"; slots {', '.join(table.slots)}" if table.slots else ""
        print(f"{name}: {table.change}{f': {detail}' if detail else ''}{slots}")
    for line in (*lookups.changes, *(f"not compared: {what}" for what in lookups.not_compared)):
        print(line)
    return 1 if lookups.changes or any(t.change != "same" or t.slots for t in found.values()) else 0
