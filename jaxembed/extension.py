"""Extension modules of ours, which use nothing but Python's stable ABI."""

import importlib.machinery
import importlib.util
from types import ModuleType

from jaxembed import built


def load(name: str) -> ModuleType | None:
    """The module in `jaxembed/native/NAME.abi3.so`; None where it was not built or this Python cannot load it."""
    if ".abi3.so" not in importlib.machinery.EXTENSION_SUFFIXES:  # free-threaded builds have another ABI
        return None
    path = built.find(f"{name}.abi3.so")
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
