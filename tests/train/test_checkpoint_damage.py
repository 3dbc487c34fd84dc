"""Damage on disk: whatever byte of a checkpoint changes, it is a ValueError or changes no value."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, open_checkpoint, read_checkpoint
from jaxembed.train import Checkpointer

from .checkpoint_programs import at_step, embedding, feature_config

# Two blocks and a remainder: damage must be named by rows.
CONFIG = {"x": FeatureConfig(TableConfig(40_000, 16, name="items")), "y": feature_config()["x"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = embedding(2, CONFIG)
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model={"w": jnp.arange(1000.0)}, data={"at": 3})
        checkpointer.save(at_step(own, 2, seed=2), model={"w": jnp.arange(1000.0) + 1}, data={"at": 4})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved / "1", tmp_path / "copy" / "1"))


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def change(file, offset, length, flip=None):
    data = bytearray(file.read_bytes())
    data[offset : offset + length] = bytes([data[offset] ^ flip]) if flip else bytes(length)
    file.write_bytes(data)


@pytest.mark.parametrize("part", ["tables", "slots", "model"])
def test_flipped_bit_is_named(copy, part):
    file = largest(copy / part)
    change(file, file.stat().st_size // 2, 1, flip=4)
    what = {"tables": "table 'items'", "slots": "slot 'accumulators' of table 'items'", "model": "'w'|model"}[
        part
    ]
    with pytest.raises(CheckpointError, match=f"(?s)(?:{what}).*(damaged: rows|cannot be read)"):
        read_checkpoint(copy, slots=True)


def test_zeroed_page_names_the_table(copy):
    """Whether it can still be unpacked is up to the bytes that it hits."""
    file = largest(copy / "tables")
    change(file, file.stat().st_size // 2, 4096)
    with pytest.raises(CheckpointError, match=r"table 'items' (is damaged|cannot be read)"):
        read_checkpoint(copy)


@pytest.mark.parametrize("what", ["table 'items'", "slot 'accumulators' of table 'items'"])
def test_a_changed_row_is_named(copy, what):
    opened = open_checkpoint(copy)
    array = opened.slots["items"]["accumulators"] if what.startswith("slot") else opened.tables["items"]
    written = tensorstore.open(array.source.spec(), open=True, read=True, write=True).result()
    written[20_000, 3] = written[20_000, 3].read().result() + 1
    with pytest.raises(CheckpointError, match=rf"{what} is damaged: rows 16384 to 32767 of 40000"):
        read_checkpoint(copy, slots=True)


def test_truncated_file(copy):
    file = largest(copy / "tables")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"table .* cannot be read"):
        read_checkpoint(copy)


def test_parts_of_another_step(saved, copy):
    for part in ("tables", "slots", "model"):
        shutil.rmtree(copy / part)
        shutil.copytree(saved / "2" / part, copy / part)
    with pytest.raises(CheckpointError, match=r"table 'a.b/c d' is damaged: rows 0 to 1002 of 1003"):
        read_checkpoint(copy)


def test_trainer_refuses_it_too(copy):
    own = embedding(8, CONFIG)
    change(copy / "data" / "metadata", 12, 1, flip=1)
    with Checkpointer(copy.parent, own) as checkpointer, pytest.raises(CheckpointError, match="data/metadata"):
        checkpointer.restore()
    file = largest(copy / "slots")
    change(file, file.stat().st_size // 2, 4096)
    with (
        Checkpointer(copy.parent, own) as checkpointer,
        pytest.raises(CheckpointError, match="slot 'accumulators'"),
    ):
        checkpointer.restore()


def test_manifest_that_was_edited(copy):
    file = copy / "manifest" / "metadata"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "step": 7}))
    with pytest.raises(CheckpointError, match="manifest/metadata is damaged"):
        read_checkpoint(copy)
    file.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="format version '99', this jaxembed reads 1; upgrade"):
        read_checkpoint(copy)
    file.write_text(json.dumps({**manifest, "format": "other"}))
    with pytest.raises(CheckpointError, match="is not a jaxembed-checkpoint"):
        read_checkpoint(copy)


def test_verification_can_be_turned_off(saved, copy):
    shutil.rmtree(copy / "tables")
    shutil.copytree(saved / "2" / "tables", copy / "tables")
    other = read_checkpoint(saved / "2").tables["items"]
    np.testing.assert_array_equal(read_checkpoint(copy, verify=False).tables["items"], other)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_change_is_an_error_or_no_change(saved, tmp_path, count):
    expected = read_checkpoint(saved / "1", slots=True)
    copy = pathlib.Path(shutil.copytree(saved / "1", tmp_path / "1"))
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    rng, refused = np.random.default_rng(count), 0
    for i in range(count):
        file = files[i % len(files)]
        data = file.read_bytes()
        offset = int(rng.integers(len(data)))
        change(file, offset, 1, flip=1 << int(rng.integers(8)))
        try:
            read = read_checkpoint(tmp_path, slots=True)
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            assert read.feature_config == expected.feature_config
            for name, table in expected.tables.items():
                np.testing.assert_array_equal(read.tables[name], table)
                for slot, values in expected.slots[name].items():
                    np.testing.assert_array_equal(read.slots[name][slot], values)
            np.testing.assert_array_equal(read.model["w"], expected.model["w"])
        file.write_bytes(data)
    assert refused
