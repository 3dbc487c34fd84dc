"""Train steps compiled for a real TPU topology, in processes of their own: JAX must not know of 8 CPU devices.

Five features are enough for tables that no device keeps in its fast memory; `benchmarks/tpu_compile.py`
compiles the whole model.
"""

import pytest

from tests.tpu.processes import answer, needs_libtpu, start

# One process runs all of them (`--dist loadfile`), for what the fixture compiles takes minutes.
pytestmark = [pytest.mark.tpu, needs_libtpu]
#: Exchanges, and what reads and updates rows: by itself, kernels.
STEPS_OF = (("all_gather", "xla"), ("all_to_all", "auto"))
VOCABULARIES = (1_000_000, 10_000_000)
#: By topology, exchange, row kernels and vocabularies.
STEPS = """
import dataclasses, json, sys, tpu_compile
topology, exchange, kernels, *vocabularies = sys.argv[1:]
costs = [
    tpu_compile.compile_step(topology, int(v), exchange, features=5, row_kernels=kernels) for v in vocabularies
]
json.dump([dataclasses.asdict(c) for c in costs], sys.stdout)
"""
READER = """
import json, sys, tpu_compile, hlo, jax
from jax.experimental import pallas as pl, topologies
from jax.experimental.pallas import tpu as pltpu

(device, *_) = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
shape = (400_000, 128)

def copies(function, *donated):
    sharding = jax.sharding.SingleDeviceSharding(device)
    table = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
    ids = jax.ShapeDtypeStruct((64,), "int32", sharding=sharding)
    text = jax.jit(function, donate_argnums=donated).lower(table, ids).compile().as_text()
    return len(hlo.whole_copies(text, {shape}))

def kernel(ids, table, out, semaphore):
    pltpu.make_async_copy(out.at[pl.ds(ids[1], 1)], out.at[pl.ds(ids[0], 1)], semaphore).start()
    pltpu.make_async_copy(out.at[pl.ds(ids[1], 1)], out.at[pl.ds(ids[0], 1)], semaphore).wait()

def by_kernel(aliases):
    return lambda table, ids: pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct(shape, "float32"),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases=aliases,
    )(ids, table)

update = lambda table, ids: table.at[ids].add(1.0)
json.dump(
    {
        "in place": copies(update, 0),
        "not donated": copies(update),
        "another layout": copies(lambda table, ids: table.T, 0),
        "every row": copies(lambda table, ids: table * 2.0, 0),
        "kernel in place": copies(by_kernel({1: 0}), 0),
        "kernel, not donated": copies(by_kernel({1: 0})),
        "kernel with a result of its own": copies(by_kernel({}), 0),
    },
    sys.stdout,
)
"""
#: Bytes that a device needs, of tables of ten million rows: to make the canonical tables, beside state and result; to
#: save a table, beside the state; to take a shard of one from the host, beside the shard.
MEMORY = """
import json, sys, tpu_compile, jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import Adagrad
from jaxembed.train import ShardedEmbedding, shard_writer, stack_reading
from jaxembed.train.engines import windows

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices

def embedding(rows):
    config = {"f": FeatureConfig(TableConfig(rows, 128, name="t"))}
    return ShardedEmbedding(config, Adagrad(0.1), Mesh(np.array(devices), ("devices",)))

def canonical(own):
    memory = jax.jit(own.to_canonical).lower(own.abstract_state()).compile().memory_analysis()
    return memory.temp_size_in_bytes

def saving(own):
    (stack, p), = own._canonical._places.values()
    leaf = own.abstract_canonical()[0]["t"]
    program = windows._one_window(windows.windows_of(stack, p, leaf.sharding, (128,)))
    scalars = [jax.ShapeDtypeStruct((), "int32", sharding=own.replicated)] * 3
    (table,) = own.abstract_state().tables.values()
    memory = program.lower(table, *scalars).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

def restoring():
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))
    # Of a host of one device, the largest.
    shard, window = of((625_000, 128), "float32"), of((stack_reading.WINDOW_BYTES // 512, 128), "float32")
    memory = shard_writer._update.lower(shard, window, of((), "int32")).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes - 625_000 * 512
    )

even, odd = embedding(10_000_000), embedding(10_000_001)
json.dump(
    {"canonical": canonical(even), "canonical, odd": canonical(odd), "saving": saving(even), "restoring": restoring()},
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def costs():
    """By exchange and row kernels, at V of a million and ten million; they compile side by side."""
    processes = {step: start(STEPS, "v5e:4x4", *step, *map(str, VOCABULARIES)) for step in STEPS_OF}
    return {step: answer(process) for step, process in processes.items()}


def test_the_reader_finds_copies_where_there_are_some():
    found = answer(start(READER))
    assert found["in place"] == 0
    assert found["not donated"] > 0
    assert found["another layout"] > 0
    assert found["every row"] > 0
    assert found["kernel in place"] == 0
    assert found["kernel, not donated"] > 0
    assert found["kernel with a result of its own"] > 0


@pytest.mark.parametrize("step", STEPS_OF)
def test_tables_are_updated_in_place_and_never_copied(costs, step):
    for cost, vocabulary in zip(costs[step], VOCABULARIES, strict=True):
        # Table and accumulators of five features, a share of 16.
        assert cost["table_bytes"] == 2 * 5 * vocabulary * 128 * 4 // 16
        assert cost["aliased"] >= cost["table_bytes"]
        assert cost["copies"] == 0


@pytest.mark.parametrize("step", STEPS_OF)
def test_cost_is_flat_in_the_vocabulary(costs, step):
    small, large = costs[step]
    assert large["touched"] == pytest.approx(small["touched"], rel=0.02)
    assert large["temporary"] == pytest.approx(small["temporary"], rel=0.02)
    assert large["exchanged"] == small["exchanged"]


def test_row_kernels_touch_rows_and_not_tiles(costs):
    """No more than five features' share of what a whole step may; see test_row_kernels.py."""
    for cost in costs["all_to_all", "auto"]:
        assert cost["row_kernels"] == "pallas"
        assert cost["touched"] <= 3.0e9 * 5 / 26


@pytest.mark.parametrize("step", STEPS_OF)
def test_tables_exchange_what_the_formula_says(costs, step):
    for cost in costs[step]:
        # The gradients of the dense model are all-reduced.
        exchanged = sum(cost["exchanged"].values()) - cost["dense_bytes"]
        # all_gather brings the entries once for both ways, which the formula counts twice.
        assert 0.9 * cost["predicted"] <= exchanged <= 1.01 * cost["predicted"]


@pytest.fixture(scope="module")
def memory():
    return answer(start(MEMORY))


def test_canonical_tables_take_a_few_windows_of_memory(memory):
    shard = 10_000_000 * 128 * 4 // 16
    assert memory["canonical"] < shard / 10
    # Columns of 8 are given another layout, table and slots one after the other; no device holds a whole table.
    assert memory["canonical, odd"] <= 2.1 * shard


def test_saving_takes_a_few_windows_of_memory(memory):
    assert memory["saving"] < 64e6


def test_restoring_takes_a_window_of_memory(memory):
    assert memory["restoring"] < 64e6
