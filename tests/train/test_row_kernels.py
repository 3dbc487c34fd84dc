"""Kernels that read and update single rows, in JAX's interpreter for TPU kernels: the same rows as by XLA.

The interpreter makes each copy as late as it may, fills memory with NaN and looks for races; what a TPU would do that it
does not model, it cannot show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from jaxembed import FeatureConfig, QuantizationConfig, RaggedTensor, TableConfig
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, CustomOptimizer, update_unique
from jaxembed.train import ShardedEmbedding
from jaxembed.train.engines import pallas_rows, row_kernels
from jaxembed.train.engines.pallas_scalars import split_rule

V, BLOCK = 100, 8
EVERY_OPTION = {
    "clip_weight_min": -1.0,
    "clip_weight_max": 1.0,
    "clipvalue": 0.5,
    "weight_decay_factor": 0.1,
    "multiply_weight_decay_factor_by_learning_rate": True,
}
OPTIMIZERS = {
    "sgd": SGD(0.1),
    "adagrad": Adagrad(0.1),
    "adagrad, clipped": Adagrad(0.1, **EVERY_OPTION),
    "adam": Adam(0.1),
    "adam, clipped": Adam(lambda step: 0.1 / (1 + jnp.float32(step)), sum_inside_sqrt=False, **EVERY_OPTION),
    "momentum": AdagradMomentum(0.1, 0.9, use_nesterov=True, beta2=0.9, exponent=3.0),
    "ftrl": FTRL(0.1, l1_regularization_strength=0.1, beta=0.1, allow_zero_accumulator=True),
}
SLOW = {"sgd", "adagrad", "adam", "momentum", "ftrl"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in OPTIMIZERS]
#: Rows of one update, in blocks of 8: none, few, whole blocks, a part of the last one, all.
COUNTS = (0, 5, 8, 16, 29, 39)


def rows_and_gradients(size, count, width, seed=0):
    """Unique rows, the last one of the table among them, and padding whose gradients are NaN."""
    rng = np.random.default_rng(seed)
    rows = np.full(size, V, np.int32)
    if count:
        rows[:count] = np.sort(np.append(rng.choice(V - 1, count - 1, replace=False), V - 1))
    gradients = rng.normal(size=(size, width)).astype(np.float32)
    gradients[count:] = np.nan
    return rows, gradients


def table_and_slots(optimizer, width):
    rng = np.random.default_rng(1)
    slots = {name: rng.uniform(0.1, 1, (V, width)).astype(np.float32) for name in optimizer.slot_names}
    return rng.normal(size=(V, width)).astype(np.float32), slots


def both(optimizer):
    """The update by kernel and by XLA, compiled."""

    kernel = jax.jit(lambda *arguments: pallas_rows.update_unique(optimizer, *arguments, block=BLOCK))
    return kernel, jax.jit(lambda *arguments: update_unique(optimizer, *arguments))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(row_kernels, "_PLATFORMS", ("cpu",))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_updated_as_by_xla(name, capsys):
    optimizer, size = OPTIMIZERS[name], 39
    table, slots = table_and_slots(optimizer, 128)
    kernel, xla = both(optimizer)
    for count in COUNTS:
        rows, gradients = rows_and_gradients(size, count, 128, seed=count)
        step = jnp.int32(count)
        arguments = table, slots, rows, gradients, optimizer.learning_rate_at(step), step
        found, wanted = (jax.tree.map(np.asarray, f(*arguments)) for f in (kernel, xla))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, wanted)
        for new, old in zip(jax.tree.leaves(found), jax.tree.leaves((table, slots)), strict=True):
            np.testing.assert_array_equal(*(np.delete(x, rows[:count], 0) for x in (new, old)))
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_wide_rows_and_no_rows():
    optimizer = Adagrad(0.1)
    table, slots = table_and_slots(optimizer, 256)
    kernel, xla = both(optimizer)
    arguments = table, slots, *rows_and_gradients(20, 19, 256), 0.1, jnp.int32(0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), kernel(*arguments), xla(*arguments)
    )
    found = kernel(table, slots, *rows_and_gradients(0, 0, 256), 0.1, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, found, (table, slots))


def test_a_copy_that_nobody_waits_for_is_found(monkeypatch, capsys):
    """The interpreter's races are a check of the waits."""
    monkeypatch.setattr(pallas_rows, "_wait", lambda *arguments: None)
    optimizer = SGD(0.1)
    table, slots = table_and_slots(optimizer, 128)
    kernel, _ = both(optimizer)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")):
        jax.block_until_ready(kernel(table, slots, *rows_and_gradients(39, 39, 128), 0.1, jnp.int32(0)))
    assert "RACE DETECTED" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 1, 7, 8, 33])
def test_rows_are_gathered_and_clipped(size, capsys):
    rng = np.random.default_rng(size)
    table = rng.normal(size=(V, 128)).astype(np.float32)
    rows = rng.integers(-2, V + 3, size).astype(np.int32)
    rows[:1] = V - 1
    found = pallas_rows.gather(jnp.asarray(table), jnp.asarray(rows), block=BLOCK)
    np.testing.assert_array_equal(found, table[np.clip(rows, 0, V - 1)])
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_scalars_are_computed_outside_of_the_kernel():
    """A bias correction takes an expm1, which Mosaic has not."""
    optimizer, row = Adam(0.1), jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def rule(gradient, rows, momenta, velocities, rate, step):
        return optimizer.update_rows(gradient, rows, {"momenta": momenta, "velocities": velocities}, rate, step)

    scalars = jnp.float32(0.1), jnp.int32(7)
    assert "expm1" in str(jax.make_jaxpr(rule)(*[row] * 4, *scalars))
    split = split_rule(rule, [row] * 4, scalars)
    given = [jnp.full(row.shape, value, row.dtype) for value in (0.5, 1.0, 0.2, 0.3)]
    assert "expm1" not in str(jax.make_jaxpr(split.on_rows)(given, split.scalars))
    found = split.on_rows(given, split.scalars)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.leaves(rule(*given, *scalars)))


def embedding(devices, dim=128, optimizer=None, plan=None, config=None, **options):
    config = config or {
        "a": FeatureConfig(TableConfig(50, dim, combiner="mean", name="a")),
        "b": FeatureConfig(TableConfig(20, dim, combiner="sum", name="b")),
    }
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    return ShardedEmbedding(config, optimizer or Adagrad(0.1), mesh, plan=plan, **options)


def train(own, steps=2):
    """Bags with duplicates and bad ids, and weights of one feature."""
    state, outputs = own.init(jax.random.key(0)), []
    for step in range(steps):
        rng = np.random.default_rng(step)
        splits = np.concatenate([[0], np.cumsum(rng.integers(0, 4, 8))]).astype(np.int32)
        ids = rng.integers(-1, 51, splits[-1]).astype(np.int32)
        weights = RaggedTensor(rng.uniform(0.5, 2, splits[-1]).astype(np.float32), splits)
        inputs = {"a": RaggedTensor(ids, splits), "b": rng.integers(0, 20, 8).astype(np.int32)}
        placed, values = own.shard_batch(inputs, {"a": weights, "b": None})
        out = own.lookup(state, placed, values)
        outputs.append(out)
        state = own.apply_gradients(state, placed, jax.tree.map(lambda x: x + 1, out), values)
    return jax.tree.map(np.asarray, (outputs, own.to_canonical(state)[:2]))


@pytest.mark.parametrize(
    ("devices", "exchange", "optimizer"),
    [
        pytest.param(1, "auto", OPTIMIZERS["adagrad, clipped"], marks=pytest.mark.slow),
        (2, "all_to_all", OPTIMIZERS["adam"]),
        pytest.param(2, "all_gather", OPTIMIZERS["adagrad"], marks=pytest.mark.slow),
    ],
)
def test_an_embedding_trains_as_by_xla(devices, exchange, optimizer, monkeypatch):
    """Not on all devices: the interpreter's callbacks would take every thread, and wait for another one."""
    used = []
    for name in ("gather", "update_unique"):
        kernel = getattr(pallas_rows, name)
        monkeypatch.setattr(pallas_rows, name, lambda *a, k=kernel: used.append(k.__name__) or k(*a))
    options = {"optimizer": optimizer, "exchange": exchange}
    wanted = train(embedding(devices, row_kernels="xla", **options))
    assert not used
    found = train(embedding(devices, row_kernels="pallas", **options))
    # One device looks bags up as everywhere.
    assert set(used) == ({"gather", "update_unique"} if devices > 1 else {"update_unique"})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), found, wanted)


def test_choices_that_are_none_are_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"row_kernels must be one of .*got 'mosaic'"):
        embedding(2, row_kernels="mosaic")
    with pytest.raises(ValueError, match=r"row_kernels='pallas' needs TPUs, got .*'cpu'"):
        embedding(2, row_kernels="pallas")
    assert set(embedding(2).row_kernels.values()) == {"xla"}


def test_tables_left_to_xla_are_named(caplog):
    def custom(gradient, table, slots, rate, hyperparameters):
        return table - rate * gradient

    tables = {
        "narrow": TableConfig(8, 64, name="narrow"),
        "half": TableConfig(8, 128, name="half", dtype=jnp.bfloat16),
        "custom": TableConfig(8, 128, name="custom", optimizer=CustomOptimizer(custom)),
        "dense": TableConfig(8, 128, name="dense", optimizer=Adam(0.1, lazy_adam=False)),
        "each": TableConfig(8, 128, name="each", optimizer=SGD(0.1, use_gradient_accumulation=False)),
        "copied": TableConfig(8, 128, name="copied"),
        "split": TableConfig(8, 128, name="split"),
        "held": TableConfig(8, 128, name="held", quantization_config=QuantizationConfig(256, -1.0, 1.0)),
        "wide": TableConfig(8, 256, name="wide"),
    }
    config = {name: FeatureConfig(table) for name, table in tables.items()}
    plan = {"copied": "replicated", "split": "column"}
    own = embedding(2, config=config, plan=plan, row_kernels="pallas")
    (record,) = caplog.records
    for name in tables:
        by_kernel = name in ("held", "wide")
        assert (f"'{name}'" in record.getMessage()) == (not by_kernel), name
        assert own.row_kernels[name] == ("pallas" if by_kernel else "xla"), name
