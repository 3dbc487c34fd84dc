"""The benchmark of promises fails where one is missed that does not depend on the machine's speed."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def promises(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("promises")


def test_a_slow_machine_is_no_failure_and_a_failed_request_is_one(promises, capsys):
    Promise = promises.Promise
    kept, slow, failed = (
        *(Promise("0 failed", True, always=True), Promise("p99 1.6x", False)),
        Promise("1 failed", False, always=True),
    )
    assert promises.judge([kept, slow]) == 0
    assert capsys.readouterr().out == "met: 0 failed\nMISSED: p99 1.6x\n"
    assert promises.judge([failed, kept]) == 1
    assert promises.judge([]) == 0
