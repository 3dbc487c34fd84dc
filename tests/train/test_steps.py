"""Which steps of a checkpoint are listed: only whole ones, each under its own number, wherever they lie."""

import os
import shutil

import jax
import numpy as np
import pytest
import tensorstore

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, read_checkpoint, steps, whole_steps
from jaxembed.cli import main
from jaxembed.convert import convert
from jaxembed.train import Checkpointer, checkpoint, hosts

from .checkpoint_programs import at_step, embedding


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


def test_looking_for_steps_again_reads_no_tree_again(tmp_path, monkeypatch):
    """Reading one leaks some KiB in tensorstore, and watchers look for years."""
    own, read, dump = embedding(1), [], tensorstore.ocdbt.dump
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    monkeypatch.setattr(tensorstore.ocdbt, "dump", lambda *args: read.append(args) or dump(*args))
    assert whole_steps(tmp_path) == [1]
    first = len(read)
    for _ in range(3):
        assert whole_steps(tmp_path) == [1]
    assert len(read) == first
    file = next(path for path in (tmp_path / "1" / "tables" / "d").iterdir())
    file.unlink()
    assert whole_steps(tmp_path) == []
    shutil.rmtree(tmp_path / "1")
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    assert whole_steps(tmp_path) == [1]


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
        # Links to the same data: files are removed, and none is written to.
        linked = shutil.copytree(step, tmp_path / "copy" / step.name, copy_function=os.link)
        copy = linked / file.relative_to(step)
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


def test_a_step_that_is_deleted_while_it_is_looked_at(tmp_path, monkeypatch):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(own, step))
    look = steps._missing

    def look_and_delete(step):
        found = look(step)
        if step.name == "1":
            shutil.rmtree(step)
        return found

    monkeypatch.setattr(steps, "_missing", look_and_delete)
    assert whole_steps(tmp_path) == [2]


def test_a_whole_step_can_be_read_before_it_is_listed(tmp_path, monkeypatch):
    """The listing of a folder on a network may lag behind what is in it."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        monkeypatch.setattr(steps, "whole_steps", lambda _: [])
        assert checkpointer.restore(1).step == 1
    with pytest.raises(FileNotFoundError, match="holds no finished step"):
        read_checkpoint(tmp_path, 2)


def test_a_step_that_one_host_cannot_open_is_restored_by_none(tmp_path, monkeypatch):
    """Others would wait for it."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        monkeypatch.setattr(hosts, "processes_where", lambda _: [1])
        with pytest.raises(
            ValueError, match=r"processes \[1\] cannot open the checkpoint; their errors say why"
        ):
            checkpointer.restore(1)


def test_a_step_that_one_host_finds_damaged_is_restored_by_none(tmp_path, monkeypatch):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model={"w": np.ones(3)}, data=7)
        checkpointer.wait()
        # What another host says of opening it, of what it fits, and then of reading it.
        said = iter([[], [], [1]])
        monkeypatch.setattr(hosts, "processes_where", lambda _: next(said))
        with pytest.raises(
            ValueError, match=r"processes \[1\] cannot read the checkpoint; their errors say why"
        ):
            checkpointer.restore(1, model={"w": np.ones(3)})


def test_the_latest_step_is_that_of_any_host(tmp_path, monkeypatch):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(own, step))
        checkpointer.wait()
        monkeypatch.setattr(checkpointer, "latest_step", lambda: 1)
        monkeypatch.setattr(checkpoint, "largest", lambda step: max(step, 2))
        assert checkpointer.restore().step == 2


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished step"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is not a directory"):
        read_checkpoint(tmp_path / "none")
