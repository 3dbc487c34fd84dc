"""The one digest of a table: the same from `convert`, from `inspect`, of a bundle, and by hand from the manifest."""

import itertools
import json
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import strategies as st

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import digest_arrays
from jaxembed.checkpoint.digests import BlockDigester
from jaxembed.cli import main
from jaxembed.optimizers import Adagrad
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {
    "x": FeatureConfig(TableConfig(40_000, 16, name="a")),
    "y": FeatureConfig(TableConfig(30, 4, name="b", dtype=jnp.bfloat16)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, Adagrad(0.1), jax.make_mesh((2,), ("d",)))
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)))
    return directory


def by_hand(entry):
    """As docs/decisions/digests.md says it, of a manifest's entry."""
    return xxhash.xxh3_128_hexdigest(json.dumps({"quantized": None, "rows": entry}, sort_keys=True).encode())


def shown(capsys, *command):
    """Digests in the order in which a command prints them."""
    assert main([str(part) for part in command]) == 0
    return re.findall(r"xxh3-128 ([0-9a-f]{32})", capsys.readouterr().out)


def test_one_digest_everywhere(checkpoint, tmp_path, capsys):
    digests = json.loads((checkpoint / "0" / "manifest" / "metadata").read_text())["digests"]
    a, b = (by_hand(digests["tables"][name]) for name in "ab")
    slot_a, slot_b = (by_hand(digests["slots"][name]["accumulators"]) for name in "ab")
    assert len(digests["tables"]["a"]["blocks"]) == 3 * 32
    assert shown(capsys, "inspect", checkpoint) == [a, slot_a, b, slot_b]
    there, back = tmp_path / "t.safetensors", tmp_path / "back"
    assert shown(capsys, "convert", checkpoint, there) == [a, b, slot_a, slot_b]
    assert shown(capsys, "inspect", there) == []
    assert shown(capsys, "inspect", there, "--stats") == [a, slot_a, b, slot_b]
    assert shown(capsys, "convert", there, back) == [a, b, slot_a, slot_b]
    assert shown(capsys, "inspect", back) == [a, slot_a, b, slot_b]
    assert shown(capsys, "convert", back, "--to", "serving", tmp_path / "out") == [a, b]
    assert shown(capsys, "inspect", tmp_path / "out", "--stats") == [a, b]
    assert shown(capsys, "convert", tmp_path / "out", tmp_path / "from-bundle") == [a, b]
    manifest = json.loads((tmp_path / "out" / "0" / "manifest.json").read_text())
    assert by_hand(manifest["tables"]["a"]["rows"]) == a


def test_of_what_is_written_where_that_is_rounded(checkpoint, tmp_path, capsys):
    (rounded, b) = shown(capsys, "convert", checkpoint, tmp_path / "r", "--dtype", "bfloat16")[:2]
    assert shown(capsys, "inspect", tmp_path / "r")[0::2] == [rounded, b]
    assert rounded != shown(capsys, "inspect", checkpoint)[0]
    assert b == shown(capsys, "inspect", checkpoint)[2]


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    rows=st.sampled_from([0, 1, 7, 4095, 4096, 4097, 9000]),
    cuts=st.lists(st.integers(0, 9000), max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_digests_of_rows_that_come_in_any_blocks(rows, cuts, dtype):
    array = np.arange(rows * 128, dtype=np.float32).reshape(rows, 128).astype(jnp.dtype(dtype))
    digester = BlockDigester(array.shape, array.dtype)
    borders = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    for start, stop in itertools.pairwise(borders):
        digester.update(array[start:stop])
        assert (digester.digests() is None) == (stop < rows)
    assert digester.digests() == digest_arrays([array])[0]
