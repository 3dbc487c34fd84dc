"""The examples in the docstrings of all public names run, and give what they say."""

import doctest
import importlib
import inspect

import pytest

import jaxembed.train

#: What an example says that goes on where another one ends.
CONTINUES = "the example of `jaxembed.train.Checkpointer`"
MODULES = ("jaxembed", "jaxembed.train", "jaxembed.serve")
NAMES = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_example(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = getattr(importlib.import_module(module), name)
    if CONTINUES in found.__doc__:
        run_examples(jaxembed.train.Checkpointer, "Checkpointer")
    runner = run_examples(found, name)
    assert runner.tries > 0, f"{module}.{name} has no example"
    assert runner.failures == 0


def run_examples(found, name):
    globs = vars(importlib.import_module(found.__module__)).copy()
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(found, name, inspect.getmodule(found), globs):
        runner.run(test)
    return runner


@pytest.mark.parametrize("module", MODULES)
def test_public_names_fit_a_screen(module):
    names = importlib.import_module(module).__all__
    assert len(names) <= 24
    assert names == sorted(names)
