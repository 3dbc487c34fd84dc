"""Damaged files of every format: they are refused with a ValueError, and where the format has checksums nothing else."""

import importlib
import json
import pathlib
import random
import re

import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError
from jaxembed.cli import main
from jaxembed.convert import convert, open_source
from jaxembed.convert.pieces import Pieces

TABLE = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def npz(folder):
    np.savez(folder / "a.npz", t=TABLE, u=TABLE)
    return folder / "a.npz", folder / "a.npz"


def packed(folder):
    np.savez_compressed(folder / "a.npz", t=TABLE, u=TABLE)
    return folder / "a.npz", folder / "a.npz"


def npy(folder):
    np.save(folder / "a.npy", TABLE)
    return folder / "a.npy", folder / "a.npy"


def safetensors(folder):
    convert(npz(folder)[0], folder / "a.safetensors")
    return folder / "a.safetensors", folder / "a.safetensors"


def torch(folder):
    convert(npz(folder)[0], folder / "a.pt")
    return folder / "a.pt", folder / "a.pt"


def sharded(folder):
    convert(npz(folder)[0], folder / "dcp", target_format="torchrec")
    return folder / "dcp", folder / "dcp" / "__0_0.distcp"


def sharded_metadata(folder):
    convert(npz(folder)[0], folder / "dcp", target_format="torchrec")
    return folder / "dcp", folder / "dcp" / ".metadata"


def hdf5(folder):
    h5py = importlib.import_module("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("e/_default_device_embedding_layers/r/vars")
        group.attrs["name"] = "t"
        group["0"] = TABLE
    return folder / "a.h5", folder / "a.h5"


def tensorflow_index(folder):
    convert(npz(folder)[0], folder / "tf", target_format="tensorflow")
    return folder / "tf", folder / "tf" / "ckpt.index"


def tensorflow_data(folder):
    convert(npz(folder)[0], folder / "tf", target_format="tensorflow")
    return folder / "tf", next((folder / "tf").glob("ckpt.data-00000*"))


def damaged(good, rng):
    data, kind = bytearray(good), rng.random()
    if kind < 0.7:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    elif kind < 0.85:
        del data[rng.randrange(len(data)) :]
    else:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "package", "has_checksums"),
    [
        (npz, None, True),
        (packed, None, True),
        (npy, None, False),
        (safetensors, None, False),
        pytest.param(torch, "torch", True, marks=pytest.mark.parity),
        pytest.param(sharded, "torch", True, marks=pytest.mark.parity),
        pytest.param(sharded_metadata, "torch", False, marks=pytest.mark.parity),
        pytest.param(hdf5, "h5py", False, marks=pytest.mark.parity),
        pytest.param(tensorflow_index, "tensorflow", True, marks=pytest.mark.parity),
        pytest.param(tensorflow_data, "tensorflow", True, marks=pytest.mark.parity),
    ],
)
def test_damage_is_refused(tmp_path, make, package, has_checksums, count):
    if package:
        pytest.importorskip(package)
    source, file = make(tmp_path)
    good, rng = pathlib.Path(file).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(count):
        # Never into a file that is mapped.
        file.unlink()
        file.write_bytes(damaged(good, rng))
        try:
            opened = open_source(source)
            tables = {name: array.read() for name, array in opened.tables.items()}
        except (ValueError, FileNotFoundError):
            refused += 1
            continue
        if has_checksums:
            assert all(np.array_equal(table, TABLE) for table in tables.values())
    assert refused > count / 10


@pytest.mark.parametrize("form", ["npy", pytest.param("saved-model", marks=pytest.mark.parity)])
def test_what_is_beside_arrays_has_a_digest(tmp_path, capsys, form):
    """No byte of it can change without an error: names and configuration would be others, without a word."""
    if form == "saved-model":
        pytest.importorskip("orbax.export")
    config = {"f": FeatureConfig(TableConfig(50, 8, name="t", combiner="sqrtn"))}
    npz(tmp_path)
    convert(tmp_path / "a.npz", tmp_path / "out", target_format=form, feature_config=config)
    file = tmp_path / "out" / ("assets.extra" if form == "saved-model" else "") / "feature_config.json"
    good = file.read_bytes()
    assert open_source(tmp_path / "out").feature_config == config
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        if json.loads(good) == _parsed(bad):  # a space of another kind
            continue
        file.write_bytes(bad)
        with pytest.raises(
            CheckpointError, match=r"feature_config.json is not what jaxembed writes beside arrays"
        ):
            open_source(tmp_path / "out")
    file.write_bytes(good.replace(b"sqrtn", b"mean"))
    assert main(["inspect", str(tmp_path / "out")]) == 1
    assert "it is damaged, for it does not have the digest it was written with" in capsys.readouterr().err


def _parsed(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (npz, None),
        (npy, None),
        (safetensors, None),
        *(pytest.param(make, "torch", marks=pytest.mark.parity) for make in (torch, sharded, sharded_metadata)),
        pytest.param(hdf5, "h5py", marks=pytest.mark.parity),
        *(
            pytest.param(make, "tensorflow", marks=pytest.mark.parity)
            for make in (tensorflow_index, tensorflow_data)
        ),
    ],
)
def test_damage_is_a_failure_and_no_mistake(tmp_path, capsys, make, package):
    """To the shell: 1, as of a checkpoint that is damaged; another command line would not do."""
    if package:
        pytest.importorskip(package)
    source, file = make(tmp_path)
    good = pathlib.Path(file).read_bytes()
    file.unlink()
    file.write_bytes(good[: len(good) // 2])
    assert main(["inspect", str(source), "--stats"]) == 1
    assert re.search("damaged|truncated", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("shape", "extents"), [((10,), [((-5,), (5,)), ((0,), (5,))]), ((2, 5), [((2, 5), (-2, -5))])]
)
def test_pieces_outside_of_an_array_are_not_all_of_it(shape, extents):
    """Though they have as many values: its other rows would be whatever was in memory."""
    with pytest.raises(CheckpointError, match="t is damaged: its pieces are not all of it"):
        Pieces("t", shape, np.dtype(np.float32), extents, lambda i: np.ones(extents[i][1], np.float32))
