"""The examples in public docstrings run, and give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["jaxembed.config", "jaxembed.inputs.ragged", "jaxembed.inputs.sparse", "jaxembed.lookup"]
)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
