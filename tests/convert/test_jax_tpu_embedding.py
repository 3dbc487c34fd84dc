"""Embedding variables of jax-tpu-embedding, stacked and saved by the library itself."""

import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxembed import FeatureConfig, TableConfig, optimizers
from jaxembed.checkpoint import read_checkpoint
from jaxembed.checkpoint.stored import StoredArray, open_array
from jaxembed.cli import main
from jaxembed.convert import convert, jax_tpu_embedding
from jaxembed.sparsecore_layout import StackedTable

pytestmark = pytest.mark.parity
table_stacking = pytest.importorskip("jax_tpu_embedding.sparsecore.lib.nn.table_stacking")

from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec  # noqa: E402

SHAPES = {"a": (37, 6), "b": (64, 8), "c": (5, 3)}
NUM_SHARDS = 16


def values(offset=0.0):
    """Each value says its table, row and column."""
    return {
        name: 1000 * (i + 1) + np.arange(rows * dim, dtype=np.float32).reshape(rows, dim) + np.float32(offset)
        for i, (name, (rows, dim)) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Their table specs, variables with Adam's slots, a checkpoint of these, and the proto's file."""
    features = [
        embedding_spec.FeatureSpec(
            name=name,
            table_spec=embedding_spec.TableSpec(
                name=name,
                vocabulary_size=rows,
                embedding_dim=dim,
                initializer=jax.nn.initializers.zeros,
                optimizer=embedding_spec.AdamOptimizerSpec(learning_rate=0.1),
                combiner="sum",
            ),
            input_shape=(16, 1),
            output_shape=(16, dim),
        )
        for name, (rows, dim) in SHAPES.items()
    ]
    table_stacking.auto_stack_tables(features, global_device_count=4, num_sc_per_device=4)
    specs = {feature.name: feature.table_spec for feature in features}
    directory = tmp_path_factory.mktemp("library")
    proto = embedding.create_proto_from_feature_specs(features, 4, 4)
    (directory / "spec.pb").write_bytes(proto.SerializeToString())

    def stack(offset):
        return table_stacking.stack_and_shard_tables(
            specs, values(offset), num_shards=NUM_SHARDS, pad_value=0.0
        )

    parts = [stack(offset) for offset in (0.0, 0.25, 0.5)]
    variables = {
        name: embedding.EmbeddingVariables(
            parts[0][name].reshape(-1, parts[0][name].shape[-1]),
            embedding_spec.AdamSlotVariables(*(p[name].reshape(-1, p[name].shape[-1]) for p in parts[1:])),
        )
        for name in parts[0]
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "saved", variables)
        by_device = {name: p.reshape(4, -1, p.shape[-1]) for name, p in parts[0].items()}
        checkpointer.save(directory / "pmap", {n: {"table": t} for n, t in by_device.items()})
    return specs, variables, directory


def test_there_and_back(library, tmp_path, capsys):
    specs, variables, directory = library
    report = convert(directory / "saved", tmp_path / "ckpt", layout=directory / "spec.pb")
    assert report.source_format == "jax-tpu-embedding"
    read = read_checkpoint(tmp_path / "ckpt", slots=True)
    for name in SHAPES:
        np.testing.assert_array_equal(read.tables[name], values()[name])
        np.testing.assert_array_equal(read.slots[name]["momenta"], values(0.25)[name])
        np.testing.assert_array_equal(read.slots[name]["velocities"], values(0.5)[name])

    back = convert(
        tmp_path / "ckpt", tmp_path / "back", target_format="jax-tpu-embedding", layout=directory / "spec.pb"
    )
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(back.path / "variables", target)
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    theirs = table_stacking.unshard_and_unstack_tables(
        specs, {name: v.table for name, v in restored.items()}, num_shards=NUM_SHARDS
    )
    for name in SHAPES:
        np.testing.assert_array_equal(theirs[name], values()[name])
    third = convert(back.path, tmp_path / "third")
    assert main(["inspect", str(back.path)]) == 0
    assert "a: 37 x 6" in capsys.readouterr().out
    assert [a.digest for a in third.arrays] == [a.digest for a in report.arrays]


def test_a_stack_is_copied_once_and_let_go_of(monkeypatch):
    """Its copy is as large as all of its tables, and on the disk until it is let go of."""
    rows = np.arange(16 * 4, dtype=np.float32).reshape(16, 4)
    tables = [StackedTable(n, "s", (5, 4), 2, 8, 4, i * 4, 0, 6) for i, n in enumerate("ab")]
    copies = []

    def copy(stack):
        copies.append(weakref.ref(made := rows.copy()))
        return made

    monkeypatch.setattr(jax_tpu_embedding._Stack, "_copy", copy)
    stack = jax_tpu_embedding._Stack(StoredArray("s", rows))
    first, second = [stack.member(table).source for table in tables]
    for array, stop in ((first, 3), (first, 5), (second, 4)):
        array[stop - 2 : stop]
    assert [made() is None for made in copies] == [False]
    np.testing.assert_array_equal(second[3:5], tables[1].read_rows(rows, 3, 5))
    assert [made() is None for made in copies] == [True]
    np.testing.assert_array_equal(first[0:5], tables[0].read_rows(rows, 0, 5))


def test_with_an_axis_of_devices(library, tmp_path):
    convert(library[2] / "pmap", tmp_path / "ckpt", layout=library[2] / "spec.pb")
    for name, table in read_checkpoint(tmp_path / "ckpt").tables.items():
        np.testing.assert_array_equal(table, values()[name])


def test_what_does_not_fit_is_refused(library, tmp_path):
    directory = library[2]
    np.savez(tmp_path / "a.npz", **values())
    np.savez(tmp_path / "more.npz", d=values()["a"], **values())
    np.savez(tmp_path / "other.npz", **{**values(), "a": values()["b"]})
    np.savez(tmp_path / "less.npz", a=values()["a"])
    (tmp_path / "bad.pb").write_bytes(b"\xff\xff\xff")
    (tmp_path / "empty.pb").write_bytes(b"")
    (tmp_path / "notorbax").mkdir()
    (tmp_path / "notorbax" / "_METADATA").write_text("{}")

    def refused(message, source, layout="spec.pb", target_format="jax-tpu-embedding"):
        folder = directory if layout == "spec.pb" else tmp_path
        with pytest.raises(ValueError, match=message):
            convert(
                source if source.is_absolute() else tmp_path / source,
                tmp_path / "out",
                target_format=target_format,
                layout=layout and folder / layout,
            )
        assert not (tmp_path / "out").exists()

    saved = directory / "saved"
    refused("write create_proto_from_feature_specs", saved, None, "jaxembed")
    refused("is no EmbeddingSpecProto, or is damaged", saved, "bad.pb", "jaxembed")
    refused("is no EmbeddingSpecProto: it has no stacks", saved, "empty.pb", "jaxembed")
    refused("is no folder of arrays that Orbax saved", tmp_path / "notorbax", target_format="jaxembed")
    refused("write create_proto_from_feature_specs", tmp_path / "a.npz", None)
    refused("the layout has no table 'd'", tmp_path / "more.npz")
    refused(r"table 'a' must be \[37, 6\] by the layout", tmp_path / "other.npz")
    refused(r"the layout has the tables \['b', 'c'\], which are not to be written", tmp_path / "less.npz")


def arrays_with(slots):
    """As jaxembed names them in a .npz file; slots by table and name."""
    tables = {f"tables/{name}": table for name, table in values().items()}
    return {**tables, **{f"slots/{table}/{slot}": values(0.5)[table] for table, slot in slots}}


def test_slots_in_some_tables_of_a_stack_are_refused(library, tmp_path):
    """The others would have zeros there, which Adagrad divides by."""
    some = [("a", "accumulators"), ("b", "accumulators")]
    mixed = [*some, ("c", "velocities")]
    for name, slots, found in (("some", some, r"\[\]"), ("mixed", mixed, r"\['velocities'\]")):
        np.savez(tmp_path / f"{name}.npz", **arrays_with(slots))
        told = (
            r"tables of stack '.*' must have one optimizer: 'a' has the slots \['accumulators'\], 'c' " + found
        )
        with pytest.raises(ValueError, match=told):
            convert(
                tmp_path / f"{name}.npz",
                tmp_path / "out",
                target_format="jax-tpu-embedding",
                layout=library[2] / "spec.pb",
            )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("initial", [None, 0.25])
def test_accumulators_of_padding_start_as_others_do(library, tmp_path, initial):
    """From what the optimizer says if it is known, as in variables that the library makes: zeros would be divided by."""
    specs, _, directory = library
    np.savez(tmp_path / "a.npz", **arrays_with([(name, "accumulators") for name in SHAPES]))
    optimizer = optimizers.Adagrad(0.1, initial_accumulator_value=initial or 0.1)
    config = {
        name: FeatureConfig(TableConfig(*shape, name=name, optimizer=optimizer))
        for name, shape in SHAPES.items()
    }
    report = convert(
        tmp_path / "a.npz",
        tmp_path / "out",
        target_format="jax-tpu-embedding",
        layout=directory / "spec.pb",
        feature_config=None if initial is None else config,
    )
    for slot, padding in ((("table",), 0.0), (("slot", "accumulator"), initial or 0.1)):
        expected = table_stacking.stack_and_shard_tables(
            specs, values(0.5 if padding else 0.0), num_shards=NUM_SHARDS, pad_value=padding
        )
        for stack, shards in expected.items():
            key = ".".join((stack, *slot))
            found = open_array(report.path / "variables", key, key).read()
            np.testing.assert_array_equal(found, np.asarray(shards).reshape(found.shape))
            assert (found == np.float32(padding)).any()
