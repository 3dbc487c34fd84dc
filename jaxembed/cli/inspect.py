"""Shows the configuration, tables and slots of a checkpoint or bundle.

jaxembed inspect runs/movielens/checkpoints --stats
"""

import argparse

from jaxembed.checkpoint.inspection import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed inspect`."""
    parser.add_argument("path")
    parser.add_argument("--stats", action="store_true", help="read and verify the tables, and count odd rows")


def run(options: argparse.Namespace) -> int:
    """Prints it."""
    print(describe(options.path, stats=options.stats))
    return 0
