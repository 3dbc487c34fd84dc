"""plan_tables: what it chooses, that what it says holds, and what it refuses."""

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, TableConfig
from jaxembed.optimizers import SGD, Adagrad
from jaxembed.train import ShardedEmbedding, plan_tables
from jaxembed.train.engines.auto_plan import memory_of_device
from jaxembed.train.engines.placement import stack_tables
from jaxembed.train.engines.traffic import exchanged_bytes

TABLES = {
    "big": TableConfig(100_000, 16, name="big", combiner="sum"),
    "small": TableConfig(40, 16, name="small", combiner="sum"),
    "tiny": TableConfig(
        5, 16, name="tiny", combiner="sum", optimizer=SGD(0.1, use_gradient_accumulation=False)
    ),
}
CONFIG = {name: FeatureConfig(table) for name, table in TABLES.items()}
BATCH, VALENCY = 64, 10


def plan(memory=10**9, **options):
    arguments = {
        "ids_per_batch": dict.fromkeys(CONFIG, BATCH * VALENCY),
        "bags_per_batch": dict.fromkeys(CONFIG, BATCH),
    }
    return plan_tables(CONFIG, Adagrad(0.1), 8, memory_per_device=memory, **{**arguments, **options})


def test_choices_and_their_reasons():
    chosen = {t.name: t for t in plan().tables}
    assert {name: t.sharding for name, t in chosen.items()} == {
        "big": "mod",
        "small": "replicated",
        "tiny": "table",
    }
    assert chosen["big"].bytes_per_device == 100_000 // 8 * 16 * 4 * 2
    assert chosen["small"].bytes_per_device == 40 * 16 * 4 * 2
    assert chosen["tiny"].bytes_per_device == 5 * 16 * 4
    text = str(plan())
    assert "fewer rows than devices" in text
    assert "MB exchanged a step" in text
    assert len(text.splitlines()) == 5


def test_tables_of_a_stack_travel_together():
    """By itself, the one with many ids a bag would go by all_gather."""
    tables = [TableConfig(10**5, 16, name="few"), TableConfig(10**5, 16, name="many")]
    config = {table.name: FeatureConfig(table) for table in tables}
    batch = {
        "few": np.arange(512, dtype=np.int32),
        "many": np.arange(512 * 12, dtype=np.int32).reshape(512, 12),
    }
    counts = {"ids_per_batch": {"few": 512, "many": 512 * 12}, "bags_per_batch": dict.fromkeys(config, 512)}
    mod = {"memory_per_device": 10**9, "overrides": dict.fromkeys(config, "mod")}
    chosen = plan_tables(config, SGD(), 8, **counts, **mod)
    alone = plan_tables(
        {"many": FeatureConfig(tables[1])},
        SGD(),
        8,
        ids_per_batch={"many": 512 * 12},
        bags_per_batch={"many": 512},
        memory_per_device=10**9,
        overrides={"many": "mod"},
    )
    assert alone.tables[0].why.endswith("all_gather")
    assert [t.why.split()[-1] for t in chosen.tables] == ["all_to_all"] * 2
    own = ShardedEmbedding(config, SGD(), jax.make_mesh((8,), ("d",)), plan=chosen)
    moved = own.predicted_bytes(own.shard_batch(batch)[0])
    assert sum(t.exchanged_bytes for t in chosen.tables) == moved


def test_tables_are_replicated_only_while_there_is_memory():
    spread = sum(t.bytes_per_device for t in plan(overrides={"small": "mod"}).tables)
    assert plan(memory=spread).shardings["small"] == "mod"


def test_wide_tables_of_many_ids_are_sharded_by_columns():
    config = {"t": FeatureConfig(TableConfig(10**6, 1024, name="t", combiner="sum"))}
    chosen = plan_tables(
        config,
        Adagrad(0.1),
        8,
        memory_per_device=2 * 10**9,
        ids_per_batch={"t": 4096 * 50},
        bags_per_batch={"t": 4096},
    )
    assert chosen.shardings == {"t": "column"}


def arrays_of(embedding):
    """Bytes of tables and slots on a device."""
    state = embedding.abstract_state()
    arrays = jax.tree.leaves((state.tables, state.slots))
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in arrays)


def test_tables_on_different_devices_take_the_same_room():
    config = {name: FeatureConfig(TableConfig(10**6, 16, name=name)) for name in "abcd"}
    counts, whole = dict.fromkeys(config, 1024), dict.fromkeys(config, "table")
    options = {"ids_per_batch": counts, "bags_per_batch": counts, "overrides": whole}
    chosen = plan_tables(config, SGD(), 4, memory_per_device=70_000_000, **options)
    own = ShardedEmbedding(config, SGD(), jax.make_mesh((4,), ("d",), devices=jax.devices()[:4]), plan=chosen)
    assert chosen.bytes_per_device == arrays_of(own) == 64_000_000
    assert {t.bytes_per_device for t in chosen.tables} == {64_000_000}
    assert str(chosen).splitlines()[-1].split()[1] == "64.00"


def test_what_sparsecores_pad_is_counted(caplog):
    pytest.importorskip("jax_tpu_embedding")
    tables = [
        TableConfig(10**6, 1, name="thin"),
        TableConfig(1001, 1, name="beside"),
        TableConfig(10, 8, name="theirs", dtype="float16"),
    ]
    config = {table.name: FeatureConfig(table) for table in tables}
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
    batch = dict.fromkeys(config, np.zeros(8, np.int32))
    mod = dict.fromkeys(config, "mod")
    own = ShardedEmbedding(
        config, SGD(), mesh, engine="sparsecore", plan="auto", example_batch=batch, overrides=mod
    )
    assert own.plan.tables[2].bytes_per_device == 8_011_776
    assert own.plan.bytes_per_device == arrays_of(own)
    assert caplog.text.count("leaves to the xla engine: 'theirs'") == 1


def test_rows_of_one_owner_travel_in_rounds():
    """1024 ids a shard, all of one owner, who gives at most 192 of them a round."""
    config, counts = {"t": FeatureConfig(TableConfig(10**6, 16, name="t"))}, {"t": 8192}
    options = {"memory_per_device": 10**9, "ids_per_batch": counts, "bags_per_batch": counts}
    plans = {s: plan_tables(config, SGD(), 8, overrides={"t": s}, **options) for s in ("mod", "table")}
    a_round = 8 * 192 * (8 + 16 * 8)
    assert plans["mod"].tables[0].exchanged_bytes == a_round
    assert "all_gather" in plans["table"].tables[0].why  # it moves less

    def moved(*vocabularies):
        tables = {f"t{i}": TableConfig(size, 16, name=f"t{i}") for i, size in enumerate(vocabularies)}
        (stack,) = stack_tables(tables, SGD(), dict.fromkeys(tables, "table"), 8)
        return exchanged_bytes(stack, "all_to_all", 1024, 1024)

    assert moved(10**6) == 6 * a_round
    assert moved(5) == a_round
    assert moved(10**6, 10**6) == 3 * a_round


@pytest.mark.parametrize("sharding", ["mod", "div", "table", "replicated", "column"])
def test_overrides_are_kept_and_stored_bytes_are_those_of_the_arrays(sharding):
    chosen = plan(overrides=dict.fromkeys(("big", "small"), sharding))
    assert {chosen.shardings[name] for name in ("big", "small")} == {sharding}
    mesh = jax.make_mesh((8,), ("devices",))
    embedding = ShardedEmbedding({"big": CONFIG["big"]}, Adagrad(0.1), mesh, plan={"big": sharding})
    state = embedding.init(jax.random.key(0))
    arrays = jax.tree.leaves((state.tables, state.slots))
    held = max(sum(x.addressable_shards[i].data.nbytes for x in arrays) for i in range(8))
    assert chosen.tables[0].bytes_per_device == held


@pytest.mark.slow  # a planned job is trained in test_job.py
def test_a_planned_embedding_trains_as_any_other():
    mesh = jax.make_mesh((8,), ("devices",))
    rng = np.random.default_rng(0)
    batch = {
        name: RaggedTensor.from_row_lengths(
            rng.integers(0, table.vocabulary_size, BATCH * 3).astype(np.int32), np.full(BATCH, 3)
        )
        for name, table in TABLES.items()
    }
    results = []
    for chosen in (plan(), None):
        embedding = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, plan=chosen)
        state = embedding.init(jax.random.key(0))
        activations = embedding.lookup(state, batch)
        state = embedding.apply_gradients(state, batch, activations)
        results.append(jax.tree.map(np.asarray, (activations, embedding.to_canonical(state))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *results)


def test_counts_of_numpy_are_counts():
    counts = {"ids_per_batch": BATCH * VALENCY, "bags_per_batch": BATCH}
    small = {name: dict.fromkeys(CONFIG, np.int32(count)) for name, count in counts.items()}
    assert plan(memory=np.int64(10**9), **small) == plan()
    # A sum of bytes beyond int32.
    many = {name: dict.fromkeys(CONFIG, 2**30) for name in counts}
    assert plan(**jax.tree.map(np.int32, many)) == plan(**many)


def test_refusals():
    with pytest.raises(ValueError, match=r"more than the memory_per_device of 1,000; use more devices"):
        plan(memory=1000)
    with pytest.raises(ValueError, match=r"num_shards must be a positive int, got 0"):
        plan_tables(CONFIG, SGD(), 0, memory_per_device=1, ids_per_batch={}, bags_per_batch={})
    with pytest.raises(ValueError, match=r"cores must be an int of at least 0, got -1"):
        plan(cores=-1)
    with pytest.raises(ValueError, match=r"ids_per_batch must give a number of at least 0 for each table"):
        plan(ids_per_batch={"big": 3})
    with pytest.raises(ValueError, match=r"bags_per_batch must give a number of at least 0 for each table"):
        plan(bags_per_batch=dict.fromkeys(CONFIG, True))
    with pytest.raises(ValueError, match=r"exchange must be one of .* got 'ring'"):
        plan(exchange="ring")
    with pytest.raises(ValueError, match=r"overrides must give tables of .* got \{'big': 'ring'\}"):
        plan(overrides={"big": "ring"})
    with pytest.raises(ValueError, match=r"table 'tiny' cannot be replicated"):
        plan(overrides={"tiny": "replicated"})
    with pytest.raises(ValueError, match=r"the plan is for 8 devices, got a mesh of 4"):
        ShardedEmbedding(
            CONFIG, Adagrad(0.1), jax.make_mesh((4,), ("d",), devices=jax.devices()[:4]), plan=plan()
        )


def test_auto_plans_for_an_example_and_the_memory_of_the_devices(caplog):
    batch = {
        "big": np.arange(BATCH, dtype=np.int32),
        "small": RaggedTensor.from_row_lengths(np.zeros(BATCH * VALENCY, np.int32), np.full(BATCH, VALENCY)),
        "tiny": np.zeros((BATCH, 3), np.int32),
    }
    mesh = jax.make_mesh((8,), ("d",))
    with caplog.at_level("INFO", "jaxembed"):
        own = ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, plan="auto", example_batch=batch)
    expected = plan(
        memory=own.plan.memory_per_device,
        ids_per_batch={"big": BATCH, "small": BATCH * VALENCY, "tiny": 3 * BATCH},
        bags_per_batch={"big": BATCH, "small": BATCH, "tiny": 3 * BATCH},
    )
    assert own.plan == expected
    assert str(expected) in caplog.text
    own = ShardedEmbedding(
        CONFIG, Adagrad(0.1), mesh, plan="auto", example_batch=batch, overrides={"small": "div"}
    )
    assert own.plan.shardings["small"] == "div"
    assert {p.sharding for s in own.stacks.values() for p in s.placements if p.table.name == "small"} == {"div"}


def test_the_exchange_that_is_fixed_is_planned_for():
    config = {"t": FeatureConfig(TABLES["big"])}
    batch, mesh = {"t": np.arange(64, dtype=np.int32)}, jax.make_mesh((8,), ("d",))
    for exchange in ("all_gather", "all_to_all"):
        own = ShardedEmbedding(
            config, SGD(), mesh, plan="auto", exchange=exchange, example_batch=batch, overrides={"big": "mod"}
        )
        (table,) = own.plan.tables
        assert table.why == f"as asked for, by {exchange}"
        assert table.exchanged_bytes == own.predicted_bytes(own.shard_batch(batch)[0])
    # A copy of a table moves less than its rows by one of the two.
    counts = {"ids_per_batch": {"t": 640}, "bags_per_batch": {"t": 64}, "memory_per_device": 10**9}
    table = {"t": FeatureConfig(TableConfig(400, 16, name="t"))}
    chosen = [
        plan_tables(table, SGD(), 8, exchange=x, **counts).shardings["t"] for x in ("all_gather", "all_to_all")
    ]
    assert chosen == ["mod", "replicated"]


def test_memory_of_cpu_devices_is_within_the_limit_of_a_container(tmp_path):
    mesh = jax.make_mesh((8,), ("d",))
    whole = memory_of_device(mesh, tmp_path)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    for text, expected in (("max", whole), (str(1 << 20), (1 << 20) // 8), (str(1 << 61), whole)):
        limit.write_text(text)
        assert memory_of_device(mesh, tmp_path) == expected


def test_auto_says_what_it_needs():
    mesh = jax.make_mesh((8,), ("d",))
    with pytest.raises(ValueError, match="plan must be 'auto' with an example_batch"):
        ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, plan="auto")
    with pytest.raises(ValueError, match="plan must be 'auto' with an example_batch"):
        ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, plan="mod")
    with pytest.raises(ValueError, match="example_batch and overrides are of plan='auto', got plan=None"):
        ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, overrides={"small": "div"})
