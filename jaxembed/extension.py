"""Extension modules of ours, which use nothing but Python's stable ABI."""

import importlib.machinery
import importlib.util
import pathlib
import sys
from types import ModuleType


def load(name: str) -> ModuleType | None:
    """The module in `jaxembed/native/NAME.abi3.so`; None where it was not built or this Python cannot load it."""
    file = f"{name}.abi3.so"
    if ".abi3.so" not in importlib.machinery.EXTENSION_SUFFIXES:  # free-threaded builds have another ABI
        return None
    # An editable install keeps the sources in one place and what was built in site-packages.
    folders = (pathlib.Path(__file__).parent, *(pathlib.Path(p) / "jaxembed" for p in sys.path if p))
    path = next((p for p in (f / "native" / file for f in folders) if p.is_file()), None)
    if path is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError:
        return None
    return module
