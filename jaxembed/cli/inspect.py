"""Shows the configuration, tables and slots of a checkpoint, a bundle, or tables of another framework.

jaxembed inspect runs/movielens/checkpoints --stats
jaxembed inspect bundles --html report.html
jaxembed inspect dlrm.safetensors --keys keys.json
"""

import argparse
import errno
import os
import pathlib

from jaxembed.checkpoint.files import absolute_path, replace_file
from jaxembed.checkpoint.scratch import check_place
from jaxembed.cli.importing import add_import
from jaxembed.convert.keys import keys_in_file
from jaxembed.inspection import describe, html_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed inspect`."""
    parser.add_argument("path")
    parser.add_argument("--step", type=int, help="default: the latest whole one; of bundles the version")
    parser.add_argument(
        "--stats",
        action="store_true",
        help="read and verify the tables: norms, odd rows, errors of quantization",
    )
    parser.add_argument(
        "--keys",
        metavar="FILE",
        help='of another framework: JSON {"name in the file": "table" or ["table", "slot"]}, as convert takes; else guessed',
    )
    parser.add_argument("--html", metavar="FILE", help="write a page of that, with plots and similar rows")
    parser.add_argument("--no-progress", action="store_true", help="no bar, even on a terminal")
    add_import(parser)


def run(options: argparse.Namespace) -> int:
    """Prints it, or writes the page."""
    progress, keys = False if options.no_progress else None, options.keys and keys_in_file(options.keys)
    if options.html is None:
        print(describe(options.path, step=options.step, stats=options.stats, progress=progress, keys=keys))
        return 0
    place = absolute_path(options.html)
    _check_file(place)
    page = html_report(options.path, step=options.step, progress=progress, keys=keys)
    replace_file(place, page.encode())
    print(f"wrote {options.html}")
    return 0


def _check_file(place: pathlib.Path) -> None:
    """Whether `replace_file` can write there, before tables are read.

    Raises:
      ValueError: as `check_place`.
      OSError: as `check_place`, or if a folder is there, or none to write it in.
    """
    if place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    if place.is_file() or not place.exists():
        check_place(place.resolve())
    if not place.resolve().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent))
