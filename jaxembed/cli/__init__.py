"""The `jaxembed` command: each subcommand is a module, imported when it is called for."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxembed.cli.importing import import_modules


class Command(NamedTuple):
    """A subcommand: the module that has `add_arguments(parser)` and `run(options) -> int`, and its help.

    `extra` is the extra of the package that the module's imports need. Commands `on_cpu` must not take an
    accelerator from a job that is running.
    """

    module: str
    help: str
    extra: str | None = None
    on_cpu: bool = True


#: Those outside the core are named, not imported: the core imports neither train nor serve.
COMMANDS = {
    "train": Command("jaxembed.train.job.command", "a model, from a configuration file", "train", on_cpu=False),
    "inspect": Command(
        "jaxembed.cli.inspect", "what is in a checkpoint, a bundle, or tables of another framework"
    ),
    "convert": Command("jaxembed.cli.convert", "a checkpoint into another form"),
    "diff": Command("jaxembed.cli.diff", "what changed between two, by table"),
    "serve": Command("jaxembed.serve.server.command", "a bundle, over HTTP and gRPC", extra="server"),
    "bench": Command("jaxembed.cli.bench", "one lookup, timed on this machine"),
    "doctor": Command("jaxembed.cli.doctor", "what this machine and installation give", on_cpu=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      0; 1 if it fails or `diff` finds a difference; 2 if what it was asked for is wrong: its command line, a file
      that is not there, a value that does not fit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="jaxembed",
        description="Embedding tables: train, look inside, convert, serve.",
        epilog="`jaxembed COMMAND --help` has an example of each; `jaxembed doctor` says what works here.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    modules: dict[str, Any] = {}
    try:
        for name, command in COMMANDS.items():
            sub = commands.add_parser(
                name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            if arguments[:1] == [name]:
                modules[name] = module = _load(name, command)
                sub.description = module.__doc__
                module.add_arguments(sub)
        options = parser.parse_args(arguments)
        import_modules(getattr(options, "imports", ()))
        return modules[options.command].run(options)
    except (ValueError, OSError, ImportError) as e:
        if isinstance(e, ImportError) and e.name is not None:
            raise  # of Python's own; ours say what to install
        print(f"jaxembed: {e}", file=sys.stderr)
        if not _is_mistake(e):
            return 1
        command = next((name for name in COMMANDS if arguments[:1] == [name]), "COMMAND")
        print(f"`jaxembed {command} --help` has an example.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxembed: interrupted", file=sys.stderr)
        return 130


def _is_mistake(error: ValueError | OSError | ImportError) -> bool:
    """Whether another command line would do, as opposed to files that are damaged and disks that are full."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError)
    return not any(c.__name__ in ("CheckpointError", "TrainingDiverged") for c in type(error).__mro__)


def _load(name: str, command: Command) -> Any:
    if command.on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return importlib.import_module(command.module)
    except ImportError as e:
        if command.extra is None or e.name is None or e.name.startswith("jaxembed"):
            raise
        is_missing, is_old = isinstance(e, ModuleNotFoundError), str(e).startswith("cannot import name")
        if not is_missing and not is_old:
            raise  # one that is there, and cannot be loaded
        raise ValueError(
            f"`jaxembed {name}` needs the package {e.name!r}{f' in a newer version ({e})' * is_old}; install it with "
            f"pip install 'jaxembed[{command.extra}]'."
        ) from e
