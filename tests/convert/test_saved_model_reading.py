"""SavedModels are read: ours by what is beside them, those of others by keys; so are files of any format in `inspect`."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.checkpoint import read_checkpoint
from jaxembed.cli import main
from jaxembed.convert import convert
from jaxembed.convert.saved_model import export_saved_model
from jaxembed.quantization import quantize, simulate_on_host
from jaxembed.serve import EmbeddingForServing

ROWS = {
    "films/a.b": np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32),
    "users": np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32),
}
CONFIG = {
    "x": FeatureConfig(TableConfig(20, 4, name="films/a.b", combiner="sqrtn")),
    "y": FeatureConfig(TableConfig(7, 4, name="users", quantization_config=QuantizationConfig(16, -1, 1))),
}


@pytest.mark.parity
def test_ours_there_and_back(tmp_path, capsys):
    """As they are looked up, with the digests that the conversion reports."""
    pytest.importorskip("orbax.export")
    np.savez(tmp_path / "a.npz", **ROWS)
    source = convert(tmp_path / "a.npz", tmp_path / "steps", feature_config=CONFIG, step=7)
    there = convert(source.path, tmp_path / "model" / "1", target_format="saved-model")
    back = convert(there.path, tmp_path / "back")
    assert (back.source_format, back.path.name) == ("saved-model", "7")
    assert [array.digest for array in back.arrays] == [array.digest for array in there.arrays]
    assert there.arrays[0].digest == source.arrays[0].digest
    read = read_checkpoint(back.path)
    assert read.feature_config == CONFIG
    np.testing.assert_array_equal(read.tables["films/a.b"], ROWS["films/a.b"])
    quantized = simulate_on_host(ROWS["users"], CONFIG["y"].table.quantization_config)
    np.testing.assert_array_equal(read.tables["users"], quantized)
    assert there.arrays[1].max_error == pytest.approx(np.abs(quantized - ROWS["users"]).max())
    assert main(["inspect", str(there.path), "--stats"]) == 0
    shown = capsys.readouterr().out
    assert "saved-model at step 7: 2 features, 2 tables, 432 bytes" in shown
    assert "films/a.b: 20 x 4 float32, 320 bytes, combiner sqrtn" in shown
    for array in there.arrays:
        assert f"xxh3-128 {array.digest}" in shown
    assert "guessed" not in shown
    # Whose variables are damaged is found by TensorFlow's checksums.
    data = there.path / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.unlink()
    data.write_bytes(content)
    assert main(["inspect", str(there.path), "--stats"]) == 1
    assert "does not have the checksum it was saved with" in capsys.readouterr().err


@pytest.mark.parity
def test_with_a_dense_model_or_of_others(tmp_path, capsys):
    pytest.importorskip("orbax.export")

    def model(params, activations, dense):
        del dense
        return activations["x"].astype(jnp.float32) @ params["w"]

    table = ROWS["films/a.b"].astype(jnp.bfloat16)
    config = {"x": FeatureConfig(TableConfig(20, 4, name="t", dtype=jnp.bfloat16))}
    params = {"w": np.ones((4, 2), np.float32)}
    out = export_saved_model(tmp_path / "1", config, {"t": table}, model=model, params=params)
    convert(out, tmp_path / "steps")
    read = read_checkpoint(tmp_path / "steps")
    assert read.feature_config == config
    np.testing.assert_array_equal(read.tables["t"], table)
    shutil.rmtree(out / "assets.extra")
    assert main(["inspect", str(out)]) == 2
    told = capsys.readouterr().err
    assert (
        f"jaxembed: {out} is a SavedModel without assets.extra/feature_config.json, which jaxembed puts into its own and "
        "which says what the tables are. Its variables can be read if keys (--keys) say which table each of them is; those "
        "that may be one: tf_var_leaves/0/.ATTRIBUTES/VARIABLE_VALUE float32[4, 2], "
        "tf_var_leaves/1/.ATTRIBUTES/VARIABLE_VALUE bfloat16[20, 4]."
    ) in told
    (tmp_path / "keys.json").write_text('{"tf_var_leaves/1/.ATTRIBUTES/VARIABLE_VALUE": "items"}')
    assert main(["inspect", str(out), "--keys", str(tmp_path / "keys.json")]) == 0
    shown = capsys.readouterr().out
    assert "VARIABLE_VALUE -> table 'items' (as given)" in shown
    assert "  items: 20 x 4 bfloat16, 160 bytes" in shown
    (out / "assets.extra").mkdir()
    (out / "assets.extra" / "feature_config.json").write_text('{"format": "other"}')
    assert main(["inspect", str(out)]) == 1
    assert "is not what jaxembed writes beside arrays: its format is 'other'" in capsys.readouterr().err


@pytest.mark.parity
def test_exported_tables_are_those_that_are_served(tmp_path):
    """Of codes their values; rows with a quantization_config as training looked them up."""
    pytest.importorskip("orbax.export")

    def model(params, activations, dense):
        return activations["x"] + dense["price"] @ params

    codes = quantize(ROWS["films/a.b"], "int8")
    served = EmbeddingForServing(CONFIG, {**ROWS, "films/a.b": codes}).embedding_tables
    films = CONFIG["x"].table
    out = export_saved_model(
        tmp_path / "1",
        CONFIG,
        {films: served[films], "users": ROWS["users"]},
        model=model,
        params=np.ones((13, 4), np.float32),
        dense={"price": 13},
    )
    convert(out, tmp_path / "steps")
    read = read_checkpoint(tmp_path / "steps")
    np.testing.assert_array_equal(read.tables["films/a.b"], codes.host_rows(0, 20))
    quantized = simulate_on_host(ROWS["users"], CONFIG["y"].table.quantization_config)
    np.testing.assert_array_equal(read.tables["users"], quantized)
    with pytest.raises(ValueError, match=r"dense\['price'\] must be the shape of one row, got \(1.5,\)"):
        export_saved_model(tmp_path / "2", CONFIG, ROWS, model=model, dense={"price": 1.5})


def test_keys_of_inspect(tmp_path, capsys):
    """As of `convert`: tables and slots by their names in the file; refused where there is nothing to say."""
    save_file({"w": ROWS["users"], "m": ROWS["users"], "z": ROWS["users"]}, tmp_path / "a.safetensors")
    keys = tmp_path / "keys.json"
    line = ["inspect", str(tmp_path / "a.safetensors"), "--keys", str(keys)]
    keys.write_text(json.dumps({"w": "users", "m": ["users", "momenta"]}))
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "safetensors at step 0: 1 tables, 112 bytes" in shown
    assert "note: w -> table 'users' (as given)" in shown
    assert "note: left out: z" in shown
    assert "    slot momenta: [7, 4] float32, 112 bytes" in shown
    assert main([*line, "--html", str(tmp_path / "page.html")]) == 0
    assert "momenta" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    for content, told in (
        ('{"q": "users"}', "a.safetensors has no array 'q'; it has m, w, z."),
        ('{"w": 1}', f'{keys}: keys[\'w\'] must be "table" or ["table", "slot"], got 1.'),
        ("[", f"{keys}: not valid JSON"),
    ):
        keys.write_text(content)
        assert main(line) == 2
        assert told in capsys.readouterr().err
    convert(tmp_path / "a.safetensors", tmp_path / "steps")
    keys.write_text('{"w": "users"}')
    assert main(["inspect", str(tmp_path / "steps"), "--keys", str(keys)]) == 2
    told = "is of jaxembed and says itself what its tables are; leave keys (--keys) out"
    assert told in capsys.readouterr().err
