"""Checkpoints: any mesh resumes bit by bit, only whole steps are listed, and what does not fit is refused."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, latest_step, layout, read_checkpoint, whole_steps
from jaxembed.cli import main
from jaxembed.convert import convert
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.optimizers import SGD, Adagrad, Adam, optimizer_from_dict
from jaxembed.train import Checkpointer, ShardedEmbedding

from . import checkpoint_programs as programs
from .checkpoint_programs import at_step, embedding, feature_config, same


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (8, 2)])
def test_any_mesh_resumes_bit_by_bit(tmp_path, saved_on, restored_on):
    before, after = embedding(saved_on), embedding(restored_on)
    state = at_step(before, 7)
    with Checkpointer(tmp_path, before) as checkpointer:
        assert checkpointer.save(state)
    with Checkpointer(tmp_path, after) as checkpointer:
        restored = checkpointer.restore()
    tables, slots, _ = before.to_canonical(state)
    assert (restored.step, int(restored.state.step)) == (7, 7)
    assert same(after, restored.state, tables, slots)


def test_digests_are_the_same_from_any_mesh(tmp_path):
    manifests = []
    for n in (1, 8):
        with Checkpointer(tmp_path / str(n), embedding(n)) as checkpointer:
            checkpointer.save(at_step(embedding(n), 1))
        manifests.append(layout.read_manifest(tmp_path / str(n) / "1"))
    assert manifests[0] == manifests[1]


def test_everything_comes_back(tmp_path):
    own = embedding(4)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": [jnp.ones(2, jnp.bfloat16), jnp.zeros(())]}
    model = {"params": params, "opt_state": optax.adam(1e-3).init(params)}
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 3), model=model, data={"at": [1, "two"]}, metadata={"auc": 0.5})
        restored = checkpointer.restore(model=jax.tree.map(jnp.zeros_like, model))
    assert jax.tree.structure(restored.model) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, restored.model, model)
    assert (restored.data, restored.metadata) == ({"at": [1, "two"]}, {"auc": 0.5})


def test_read_from_the_checkpoint_alone(tmp_path):
    own = embedding(8)
    state = at_step(own, 5)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state, model={"w": [jnp.ones(3)]}, metadata={"a": 1})
    read = read_checkpoint(tmp_path, slots=True)
    assert (read.step, read.metadata, read.feature_config) == (5, {"a": 1}, feature_config())
    assert all(type(table) is np.ndarray for table in read.tables.values())
    assert all(table.ctypes.data % 64 == 0 for table in read.tables.values())
    tables, slots, _ = own.to_canonical(state)
    for name in tables:
        np.testing.assert_array_equal(read.tables[name], np.asarray(tables[name]))
    accumulators = np.asarray(slots["a.b/c d"]["accumulators"])
    np.testing.assert_array_equal(read.slots["a.b/c d"]["accumulators"], accumulators)
    assert read.model["w"][0].tolist() == [1, 1, 1]
    assert read_checkpoint(tmp_path / "5", model=False).model is None


def test_optimizers_are_stored(tmp_path, capsys):
    """Of every table, whether its own or the default; one that cannot be stored by its name, and training goes on."""

    def falling(step):
        return 0.1 / (1 + step)

    for name, default in (("named", Adagrad(0.125)), ("unnamed", Adagrad(falling))):
        own = ShardedEmbedding(feature_config(), default, jax.make_mesh((1,), ("d",)))
        with Checkpointer(tmp_path / name, own) as checkpointer:
            checkpointer.save(own.init(jax.random.key(0)))
        stored = layout.optimizers(layout.read_manifest(tmp_path / name / "0"))
        assert optimizer_from_dict(stored["small"]) == SGD(0.1)
        assert main(["inspect", str(tmp_path / name)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "a.b/c d: 1,003" in line)
        if name == "named":
            assert optimizer_from_dict(stored["a.b/c d"]) == default
            assert ", adagrad, learning rate 0.125, combiner mean" in line
        else:
            assert stored["a.b/c d"] == {"name": "adagrad"}
            assert ", adagrad, combiner mean" in line
    with pytest.raises(CheckpointError, match="the optimizers of a manifest must have names"):
        layout.optimizers({"optimizers": {"t": {"name": 3}}})


def test_save_is_of_the_state_it_was_given(tmp_path):
    """The trainer donates the state right after an asynchronous save returns."""
    own = embedding(1)
    state = at_step(own, 1)
    expected = jax.tree.map(np.array, own.to_canonical(state)[:2])
    scale = jax.jit(lambda s: jax.tree.map(lambda x: x * x.dtype.type(2), s), donate_argnums=0)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state)
        for _ in range(5):
            state = scale(state)
        assert same(own, checkpointer.restore().state, *expected)


def test_interval_force_and_old_steps(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own, max_to_keep=2, save_interval_steps=10) as checkpointer:
        assert checkpointer.latest_step() is None
        saved = [checkpointer.save(at_step(own, step)) for step in (10, 15, 20, 30)]
        assert saved == [True, False, True, True]
        assert checkpointer.save(at_step(own, 31), force=True)
        checkpointer.wait()
        assert whole_steps(tmp_path) == [30, 31]
        assert checkpointer.latest_step() == latest_step(tmp_path) == 31
        assert checkpointer.restore(30).step == 30
        with pytest.raises(FileNotFoundError, match=r"no step 10 at .*whole steps are \[30, 31\]"):
            checkpointer.restore(10)


def test_deleted_steps_leave_the_disk(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own, max_to_keep=2) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(at_step(own, step))
            checkpointer.wait()
        # Those of the last save are removed beside the next.
        assert len(list((tmp_path / layout.DELETING).iterdir())) <= 2
    assert not list((tmp_path / layout.DELETING).iterdir())
    assert whole_steps(tmp_path) == [5, 6]


def test_unfinished_steps_are_not_listed(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    whole = tmp_path / "1"
    for step, missing in ((2, "_CHECKPOINT_METADATA"), (3, "manifest/metadata"), (4, "tables/manifest.ocdbt")):
        shutil.copytree(whole, tmp_path / str(step))
        (tmp_path / str(step) / missing).unlink()
    shutil.copytree(whole, tmp_path / "5.orbax-checkpoint-tmp-1")
    (tmp_path / "6").write_text("a file")
    for name in ("007", "\u0663"):
        shutil.copytree(whole, tmp_path / name)
    assert whole_steps(tmp_path) == [1]


def large_config():
    """Of several chunks, and so of several files of data."""
    return {name: FeatureConfig(TableConfig(60_000, 16, name=name)) for name in ("one", "two")}


@pytest.mark.parametrize("writer", ["trainer", "conversion"])
def test_half_deleted_steps_are_not_listed(tmp_path, writer):
    """Whoever removes a step by other means and is interrupted leaves some of its files: without any one of them, or any
    folder, the step is not listed, or it comes back bit by bit all the same."""
    own = embedding(1, large_config())
    model = {"w": jax.random.normal(jax.random.key(0), (512, 8))}
    with Checkpointer(tmp_path / "0", own) as checkpointer:
        checkpointer.save(at_step(own, 1), model=model, data={"at": 1})
    step = tmp_path / "0" / "1"
    if writer == "conversion":
        step = convert(step, tmp_path / "1").path
    expected = read_checkpoint(step, slots=True)
    listed, files = {}, sorted(step.rglob("*"))
    for file in files:
        copy = shutil.copytree(step, tmp_path / "copy" / step.name) / file.relative_to(step)
        copy.unlink() if copy.is_file() else shutil.rmtree(copy)
        listed[str(file.relative_to(step))] = whole_steps(tmp_path / "copy") == [1]
        if whole_steps(tmp_path / "copy"):
            read = read_checkpoint(tmp_path / "copy", slots=True)
            jax.tree.map(
                np.testing.assert_array_equal,
                (read.tables, read.slots, read.model),
                (expected.tables, expected.slots, expected.model),
            )
        elif copy.name != "_CHECKPOINT_METADATA":
            with pytest.raises(FileNotFoundError, match=r"is not whole, or of another program: .* is missing"):
                read_checkpoint(tmp_path / "copy" / step.name)
        shutil.rmtree(tmp_path / "copy")
    data = [name for name in listed if "/d/" in name]
    assert sum(not listed[name] for name in data) >= 4  # tables and slots, of two tables
    if writer == "trainer":
        assert sum(not listed[name] for name in data if name.startswith("model/")) >= 1
        assert not listed["data"]
    gone = {
        f"{part}{name}" for part in ("tables", "slots") for name in ("", "/d", "/_METADATA", "/manifest.ocdbt")
    }
    assert not any(listed[name] for name in gone | {"manifest", "manifest/metadata", "_CHECKPOINT_METADATA"})


def test_copies_of_a_step_under_another_number_are_not_listed(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 3))
    shutil.copytree(tmp_path / "3", tmp_path / "30")
    (tmp_path / "8").symlink_to(tmp_path / "3")
    assert whole_steps(tmp_path) == [3]
    assert read_checkpoint(tmp_path).step == 3
    with pytest.raises(FileNotFoundError, match=r"30 was saved as step 3; give it back its name"):
        read_checkpoint(tmp_path, 30)
    with Checkpointer(tmp_path, own) as checkpointer, pytest.warns(RuntimeWarning, match="was set aside"):
        assert checkpointer.save(at_step(own, 4))
    assert whole_steps(tmp_path) == [3, 4]


def test_a_step_that_is_not_whole_makes_way(tmp_path):
    """It would stop a job that goes on from the step before it, for ever."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(own, step))
    for _ in range(2):
        shutil.rmtree(tmp_path / "2" / "tables" / "d")
        assert whole_steps(tmp_path) == [1]
        with Checkpointer(tmp_path, own) as checkpointer:
            assert checkpointer.restore().step == 1
            assert (tmp_path / "2").exists()  # whoever only reads moves nothing
            with pytest.warns(RuntimeWarning, match=r"cannot be restored was set aside: .*/2\.incomplete"):
                assert checkpointer.save(at_step(own, 2))
            assert checkpointer.save(at_step(own, 3))
        assert whole_steps(tmp_path) == [1, 2, 3]
        shutil.rmtree(tmp_path / "3")
    assert sorted(path.name for path in tmp_path.glob("*.incomplete*")) == ["2.incomplete", "2.incomplete-2"]


@pytest.mark.parametrize("place", ["../steps", "./a/../b/steps", "link/../steps", "//{}/steps"])
def test_places_that_are_not_named_straight(tmp_path, monkeypatch, place):
    here = tmp_path / "here"
    (here / "a").mkdir(parents=True)
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (here / "link").symlink_to(tmp_path / "far" / "folder")
    monkeypatch.chdir(here)
    place = place.format(str(tmp_path).lstrip("/"))
    own = embedding(1)
    with Checkpointer(place, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        assert checkpointer.restore().step == 1
    assert whole_steps(place) == [1]
    assert (here / place / "1").is_dir()
    expected = read_checkpoint(here.joinpath(place).resolve())
    assert main(["convert", place, f"{place}-as-bundle", "--to", "serving"]) == 0
    read = read_checkpoint(f"{place}-as-bundle")
    jax.tree.map(np.testing.assert_array_equal, read.tables, expected.tables)
    assert convert(place, f"{place}-again", dry_run=True).path == convert(place, f"{place}-again").path
    shutil.rmtree(here / place / "1" / "tables" / "d")
    assert whole_steps(place) == []


def test_a_half_deleted_step_is_passed_over(tmp_path):
    """Also where the folders that Orbax has beside the data have gone with it."""
    own = embedding(1, large_config())
    with Checkpointer(tmp_path, own) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(own, step))
        checkpointer.wait()
        tables = tmp_path / "2" / "tables"
        for name in ("array_metadatas", "ocdbt.process_0/d"):
            shutil.rmtree(tables / name)
        for name in ("_sharding", "commit_success.txt"):
            (tables / name).unlink(missing_ok=True)
        assert whole_steps(tmp_path) == [1]
        assert checkpointer.restore().step == 1
        with pytest.raises(
            FileNotFoundError, match=r"/2 is not whole.*/tables/ocdbt.process_0/d/\w+ is missing"
        ):
            checkpointer.restore(2)


def test_listing_reads_no_rows(tmp_path):
    """A file of rows that is damaged is for whoever restores it to name: the step stays listed."""
    own = embedding(1, large_config())
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    largest = max((tmp_path / "1" / "tables").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(b"")
    assert whole_steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match=r"table '(one|two)' cannot be read"):
        read_checkpoint(tmp_path)
    (tmp_path / "1" / "tables" / "manifest.ocdbt").write_bytes(b"nonsense")
    assert whole_steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match="table 'one' cannot be opened"):
        read_checkpoint(tmp_path)


def test_parts_of_other_steps_are_refused(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(own, step), data={"at": step})
        checkpointer.wait()
        shutil.copytree(tmp_path / "1", tmp_path / "3")
        assert checkpointer.restore().step == read_checkpoint(tmp_path).step == 2
        with pytest.raises(FileNotFoundError, match=r"/3 was saved as step 1; give it back its name"):
            checkpointer.restore(3)
        with pytest.raises(CheckpointError, match=r"/3 was saved as step 1: it was renamed, or copied over"):
            read_checkpoint(tmp_path / "3")
        shutil.copy(tmp_path / "1" / "data" / "metadata", tmp_path / "2" / "data" / "metadata")
        with pytest.raises(CheckpointError, match=r"2/data/metadata is damaged, or of another step"):
            checkpointer.restore(2)


def test_parts_are_left_behind_where_asked(tmp_path):
    own = embedding(1)
    state = at_step(own, 1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state)
    without_slots = embedding(8, feature_config(optimizer=SGD(0.1)))
    fewer = embedding(1, {"one": FeatureConfig(own.tables["small"])})
    for other, message in (
        (without_slots, r"has slots of table 'a.b/c d' that its optimizer has not: \['accumulators'\]"),
        (fewer, r"has tables that the feature configuration has not: \['a.b/c d'\]"),
    ):
        with Checkpointer(tmp_path, other) as checkpointer:
            with pytest.raises(ValueError, match=message + ".* pass partial=True"):
                checkpointer.restore()
            tables = other.to_canonical(checkpointer.restore(partial=True).state)[0]
        for name, rows in tables.items():
            np.testing.assert_array_equal(rows, own.to_canonical(state)[0][name])


@pytest.mark.parametrize(
    "text", ['{"a":[' + "{}," * (1 << 20) + "{}]}", "[" * (1 << 21), '{"a":"' + '\\",' * (1 << 20)]
)
def test_a_manifest_of_many_values_is_refused_at_once(tmp_path, text):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    (tmp_path / "1" / "manifest" / "metadata").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"no readable manifest/metadata \(it has [\d,]+ values, of at most"
    ):
        read_checkpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished step"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is not a directory"):
        read_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": 1004},
            r"must be float32\[1004, 8\], the checkpoint has float32\[1003, 8\].*vocabulary_growth",
        ),
        ({"rows": 1000}, r"must be float32\[1000, 8\]"),
        ({"dim": 4}, r"must be float32\[1003, 4\]"),
        ({"dtype": jnp.bfloat16}, r"must be bfloat16\[1003, 8\]"),
        ({"name": "other"}, r"table 'other' must be .*the checkpoint has none"),
        ({"optimizer": Adam(0.1)}, r"has no slot 'momenta' of table 'a.b/c d', only \['accumulators'\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    with (
        Checkpointer(tmp_path, embedding(1, feature_config(**changes))) as checkpointer,
        pytest.raises(ValueError, match=message),
    ):
        checkpointer.restore()


@pytest.mark.parametrize(
    "model", [{"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)}, {"x": [jnp.ones(1)], "x.0": jnp.zeros(1)}]
)
def test_leaves_of_one_name_are_refused(tmp_path, model):
    """Orbax would keep one of them."""
    own = embedding(1)
    with (
        Checkpointer(tmp_path, own) as checkpointer,
        pytest.raises(ValueError, match=r"two leaves that are stored as '(a.b|x.0)'; give one another name"),
    ):
        checkpointer.save(at_step(own, 1), model=model)
    assert whole_steps(tmp_path) == []


@pytest.mark.parametrize("model", [{}, {"a": None, "b": []}])
def test_models_without_arrays_are_refused(tmp_path, model):
    """Nothing would lie where their arrays are looked for."""
    own = embedding(1)
    with (
        Checkpointer(tmp_path, own) as checkpointer,
        pytest.raises(ValueError, match=r"model has no arrays, got .*; leave it out"),
    ):
        checkpointer.save(at_step(own, 1), model=model)
    assert whole_steps(tmp_path) == []


@pytest.mark.parametrize("argument", ["metadata", "data"])
def test_what_could_not_be_read_back_is_not_saved(tmp_path, argument):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        with pytest.raises(
            ValueError, match=r"has [\d,]+ bytes and 1,04\d,\d+ values; at most .* can be read back"
        ):
            checkpointer.save(at_step(own, 1), **{argument: {"seen": [0] * (1 << 20)}})
        assert checkpointer.save(at_step(own, 1), **{argument: {"seen": [0] * 1_000_000}})
        found = getattr(checkpointer.restore(), argument)
    assert len(found["seen"]) == 1_000_000


@pytest.mark.parametrize("model", [{"n": np.int64(5)}, {"a": None, "b": [jnp.zeros(2)]}])
def test_models_of_few_leaves_come_back(tmp_path, model):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model=model)
        restored = checkpointer.restore(model=model).model
    jax.tree.map(np.testing.assert_array_equal, restored, model)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": None},
        {"metadata": [1]},
        {"step": 1.0},
        {"digests": {"tables": {}, "slots": {}, "model": 5}},
    ],
)
def test_odd_manifests_are_refused(tmp_path, change):
    """Sealed, but by another program."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        manifest = layout.read_manifest(tmp_path / "1")
        (tmp_path / "1" / "manifest" / "metadata").write_text(json.dumps(layout.seal({**manifest, **change})))
        for read in (checkpointer.restore, lambda: read_checkpoint(tmp_path)):
            with pytest.raises(CheckpointError, match=r"manifest of .* is incomplete|is missing, though"):
                read()


def test_model_that_does_not_fit_is_refused(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model={"w": jnp.zeros((2, 3))})
        checkpointer.save(at_step(own, 2))
        with pytest.raises(ValueError, match=r"leaf 'w' must be bfloat16\[2, 3\], got float32\[2, 3\]"):
            checkpointer.restore(1, model={"w": jnp.zeros((2, 3), jnp.bfloat16)})
        with pytest.raises(ValueError, match=r"leaf 'w' must be float32\[4, 3\]"):
            checkpointer.restore(1, model={"w": jnp.zeros((4, 3))})
        with pytest.raises(ValueError, match=r"must have the leaves \['v'\], got \['w'\]"):
            checkpointer.restore(1, model={"v": jnp.zeros((2, 3))})
        with pytest.raises(ValueError, match="has no model; it was not saved"):
            checkpointer.restore(2, model={"w": jnp.zeros((2, 3))})


def test_vocabulary_grows_where_asked(tmp_path):
    small, large = embedding(1), embedding(8, feature_config(rows=1100))
    state = at_step(small, 4)
    with Checkpointer(tmp_path, small) as checkpointer:
        checkpointer.save(state)
    key = jax.random.key(3)
    with Checkpointer(tmp_path, large) as checkpointer:
        with pytest.raises(ValueError, match="needs a key"):
            checkpointer.restore(vocabulary_growth="initialize")
        with pytest.raises(ValueError, match="must be one of"):
            checkpointer.restore(vocabulary_growth="zeros")
        grown = checkpointer.restore(vocabulary_growth="initialize", key=key).state
    fresh = large.to_canonical(large.init(key))
    old, new = small.to_canonical(state), large.to_canonical(grown)
    name = "a.b/c d"
    for get in (lambda t: t[0][name], lambda t: t[1][name]["accumulators"]):
        rows = np.asarray(get(new))
        np.testing.assert_array_equal(rows[:1003], get(old))
        np.testing.assert_array_equal(rows[1003:], np.asarray(get(fresh))[1003:])


QUANTIZED = QuantizationConfig(16, -1.0, 1.0)


@pytest.mark.parametrize(
    ("saved", "restored", "message"),
    [
        (
            None,
            QUANTIZED,
            r"go through QuantizationConfig\(num_buckets=16.*that it was trained with through none",
        ),
        (
            QUANTIZED,
            None,
            r"go through no quantization, .* trained with through QuantizationConfig\(num_buckets=16",
        ),
        (
            QUANTIZED,
            QuantizationConfig(16, -2.0, 1.0),
            r"go through QuantizationConfig\(num_buckets=16, lower=-2.0",
        ),
    ],
)
def test_another_quantization_is_an_error_unless_asked_for(tmp_path, saved, restored, message):
    """Lookups would give other values than those that the dense model has learnt from."""
    before = embedding(1, feature_config(quantization_config=saved))
    state = at_step(before, 1)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
        assert checkpointer.restore().step == 1
    after = embedding(1, feature_config(quantization_config=restored))
    with Checkpointer(tmp_path, after) as checkpointer:
        with pytest.raises(ValueError, match=rf"table 'a.b/c d' {message}.* pass reinterpret=True"):
            checkpointer.restore()
        found = checkpointer.restore(reinterpret=True).state
    assert same(after, found, *before.to_canonical(state)[:2])


def with_ids(preprocessing, rows=4):
    table = TableConfig(rows, 8, name="words", optimizer=SGD(0.1))
    return embedding(1, {"x": FeatureConfig(table, preprocessing=preprocessing)})


def test_other_rows_of_ids_are_an_error_unless_asked_for(tmp_path):
    """Of the same shape and type, but another vocabulary or hash: each row would be that of another id."""
    for name, text in (("old", "a\nb\nc\nd\n"), ("swapped", "b\na\nc\nd\n"), ("same", "a\nb\nc\nd\n")):
        (tmp_path / name).write_text(text)
    old, swapped, same_words = (VocabularyFile(str(tmp_path / n), 0) for n in ("old", "swapped", "same"))
    cases = [
        (old, swapped),
        (old, None),
        (old, HashBuckets(4)),
        (HashBuckets(4), HashBuckets(4, seed=1)),
        (None, old),
    ]
    for i, (was, now) in enumerate(cases):
        with Checkpointer(tmp_path / str(i), with_ids(was)) as checkpointer:
            checkpointer.save(at_step(with_ids(was), 1))
        with Checkpointer(tmp_path / str(i), with_ids(now)) as checkpointer:
            with pytest.raises(
                ValueError, match=r"feature 'x' makes rows of table 'words' of its ids by .*when it was"
            ):
                checkpointer.restore()
            assert checkpointer.restore(reinterpret=True).step == 1
    with Checkpointer(tmp_path / "0", with_ids(same_words)) as checkpointer:
        assert checkpointer.restore().step == 1


def test_vocabularies_grow_at_their_end(tmp_path):
    (tmp_path / "old").write_text("a\nb\nc\nd\n")
    (tmp_path / "grown").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "inserted").write_text("a\nb\nz\nc\nd\n")
    old = VocabularyFile(str(tmp_path / "old"), 0)
    with Checkpointer(tmp_path / "steps", with_ids(old)) as checkpointer:
        checkpointer.save(at_step(with_ids(old), 1))
    growth = {"vocabulary_growth": "initialize", "key": jax.random.key(0)}
    with Checkpointer(
        tmp_path / "steps", with_ids(VocabularyFile(str(tmp_path / "grown"), 0), 5)
    ) as checkpointer:
        assert checkpointer.restore(**growth).step == 1
    for name, buckets in (("inserted", 0), ("grown", 1)):
        other = with_ids(VocabularyFile(str(tmp_path / name), buckets), 6)
        with (
            Checkpointer(tmp_path / "steps", other) as checkpointer,
            pytest.raises(ValueError, match="rows would be those of other ids"),
        ):
            checkpointer.restore(**growth)


def test_failed_write_leaves_the_last_step(tmp_path):
    """A disk that refuses to take more, here by a limit on the size of files."""
    own = embedding(1, {"x": FeatureConfig(TableConfig(50_000, 16, name="t"))})
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpointer.save(at_step(own, 2))
            with pytest.raises(OSError, match="File too large"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_steps(tmp_path) == [1]
    assert read_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_saves(tmp_path, count):
    """Every step that is listed after SIGKILL is whole, at whatever moment it came."""
    program = pathlib.Path(programs.__file__)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    own, rng = embedding(1), np.random.default_rng(0)
    for round in range(count):
        directory = tmp_path / str(round)
        child = subprocess.Popen(
            [sys.executable, str(program), str(directory)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "3":
                break
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        steps = whole_steps(directory)
        assert steps
        for step in steps:
            read = read_checkpoint(directory, step, slots=True)
            tables, slots, _ = own.to_canonical(at_step(own, step, seed=step))
            assert read.model["step"] == read.step == step
            np.testing.assert_array_equal(read.tables["small"], np.asarray(tables["small"]))
            np.testing.assert_array_equal(
                read.slots["a.b/c d"]["accumulators"], np.asarray(slots["a.b/c d"]["accumulators"])
            )
        with Checkpointer(directory, own) as checkpointer:
            assert checkpointer.restore().step == steps[-1]
            # Training goes on at the step that was being saved; what was left of it makes way.
            assert checkpointer.save(at_step(own, steps[-1] + 1, seed=1))
        assert sorted(path.name for path in directory.iterdir() if path.name != layout.DELETING) == sorted(
            map(str, [*steps[-2:], steps[-1] + 1])
        )
        assert not list(directory.glob(f"{layout.DELETING}/*"))


def test_unnamed_initializer_is_refused_before_training():
    config = {
        "x": FeatureConfig(TableConfig(8, 4, lambda key, shape, dtype: jnp.zeros(shape, dtype), name="t"))
    }
    with pytest.raises(ValueError, match="cannot be stored"):
        Checkpointer("unused", embedding(1, config))
    assert isinstance(embedding(1, config), ShardedEmbedding)
