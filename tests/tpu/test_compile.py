"""Train steps compiled for a real TPU topology, in a process of their own: JAX must not know of 8 CPU devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxembed[tpu]'"
    ),
]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import dataclasses, json, sys, tpu_compile
costs = [tpu_compile.compile_step("v5e:4x4", v, "all_to_all") for v in (1_000_000, 10_000_000)]
json.dump([dataclasses.asdict(c) for c in costs], sys.stdout)
"""


@pytest.fixture(scope="module")
def costs():
    """At V of a million and ten million."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(BENCHMARKS)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_tables_are_updated_in_place_and_never_copied(costs):
    for cost in costs:
        assert cost["aliased"] >= cost["table_bytes"]
        assert cost["copies"] == 0


def test_cost_is_flat_in_the_vocabulary(costs):
    small, large = costs
    assert large["touched"] == pytest.approx(small["touched"], rel=0.02)
    assert large["temporary"] == pytest.approx(small["temporary"], rel=0.02)
    assert large["exchanged"] == small["exchanged"]


def test_tables_exchange_what_the_formula_says(costs):
    for cost in costs:
        exchanged = cost["exchanged"]["all-to-all"]
        assert exchanged == pytest.approx(cost["predicted"], rel=0.02)
        assert sum(cost["exchanged"].values()) <= 90e6
