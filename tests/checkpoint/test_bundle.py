"""Serving bundles: the same bytes as the checkpoint, mapped in place, and every damage an error."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import (
    CheckpointError,
    convert_to_bundle,
    layout,
    open_bundle,
    read_checkpoint,
)
from jaxembed.cli import main
from jaxembed.inspection import describe, difference
from jaxembed.optimizers import Adagrad
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {
    "x": FeatureConfig(TableConfig(40_000, 16, name="../items")),
    "y": [FeatureConfig(TableConfig(100, 4, name="b", dtype=jnp.bfloat16))],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, Adagrad(0.1), jax.make_mesh((2,), ("d",)))
    model = {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "l": [jnp.ones(2), jnp.zeros(())]},
        "other": jnp.ones(1),
    }
    state = own.init(jax.random.key(0))
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(state, model=model, metadata={"auc": 0.5})
        tables, slots, _ = own.to_canonical(state)
        tables = {**tables, "../items": tables["../items"].at[7].add(0.5).at[39_999].set(0.0)}
        checkpointer.save(own.from_canonical(tables, slots, 1), model=model)
    return directory


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    convert_to_bundle(checkpoint, out, step=0, select_model=lambda model: model["params"])
    return out


@pytest.fixture
def copy(bundles, tmp_path):
    return pathlib.Path(shutil.copytree(bundles / "0", tmp_path / "out" / "0"))


def test_same_bytes_and_reader_as_the_checkpoint(checkpoint, bundles):
    ours, theirs = read_checkpoint(bundles), read_checkpoint(checkpoint, 0)
    assert (ours.step, ours.metadata, ours.feature_config) == (0, {"auc": 0.5}, CONFIG)
    for name, table in theirs.tables.items():
        assert ours.tables[name].dtype == table.dtype
        assert ours.tables[name].tobytes() == table.tobytes()
    jax.tree.map(np.testing.assert_array_equal, ours.model, theirs.model["params"])
    assert isinstance(ours.model["l"], list)
    with pytest.raises(ValueError, match="has no slots"):
        read_checkpoint(bundles, slots=True)


class Pair(typing.NamedTuple):
    a: typing.Any
    b: typing.Any


@pytest.mark.parametrize("dry_run", [True, False])
def test_models_that_could_not_be_opened_are_refused(checkpoint, tmp_path, dry_run):
    """The leaves of a named tuple have names of their own, which no structure of dicts and lists would lead to."""
    with pytest.raises(ValueError, match=r"around the leaf 'p\.(a|0)'; have select_model return a dict"):
        convert_to_bundle(
            checkpoint,
            tmp_path / "out",
            select_model=lambda model: {"p": Pair(model["other"], model["other"])},
            dry_run=dry_run,
        )
    assert not (tmp_path / "out").exists()
    convert_to_bundle(
        checkpoint, tmp_path / "out", select_model=lambda m: (m["other"], [None, {1: m["other"]}])
    )
    np.testing.assert_array_equal(open_bundle(tmp_path / "out").model[1][1]["1"], [1.0])


def test_official_reader_reads_it(bundles):
    bundle = open_bundle(bundles)
    for i, table in enumerate(bundle.tables.values()):
        rows = load_file(bundles / "0" / "tables" / f"{i:05d}.safetensors")["rows"]
        assert rows.tobytes() == table.tobytes()
    assert load_file(bundles / "0" / "model.safetensors")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tables_are_used_in_place(bundles):
    device = jax.local_devices(backend="cpu")[0]
    for table in open_bundle(bundles).tables.values():
        assert table.ctypes.data % 4096 == 0
        assert not table.flags.writeable
        assert jax.device_put(table, device).unsafe_buffer_pointer() == table.ctypes.data


@pytest.mark.slow
def test_two_gigabytes_open_at_once_and_are_shared():
    """Aliasing, which the program asserts, 50 ms and 50 MB; four processes share one copy."""
    program = pathlib.Path(__file__).parents[2] / "benchmarks" / "bundle_open.py"
    readers = ["jaxembed bundle", "jaxembed bundle, verified"]
    run = subprocess.run(
        [sys.executable, program, "--json", "--only", *readers], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert found["bytes"] == 2**31
    assert found["readers"][readers[0]]["first"] < 0.05
    for reader in readers:
        assert found["readers"][reader]["private"] < 50e6
        assert found["readers"][reader]["four"] < 2**31 + 4 * 50e6


def test_bfloat16_is_rounding(checkpoint, tmp_path):
    report = convert_to_bundle(checkpoint, tmp_path, step=0, quantize="bfloat16", version=9)
    rows = read_checkpoint(checkpoint, 0).tables["../items"]
    bundle = read_checkpoint(tmp_path)
    assert bundle.tables["../items"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(bundle.tables["../items"], rows.astype(jnp.bfloat16))
    error = np.abs(rows.astype(jnp.bfloat16).astype(np.float32) - rows).max()
    assert report.path == tmp_path / "9"
    assert {t.name: t.max_error for t in report.tables} == {"../items": error, "b": 0.0}


def test_versions_are_never_overwritten(checkpoint, bundles, tmp_path):
    with pytest.raises(ValueError, match=r"/0 exists, and may be in use; pass another version"):
        convert_to_bundle(checkpoint, bundles, step=0)
    with pytest.raises(FileNotFoundError, match=r"no version 5 of a bundle at .*; versions there are \[0\]"):
        open_bundle(bundles, 5)
    with pytest.raises(ValueError, match="quantize must be one of"):
        convert_to_bundle(checkpoint, tmp_path, quantize="int3")
    assert convert_to_bundle(checkpoint, tmp_path, dry_run=True).path == tmp_path / "1"
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_no_checkpoint_to_make_one_of(bundles, tmp_path, capsys):
    told = (
        "is a serving bundle, and --to serving makes one of a checkpoint: pass the checkpoint that it was made from, "
        "or copy the folder"
    )
    for path in (bundles, bundles / "0"):
        for more in ([], ["--dry-run"]):
            assert main(["convert", str(path), "--to", "serving", str(tmp_path / "out"), *more]) == 2
            assert f"jaxembed: {path} {told}" in capsys.readouterr().err
        with pytest.raises(ValueError, match=told):
            convert_to_bundle(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_leaves_no_bundle(checkpoint, tmp_path):
    copy = pathlib.Path(shutil.copytree(checkpoint / "0", tmp_path / "0"))
    shutil.rmtree(copy / "tables")
    shutil.copytree(checkpoint / "1" / "tables", copy / "tables")
    with pytest.raises(CheckpointError, match=r"table '\.\./items' is damaged: rows 0 to"):
        convert_to_bundle(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def reseal(directory, edit):
    manifest = layout.read_manifest(directory, "manifest.json", "jaxembed-bundle")
    edit(manifest)
    (directory / "manifest.json").write_text(json.dumps(layout.seal(manifest)))


def first(copy):
    return copy / "tables" / "00000.safetensors"


def put_file(path):
    return lambda copy: reseal(copy, lambda m: m["tables"]["b"].update(file=path))


def write_header(header):
    def edit(copy):
        text = json.dumps(header) if isinstance(header, dict) else header
        first(copy).write_bytes(len(text).to_bytes(8, "little") + text.encode())

    return edit


def link_out(copy):
    first(copy).rename(copy.parent / "elsewhere")
    first(copy).symlink_to(copy.parent / "elsewhere")


def link_folder(copy):
    (copy / "tables").rename(copy.parent / "elsewhere")
    (copy / "tables").symlink_to(copy.parent / "elsewhere")


def replace_by_pipe(copy):
    first(copy).unlink()
    os.mkfifo(first(copy))


def write_manifest(text):
    return lambda copy: (copy / "manifest.json").write_text(text)


def link_manifest(copy):
    (copy / "manifest.json").rename(copy.parent / "elsewhere")
    (copy / "manifest.json").symlink_to(copy.parent / "elsewhere")


def pipe_for_manifest(copy):
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")


def link_model(copy):
    (copy / "model.safetensors").rename(copy.parent / "elsewhere")
    (copy / "model.safetensors").symlink_to(copy.parent / "elsewhere")


def make_huge(copy):
    """Sparse: it takes no room."""
    (copy / "manifest.json").unlink()
    with open(copy / "manifest.json", "wb") as f:
        f.truncate(10 << 30)


def reshape(shape):
    return lambda copy: reseal(copy, lambda m: m["tables"]["b"]["rows"].update(shape=shape))


def resize(vocabulary_size):
    def edit(manifest):
        config = json.loads(manifest["feature_config"])
        config["tables"][0]["vocabulary_size"] = vocabulary_size
        manifest["feature_config"] = json.dumps(config)

    return lambda copy: reseal(copy, edit)


def entry(**changes):
    return {"rows": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4], **changes}}


ATTACKS = {
    "traversal": (put_file("../../secret"), "is not a file of a bundle"),
    "absolute": (put_file("/etc/passwd"), "is not a file of a bundle"),
    "link": (link_out, "must be a regular file"),
    "linked folder": (link_folder, "is a symbolic link"),
    "pipe": (replace_by_pipe, "must be a regular file"),
    "missing": (
        lambda copy: first(copy).unlink(),
        "table '../items': .*00000.safetensors cannot be opened: No such file",
    ),
    "empty": (
        lambda copy: first(copy).write_bytes(b""),
        "00000.safetensors: table '../items': .* or is truncated: 0 bytes",
    ),
    "truncated": (
        lambda copy: os.truncate(first(copy), 9000),
        r"bundle .*/00000\.safetensors: table '\.\./items': .* 'rows' does not lie where its shape says",
    ),
    "lfs": (
        lambda copy: first(copy).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "huge header": (lambda copy: first(copy).write_bytes(b"\xff" * 16), "or is truncated"),
    "deep header": (write_header("[" * 100_000), "is damaged: not valid JSON"),
    "duplicate": (write_header('{"rows": 1, "rows": 2}'), "'rows' is there twice"),
    "negative": (write_header(entry(shape=[-1, -1])), "impossible sizes"),
    "overflow": (write_header(entry(shape=[2**40, 2**40])), "does not lie where"),
    "unknown type": (write_header(entry(dtype="F4", data_offsets=[0, 0])), r"is damaged: it has 'rows \(F4\)'"),
    "no JSON": (lambda copy: (copy / "manifest.json").write_text("{"), "no readable manifest.json"),
    "unsealed": (
        lambda copy: (copy / "manifest.json").write_text(
            (copy / "manifest.json").read_text().replace("0.5", "0.6")
        ),
        "manifest.json is damaged",
    ),
    "linked manifest": (link_manifest, "manifest.json .*must be a regular file"),
    "pipe for the manifest": (pipe_for_manifest, "must be a regular file"),
    "manifest in LFS": (write_manifest("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "huge manifest": (make_huge, r"too large: 10,737,418,240 bytes, of at most 67,108,864"),
    "deep manifest": (write_manifest('{"a":' * 50_000 + "1" + "}" * 50_000), "not valid JSON"),
    "long number": (write_manifest('{"a":' + "1" * 10_000 + "}"), "not valid JSON"),
    "key twice": (
        write_manifest('{"format": "jaxembed-bundle", "format": "x"}'),
        "key 'format' is there twice",
    ),
    "no number": (write_manifest('{"a": NaN}'), "NaN is not JSON"),
    "no object": (write_manifest("[1]"), "must be a JSON object, got list"),
    "other program": (write_manifest('{"manifest_version": 3, "name": "an app"}'), "is not a jaxembed-bundle"),
    "linked model": (link_model, "model.safetensors .*must be a regular file"),
    "no model": (
        lambda copy: (copy / "model.safetensors").unlink(),
        ": model: .*cannot be opened: No such file",
    ),
    "negative shape": (
        reshape([-100, 4]),
        r"bundle /.*/0: table 'b': not the digests of an array: ValueError: the shape is \[-100, 4\]",
    ),
    "overflowing shape": (reshape([2**62, 2**62]), "not the digests of an array"),
    "shape of floats": (reshape([100.0, 4]), "not the digests of an array"),
    "negative vocabulary": (resize(-5), "must be ints below 2"),
    "overflowing vocabulary": (resize(2**40), "must be ints below 2"),
    "no table": (lambda copy: reseal(copy, lambda m: m.update(tables={})), "is incomplete: KeyError"),
    "tables list": (lambda copy: reseal(copy, lambda m: m.update(tables=[])), "is incomplete: TypeError"),
    "leaves list": (
        lambda copy: reseal(copy, lambda m: m["model"].update(leaves=[9])),
        "is incomplete: IndexError",
    ),
    "swapped": (
        lambda copy: reseal(copy, lambda m: m["tables"]["b"].update(file="tables/00000.safetensors")),
        "00000.safetensors: table 'b' is damaged: saved as bfloat16.*, the file has float32",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_named(copy, attack):
    do, message = ATTACKS[attack]
    do(copy)
    with pytest.raises(CheckpointError, match=message):
        open_bundle(copy)


def test_flipped_bit_names_table_and_rows(copy):
    data = bytearray(first(copy).read_bytes())
    data[4096 + 39_000 * 64] ^= 1
    first(copy).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"table '../items' is damaged: rows 32768 to 39999 of 40000"):
        read_checkpoint(copy)
    assert read_checkpoint(copy, verify=False).step == 0


def test_read_only_and_empty_folders(copy, tmp_path):
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert read_checkpoint(copy).step == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no bundle at"):
        open_bundle(tmp_path / "empty")


def test_command(checkpoint, bundles, tmp_path, capsys):
    assert main(["convert", str(checkpoint), "--to", "serving", str(tmp_path), "--model-key", "params"]) == 0
    assert f"wrote {tmp_path / '1'}" in capsys.readouterr().out
    assert main(["convert", str(checkpoint), "--to", "serving", str(tmp_path / "q"), "--quantize", "int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        re.search(r"\d bytes, max error 0\.\d+, mean .*, xxh3-128 [0-9a-f]{32}$", line) for line in lines[1:3]
    )
    assert lines[3].startswith("2 tables, ")
    assert main(["diff", str(bundles), str(tmp_path)]) == 1
    assert "../items: values: 2 rows, by up to 0." in capsys.readouterr().out
    assert main(["diff", str(tmp_path), str(checkpoint)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path), "--stats"]) == 0
    out = capsys.readouterr().out
    assert "bundle at step 1: 2 features, 2 tables" in out
    assert "../items: 40,000 x 16 float32, 2,560,000 bytes" in out
    assert "dead rows 1, NaN or infinite 0, duplicates 0" in out
    assert main(["convert", str(checkpoint), "--to", "serving", str(tmp_path)]) == 2
    assert "exists, and may be in use" in capsys.readouterr().err
    assert (
        main(
            ["convert", str(checkpoint), "--to", "serving", str(tmp_path), "--version", "8", "--model-key", "q"]
        )
        == 2
    )
    assert "the dense model has no part 'q'" in capsys.readouterr().err


@pytest.mark.parametrize("theirs", ["empty folder", "folder", "file"])
def test_a_version_that_comes_meanwhile_stays(checkpoint, tmp_path, theirs):
    """Of another process that converts to the same version."""

    def export(bundle):
        if theirs == "file":
            (tmp_path / "7").write_text("theirs")
        else:
            (tmp_path / "7").mkdir()
            if theirs == "folder":
                (tmp_path / "7" / "file").write_text("theirs")
        return b"model"

    with pytest.raises(ValueError, match=r"/7 exists, and may be in use; pass another version or remove it"):
        convert_to_bundle(checkpoint, tmp_path, version=7, exported=export)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["7", "7/file"] if theirs == "folder" else ["7"])


def test_progress_is_of_all_bytes(checkpoint, tmp_path):
    done = []
    convert_to_bundle(checkpoint, tmp_path, step=0, quantize="int8", advance=done.append)
    size = sum(table.nbytes for table in read_checkpoint(checkpoint, 0).tables.values())
    assert sum(done) == size
    done.clear()
    convert_to_bundle(checkpoint, tmp_path / "d", step=0, version=0)
    convert_to_bundle(checkpoint, tmp_path / "d", step=1, version=1, delta_from=0, advance=done.append)
    assert sum(done) == size


def test_inspection_of_a_checkpoint(checkpoint, bundles):
    text = describe(checkpoint / "0")
    assert "checkpoint at step 0" in text
    assert "slot accumulators: [40000, 16] float32" in text
    found = difference(bundles, checkpoint)
    assert (found["b"].change, found["../items"].change, found["../items"].num_rows) == ("same", "values", 2)
    assert found["../items"].max_difference >= 0.5 - 1e-6
