"""Says what changed between two checkpoints or bundles, by table; exits with 2 if anything did.

jaxembed diff runs/movielens/checkpoints/155 runs/movielens/checkpoints/310
"""

import argparse

from jaxembed.checkpoint.inspection import difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed diff`."""
    parser.add_argument("a")
    parser.add_argument("b")


def run(options: argparse.Namespace) -> int:
    """Prints a line a table."""
    found = difference(options.a, options.b)
    for name, table in found.items():
        detail = f": {table.num_rows:,} rows, by up to {table.max_difference:.3g}" if table.num_rows else ""
        print(f"{name}: {table.change}{detail}")
    return 2 if any(table.change != "same" for table in found.values()) else 0
