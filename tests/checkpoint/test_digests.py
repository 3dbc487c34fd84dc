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
from jax.experimental import multihost_utils

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import digest_arrays
from jaxembed.checkpoint.digests import BlockDigester, CheckpointError, Digests
from jaxembed.checkpoint.stored import StoredArray
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


@hypothesis.given(
    cuts=st.sets(st.integers(1, 63)),
    start=st.integers(0, 64),
    length=st.integers(0, 64),
    damaged=st.integers(0, 63),
    max_bytes=st.sampled_from([1, 16, 64, 1 << 20]),
)
def test_spans_and_checks_are_of_the_blocks_in_question_alone(cuts, start, length, damaged, max_bytes):
    rows = np.arange(64 * 2, dtype=np.float32).reshape(64, 2)
    borders = (0, *sorted(cuts), 64)
    blocks = list(itertools.pairwise(borders))
    digests = Digests(
        rows.shape,
        "float32",
        borders,
        tuple(xxhash.xxh3_128_hexdigest(rows[a:b].tobytes()) for a, b in blocks),
    )
    stop = min(start + length, 64)
    spans = digests.spans(max_bytes, start, stop)
    if start < stop:
        touched = [(a, b) for a, b in blocks if a < stop and start < b]
        assert (spans[0][0], spans[-1][1]) == (touched[0][0], touched[-1][1])
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        assert all((b - a) * 8 <= max_bytes or (a, b) in blocks for a, b in spans)
        assert all(a in borders and b in borders for a, b in spans)
        for of in (digests, None):
            np.testing.assert_array_equal(StoredArray("t", rows, of).read_rows(start, stop), rows[start:stop])
            for first, block in StoredArray("t", rows, of).blocks(max_bytes, start, stop):
                np.testing.assert_array_equal(block, rows[first : first + block.shape[0]])
    changed = rows.copy()
    changed[damaged] += 1
    ((low, high),) = [(a, b) for a, b in blocks if a <= damaged < b]
    if start <= low and high <= stop:
        with pytest.raises(CheckpointError, match=f"t is damaged: rows {low} to {high - 1} of 64"):
            digests.check(changed[start:stop], "t", start)
    else:
        digests.check(changed[start:stop], "t", start)


class Counted(tuple):
    """Counts the borders that are looked at."""

    count = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.count += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        Counted.count += len(self)
        return super().__iter__()


def test_a_few_rows_take_no_look_at_all_blocks():
    """Otherwise reading a terabyte would take the square of a million blocks."""
    row = np.ones((1, 1 << 18), np.float32)
    rows = np.broadcast_to(row, (200_000, 1 << 18))
    blocks = (xxhash.xxh3_128_hexdigest(row.tobytes()),) * 200_000
    array = StoredArray("t", rows, Digests(rows.shape, "float32", Counted(range(200_001)), blocks))
    Counted.count = 0
    assert (array.read_rows(123_456, 123_459) == 1).all()
    assert [start for start, _ in array.blocks(1 << 20, 150_000, 150_002)] == [150_000, 150_001]
    assert 0 < Counted.count < 500


def test_a_process_with_arrays_of_its_own_waits_for_no_other(monkeypatch):
    """A conversion runs on one process of a job alone."""
    arrays = [
        np.arange(12.0).reshape(4, 3),
        jnp.ones(()),
        jax.device_put(jnp.ones((8, 2)), jax.NamedSharding(jax.make_mesh((8,), ("d",)), jax.P("d"))),
    ]
    expected = digest_arrays(arrays)

    def hang(*args, **kwargs):
        raise AssertionError("another process would have to take part")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", hang)
    assert digest_arrays(arrays) == expected
