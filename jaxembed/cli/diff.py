"""Says what changed between two checkpoints, bundles or files, by table; exits with 1 if anything did.

jaxembed diff runs/movielens/checkpoints/160 runs/movielens/checkpoints/320
"""

import argparse

from jaxembed.inspection import difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed diff`."""
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--no-progress", action="store_true", help="no bar, even on a terminal")


def run(options: argparse.Namespace) -> int:
    """Prints a line a table."""
    found = difference(options.a, options.b, progress=False if options.no_progress else None)
    for name, table in found.items():
        detail = (
            f"{table.num_rows:,} rows, by up to {table.max_difference:.3g}" if table.num_rows else table.detail
        )
        slots = f"; slots {', '.join(table.slots)}" if table.slots else ""
        print(f"{name}: {table.change}{f': {detail}' if detail else ''}{slots}")
    return 1 if any(table.change != "same" or table.slots for table in found.values()) else 0
