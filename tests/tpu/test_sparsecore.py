"""The sparsecore engine's train steps compiled for v5p and v6e: a whole DLRM, every optimizer, every kind of table."""

import importlib.util

import pytest

from tests.tpu.processes import answer, needs_libtpu, start

pytestmark = [
    pytest.mark.tpu,
    needs_libtpu,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_tpu_embedding") is None,
        reason="needs jax-tpu-embedding: pip install 'jaxembed[sparsecore]'",
    ),
]
#: By topology, the devices.
TOPOLOGIES = {"v5p:2x2x2": 8, "v6e:4x4": 16}
#: By optimizer, how many slots it has.
OPTIMIZERS = {"SGD": 0, "Adagrad": 1, "AdagradMomentum": 2, "FTRL": 2, "Adam": 2}
#: 26 features, 4096 examples of 10 ids, D 128; by the name of an optimizer.
STEP = """
import dataclasses, json, sys, tpu_compile
from jaxembed import optimizers
topology, *names = sys.argv[1:]
costs = {
    name: dataclasses.asdict(
        tpu_compile.compile_step(
            topology, 1_000_000, "sparsecore", optimizer=getattr(optimizers, name)(0.05), batch=4096
        )
    )
    for name in names
}
json.dump(costs, sys.stdout)
"""
#: What else a table may ask for, on fewer features.
VARIANTS = """
import dataclasses, json, sys, tpu_compile
from jaxembed import QuantizationConfig
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam
every_option = dict(
    clip_weight_min=-1.0, clip_weight_max=1.0, clipvalue=1.0, weight_decay_factor=0.1,
    multiply_weight_decay_factor_by_learning_rate=True,
)
variants = {
    "options": dict(optimizer=Adagrad(lambda step: 0.1 / (step + 1), **every_option)),
    "ftrl": dict(optimizer=FTRL(0.1, l1_regularization_strength=0.1, beta=0.1, allow_zero_accumulator=True,
                                multiply_linear_by_learning_rate=True, learning_rate_power=-0.3)),
    "sgd": dict(optimizer=SGD(0.1)),
    "momentum": dict(optimizer=AdagradMomentum(0.1, 0.9, use_nesterov=True)),
    "adam": dict(optimizer=Adam(0.1, sum_inside_sqrt=False, bias_correction=False)),
    "quantized": dict(quantization=QuantizationConfig(256, -1.0, 1.0)),
    "weighted": dict(weighted=True),
    "narrow": dict(dim=20),
    "half": dict(dim=64),
    "wide": dict(dim=256),
}
costs = {
    name: dataclasses.asdict(tpu_compile.compile_step("v6e:4x4", 1_000_000, "sparsecore", features=4, **arguments))
    for name, arguments in variants.items()
}
json.dump(costs, sys.stdout)
"""


@pytest.mark.parametrize(
    "on_v6e",
    [["Adagrad"], pytest.param([*OPTIMIZERS], marks=pytest.mark.slow)],
    ids=["adagrad", "every optimizer"],
)
def test_whole_steps(on_v6e):
    """Tables and slots are updated where they are, none is copied, and little else is needed."""
    both = {
        "v5p:2x2x2": start(STEP, "v5p:2x2x2", "Adagrad"),
        "v6e:4x4": start(STEP, "v6e:4x4", *on_v6e),
    }
    for topology, process in both.items():
        found = answer(process)
        assert found
        for name, cost in found.items():
            held = (1 + OPTIMIZERS[name]) * 26 * 1_000_000 * 128 * 4 / TOPOLOGIES[topology]
            # Rows of padding are few.
            assert held <= cost["table_bytes"] <= 1.001 * held, (topology, name)
            assert cost["aliased"] >= cost["table_bytes"], (topology, name)
            assert cost["copies"] == 0, (topology, name)
            assert cost["temporary"] <= 64e6, (topology, name)


def test_whatever_the_table_asks_for():
    found = answer(start(VARIANTS))
    assert len(found) == 10
    for name, cost in found.items():
        assert cost["aliased"] >= cost["table_bytes"], name
        assert cost["copies"] == 0, name
        assert cost["temporary"] < cost["table_bytes"] / 10, name
