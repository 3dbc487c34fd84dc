"""Restoring by blocks: every sharding, every window, the same bits; and no more memory than a share of the table."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import FeatureConfig, TableConfig
from jaxembed.convert import convert
from jaxembed.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    CustomOptimizer,
    register_function,
)
from jaxembed.optimizers.schedules import ExponentialDecay
from jaxembed.train import Checkpointer, ShardedEmbedding, stack_reading
from jaxembed.train.engines import windows
from jaxembed.train.engines.placement import stack_tables
from jaxembed.train.shard_writer import ShardWriter

from .checkpoint_programs import at_step, same

PLAN = {
    "mod": "mod",
    "mod2": "mod",
    "div": "div",
    "one": "table",
    "two": "table",
    "col": "column",
    "all": "replicated",
}


def config(rows=1003):
    sizes = {"mod": rows, "mod2": 41, "div": 777, "one": 50, "two": 333, "col": 200, "all": 19}
    return {name: FeatureConfig(TableConfig(size, 8, name=name)) for name, size in sizes.items()}


def embedding(num_devices, rows=1003, plan=None):
    mesh = jax.make_mesh((num_devices,), ("d",), devices=jax.devices()[:num_devices])
    return ShardedEmbedding(config(rows), Adagrad(0.1), mesh, plan=PLAN if plan is None else plan)


# One window a shard; many windows; windows that divide nothing.
@pytest.mark.parametrize("window", [32 << 20, pytest.param(8 * 32 * 8, marks=pytest.mark.slow), 8 * 32 * 7])
@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (4, 8)])
def test_every_sharding_comes_back(tmp_path, monkeypatch, window, saved_on, restored_on):
    monkeypatch.setattr(stack_reading, "WINDOW_BYTES", window)
    before, after = embedding(saved_on), embedding(restored_on)
    state = at_step(before, 7)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
    with Checkpointer(tmp_path, after) as checkpointer:
        restored = checkpointer.restore().state
    tables, slots, _ = before.to_canonical(state)
    assert same(after, restored, tables, slots)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(after.abstract_state()), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)
    assert int(restored.step) == 7


@pytest.mark.parametrize("window", [pytest.param(32 << 20, marks=pytest.mark.slow), 8 * 32 * 7])
def test_growth_by_windows(tmp_path, monkeypatch, window):
    monkeypatch.setattr(stack_reading, "WINDOW_BYTES", window)
    small, large = embedding(2), embedding(8, rows=1500)
    state = at_step(small, 4)
    with Checkpointer(tmp_path, small) as checkpointer:
        checkpointer.save(state)
    key = jax.random.key(3)
    with Checkpointer(tmp_path, large) as checkpointer:
        grown = checkpointer.restore(vocabulary_growth="initialize", key=key).state
    old, new, fresh = (
        own.to_canonical(s) for own, s in ((small, state), (large, grown), (large, large.init(key)))
    )
    for get in (lambda t, n: t[0][n], lambda t, n: t[1][n]["accumulators"]):
        for name in PLAN:
            num_old = old[0][name].shape[0]
            np.testing.assert_array_equal(get(new, name)[:num_old], get(old, name))
            np.testing.assert_array_equal(get(new, name)[num_old:], get(fresh, name)[num_old:])


@register_function("tests.restoring.counted")
def counted(shape, names, values):
    return {name: np.arange(1, 1 + shape[0] * shape[1]).reshape(shape) for name in names}


@register_function("tests.restoring.unchanged")
def unchanged(gradient, row, slots, learning_rate, hyperparameters):
    return row, slots[0]


def test_slots_that_are_missing_start_anew(tmp_path):
    """On every sharding, whatever makes them; those that there are come back."""

    def own(optimizer, others, num_devices):
        features = {
            name: FeatureConfig(dataclasses.replace(feature.table, optimizer=others.get(name)))
            for name, feature in config().items()
        }
        mesh = jax.make_mesh((num_devices,), ("d",), devices=jax.devices()[:num_devices])
        return ShardedEmbedding(features, optimizer, mesh, plan=PLAN)

    by_row = CustomOptimizer(unchanged, 0.1, ["totals"], [2.5], slot_dims=[1])
    others = {"mod2": Adagrad(slot_variable_creation_fn=counted), "div": by_row}
    before, after = own(SGD(0.1), {"one": FTRL()}, 1), own(FTRL(), others, 8)
    state = at_step(before, 3)
    tables, slots, _ = before.to_canonical(state)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
    with Checkpointer(tmp_path, after) as checkpointer:
        restored = checkpointer.restore(fresh_slots=True).state
    initial = {
        p.table.name: stack.optimizer.init_slots((p.table.vocabulary_size, p.table.dim))
        for stack in after.stacks.values()
        for p in stack.placements
    }
    for name, found in initial.items():
        if "linears" in found:
            found["linears"] = FTRL().linears_of(
                jnp.asarray(tables[name]), found["accumulators"], np.float32(0.001)
            )
    assert same(after, restored, tables, initial | {"one": slots["one"]})
    assert int(restored.step) == 3


def test_whole_slots_are_made_on_the_host(tmp_path):
    """A device has room for its share."""
    made = []

    def create(shape, names, values):
        slots = {name: jnp.full(shape, value) for name, value in zip(names, values, strict=True)}
        made.extend(next(iter(slot.devices())) for slot in slots.values())
        return slots

    np.savez(tmp_path / "a.npz", a=np.ones((40, 4), np.float32))
    features = {"a": FeatureConfig(TableConfig(40, 4, name="a"))}
    convert(tmp_path / "a.npz", tmp_path / "steps", feature_config=features)
    adagrad = Adagrad(0.1, slot_variable_creation_fn=create)
    own = ShardedEmbedding(features, adagrad, jax.make_mesh((1,), ("d",)))
    with Checkpointer(tmp_path / "steps", own) as checkpointer, jax.default_device(jax.devices()[3]):
        checkpointer.restore(fresh_slots=True)
    assert made == [jax.local_devices(backend="cpu")[0]]


@pytest.mark.parametrize("saved", [AdagradMomentum(0.1), AdagradMomentum(0.1, beta2=0.9), Adagrad(0.1)])
@pytest.mark.parametrize("restored", [Adam(0.1), FTRL(0.1), Adagrad(0.1)])
def test_slots_of_another_optimizer_are_kept_where_they_mean_the_same(tmp_path, saved, restored):
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    features = {"a": FeatureConfig(TableConfig(40, 4, name="a"))}
    before, after = (ShardedEmbedding(features, optimizer, mesh) for optimizer in (saved, restored))
    state = at_step(before, 3)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
    told = contextlib.nullcontext()
    if isinstance(saved, AdagradMomentum):  # else none that both have
        message = r"^Slots \['\w+'\] of table 'a' start anew.*'adagrad_momentum'"
        told = pytest.warns(RuntimeWarning, match=message)
    with Checkpointer(tmp_path, after) as checkpointer, told:
        found = after.slots(checkpointer.restore(partial=True, fresh_slots=True).state)["a"]
    kept = before.slots(state)["a"]
    for slot, initial in restored.slot_initial_values.items():
        if slot == "accumulators" and (saved == restored or not isinstance(saved, AdagradMomentum)):
            np.testing.assert_array_equal(found[slot], kept[slot])
        elif slot != "linears":
            assert (np.asarray(found[slot]) == np.float32(initial)).all()


@register_function("tests.restoring.halved")
def halved(gradient, row, slots, learning_rate, hyperparameters):
    return row, slots[0] / 2


@pytest.mark.parametrize("rate", [0.1, lambda step: 0.1], ids=["stored", "unstored"])
@pytest.mark.parametrize(
    ("saved", "restored", "is_kept"),
    [
        (unchanged, unchanged, True),
        (unchanged, halved, False),
        (lambda gradient, row, slots, *_: (row, slots[0]), unchanged, False),
        (unchanged, lambda gradient, row, slots, *_: (row, slots[0]), False),
    ],
)
def test_slots_of_another_function_start_anew(tmp_path, saved, restored, is_kept, rate):
    """With a warning, whether or not the rest of the optimizer can be stored."""
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    features = {"a": FeatureConfig(TableConfig(40, 4, name="a"))}
    before, after = (
        ShardedEmbedding(features, CustomOptimizer(function, rate, ["acc"], [2.5]), mesh)
        for function in (saved, restored)
    )
    state = at_step(before, 3)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
    told = pytest.warns(RuntimeWarning, match=r"^Slots \['acc'\] of table 'a' start anew.*the registered name")
    with Checkpointer(tmp_path, after) as checkpointer, contextlib.nullcontext() if is_kept else told:
        found = after.slots(checkpointer.restore(fresh_slots=True).state)["a"]["acc"]
    expected = before.slots(state)["a"]["acc"] if is_kept else np.full((40, 4), 2.5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"l1_regularization_strength": 0.05, "l2_regularization_strength": 0.1, "beta": 0.5},
        {
            "l1_regularization_strength": 0.05,
            "l2_regularization_strength": 0.1,
            "learning_rate_power": -0.7,
            "multiply_linear_by_learning_rate": True,
        },
    ],
)
@pytest.mark.parametrize("saved", [SGD(0.1), Adagrad(0.1)], ids=["bare", "with_accumulators"])
def test_ftrl_goes_on_from_the_rows_of_tables_without_linears(tmp_path, saved, options):
    """It makes rows of its slots, and would make others of zeros."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    features = {"a": FeatureConfig(TableConfig(40, 4, name="a"))}
    ftrl = FTRL(learning_rate=ExponentialDecay(0.2, 10, 0.5), **options)
    before, after = (ShardedEmbedding(features, optimizer, mesh) for optimizer in (saved, ftrl))
    tables, slots, step = before.to_canonical(at_step(before, 3))
    state = before.from_canonical(tables, jax.tree.map(jnp.abs, slots), step)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
    with Checkpointer(tmp_path, after) as checkpointer:
        restored = checkpointer.restore(partial=True, fresh_slots=True).state
    ((rows,), (slots,)) = (tuple(after.to_canonical(restored)[i].values()) for i in (0, 1))
    again, _ = ftrl.rule(jnp.zeros_like(rows), rows, slots, ftrl.learning_rate_at(3), 3)
    np.testing.assert_allclose(again, rows, rtol=1e-5, atol=1e-6)
    assert np.abs(rows).max() > 0.1


def test_tables_that_were_converted_without_slots_are_trained_on(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones((40, 4), np.float32))
    features = {"a": FeatureConfig(TableConfig(40, 4, name="a"))}
    convert(tmp_path / "a.npz", tmp_path / "steps", feature_config=features)
    own = ShardedEmbedding(features, Adagrad(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(tmp_path / "steps", own) as checkpointer:
        with pytest.raises(ValueError, match="has no slot 'accumulators' of table 'a'; pass fresh_slots=True"):
            checkpointer.restore()
        state = checkpointer.restore(fresh_slots=True).state
    assert (own.slots(state)["a"]["accumulators"] == np.float32(0.1)).all()


@pytest.mark.parametrize("window", [32 << 20, 8 * 32 * 7])
def test_arrays_of_the_host_go_onto_devices_as_those_of_devices_do(monkeypatch, window):
    monkeypatch.setattr(stack_reading, "WINDOW_BYTES", window)
    own = embedding(8)
    # Made by numpy, and thus of the host.
    state = at_step(own, 7)
    tables, slots, step = own.to_canonical(state)
    on_devices = own.from_canonical(tables, slots, step)
    jax.tree.map(np.testing.assert_array_equal, state, on_devices)
    arrays = jax.tree.map(np.asarray, (tables, slots))
    traced = jax.jit(lambda: own.from_canonical(*arrays, 7))()
    jax.tree.map(np.testing.assert_array_equal, state, traced)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(own.abstract_state()), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)


def test_a_state_comes_back_from_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1)
    config = {name: FeatureConfig(TableConfig(size, 8, name=name)) for name, size in (("a", 1000), ("b", 48))}
    own = ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh((8,), ("d",)))
    state = at_step(own, 7)
    canonical = own.canonical_on_host(state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(canonical[:2])} == {"pinned_host"}
    # On devices they would be laid out anew.
    monkeypatch.setattr(own._canonical, "to_stacks", None)
    jax.tree.map(np.testing.assert_array_equal, state, own.from_canonical(*canonical))


@given(st.sampled_from(["mod", "div", "table"]), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70))
def test_shares_are_where_positions_are(sharding, num_shards, rows, others):
    tables = {name: TableConfig(size, 4, name=name) for name, size in (("a", others), ("b", rows))}
    (stack,) = stack_tables(tables, Adagrad(0.1), {"a": "mod", "b": sharding}, num_shards)
    for p in stack.placements:
        found = np.full(p.table.vocabulary_size, -1)
        for shard in range(num_shards):
            share = stack.share(p, shard)
            found[np.asarray(share, int)] = shard * stack.num_rows + p.first_row + np.arange(len(share))
        np.testing.assert_array_equal(found, stack.position(p, np.arange(p.table.vocabulary_size)))


@given(st.data())
def test_writer_in_any_order(data):
    # Few shapes: each is compiled.
    num_rows, window = data.draw(st.sampled_from((1, 7, 30))), data.draw(st.sampled_from((1, 4, 12)))
    initial = jnp.arange(num_rows * 2.0).reshape(num_rows, 2) if data.draw(st.booleans()) else None
    expected = np.zeros((num_rows, 2), np.float32) if initial is None else np.array(initial)
    writer = ShardWriter((num_rows, 2), np.dtype(np.float32), jax.devices()[0], initial, window * 8)
    for i in range(data.draw(st.integers(0, 5))):
        first = data.draw(st.integers(0, num_rows - 1))
        count = data.draw(st.integers(0, num_rows - first))
        rows = np.full((count, 2), 100 + i, np.float32)
        writer.write(first, rows)
        expected[first : first + count] = rows
    np.testing.assert_array_equal(writer.finish(), expected)


@pytest.mark.slow
@pytest.mark.multihost
def test_memory_is_a_share_of_the_table_and_512_mb():
    """1 GiB of rows and as much of slots, 8 devices to 1 and 1 to 8 processes; every value compared."""
    program = pathlib.Path(__file__).parents[2] / "benchmarks" / "restore_memory.py"
    run = subprocess.run(
        [sys.executable, program, "--json"], capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    assert run.stdout, run.stderr
    results = json.loads(run.stdout)
    assert [(r["saved_on"], r["restored_on"]) for r in results] == [(8, 1), (1, 8)]
    for result in results:
        assert result["peak"] < result["bytes"] / result["restored_on"] + 512e6
