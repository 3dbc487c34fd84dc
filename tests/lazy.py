"""Modules that take seconds to import, for the few processes that run tests with them: every one collects all tests."""

import importlib
import importlib.util
from typing import Any

import pytest


class Lazy:
    """A module, imported when an attribute of it is first asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest looks for marks of its own in all that a file names
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def lazily(name: str) -> Any:
    """The module, or the tests of the file that calls this are skipped, as by `pytest.importorskip`."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package that it would be in
        found = None
    if found is None:
        pytest.skip(f"could not import {name!r}", allow_module_level=True)
    return Lazy(name)
