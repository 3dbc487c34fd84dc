"""Checkpoints of others, placeholders, pipes, folders that are empty or read-only, and files replaced while loading."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import (
    CheckpointError,
    bundle_table_reading,
    convert_to_bundle,
    layout,
    open_bundle,
    read_checkpoint,
    whole_steps,
)
from jaxembed.checkpoint.reading import open_checkpoint
from jaxembed.cli import main
from jaxembed.id_mapping import VocabularyFile
from jaxembed.optimizers import SGD
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {"x": FeatureConfig(TableConfig(60_000, 16, name="a"))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two steps of different values."""
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(directory, own) as checkpointer:
        for step in (0, 1):
            state = own.init(jax.random.key(step))
            tables, slots, _ = own.to_canonical(state)
            checkpointer.save(own.from_canonical(tables, slots, step), model={"w": jnp.full(5, step)})
    return directory


@pytest.fixture
def copy(checkpoint, tmp_path):
    return pathlib.Path(shutil.copytree(checkpoint / "1", tmp_path / "steps" / "1"))


def metadata(copy):
    return copy / "manifest" / "metadata"


def rewrite(copy, edit):
    manifest = json.loads(metadata(copy).read_text())
    manifest.pop("digest")
    edit(manifest)
    metadata(copy).write_text(json.dumps(layout.seal(manifest)))


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def point(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def resize(vocabulary_size):
    def edit(manifest):
        config = json.loads(manifest["feature_config"])
        config["tables"][0]["vocabulary_size"] = vocabulary_size
        manifest["feature_config"] = json.dumps(config)

    return lambda copy: rewrite(copy, edit)


ATTACKS = {
    "manifest in LFS": (
        lambda c: point(metadata(c)),
        "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "rows in LFS": (
        lambda c: point(largest(c / "tables")),
        r"tables/.* is a Git LFS pointer, not the file itself",
    ),
    "model in LFS": (
        lambda c: point(largest(c / "model")),
        r"model/.* is a Git LFS pointer, not the file itself",
    ),
    "pipe": (lambda c: pipe(largest(c / "tables")), "must be a regular file"),
    "broken link": (lambda c: (c / "x").symlink_to("nowhere"), "cannot be opened: No such file"),
    "deep": (lambda c: metadata(c).write_text("[" * 100_000), "not valid JSON"),
    "key twice": (lambda c: metadata(c).write_text('{"a": 1, "a": 2}'), "key 'a' is there twice"),
    "other program": (lambda c: metadata(c).write_text('{"name": "an app"}'), "is not a jaxembed-checkpoint"),
    "negative": (resize(-1), "must be ints below 2"),
    "overflow": (resize(2**31), "must be ints below 2"),
    "larger": (resize(60_001), r"table 'a' must be float32\[60001, 16\], got float32\[60000, 16\]"),
    "no digests": (lambda c: rewrite(c, lambda m: m.pop("digests")), "is incomplete: KeyError: 'digests'"),
    "list of digests": (lambda c: rewrite(c, lambda m: m["digests"].update(tables=[])), "table 'a' is missing"),
    "no blocks": (
        lambda c: rewrite(c, lambda m: m["digests"]["tables"]["a"].update(blocks=[])),
        "not the digests of an array",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_named(copy, attack):
    do, message = ATTACKS[attack]
    do(copy)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(copy)


def test_checkpoint_of_another_program(tmp_path, capsys):
    with ocp.CheckpointManager(tmp_path / "other") as manager:
        manager.save(0, args=ocp.args.StandardSave({"w": np.ones(3)}))
    with pytest.raises(FileNotFoundError, match=r"holds no finished step; pass the directory given to"):
        read_checkpoint(tmp_path / "other")
    for command in (["inspect", str(tmp_path / "other")], ["inspect", str(tmp_path / "other" / "0")]):
        assert main(command) == 2
        assert "looks like none of" in capsys.readouterr().err
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "manifest.json").write_text('{"format": "other", "version": 1}')
    for path in (tmp_path, tmp_path / "0"):
        with pytest.raises(CheckpointError, match="is not a jaxembed-bundle; its manifest does not say so"):
            read_checkpoint(path)


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for command in (
        ["inspect"],
        ["convert", "--to", "serving", str(tmp_path / "new")],
        ["diff", str(tmp_path)],
    ):
        name, *rest = command
        assert main([name, str(tmp_path / "out"), *rest]) == 2
        assert "is an empty folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no finished step"):
        read_checkpoint(tmp_path / "out")
    assert not (tmp_path / "new").exists()


def test_bundle_replaced_before_it_is_mapped(checkpoint, tmp_path, monkeypatch):
    """Between the manifest and the tables: what is loaded is never a mixture without an error."""
    old, new = (convert_to_bundle(checkpoint, tmp_path / name, step=s).path for name, s in (("a", 0), ("b", 1)))
    real = bundle_table_reading.map_tensors

    def replaced(file):
        if new.exists():
            shutil.rmtree(old)
            new.rename(old)
        return real(file)

    monkeypatch.setattr(bundle_table_reading, "map_tensors", replaced)
    with pytest.raises(CheckpointError, match="table 'a' is damaged: rows 0 to 59999 of 60000"):
        open_bundle(old).verify()


def test_bundle_replaced_after_it_is_mapped(checkpoint, tmp_path):
    old, new = (convert_to_bundle(checkpoint, tmp_path / name, step=s).path for name, s in (("a", 0), ("b", 1)))
    bundle = open_bundle(old)
    shutil.rmtree(old)
    new.rename(old)
    bundle.verify()
    assert bundle.tables["a"].tobytes() == read_checkpoint(checkpoint, 0).tables["a"].tobytes()
    assert open_bundle(old).step == 1


@pytest.mark.parametrize("part", ["tables", "model"])
def test_checkpoint_replaced_while_it_is_read(checkpoint, copy, part):
    opened = open_checkpoint(copy)
    shutil.rmtree(copy / part)
    shutil.copytree(checkpoint / "0" / part, copy / part)
    with pytest.raises(
        CheckpointError, match=r"table 'a' (is damaged|cannot be read)|model.*(damaged|cannot be read)"
    ):
        _ = opened.tables["a"].read() if part == "tables" else opened.model()


def test_checkpoint_deleted_while_it_is_read(checkpoint, copy):
    """What was read ahead is there; the rest is an error, never rows of something else."""
    expected, table = read_checkpoint(copy).tables["a"], open_checkpoint(copy).tables["a"]
    blocks, error = table.blocks(1 << 20), ""
    found = [next(blocks)]
    shutil.rmtree(copy)
    try:
        found += blocks
    except CheckpointError as e:
        error = str(e)
    assert not error or "table 'a' cannot be read" in error
    for start, rows in found:
        np.testing.assert_array_equal(rows, expected[start : start + rows.shape[0]])
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(copy)


PROGRAM = """
import sys
import jax
from jaxembed.cli import main
from jaxembed.train import Checkpointer, ShardedEmbedding
from jaxembed.id_mapping import VocabularyFile
from jaxembed.optimizers import SGD
from jaxembed import FeatureConfig, TableConfig
folder = sys.argv[1]
print(main(["inspect", folder + "/checkpoint"]))
line = ["convert", folder + "/checkpoint", "--to", "serving", folder + "/out"]
print(main(line))
print(main([*line, "--dry-run"]))
own = ShardedEmbedding({"x": FeatureConfig(TableConfig(60_000, 16, name="a"))}, SGD(0.1), jax.make_mesh((1,), ("d",)))
with Checkpointer(folder + "/checkpoint", own) as checkpointer:
    state = checkpointer.restore().state
    try:
        checkpointer.save(own.from_canonical(*own.to_canonical(state)[:2], 7), force=True)
        checkpointer.wait()
    except OSError as e:
        print("not saved:", e)
    print(checkpointer.restore().step)
"""


def test_read_only_folder(checkpoint, tmp_path):
    """It is read, and what would write there says why it cannot."""
    unshare = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount --bind {checkpoint.parent} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("may not mount a folder in a namespace of its own")
    (checkpoint.parent / "program.py").write_text(PROGRAM)
    link = checkpoint.parent / "checkpoint"
    link.symlink_to(checkpoint.name)
    try:
        run = subprocess.run(
            [*unshare, "sh", "-c", f"{mount} && exec {sys.executable} {tmp_path}/program.py {tmp_path}"],
            env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        link.unlink()
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert lines[0].startswith("checkpoint at step 1: 1 features, 1 tables")
    refused = [line for line in run.stderr.splitlines() if line.startswith("jaxembed: ")]
    assert refused == [f"jaxembed: [Errno 30] Read-only file system: '{tmp_path}'"] * 2
    assert any(line.startswith("not saved: ") and "Read-only file system" in line for line in lines)
    assert [line for line in lines if line.isdecimal()] == ["0", "1", "1", "1"]


def test_pipe_for_a_vocabulary(tmp_path):
    """It is refused at once; whoever reads it would wait for ever."""
    file = tmp_path / "words.txt"
    file.write_text("a\nb\n")
    vocabulary = VocabularyFile(str(file))
    pipe(file)
    with pytest.raises(ValueError, match=r"words\.txt must be a regular file"):
        vocabulary.read()


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("argument", ["metadata", "data"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"eval": {"loss": NAN}},
            r"{}\.eval\.loss is nan, which is no number of JSON; pass None or text in its place\.",
        ),
        ({"seen": [1.0, (2, -INFINITY)]}, r"{}\.seen\.1\.1 is -inf, "),
        (
            {"by_id": {1: "a", 2: "b", "1": "c"}},
            r"{}\.by_id has 2 keys that are '1' as text; rename all but one\.",
        ),
        ({"by": {None: 0, "null": 1}}, r"{}\.by has 2 keys that are 'null' as text"),
        ({NAN: 0}, "not JSON compliant"),
    ],
    ids=["nan", "infinity", "keys", "None", "key nan"],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path, argument, value, told):
    """The step would count as whole, and max_to_keep delete those before it."""
    few = {"x": FeatureConfig(TableConfig(60, 16, name="a"))}
    own = ShardedEmbedding(few, SGD(0.1), jax.make_mesh((1,), ("d",)))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    fine = {"loss": None, "by_id": {"1": [True, 2.5, "NaN"]}}
    with Checkpointer(tmp_path, own, max_to_keep=1) as checkpointer:
        checkpointer.save(own.from_canonical(tables, slots, 1), **{argument: fine})
        checkpointer.wait()
        where = "metadata" if argument == "metadata" else "state"
        with pytest.raises(ValueError, match=rf"{argument},? could not be read back: .*{told.format(where)}"):
            checkpointer.save(own.from_canonical(tables, slots, 2), **{argument: value})
        assert whole_steps(tmp_path) == [1]
        assert not list(tmp_path.glob("2*"))
        assert getattr(checkpointer.restore(), argument) == fine


def test_what_is_nested_without_end_could_not_be_read_back():
    deep, loop = [], []
    loop.append(loop)
    for _ in range(5000):
        deep = [deep]
    for value, told in ((deep, "recursion"), (loop, "Circular reference")):
        with pytest.raises(ValueError, match=rf"data could not be read back: .*{told}"):
            layout.readable_digest({"state": value}, "data")
