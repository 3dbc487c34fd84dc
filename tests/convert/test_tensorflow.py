"""Object checkpoints of TensorFlow, written and restored by TensorFlow itself."""

import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxembed import FeatureConfig, RaggedTensor, TableConfig, optimizers, serve
from jaxembed.checkpoint import read_checkpoint
from jaxembed.cli import main
from jaxembed.convert import convert, open_source
from jaxembed.convert import tensorflow as ours
from jaxembed.train import Checkpointer, ShardedEmbedding
from tests.lazy import lazily

pytestmark = pytest.mark.parity
tf = lazily("tensorflow")

SHAPES = {"films/a.b": (400, 6), "users": (70, 8)}
IDS = {"x": [[1, 2, 399], [], [7]], "y": [[3], [69, 69], [0]]}


def theirs():
    api = tf.tpu.experimental.embedding
    films = api.TableConfig(400, 6, name="films/a.b", combiner="sum", optimizer=api.Adagrad(0.1))
    users = api.TableConfig(70, 8, name="users", optimizer=api.Adam(0.1))
    config = {"x": api.FeatureConfig(table=films), "y": api.FeatureConfig(table=users)}
    embedding = api.TPUEmbeddingForServing(feature_config=config, optimizer=api.SGD(0.1))
    embedding.build()
    return embedding


def config():
    films = TableConfig(400, 6, name="films/a.b", combiner="sum", optimizer=optimizers.Adagrad(0.1))
    users = TableConfig(70, 8, name="users", optimizer=optimizers.Adam(0.1))
    return {"x": FeatureConfig(films), "y": FeatureConfig(users)}


def lookups(embedding):
    found = embedding({name: tf.ragged.constant(bags, tf.int64) for name, bags in IDS.items()})
    return {name: activations.numpy() for name, activations in found.items()}


def fill(embedding):
    """Each variable has values of its own."""
    flat = [(table, name) for table in sorted(SHAPES) for name in sorted(embedding._variables[table])]
    for i, (table, name) in enumerate(flat):
        rows, dim = SHAPES[table]
        values = np.arange(rows * dim, dtype=np.float32).reshape(rows, dim) / 64 + 1000 * i
        embedding._variables[table][name].assign(values)


def arrays(embedding):
    return {
        table: {name: variable.numpy() for name, variable in embedding._variables[table].items()}
        for table in SHAPES
    }


def ours_of(path):
    read = read_checkpoint(path, slots=True)
    return {table: {"parameters": read.tables[table], **read.slots.get(table, {})} for table in read.tables}


def test_there_and_back(tmp_path, capsys):
    """Theirs to a checkpoint that trains and serves, and back to theirs: tables, slots and lookups."""
    embedding = theirs()
    fill(embedding)
    prefix = tf.train.Checkpoint(model=tf.Module(), embedding=embedding).save(str(tmp_path / "tf" / "model"))
    report = convert(prefix, tmp_path / "ckpt", feature_config=config())
    assert (report.source_format, len(report.arrays)) == ("tensorflow", 5)
    assert main(["inspect", prefix]) == 0
    assert "users: 70 x 8" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, ours_of(tmp_path / "ckpt"), arrays(embedding))
    own = ShardedEmbedding(config(), optimizers.SGD(0.1), jax.make_mesh((2,), ("d",)))
    with Checkpointer(tmp_path / "ckpt", own) as checkpointer:
        tables, slots, _ = own.to_canonical(checkpointer.restore().state)
    np.testing.assert_array_equal(slots["users"]["velocities"], arrays(embedding)["users"]["velocities"])
    np.testing.assert_array_equal(tables["films/a.b"], arrays(embedding)["films/a.b"]["parameters"])

    found = serve.load(tmp_path / "ckpt").embedding(
        {name: RaggedTensor.from_lists(bags) for name, bags in IDS.items()}
    )
    expected = lookups(embedding)
    for name, activations in found.items():
        np.testing.assert_allclose(activations, expected[name], rtol=1e-6, atol=1e-6)

    convert(tmp_path / "ckpt", tmp_path / "back", target_format="tensorflow")
    again = theirs()
    status = tf.train.Checkpoint(embedding=again).restore(tf.train.latest_checkpoint(str(tmp_path / "back")))
    status.assert_existing_objects_matched()
    status.assert_consumed()
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(embedding))
    jax.tree.map(np.testing.assert_array_equal, lookups(again), expected)
    third = convert(tmp_path / "back", tmp_path / "third")
    assert [a.digest for a in third.arrays] == [a.digest for a in report.arrays]
    assert third.feature_config == config()


def test_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch, capsys):
    """TensorFlow has types of its own for it, which would come out as a traceback."""
    np.savez(tmp_path / "a.npz", films=np.ones((3, 2), np.float32))

    def full(**arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.raw_ops, "SaveV2", full)
    assert main(["convert", str(tmp_path / "a.npz"), "--to", "tensorflow", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "TensorFlow cannot write it: No space left on device" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_tensors_are_written_in_parts(tmp_path, monkeypatch):
    """Parts of a tensor are one tensor to TensorFlow."""
    monkeypatch.setattr(ours, "PART_BYTES", 1000)
    rng = np.random.default_rng(0)
    tables = {"films/a.b": rng.normal(size=(400, 6)), "users": rng.normal(size=(70, 8))}
    np.savez(tmp_path / "a.npz", **{name: table.astype(np.float32) for name, table in tables.items()})
    convert(tmp_path / "a.npz", tmp_path / "tf", target_format="tensorflow")
    assert len(list((tmp_path / "tf").glob("ckpt.data-*"))) > 10
    again = theirs()
    tf.train.Checkpoint(embedding=again).restore(str(tmp_path / "tf" / "ckpt")).expect_partial()
    for name, table in tables.items():
        np.testing.assert_array_equal(again._variables[name]["parameters"].numpy(), table.astype(np.float32))
    convert(tmp_path / "tf", tmp_path / "ckpt")
    np.testing.assert_array_equal(
        read_checkpoint(tmp_path / "ckpt").tables["users"], tables["users"].astype(np.float32)
    )


def test_pieces_are_mapped_and_not_read_as_a_whole(tmp_path, monkeypatch):
    """TensorFlow reads a whole piece for any of its rows, and a stack asks for some of each of its shards with each block."""
    monkeypatch.setattr(ours, "PART_BYTES", 1000)
    prefix, values = stacked_checkpoint(tmp_path / "tf")
    convert(prefix, tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "stacks", target_format="tensorflow", layout=prefix)
    assert len(list((tmp_path / "stacks").glob("ckpt.data-*"))) > 10
    rng = np.random.default_rng(0)
    table = rng.normal(size=(300, 70)).astype(np.float32)
    slices = ["300 70 0,120:0,40", "300 70 0,120:40,30", "300 70 120,180:-"]
    parts = [table[:120, :40], table[:120, 40:], table[120:]]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "w"), tensor_names=["w"] * 3, shape_and_slices=slices, tensors=parts
    )
    monkeypatch.setattr(tf.raw_ops, "RestoreV2", lambda **_: pytest.fail("TensorFlow read a piece"))
    found = open_source(tmp_path / "stacks")
    for name in SHAPES:
        np.testing.assert_array_equal(found.tables[name].read(), values["parameters"][name])
        np.testing.assert_array_equal(found.slots[name]["accumulators"].read(), values["accumulators"][name])
    np.testing.assert_array_equal(open_source(tmp_path / "w").tables["w"].source[100:140], table[100:140])
    data = tmp_path / "w.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    rows = open_source(tmp_path / "w").tables["w"].source
    np.testing.assert_array_equal(rows[0:120], table[:120])
    with pytest.raises(ValueError, match="w: w cannot be read, or is damaged: it does not have the checksum"):
        rows[0:121]


def test_a_variable_that_is_not_all_there_is_an_error_of_its_own(tmp_path):
    """Others of the checkpoint can be converted."""
    whole = np.ones((4, 3), np.float32)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "w"),
        tensor_names=["v", "w"],
        shape_and_slices=["9 3 0,4:-", ""],
        tensors=[whole] * 2,
    )
    convert(tmp_path / "w", tmp_path / "out", keys={"w": ("w", None)})
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "out").tables["w"], whole)
    with pytest.raises(ValueError, match="w: v is damaged: its pieces are not all of it"):
        convert(tmp_path / "w", tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_memory_is_a_few_blocks(tmp_path):
    shape = (1 << 18, 32)
    variable = tf.Variable(tf.random.normal(shape))
    prefix = tf.train.Checkpoint(w=variable).save(str(tmp_path / "tf" / "model"))
    tracemalloc.start()
    convert(prefix, tmp_path / "a.safetensors", keys={"w/.ATTRIBUTES/VARIABLE_VALUE": ("w", None)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < shape[0] * shape[1] * 4
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["tables/w"], variable.numpy())


#: TensorFlow's adapter, which stacks anew, finds no tables whose names have a "/" or ".".
PLAIN = {"films": (400, 6), "users": (70, 8)}


def stacked_layouts(num_partitions=4, shapes=SHAPES):
    """As TPUEmbeddingV2 makes them of its tables."""
    from tensorflow.core.tpu.kernels import sparse_core_layout_pb2
    from tensorflow.python.tpu import _pywrap_sparse_core_layout

    stacker = _pywrap_sparse_core_layout.SparseCoreLayoutStacker(
        num_partitions=num_partitions, sparse_cores_per_partition=4, disable_table_stacking=False
    )
    for name, shape in shapes.items():
        stacker.AddTable(name, *shape, "group", output_samples=8, num_features=1)
    layouts = sparse_core_layout_pb2.SparseCoreTableLayouts()
    layouts.ParseFromString(stacker.GetLayouts().SerializeToString())
    return layouts


def stack_of(layouts):
    """Name, rows and width of the only stack."""
    (name,) = {layout.stacked_table_name for layout in layouts.tables}
    first = layouts.tables[0]
    return (
        name,
        first.total_rows_per_sparse_core_shard * first.num_sparse_cores,
        first.unsharded_padded_shape[1],
    )


def stacked(layouts, tables):
    """[rows, width], put together by TensorFlow."""
    from tensorflow.python.tpu import tpu_embedding_v3_checkpoint_adapter as adapter

    _, rows, width = stack_of(layouts)
    return adapter._shard_from_cpu_to_sc(
        [tables[layout.table_name] for layout in layouts.tables],
        f"{rows} {width} 0,{rows}:0,{width}",
        list(layouts.tables),
    )


def as_written(layouts, kind, stack):
    """Padding of accumulators starts from 0.1, where TensorFlow's adapter makes zeros, which would be divided by."""
    ones = {layout.table_name: np.ones(layout.unsharded_shape, np.float32) for layout in layouts.tables}
    is_padding = np.asarray(stacked(layouts, ones)) == 0
    assert is_padding.any()
    return np.where(is_padding, np.float32(0.1), stack) if kind == "accumulators" else np.asarray(stack)


def values_of(kinds, shapes=SHAPES):
    return {
        kind: {n: np.arange(r * d, dtype=np.float32).reshape(r, d) + offset for n, (r, d) in shapes.items()}
        for kind, offset in kinds.items()
    }


def tpu_embedding_v2(layouts):
    from tensorflow.__internal__.tracking import AutoTrackable

    class TPUEmbeddingV2(AutoTrackable):
        """What that of TensorFlow is to a checkpoint; it cannot be built without SparseCores."""

        def __init__(self, layouts):
            self.embedding_layouts = {layout.table_name: layout for layout in layouts.tables}

        def build(self, layouts, values):
            """As there, a variable takes its value from a checkpoint that is to be restored, else from `values`."""
            from tensorflow.python.tpu import tpu_embedding_v3_utils as utils
            from tensorflow.python.trackable import base

            stack, rows, width = stack_of(layouts)

            def getter(name, shape, dtype, initializer):
                whole = base.ShardInfo(shape=shape, offset=[0, 0])
                return tf.Variable(lambda: initializer(shape, dtype=dtype, shard_info=whole), name=name)

            self._variables = {stack: {}}
            for kind, value in values.items():
                self._variables[stack][kind] = self._add_variable_with_custom_getter(
                    name=stack if kind == "parameters" else f"{stack}/{kind}",
                    shape=[rows, width],
                    initializer=lambda shape, dtype, shard_info, value=value: value,
                    getter=getter,
                )
            self._track_trackable(
                utils.SparseCoreLayoutsTrackable(tf.constant(layouts.SerializeToString())),
                utils.SPARSECORE_LAYOUTS_CHECKPOINT_KEY,
            )
            return self._variables[stack]

        def _checkpoint_adapter(self, path):
            from tensorflow.python.tpu import tpu_embedding_v3_checkpoint_adapter as adapter

            return adapter.TpuEmbeddingV3CheckpointAdapter.create_from_checkpoint(path)

    return TPUEmbeddingV2(layouts)


def restored_by_v2(path, layouts, kinds):
    """The stacks that TPUEmbeddingV2 of these layouts restores."""
    embedding = tpu_embedding_v2(layouts)
    tf.train.Checkpoint(embedding=embedding).restore(str(path)).expect_partial()
    found = embedding.build(layouts, dict.fromkeys(kinds, tf.fill(stack_of(layouts)[1:], -1.0)))
    return {kind: variable.numpy() for kind, variable in found.items()}


KINDS = {"parameters": 0.25, "accumulators": 0.5}


def stacked_checkpoint(directory, shapes=SHAPES):
    layouts, values = stacked_layouts(shapes=shapes), values_of(KINDS, shapes)
    assert any(layout.sparse_core_shard_rotation for layout in layouts.tables)
    assert any(layout.sparse_core_shard_row_offset for layout in layouts.tables)
    embedding = tpu_embedding_v2(layouts)
    embedding.build(layouts, {kind: stacked(layouts, tables) for kind, tables in values.items()})
    return tf.train.Checkpoint(embedding=embedding).save(str(directory / "model")), values


def test_stacked_by_sparsecore(tmp_path):
    """Read, and written again by the layout of a checkpoint or of a file: what TensorFlow itself would have written."""
    prefix, values = stacked_checkpoint(tmp_path / "tf")
    convert(prefix, tmp_path / "ckpt")
    read = read_checkpoint(tmp_path / "ckpt", slots=True)
    for name in SHAPES:
        np.testing.assert_array_equal(read.tables[name], values["parameters"][name])
        np.testing.assert_array_equal(read.slots[name]["accumulators"], values["accumulators"][name])
    layouts = stacked_layouts()
    (tmp_path / "layouts.pb").write_bytes(layouts.SerializeToString())
    for i, layout in enumerate((prefix, tmp_path / "layouts.pb")):
        out = tmp_path / f"back{i}"
        report = convert(tmp_path / "ckpt", out, target_format="tensorflow", layout=layout)
        assert any(note.startswith("table 'users' -> stack ") for note in report.notes)
        ours, theirs = tf.train.load_checkpoint(str(out)), tf.train.load_checkpoint(prefix)
        keys = theirs.get_variable_to_shape_map().keys() - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
        assert ours.get_variable_to_shape_map().keys() - {"_CHECKPOINTABLE_OBJECT_GRAPH"} == keys
        for key in keys:
            kind = "accumulators" if "Saccumulators" in key else "parameters"
            is_stack = ours.get_variable_to_shape_map()[key] == list(stack_of(layouts)[1:])
            wanted = as_written(layouts, kind, theirs.get_tensor(key)) if is_stack else theirs.get_tensor(key)
            np.testing.assert_array_equal(ours.get_tensor(key), wanted)
        third = convert(out, tmp_path / f"third{i}")
        assert [a.digest for a in third.arrays] == [a.digest for a in report.arrays]
    # For serving TensorFlow unstacks them, theirs and ours.
    for path in (prefix, tmp_path / "back0" / "ckpt"):
        again = theirs_for_serving(path)
        for name, table in values["parameters"].items():
            np.testing.assert_array_equal(again._variables[name]["parameters"].numpy(), table)


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize("chips", [4, 2])
def test_training_on_sparsecores_restores_them(tmp_path, stacks, chips):
    """By its own layout, whole; else TensorFlow stacks the tables anew, but finds no slots (2.21: its adapter gives them
    the stack's name)."""
    prefix, values = stacked_checkpoint(tmp_path / "tf", PLAIN)
    convert(prefix, tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "back", target_format="tensorflow", layout=prefix if stacks else None)
    layouts = stacked_layouts(chips, PLAIN)
    found = restored_by_v2(tmp_path / "back" / "ckpt", layouts, KINDS)
    if not stacks or chips != 4:
        assert (found.pop("accumulators") == -1).all()
    for kind, stack in found.items():
        np.testing.assert_array_equal(stack, as_written(layouts, kind, stacked(layouts, values[kind])))


def test_layouts_that_do_not_fit_are_refused(tmp_path):
    tables = values_of({"p": 0})["p"]
    np.savez(tmp_path / "a.npz", **tables)
    np.savez(tmp_path / "less.npz", users=np.ones(SHAPES["users"], np.float32))
    np.savez(tmp_path / "other.npz", **{**tables, "users": np.ones((3, 8), np.float32)})
    (tmp_path / "good.pb").write_bytes(stacked_layouts().SerializeToString())
    (tmp_path / "bad.pb").write_bytes(b"\xff\xff\xff")
    (tmp_path / "empty.pb").write_bytes(b"")
    convert(tmp_path / "a.npz", tmp_path / "plain", target_format="tensorflow")

    def refused(message, layout, source="a.npz", target="tensorflow"):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / source, tmp_path / "out", target_format=target, layout=tmp_path / layout)
        assert not (tmp_path / "out").exists()

    refused("bad.pb is no SparseCoreTableLayouts, or is damaged", "bad.pb")
    refused("empty.pb is no SparseCoreTableLayouts: it has no tables", "empty.pb")
    refused("plain has no layout of stacks to take", "plain")
    refused(
        r"the layout has the tables \['films/a.b', 'users'\], to be written are \['users'\]",
        "good.pb",
        "less.npz",
    )
    refused(r"table 'users' must be \[70, 8\] by the layout, got \[3, 8\]", "good.pb", "other.npz")
    refused("layout is neither for reading npz nor for writing jaxembed", "good.pb", target="jaxembed")
    embedding = ShardedEmbedding(config(), optimizers.SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(tmp_path / "mixed", embedding) as checkpointer:
        checkpointer.save(embedding.init(jax.random.key(0)))
    refused(
        r"must have one optimizer: 'films/a.b' has the slots \['accumulators'\], 'users' \['momenta', ",
        "good.pb",
        "mixed",
    )


def theirs_for_serving(prefix):
    api = tf.tpu.experimental.embedding
    tables = {name: api.TableConfig(*shape, name=name) for name, shape in SHAPES.items()}
    embedding = api.TPUEmbeddingForServing(
        feature_config={name: api.FeatureConfig(table=table) for name, table in tables.items()},
        optimizer=api.SGD(0.1),
    )
    tf.train.Checkpoint(embedding=embedding).restore(str(prefix)).expect_partial()
    embedding.build()
    return embedding


def test_bad_checkpoints_are_refused(tmp_path):
    embedding = theirs()
    prefix = tf.train.Checkpoint(embedding=embedding).save(str(tmp_path / "tf" / "model"))
    data = tmp_path / "tf" / "model-1.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"model-1: embedding/.* cannot be read, or is damaged"):
        convert(prefix, tmp_path / "out")
    index = tmp_path / "tf" / "model-1.index"
    index.write_bytes(index.read_bytes()[:40])
    with pytest.raises(ValueError, match="is no TensorFlow checkpoint, or is damaged"):
        convert(tmp_path / "tf", tmp_path / "out")
    (tmp_path / "tf" / "other.index").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has the checkpoints|is no TensorFlow checkpoint"):
        convert(tmp_path / "tf", tmp_path / "out")
    np.savez(tmp_path / "a.npz", t=np.ones((2, 3), np.float16))
    with pytest.raises(ValueError, match=r"a TPUEmbedding of TensorFlow cannot hold float16.*--dtype float32"):
        convert(tmp_path / "a.npz", tmp_path / "out", target_format="tensorflow")
    assert not (tmp_path / "out").exists()


def test_what_was_written_beside_one_checkpoint_is_of_no_other(tmp_path):
    """TensorFlow trains on from what was written, and saves to the same folder: at another step, maybe other tables."""
    np.savez(tmp_path / "a.npz", users=np.ones((70, 8), np.float32))
    convert(tmp_path / "a.npz", tmp_path / "tf", target_format="tensorflow", step=1000)
    assert open_source(tmp_path / "tf").step == 1000
    later = tf.train.Checkpoint(w=tf.Variable(tf.ones((3, 2))))
    prefix = later.write(str(tmp_path / "tf" / "ckpt-2"))
    found = open_source(prefix)
    assert (found.step, found.feature_config) == (0, None)
    assert "left out: feature_config.json, which is of the checkpoint 'ckpt' beside this one" in found.notes


def test_any_program_s_variables(tmp_path):
    """Variables of no TPUEmbedding are tables by their shapes, or by keys."""
    model = tf.Module()
    model.w = tf.Variable(np.ones((4, 3), np.float32))
    model.bias = tf.Variable(np.ones(3, np.float32))
    prefix = tf.train.Checkpoint(model=model).save(str(tmp_path / "tf" / "model"))
    report = convert(prefix, tmp_path / "out", keys={"model/w/.ATTRIBUTES/VARIABLE_VALUE": ("w", None)})
    assert any(note.startswith("left out: ") and "model/bias" in note for note in report.notes)
    assert read_checkpoint(tmp_path / "out").tables["w"].sum() == 12
