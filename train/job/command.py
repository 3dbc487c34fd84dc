"""Trains from a configuration file, and goes on where the same command was stopped.

jaxembed train --config examples/movielens.toml --set out=runs/adam --set tables.optimizer.name=adam
"""

import argparse

from jaxembed.cli.importing import add_import

from .config_file import load_config
from .loop import train

#: What a shell reports of a process that SIGTERM ended, so that a scheduler starts the job again.
PREEMPTED = 143


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed train`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a .toml or .json file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="a value in place of the file's; may be repeated",
    )
    add_import(parser)


def run(options: argparse.Namespace) -> int:
    """Trains; 143 where SIGTERM stopped it with a checkpoint saved."""
    result = train(load_config(options.config, options.set))
    return PREEMPTED if result.preempted else 0
