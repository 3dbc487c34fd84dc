"""Bundles of codes: what training looked up, mapped in place, verified, and reported."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxembed as je
from jaxembed.checkpoint import (
    CheckpointError,
    convert_to_bundle,
    digest_arrays,
    layout,
    open_bundle,
    read_checkpoint,
)
from jaxembed.checkpoint.delta import arrays_of
from jaxembed.cli import main
from jaxembed.inspection import describe, difference
from jaxembed.optimizers import SGD
from jaxembed.serve import EmbeddingForServing, ServingFunction, load
from jaxembed.train import Checkpointer, ShardedEmbedding


def table(name, rows, dim, quantization=None, **options):
    return je.TableConfig(
        rows,
        dim,
        name=name,
        combiner="sum",
        quantization_config=quantization and je.QuantizationConfig(*quantization),
        **options,
    )


CONFIG = {
    "byte": je.FeatureConfig(table("byte", 30_001, 9, (256, -0.8, 0.8))),
    "half": je.FeatureConfig(table("half", 101, 7, (16, -0.5, 0.4), dtype=jnp.bfloat16)),
    "many": je.FeatureConfig(table("many", 50, 4, (1000, -1, 1))),
    "plain": je.FeatureConfig(table("plain", 333, 5)),
}
KINDS = {"byte": "codes8", "half": "codes4"}
INPUTS = {name: je.RaggedTensor.from_lists([[1, 40, 1], [], [7, 0]]) for name in CONFIG}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a checkpoint at steps 0 and 1, and what training looked up at step 0."""
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    state = own.init(jax.random.key(0))
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(state)
        tables, slots, _ = own.to_canonical(state)
        tables = {**tables, "plain": tables["plain"].at[5].set(0.5)}
        checkpointer.save(own.from_canonical(tables, slots, 1))
    return directory, jax.device_get(own.lookup(state, INPUTS))


@pytest.fixture(scope="module", params=[None, "int8", "int4", "bfloat16"])
def how(request):
    return request.param


@pytest.fixture(scope="module")
def bundles(trained, how, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    return out, convert_to_bundle(trained[0], out, step=0, quantize=how)


def test_serving_equals_training_bit_for_bit(trained, bundles, how):
    checkpoint, looked_up = trained
    for path in (checkpoint / "0", bundles[0]):
        embedding = EmbeddingForServing.restore(path)
        exact = [name for name in CONFIG if how is None or path != bundles[0] or name != "plain"]
        served = embedding(INPUTS)
        for name in exact:
            assert served[name].dtype == looked_up[name].dtype
            np.testing.assert_array_equal(served[name], looked_up[name], err_msg=name)
    serve = ServingFunction(load(bundles[0]).embedding, max_batch_size=4, max_ids_per_row=4)
    answer = serve({name: [[1, 40, 1], [], [7, 0]] for name in CONFIG})
    for name in exact:
        np.testing.assert_array_equal(answer[name], looked_up[name], err_msg=name)


def test_report_of_each_table(trained, bundles, how):
    rows = read_checkpoint(trained[0], 0).tables
    bundle = open_bundle(bundles[0])
    kinds = {**KINDS, "many": "float32", "plain": how or "float32"}
    for report in bundles[1].tables:
        stored = bundle.stored()[report.name]
        gap = np.abs(stored.read().astype(np.float32) - rows[report.name].astype(np.float32))
        assert report.dtype == kinds[report.name]
        assert report.max_error == gap.max()
        assert report.mean_error == pytest.approx(gap.mean(), rel=1e-5)
        assert report.num_bytes == bundle.tables[report.name].nbytes
        assert (report.max_error > 0) == (report.name != "plain" or how is not None)
    planned = convert_to_bundle(trained[0], bundles[0], step=0, quantize=how, version=7, dry_run=True)
    assert [(t.name, t.dtype, t.num_bytes) for t in planned.tables] == [
        (t.name, t.dtype, t.num_bytes) for t in bundles[1].tables
    ]


def test_mapped_in_place_and_read_by_the_official_reader(bundles):
    device = jax.local_devices(backend="cpu")[0]
    bundle = open_bundle(bundles[0])
    embedding = EmbeddingForServing(bundle.feature_config, bundle.tables)
    placed = {config.name: found for config, found in embedding.embedding_tables.items()}
    for i, (name, made) in enumerate(bundle.tables.items()):
        file = load_file(bundles[0] / "0" / "tables" / f"{i:05d}.safetensors")
        if not isinstance(made, je.QuantizedTable):
            assert made.tobytes() == file["rows"].tobytes()
            continue
        assert isinstance(placed[name], je.QuantizedTable)
        for part, array in made.arrays.items():
            assert array.ctypes.data % 64 == 0
            assert not array.flags.writeable
            assert jax.device_put(array, device).unsafe_buffer_pointer() == array.ctypes.data
            assert placed[name].arrays[part].unsafe_buffer_pointer() == array.ctypes.data
            assert array.tobytes() == file[part].tobytes()


@pytest.fixture(scope="module")
def int8_bundle(trained, tmp_path_factory):
    return convert_to_bundle(trained[0], tmp_path_factory.mktemp("int8"), step=0, quantize="int8").path


@pytest.fixture
def copy(int8_bundle, tmp_path):
    return pathlib.Path(shutil.copytree(int8_bundle, tmp_path / "0"))


def reseal(directory, edit):
    manifest = layout.read_manifest(directory, "manifest.json", "jaxembed-bundle")
    edit(manifest["tables"])
    (directory / "manifest.json").write_text(json.dumps(layout.seal(manifest)))


def test_flipped_bits_are_named(copy):
    """In codes, a codebook, a bias."""
    bundle = open_bundle(copy)
    order = list(bundle.tables)
    for name, part in [("byte", "codes"), ("half", "codebook"), ("plain", "codes")]:
        file = copy / "tables" / f"{order.index(name):05d}.safetensors"
        intact, array = file.read_bytes(), bundle.tables[name].arrays[part]
        at = intact.index(array.tobytes(), 4096) + array.nbytes - 1
        file.unlink()  # what is mapped must not change
        file.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        with pytest.raises(CheckpointError, match=f"table '{name}', {part} is damaged: rows"):
            read_checkpoint(copy)
        if part == "codes":
            with pytest.raises(CheckpointError, match=f"table '{name}', codes is damaged"):
                open_bundle(copy).stored()[name].read()
        file.unlink()
        file.write_bytes(intact)
    read_checkpoint(copy)


ATTACKS = {
    "other kind": (
        lambda t: t["byte"]["quantized"].update(kind="int8"),
        r"must be uint8\[30001, 17\], got uint8\[30001, 9\]",
    ),
    "no codebook": (
        lambda t: t["byte"]["quantized"]["arrays"].pop("codebook"),
        "incomplete: KeyError: 'codebook'",
    ),
    "unknown kind": (lambda t: t["byte"]["quantized"].update(kind="int2"), "incomplete: KeyError"),
    "no kind": (lambda t: t["byte"].update(quantized={}), "incomplete: KeyError: 'arrays'"),
    "list": (lambda t: t["byte"]["quantized"].update(kind=[]), "incomplete: TypeError"),
    "half the codes": (
        lambda t: t["byte"]["quantized"].update(kind="codes4"),
        r"must be uint8\[30001, 5\], got",
    ),
    "not quantized": (lambda t: t["byte"].pop("quantized"), "the file has nothing"),
    "traversal": (lambda t: t["byte"].update(file="../../secret"), "is not a file of a bundle"),
    "no file": (
        lambda t: t["byte"].update(file=None),
        "table 'byte' has no file, and the bundle is not a delta",
    ),
    "other codebook": (
        lambda t: t["half"]["quantized"]["arrays"].update(
            codebook=t["byte"]["quantized"]["arrays"]["codebook"]
        ),
        r"table 'half', codebook must be float32\[16\], got float32\[256\]",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_named(copy, attack):
    edit, message = ATTACKS[attack]
    reseal(copy, edit)
    with pytest.raises(CheckpointError, match=message):
        open_bundle(copy)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A checkpoint of three steps; from one to the next some rows of every table change, one by less than a code."""
    directory = tmp_path_factory.mktemp("steps")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    with Checkpointer(directory, own) as checkpointer:
        for step in range(3):
            checkpointer.save(own.from_canonical(tables, slots, step))
            tables = {
                "byte": tables["byte"].at[jnp.array([2 + step, 29_990])].add(0.2).at[9].set(1e-9 * step),
                "half": tables["half"].at[7].set(-0.5 + step),
                "many": tables["many"].at[jnp.array([1, 49])].set(step / 7),
                "plain": tables["plain"].at[jnp.array([0, 300 + step, 332])].multiply(-0.5),
            }
    return directory


def test_a_chain_of_deltas_of_codes_is_the_whole(steps, how, tmp_path):
    """Each version has only the rows that changed, stored as the first one does, to the bytes of a whole bundle."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    convert_to_bundle(steps, out, step=0, quantize=how)
    for step in (1, 2):
        planned = convert_to_bundle(steps, out, step=step, delta_from=step - 1, dry_run=True)
        # Naming the form is allowed, and changes nothing.
        report = convert_to_bundle(
            steps, out, step=step, delta_from=step - 1, quantize=how if step == 2 else None
        )
        full = convert_to_bundle(steps, whole, step=step, quantize=how)
        assert [(t.name, t.dtype, t.num_bytes, t.num_changed) for t in planned.tables] == [
            (t.name, t.dtype, t.num_bytes, t.num_changed) for t in report.tables
        ]
        changed = {t.name: t.num_changed for t in report.tables}
        assert changed == {"byte": 2 + (step == 1), "half": 1, "many": 2, "plain": 3}
        for table, other in zip(report.tables, full.tables, strict=True):
            assert (table.digest, table.max_error, table.mean_error) == (
                other.digest,
                other.max_error,
                other.mean_error,
            )
            assert table.num_bytes == (out / str(step) / "tables" / file_of(out, table.name)).stat().st_size
    opened, expected = open_bundle(out), open_bundle(whole)
    assert opened.table_digests == expected.table_digests
    opened.verify()
    for name, table in expected.tables.items():
        ours = opened.tables[name]
        assert type(ours) is type(table)
        for part, array in arrays_of(table).items():
            assert arrays_of(ours)[part].tobytes() == array.tobytes()
            assert arrays_of(ours)[part].dtype == array.dtype
            assert arrays_of(ours)[part].ctypes.data % 64 == 0
        np.testing.assert_array_equal(opened.stored()[name].read(), expected.stored()[name].read())
    size = sum(file.stat().st_size for file in (out / "2" / "tables").iterdir())
    assert size < 5 * 4096


def file_of(out, name):
    return f"{list(open_bundle(out).tables).index(name):05d}.safetensors"


def test_a_delta_of_another_form_is_refused(steps, tmp_path, capsys):
    convert_to_bundle(steps, tmp_path, step=0, quantize="int8")
    line = ["convert", str(steps), "--to", "serving", str(tmp_path), "--step", "1", "--delta-from", "0"]
    for more in ([], ["--dry-run"]):
        assert main([*line, "--quantize", "int4", *more]) == 2
        assert (
            "version 0 holds table 'plain' as int8, and a delta of it cannot hold it as int4: leave quantize (--quantize) "
            "out to keep int8, or delta_from (--delta-from) to write a whole version"
        ) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["0"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"plain: 333 rows, \[333, 5\] int8, [\d,]+ bytes, max error 0\.\d+, .*, 3 rows changed", out
    )
    assert re.search(r"byte: 30,001 rows, \[30001, 9\] codes8, [\d,]+ bytes, .*, 3 rows changed", out)


def test_a_table_that_changed_its_form_or_is_new_is_written_whole(steps, tmp_path):
    """As the others are that were quantized after training; trained codes that changed are no rows of a delta."""
    convert_to_bundle(steps, tmp_path / "out", step=0, quantize="int8")
    changed = {
        **CONFIG,
        "byte": je.FeatureConfig(table("byte", 30_001, 9, (256, -0.7, 0.8))),
        "new": je.FeatureConfig(table("new", 60, 4)),
    }
    own = ShardedEmbedding(changed, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    with Checkpointer(tmp_path / "changed", own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)))
    report = convert_to_bundle(tmp_path / "changed", tmp_path / "out", version=1, delta_from=0)
    found = {t.name: (t.dtype, t.num_changed) for t in report.tables}
    assert (found["byte"], found["new"]) == (("codes8", None), ("int8", None))
    bundle = open_bundle(tmp_path / "out")
    bundle.verify()
    assert bundle.tables["new"].kind == "int8"


def test_a_delta_of_rows_cannot_build_on_codes(copy):
    newer = copy.parent / "1"
    shutil.copytree(copy, newer)
    manifest = layout.read_manifest(newer, "manifest.json", "jaxembed-bundle")
    manifest["base"] = {"version": 0, "digest": open_bundle(copy).digest}
    manifest["tables"]["plain"].pop("quantized")
    rows = open_bundle(copy).tables["plain"].host_rows(0, 333)
    manifest["tables"]["plain"].update(file=None, rows=digest_arrays([rows])[0].to_json())
    (newer / "manifest.json").write_text(json.dumps(layout.seal(manifest)))
    told = "table 'plain' has no file with all of it, and the version below stores int8 codes"
    with pytest.raises(CheckpointError, match=told):
        open_bundle(newer)


def test_nan_has_no_code(tmp_path):
    own = ShardedEmbedding(CONFIG["byte"], SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    broken = own.from_canonical({"byte": tables["byte"].at[29_000, 3].set(jnp.nan)}, slots, 0)
    with Checkpointer(tmp_path / "c", own) as checkpointer:
        checkpointer.save(broken)
    with pytest.raises(
        ValueError, match=r"table 'byte' cannot be quantized: .* NaN, first at row 29000, column 3"
    ):
        convert_to_bundle(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds NaN, first at row 29000"):
        EmbeddingForServing.restore(tmp_path / "c")


def test_inspection_and_command(trained, tmp_path, capsys):
    command = ["convert", str(trained[0]), "--to", "serving", str(tmp_path), "--quantize", "int4"]
    assert main(command) == 0
    out = capsys.readouterr().out
    size = 333 * 3 + 2 * 4 * 333
    assert re.search(rf"plain: 333 rows, \[333, 5\] int4, {size:,} bytes, max error 0\.\d+, mean 0\.\d+", out)
    text = describe(tmp_path, stats=True)
    assert "byte: 30,001 x 9 codes8 codes, 271,033 bytes" in text
    assert f"plain: 333 x 5 int4 codes, {size:,} bytes" in text
    found = difference(trained[0], tmp_path)
    assert (found["plain"].change, found["many"].change) == ("values", "values")
    assert 0 < found["byte"].max_difference < 0.7
