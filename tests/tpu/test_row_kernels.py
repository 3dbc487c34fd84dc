"""Kernels that read and update single rows, compiled by Mosaic: in whole steps, and alone with every optimizer."""

import json

import pytest

from tests.tpu.processes import answer, needs_libtpu, start

pytestmark = [pytest.mark.tpu, needs_libtpu]
#: The whole DLRM as it is by default; by topology and V.
STEP = """
import dataclasses, json, sys, tpu_compile
topology, vocabulary = sys.argv[1:]
cost = tpu_compile.compile_step(topology, int(vocabulary), "auto")
json.dump(dataclasses.asdict(cost), sys.stdout)
"""
#: Of the lookup and the update by each optimizer, by topology, each with a D: bytes touched, aliased and temporary, and
#: whole-table copies.
ALONE = """
import functools, json, sys, tpu_compile, hlo, jax
from jax.experimental import topologies
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from jaxembed.train.engines import pallas_rows

def cost(lowered, shape):
    compiled = lowered.compile()
    return {
        "touched": compiled.cost_analysis()["bytes accessed"],
        "aliased": compiled.memory_analysis().alias_size_in_bytes,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "copies": len(hlo.whole_copies(compiled.as_text(), {shape})),
    }

every_option = dict(
    clip_weight_min=-1.0, clip_weight_max=1.0, clipvalue=1.0, weight_decay_factor=0.1,
    multiply_weight_decay_factor_by_learning_rate=True,
)
ftrl = dict(l1_regularization_strength=0.1, beta=0.1, allow_zero_accumulator=True, learning_rate_power=-0.3)
optimizers = {
    "sgd": SGD(0.1), "adagrad": Adagrad(lambda step: 0.1 / (step + 1), **every_option),
    "momentum": AdagradMomentum(0.1, 0.9, use_nesterov=True, beta2=0.9, exponent=3.0),
    "ftrl": FTRL(0.1, **ftrl), "linear": FTRL(0.1, multiply_linear_by_learning_rate=True),
    "adam": Adam(0.1), "other adam": Adam(0.1, sum_inside_sqrt=False, bias_correction=False),
}

def costs(topology, dim):
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(device)
    of = lambda shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    table, rows, gradients = of((400_000, dim)), of((5_000,), "int32"), of((5_000, dim))
    found = {"gather": cost(jax.jit(pallas_rows.gather).lower(table, rows), table.shape)}
    for name, optimizer in optimizers.items():
        def update(table, slots, rows, gradients, step):
            rate = optimizer.learning_rate_at(step)
            return pallas_rows.update_unique(optimizer, table, slots, rows, gradients, rate, step)

        slots = {slot: table for slot in optimizer.slot_names}
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(table, slots, rows, gradients, of((), "int32"))
        found[name] = cost(lowered, table.shape)
    return found

json.dump({topology: costs(topology, dim) for topology, dim in json.loads(sys.argv[1]).items()}, sys.stdout)
"""
#: By topology, D.
DIMS = {"v5e:4x4": 128, "v5p:2x2x2": 256, "v6e:4x4": 128}
SLOTS = {"sgd": 0, "adagrad": 1, "momentum": 2, "ftrl": 2, "linear": 2, "adam": 2, "other adam": 2}


@pytest.mark.parametrize(
    ("topology", "devices", "temporary"),
    [
        ("v5e:4x4", 16, 60e6),
        # Over 8 devices all_gather exchanges less, and what it brings takes memory.
        ("v5p:2x2x2", 8, 200e6),
        ("v5e:8x8", 64, 60e6),
        ("v6e:4x4", 16, 60e6),
    ],
)
@pytest.mark.slow  # minutes each; of five features, test_compile.py looks at what a step touches
def test_a_whole_step_touches_rows_and_not_tiles(topology, devices, temporary):
    """26 features, D 128, 256 examples of 10 ids a device, by all defaults of the `xla` engine."""
    cost = answer(start(STEP, topology, "1000000"))
    assert cost["table_bytes"] == 2 * 26 * (1_000_000 // devices) * 128 * 4
    assert cost["aliased"] >= cost["table_bytes"]
    assert cost["copies"] == 0
    assert cost["touched"] <= 3.0e9
    assert sum(cost["exchanged"].values()) <= 90e6
    assert cost["temporary"] <= temporary
    # The rows of a gather and of an update are among the bytes: Adagrad reads and writes two arrays of them.
    assert cost["touched"] > (2 + 5) * cost["predicted"] / 2


@pytest.fixture(scope="module")
def alone():
    return answer(start(ALONE, json.dumps(DIMS)))


@pytest.mark.parametrize(("topology", "dim"), DIMS.items())
def test_every_optimizer_compiles_in_place(alone, topology, dim):
    found = dict(alone[topology])
    rows = 5_000 * dim * 4
    gather = found.pop("gather")
    assert 2 * rows <= gather["touched"] <= 2.05 * rows
    assert gather["copies"] == 0
    assert gather["temporary"] <= rows / 20
    assert found.keys() == SLOTS.keys()
    for name, cost in found.items():
        arrays = 1 + SLOTS[name]
        assert cost["copies"] == 0, name
        assert cost["aliased"] == arrays * 400_000 * dim * 4, name
        assert cost["temporary"] <= rows / 20, name  # ids and their order, and no rows
        assert (1 + 2 * arrays) * rows <= cost["touched"] <= 1.05 * (1 + 2 * arrays) * rows, name
