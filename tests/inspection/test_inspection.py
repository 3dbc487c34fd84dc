"""What `jaxembed inspect` and `jaxembed diff` show, of every kind of input."""

import dataclasses
import errno
import html.parser
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, HashBuckets, QuantizationConfig, TableConfig
from jaxembed.checkpoint import convert_to_bundle
from jaxembed.cli import main
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.convert import convert
from jaxembed.initializers import Constant
from jaxembed.inspection import describe, difference, html_report, lookup_difference
from jaxembed.inspection.plots import norm_histogram, rank_curve
from jaxembed.optimizers import Adagrad, Adam
from jaxembed.train import Checkpointer, ShardedEmbedding

MOVIES = TableConfig(3000, 8, name="movies", optimizer=Adam(1e-3))
CONFIG = {
    "user": {
        "id": FeatureConfig(
            TableConfig(500, 4, name="<users>", quantization_config=QuantizationConfig(256, -1, 1))
        ),
        "deep": {"country": FeatureConfig(TableConfig(20, 8, name="country", dtype=jnp.bfloat16))},
    },
    "history": [FeatureConfig(MOVIES), FeatureConfig(MOVIES, max_sequence_length=20)],
}
METADATA = {
    "auc": 0.5,
    "note": "</pre><script>alert(1)</script>",
    "id_frequency": {
        "movies": {"ranks": [1, 2, 4, 2900], "counts": [900, 500, 300, 1], "lookups": 12_345, "distinct": 2900},
        "country": {"counts_by_rank": [9, 5, 1], "num_examples": 17},
        "<users>": {"ranks": "none", "counts": 3},
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, Adagrad(0.1), jax.make_mesh((1,), ("d",)))
    state = own.init(jax.random.key(0))
    tables, slots, _ = own.to_canonical(state)
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(state, metadata=METADATA)
        tables = {**tables, "movies": tables["movies"].at[3].set(0).at[5, 1].set(jnp.nan)}
        slots["country"]["accumulators"] = slots["country"]["accumulators"] + 1
        checkpointer.save(own.from_canonical(tables, slots, 1), metadata=METADATA)
    return directory


def test_configuration_is_a_tree(checkpoint):
    text = describe(checkpoint)
    tree = "\n".join(
        [
            "features",
            "  history/",
            "    0 -> movies",
            "    1 -> movies, sequence of 20",
            "  user/",
            "    deep/",
            "      country -> country",
            "    id -> <users>",
        ]
    )
    assert tree in text
    assert text.startswith("checkpoint at step 1: 4 features, 3 tables, 104,320 bytes")
    assert "  movies: 3,000 x 8 float32, 96,000 bytes, adam, learning rate 0.001, combiner mean" in text
    assert "  country: 20 x 8 bfloat16, 320 bytes, adagrad, learning rate 0.1, combiner mean" in text
    assert "    slot momenta: [3000, 8] float32, 96,000 bytes" in text
    assert "256 buckets in [-1, 1]" in text
    assert "norms" not in text
    assert "checkpoint at step 0" in describe(checkpoint, step=0)


def test_stats(checkpoint):
    text = describe(checkpoint, stats=True)
    assert "dead rows 1, NaN or infinite 1, duplicates 0" in text
    assert re.search(r"as trained 0\.\d+ / 0\.\d+; bfloat16 .*; int8 .*; int4 ", text)


@pytest.mark.parametrize("others", [1.0, 3e38])
def test_values_at_the_end_of_float32(tmp_path, others, capsys):
    """Finite, but not to be quantized."""
    rows = np.full((4, 2), others, np.float32)
    rows[1] = [3.4e38, -3.4e38]
    np.savez(tmp_path / "a.npz", items=rows)
    assert main(["inspect", str(tmp_path / "a.npz"), "--stats"]) == 0
    text = capsys.readouterr().out
    assert "bfloat16 not quantizable; int8 not quantizable; int4 not quantizable" in text
    assert main(["inspect", str(tmp_path / "a.npz"), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    Page(text)
    assert "<td>not quantizable</td>" in text
    assert "inf" not in text.partition("<svg")[2].partition("</svg>")[0]


@pytest.mark.parametrize(
    ("place", "told"),
    [("folder", "Is a directory"), ("file/page.html", "file is no folder"), ("none/page.html", "none'")],
)
def test_a_page_that_cannot_be_written_is_known_before_tables_are_read(
    tmp_path, place, told, monkeypatch, capsys
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("jaxembed.cli.inspect.html_report", lambda *_, **__: pytest.fail("tables were read"))
    assert main(["inspect", str(tmp_path / "a.npz"), "--html", str(tmp_path / place)]) == 2
    assert told in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects what they refer to."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [found[key] for key in ("href", "src") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_its_own(checkpoint):
    text = html_report(checkpoint)
    page = Page(text)
    # Nothing from elsewhere, nothing that runs, and no name that becomes an element.
    assert "script" not in page.tags
    assert "http" not in text
    assert "users" not in page.tags
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert page.tags.count("svg") == 3 + 2
    assert "12,345 lookups, 2,900 different ids" in text
    assert "17 examples" in text
    assert "Most similar rows" in text
    assert "momenta" in text


def test_bundles_and_other_formats(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path / "bundles", step=0, quantize="int8")
    text = describe(tmp_path / "bundles", stats=True)
    assert re.match(r"bundle at step 0: 4 features, 3 tables, [\d,]+ bytes\ndigest [0-9a-f]{32}\n", text)
    assert "movies: 3,000 x 8 int8 codes" in text
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "other.npz", items=rows)
    text = describe(tmp_path / "other.npz", stats=True)
    assert "npz at step 0: 1 tables, 48 bytes" in text
    assert "items: 4 x 3 float32, 48 bytes" in text
    Page(html_report(tmp_path / "other.npz"))


def test_slots_of_other_formats_have_digests(checkpoint, tmp_path, capsys):
    """Those that the conversion reported, and that the checkpoint itself has."""
    report = convert(checkpoint, tmp_path / "other.safetensors")
    expected = {(array.table, array.slot): array.digest for array in report.arrays if array.slot is not None}
    assert expected
    for path in (tmp_path / "other.safetensors", checkpoint):
        assert main(["inspect", str(path), "--stats"]) == 0
        table, found = "", {}
        for line in capsys.readouterr().out.splitlines():
            if (start := re.match(r"  (\S+): [\d,]+ x", line)) is not None:
                table = start[1]
            if (slot := re.match(r"    slot (\w+): .*, xxh3-128 ([0-9a-f]{32})$", line)) is not None:
                found[table, slot[1]] = slot[2]
        assert found == expected
    assert not re.search("slot .*xxh3", describe(tmp_path / "other.safetensors"))


def test_a_page_that_cannot_be_written_leaves_none(checkpoint, tmp_path, capsys, monkeypatch):
    """Not a page that is empty or cut off; one that was there stays."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old.html").write_text("an old page")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("new.html", "old.html"):
        assert main(["inspect", str(checkpoint), "--html", str(tmp_path / name)]) == 1
        assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.html": "an old page"}
    monkeypatch.undo()
    (tmp_path / "link.html").symlink_to("old.html")
    assert main(["inspect", str(checkpoint), "--html", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    Page((tmp_path / "old.html").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "old.html"]
    assert main(["inspect", str(checkpoint), "--html", "/dev/null"]) == 0
    assert not pathlib.Path("/dev/null").is_file()


def test_differences(checkpoint, tmp_path, capsys):
    found = difference(checkpoint / "0", checkpoint / "1")
    assert {name: table.change for name, table in found.items()} == {
        "<users>": "same",
        "country": "same",
        "movies": "values",
    }
    assert found["movies"].num_rows == 2
    assert (found["country"].slots, found["movies"].slots) == (("accumulators",), ())
    rows = np.zeros((3, 2), np.float32)
    np.savez(tmp_path / "a.npz", w=rows, x=rows, y=rows)
    np.savez(tmp_path / "b.npz", w=rows.astype(np.float16), x=np.zeros((4, 2), np.float16), z=rows)
    found = difference(tmp_path / "a.npz", tmp_path / "b.npz")
    assert {name: (table.change, table.detail) for name, table in found.items()} == {
        "w": ("dtype", "float32 to float16"),
        "x": ("shape", "[3, 2] to [4, 2]"),
        "y": ("removed", ""),
        "z": ("added", ""),
    }
    assert main(["diff", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told == ["w: dtype: float32 to float16", "x: shape: [3, 2] to [4, 2]", "y: removed", "z: added"]


def looked_up_otherwise(feature, table, weights):
    """Checkpoints of equal rows: as `feature`, `table` and `weights` change what is looked up, and as it was."""
    rows = np.ones((6, 4), np.float32)
    combiner = CustomCombiner(nth, 3, 2, Constant(1.0))
    was = {
        "x": FeatureConfig(TableConfig(6, 4, name="t")),
        "y": FeatureConfig(TableConfig(6, 4, name="u", combiner=combiner)),
    }
    changed = dataclasses.replace(was["x"], table=dataclasses.replace(was["x"].table, **table), **feature)
    now = {"x": changed, "y": was["y"]}
    return {"t": rows, "u": rows}, (was, {"u": [1.0, 2.0]}), (now, {"u": weights})


@register_combiner("test_inspection.nth")
def nth(valency, vectors, weights):
    return vectors[0] * weights[0] + weights[1]


@pytest.mark.parametrize(
    ("feature", "table", "weights", "told"),
    [
        ({}, {"combiner": "sum"}, [1, 2], "table 't': combiner 'mean' to 'sum'"),
        (
            {},
            {"quantization_config": QuantizationConfig(16, -1, 1)},
            [1, 2],
            "table 't': quantization_config None to QuantizationConfig(",
        ),
        ({"preprocessing": HashBuckets(6)}, {}, [1, 2], "feature 'x': preprocessing None to HashBuckets("),
        ({"max_sequence_length": 3}, {}, [1, 2], "feature 'x': max_sequence_length 0 to 3"),
        ({}, {}, [1, 3], "table 'u': the weights of its combiner"),
    ],
)
def test_lookups_that_differ(tmp_path, capsys, feature, table, weights, told):
    """With the same rows: whoever gates a rollout on the exit code would let them pass."""
    arrays, *sides = looked_up_otherwise(feature, table, weights)
    np.savez(tmp_path / "rows.npz", **arrays)
    for name, (config, combiner_weights) in zip("ab", sides, strict=True):
        convert(
            tmp_path / "rows.npz",
            tmp_path / f"{name}.safetensors",
            feature_config=config,
            combiner_weights=combiner_weights,
        )
    a, b = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    assert main(["diff", a, a]) == 0
    assert capsys.readouterr().out.splitlines() == ["t: same", "u: same"]
    assert main(["diff", a, b]) == 1
    *tables, line = capsys.readouterr().out.splitlines()
    assert tables == ["t: same", "u: same"]
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"initializer": Constant(2.0), "combiner_weights_learning_rate": 0.5}, False),
        ({"max_valency": 4}, True),
    ],
)
def test_settings_of_training_change_no_lookups(tmp_path, change, told):
    was, rows = CustomCombiner(nth, 3, 2, Constant(1.0)), np.ones((6, 4), np.float32)
    np.savez(tmp_path / "rows.npz", u=rows)
    for name, combiner in (("a", was), ("b", dataclasses.replace(was, **change))):
        convert(
            tmp_path / "rows.npz",
            tmp_path / f"{name}.safetensors",
            feature_config={"y": FeatureConfig(TableConfig(6, 4, name="u", combiner=combiner))},
            combiner_weights={"u": [1.0, 2.0]},
        )
    found = lookup_difference(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert ["combiner" in change for change in found.changes] == [True] * told


def test_what_is_not_compared_is_said(checkpoint, tmp_path, capsys):
    convert_to_bundle(checkpoint, tmp_path / "bundles", step=0)
    assert lookup_difference(checkpoint / "0", tmp_path / "bundles").changes == ()
    main(["diff", str(checkpoint / "0"), str(tmp_path / "bundles")])
    assert f"not compared: slots, as only {checkpoint / '0'} has some" in capsys.readouterr().out.splitlines()
    np.savez(tmp_path / "a.npz", movies=np.ones((3000, 8), np.float32))
    found = lookup_difference(tmp_path / "bundles", tmp_path / "a.npz")
    assert found.not_compared == (f"feature configurations, as only {tmp_path / 'bundles' / '0'} has one",)
    assert found.changes == ()


def test_commands(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint), "--html", str(tmp_path / "report.html")]) == 0
    assert "wrote" in capsys.readouterr().out
    Page((tmp_path / "report.html").read_text())
    assert main(["diff", str(checkpoint / "0"), str(checkpoint / "1")]) == 1
    out = capsys.readouterr().out
    assert "country: same; slots accumulators" in out
    assert "movies: values: 2 rows, by up to" in out
    assert main(["diff", str(checkpoint / "0"), str(checkpoint / "0")]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "is an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[], [0.0], [2.5], [1e-40, 1e38], list(range(100))])
def test_plots_of_odd_values(values):
    norms = np.asarray(values, np.float64)
    plot = norm_histogram(norms, norms * 1.01 + 1e-45, np.ones(norms.size, np.int64))
    Page(plot)
    assert "nan" not in plot
    assert (plot == "") == (not values)
    curve = rank_curve(range(1, len(values) + 1), values)
    Page(curve)
    assert "nan" not in curve
