"""`--import`: the modules that register what checkpoints, bundles and configurations name."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds it; `jaxembed.cli` imports what is given before the command runs."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first, for the combiners, optimizers and initializers that it registers; may be repeated",
    )


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules, from the working folder too.

    Raises:
      ValueError: if one is no name of a module, or cannot be imported.
    """
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"--import must be a module, such as my.combiners, got {module!r}.")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise ValueError(
                f"--import {module} cannot be imported: {e}; install it, or name its folder in PYTHONPATH."
            ) from e
