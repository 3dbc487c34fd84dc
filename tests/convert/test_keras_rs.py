"""Weights files of keras-rs models on JAX, written and loaded by Keras itself in a process of its own."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import read_checkpoint
from jaxembed.cli import main
from jaxembed.convert import convert
from tests.lazy import lazily

pytestmark = pytest.mark.parity
h5py = pytest.importorskip("h5py")
lazily("keras_rs")

PROGRAM = """
import sys
import keras, keras_rs, numpy as np
layers = keras_rs.layers
films = layers.TableConfig(name="films", vocabulary_size=20, embedding_dim=4, combiner="sum")
users = layers.TableConfig(name="users", vocabulary_size=20, embedding_dim=4)
shape = lambda name, table: layers.FeatureConfig(name, table, (2, 3), (2, 4))
layer = layers.DistributedEmbedding({"z": shape("z", films), "x": shape("x", users), "y": shape("y", films)})
inputs = {name: keras.Input((3,), batch_size=2, dtype="int32", name=name) for name in "xyz"}
model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Concatenate()(list(layer(inputs).values()))))
if sys.argv[1] == "save":
    model.save_weights(sys.argv[2])
else:
    model.load_weights(sys.argv[2])
np.savez(sys.argv[3], **{name: np.asarray(table) for name, table in layer.get_embedding_tables().items()})
"""


def run(*arguments):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], check=True, env=environment)
    with np.load(arguments[-1]) as tables:
        return dict(tables)


def test_there_and_back(tmp_path, capsys):
    tables = run("save", tmp_path / "model.weights.h5", tmp_path / "before.npz")
    report = convert(tmp_path / "model.weights.h5", tmp_path / "ckpt")
    assert report.source_format == "keras-rs"
    assert main(["inspect", str(tmp_path / "model.weights.h5")]) == 0
    assert "users: 20 x 4" in capsys.readouterr().out
    read = read_checkpoint(tmp_path / "ckpt")
    assert sorted(read.tables) == ["films", "users"]
    for name, table in tables.items():
        np.testing.assert_array_equal(read.tables[name], table)
    changed = {name: table + np.float32(i + 1) for i, (name, table) in enumerate(tables.items())}
    np.savez(tmp_path / "changed.npz", **changed)
    back = tmp_path / "back.weights.h5"
    convert(tmp_path / "changed.npz", back, target_format="keras-rs", layout=tmp_path / "model.weights.h5")
    after = run("load", back, tmp_path / "after.npz")
    for name, table in changed.items():
        np.testing.assert_array_equal(after[name], table)
    with h5py.File(tmp_path / "model.weights.h5") as old, h5py.File(back) as new:
        kernel = "layers/dense/vars/0"
        np.testing.assert_array_equal(new[kernel], old[kernel])


def weights(file, **tables):
    with h5py.File(file, "w") as f:
        for i, (name, rows) in enumerate(tables.items()):
            group = f.create_group(f"layers/e/_default_device_embedding_layers/embed_reduce_{i}/vars")
            group.attrs["name"] = name
            group["0"] = rows


def test_keys_of_either_side(tmp_path):
    """Of a source they say which array is which table; of our own they say which array of the file a table is."""
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    weights(tmp_path / "m.h5", movie=np.zeros((4, 2), np.float32))
    np.savez(tmp_path / "a.npz", emb=rows)
    keys = {"emb": ("movie", None)}
    convert(tmp_path / "a.npz", tmp_path / "out.h5", keys=keys, layout=tmp_path / "m.h5")
    convert(tmp_path / "a.npz", tmp_path / "steps", keys={"emb": ("film", None)})
    path = "layers/e/_default_device_embedding_layers/embed_reduce_0/vars/0"
    named = {path: ("film", None)}
    convert(tmp_path / "steps", tmp_path / "named.h5", keys=named, layout=tmp_path / "m.h5")
    for name in ("out", "named"):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            np.testing.assert_array_equal(file[path], rows)


def test_tables_of_other_names(tmp_path):
    """Two go to no one array, and what was written is told of by its array, not by its name."""
    rows = np.ones((4, 2), np.float32)
    weights(tmp_path / "m.h5", movie=rows, user=rows)
    path = "layers/e/_default_device_embedding_layers/embed_reduce_0/vars/0"
    common = {"keys": {path: ("film", None)}, "layout": tmp_path / "m.h5"}
    np.savez(tmp_path / "a.npz", film=rows)
    np.savez(tmp_path / "b.npz", film=rows, movie=rows)
    for name in "ab":
        convert(tmp_path / f"{name}.npz", tmp_path / name, target_format="jaxembed")
    report = convert(tmp_path / "a", tmp_path / "out.h5", **common)
    assert report.notes[-1] == f"as they were in {tmp_path / 'm.h5'}: tables user"
    with pytest.raises(ValueError, match=f"'film' and 'movie' would both be {path}; give one another key"):
        convert(tmp_path / "b", tmp_path / "both.h5", **common)
    assert not (tmp_path / "both.h5").exists()


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("group", ["layers/distributed_embedding_1", "emb"])
def test_stacks_of_sparse_cores_are_refused(tmp_path, group, slots):
    """Whatever the keys say, and the layer's name: their rows are in another order. A table beside them is read."""
    rows = np.ones((16, 8), np.float32)
    stack, alone = f"{group}/vars/0", f"{group}/_default_device_embedding_layers/embed_reduce/vars/0"
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for i in range(1 + slots):
            file[f"{group}/vars/{i}"] = rows
        file[f"{group}/vars/{1 + slots}"] = np.float32(3)  # steps
    message = rf"{stack} looks like a stack of tables on SparseCores.*np\.savez\(FILE, \*\*layer\.get_embedding_tables"
    for keys in (None, {stack: ("t", None)}):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "m.h5", tmp_path / "out", keys=keys)
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file[alone] = rows
        file[alone].parent.attrs["name"] = "t"
    config = {"f": FeatureConfig(TableConfig(16, 8, name="stacked"))}
    with pytest.raises(ValueError, match=rf"names table 'stacked'; there are \['t'\]\. not read: {message}"):
        convert(tmp_path / "m.h5", tmp_path / "out", feature_config=config)
    report = convert(tmp_path / "m.h5", tmp_path / "steps")
    assert re.search(f"not read: {message}", "\n".join(report.notes))
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "steps").tables["t"], rows)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "m.h5", tmp_path / "out", keys={stack: ("t", None)})
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "steps", tmp_path / "out.h5", keys={stack: ("t", None)}, layout=tmp_path / "m.h5")
    np.savez(tmp_path / "a.npz", other=rows)
    message = rf"has no table 'other'; it has \['t'\]\. {message}.*; if it is none, name the tables with keys \(--keys\)\."
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.npz", tmp_path / "out.h5", layout=tmp_path / "m.h5")


def test_layers_that_only_look_like_stacks(tmp_path):
    """One of a DistributedEmbedding's name with one matrix, those with a bias or a scale, and the optimizer."""
    rows = np.ones((16, 8), np.float32)
    layers = {
        "distributed_embedding": [rows],
        "dense": [rows, rows[0]],
        "scaled": [np.ones((3, 8), np.float32), np.float32(1)],
        "optimizer": [np.int32(1), np.float32(0.1), rows],
    }
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for name, arrays in layers.items():
            for i, array in enumerate(arrays):
                file[f"{name}/vars/{i}"] = array
    convert(tmp_path / "m.h5", tmp_path / "out", keys={"distributed_embedding/vars/0": ("t", None)})
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "out").tables["t"], rows)


def test_the_state_of_the_optimizer_that_a_copy_keeps_is_told_of(tmp_path):
    rows = np.ones((4, 2), np.float32)
    weights(tmp_path / "m.h5", t=rows)
    np.savez(tmp_path / "a.npz", t=rows)
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file["optimizer/vars/2"] = rows
    report = convert(tmp_path / "a.npz", tmp_path / "out.h5", layout=tmp_path / "m.h5")
    kept = "the state of the optimizer, which is not that of these tables"
    assert report.notes[-1] == f"as they were in {tmp_path / 'm.h5'}: {kept}"


def test_what_does_not_fit_is_refused(tmp_path):
    rows = np.ones((4, 2), np.float32)
    weights(tmp_path / "m.weights.h5", t=rows)
    weights(tmp_path / "twice.h5", t=rows)
    with h5py.File(tmp_path / "twice.h5", "a") as f:
        f.copy("layers/e", "layers/f")
    with h5py.File(tmp_path / "outside.h5", "w") as f:
        group = f.create_group("e/_default_device_embedding_layers/r/vars")
        group.attrs["name"] = "t"
        group["0"] = h5py.ExternalLink("m.weights.h5", "layers")
        f.create_dataset("raw", (2, 2), "f4", external=[("/etc/hostname", 0, 16)])
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "lfs.h5").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, message in (
        ("text", "is no HDF5 file, or is damaged"),
        ("lfs", "is a Git LFS pointer"),
        ("twice", "two arrays are the table 't'"),
        ("outside", "has no table that jaxembed recognizes"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{name}.h5", tmp_path / "out")
    np.savez(tmp_path / "a.npz", u=rows)
    np.savez(tmp_path / "b.npz", t=np.ones((5, 2), np.float32))
    with pytest.raises(ValueError, match=r"save one with model\.save_weights and pass it as layout"):
        convert(tmp_path / "a.npz", tmp_path / "out.h5")
    for source, message in (
        ("a", r"has no table 'u'; it has \['t'\]"),
        ("b", r"must be float32\[5, 2\], got float32\[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{source}.npz", tmp_path / "out.h5", layout=tmp_path / "m.weights.h5")
    assert not (tmp_path / "out.h5").exists()
    assert not (tmp_path / "out").exists()
