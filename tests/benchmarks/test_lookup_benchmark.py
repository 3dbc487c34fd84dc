"""The lookup benchmark runs on a tiny grid, and does not time wrong results."""

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Where there is no native kernel, it benchmarks what there is.
pytestmark = pytest.mark.filterwarnings("ignore:jaxembed looks tables up in plain JAX")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "vocabulary": (300,),
    "dim": (8,),
    "batch": (5,),
    "valency": (3,),
    "weighted": (False, True),
    "ids": ("zipf",),
}


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/, where they import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def tiny(load):
    cells = load("cells")
    return cells.grid(cells.FULL_GRID | TINY | {"dtype": ("float32", "bfloat16")})


def test_report_has_every_cell_and_contender(load, tiny, tmp_path):
    results, lookup = load("results").Results(facts={"CPU": "the one"}, cache_bytes=2**20), load("lookup")
    lookup.run_cells(tiny, results, seconds=0.01, only=[])
    assert results.wrong == []
    assert results.cells == tiny
    assert results.contenders == ["jaxembed", "jaxembed, plain JAX", "numpy"]
    assert {name for _, name in results.timings} == set(results.contenders)
    path = tmp_path / "lookup.md"
    load("report").write_report(results, path)
    results.write_csv(path.with_suffix(".csv"))
    load("plot").draw(results, path.with_suffix(".png"))
    report = path.read_text()
    assert report.index("## Targets") < report.index("## Ratios") < report.index("## Every cell")
    assert "| the automatic choice is never slower than plain JAX | in " in report
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "# CPU: the one"
    assert len(lines) == 2 + len(tiny) * 3
    assert path.with_suffix(".png").stat().st_size > 10_000
    other = load("results").Results(facts={"CPU": "another"})
    with pytest.raises(ValueError, match=r"is of CPU 'the one', this run of 'another': .*; give another --out"):
        other.read_csv(path.with_suffix(".csv"))
    newer = load("results").Results(facts={"CPU": "the one", "versions": "Python 3", "date": "today"})
    with pytest.raises(ValueError, match=r"does not say .* begin the file with:\n# versions: Python 3$"):
        newer.read_csv(path.with_suffix(".csv"))
    assert not newer.timings
    again = load("results").Results(facts={"CPU": "the one"})
    again.read_csv(path.with_suffix(".csv"))
    assert again.wrong == []
    assert again.timings.keys() == results.timings.keys()
    for key, timing in results.timings.items():
        np.testing.assert_allclose(again.timings[key], timing, atol=1e-9)
    before = dict(again.timings)
    lookup.run_cells(tiny, again, seconds=0.01, only=[])
    assert again.timings == before


def test_peers_that_are_not_installed_are_left_out_by_name(load, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("torch", "fbgemm_gpu", "tensorflow") else find(name),
    )
    peers, left_out = load("peers").installed_peers()
    assert [peer.name for peer in peers] == ["jaxembed", "jaxembed, plain JAX", "numpy"]
    assert left_out == {
        "torch": "torch not installed",
        "FBGEMM": "torch and fbgemm_gpu not installed",
        "TensorFlow": "tensorflow not installed",
    }
    load("report").write_report(load("results").Results(left_out=left_out), tmp_path / "lookup.md")
    assert "- FBGEMM: torch and fbgemm_gpu not installed." in (tmp_path / "lookup.md").read_text()


@pytest.mark.parametrize("fault", ["value", "bag", "nan", "missing"])
def test_wrong_contender_is_reported_and_not_timed(load, tiny, tmp_path, fault):
    peers, lookup = load("peers"), load("lookup")

    class Wrong(peers.Numpy):
        name = "wrong"

        def outputs(self, result):
            last = np.array(result[-1], np.float32)
            last = {"value": last + 1, "bag": np.roll(last, 1, 1), "nan": last * np.nan, "missing": last}[fault]
            return result[:-1] if fault == "missing" else [*result[:-1], last]

    results = load("results").Results()
    lookup.run_peers([peers.Numpy(), Wrong()], tiny[-1:], results, seconds=0.01)
    assert {name for _, name in results.timings} == {"numpy"}
    (line,) = results.wrong
    assert line.startswith(f"wrong, {tiny[-1]}: ")
    results.write_csv(tmp_path / "part.csv")
    again = load("results").Results()
    again.read_csv(tmp_path / "part.csv")
    assert again.wrong == [line]
    again.drop([dataclasses.replace(tiny[-1], weighted=not tiny[-1].weighted)])
    assert again.wrong == [line]
    lookup.run_peers([peers.Numpy()], tiny[-1:], again, seconds=0.01)
    assert again.wrong == []


def test_int8_table_and_float32_table_hold_the_same_numbers(load):
    cells, peers = load("cells"), load("peers")
    cell = dataclasses.replace(cells.grid(cells.FULL_GRID)[0], batch=20, valency=4, weighted=True)
    (batch,), *_ = cells.make_sets(cell, cells.Ids(500, "uniform"), 1, 1)
    outputs = [peers.numpy_lookup(cells.make_table(dtype, 500, 8), batch) for dtype in cells.DTYPES]
    assert batch.ids.size == cell.num_ids
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_allclose(outputs[1].astype(np.float32), outputs[0], rtol=2.0**-8)


def test_targets_name_the_cells_that_miss(load):
    cells, results_module, timing = load("cells"), load("results"), load("timing")
    fast, slow = cells.grid(cells.FULL_GRID)[:2]
    results = results_module.Results(contenders=["jaxembed", "torch"])
    for cell, ours in ((fast, 1.0), (slow, 4.0)):
        results.timings[cell, "jaxembed"] = timing.Timing(ours, ours, ours, 3)
        results.timings[cell, "torch"] = timing.Timing(2.0, 2.0, 2.0, 3)
    every, mean, fbgemm, *_ = results_module.targets(results)
    assert (every.met, every.misses) == (False, [f"{slow}: 0.50x"])
    assert mean.measured.startswith("1.00x")
    assert fbgemm.met is None
    # What is run again: cells that are close, in the place that they had.
    results.timings[fast, "numpy"] = timing.Timing(0.1, 0.1, 0.1, 3)
    assert [results.closest(cell) for cell in results.cells] == [2.0, 0.5]
    results.drop([fast])
    assert results.cells == [slow]
    results.timings[fast, "jaxembed"] = timing.Timing(1.0, 1.0, 1.0, 3)
    assert results.closest(fast) == float("inf")
    results.sort([fast, slow])
    assert results.cells == [fast, slow]


def test_memory_limit_takes_its_turns_beyond_the_cache(load, tiny):
    limits = load("memory_limit").memory_limits()
    if not limits:
        pytest.skip("no C++ compiler")
    assert limits[0].stream(megabytes=1) > 0
    results_module, lookup = load("results"), load("lookup")
    large = dataclasses.replace(tiny[0], ids="uniform", batch=50_000)
    results = results_module.Results(cache_bytes=64)
    lookup.run_cells([tiny[0], large], results, seconds=0.01, only=[], limits=limits)
    for name in ("memory limit", "memory limit, results written"):
        assert results.limit_of(tiny[0], name) is None
        assert results.limit_of(large, name) > 0
        assert name not in results.contenders
    target = next(t for t in results_module.targets(results) if "memory limit" in t.promise)
    assert target.met is not None
    assert target.measured.count(" of 1 cells reach 85%") == 2


@pytest.mark.parametrize("writes", [False, True])
def test_memory_limit_reads_the_rows_of_the_lookups(load, writes):
    limits, cells = load("memory_limit").memory_limits(), load("cells")
    if not limits:
        pytest.skip("no C++ compiler")
    limit = limits[writes]
    cell = dataclasses.replace(cells.grid(cells.FULL_GRID)[0], batch=20, valency=4)
    sets = cells.make_sets(cell, cells.Ids(500, "uniform"), 2, 3)
    for dtype in cells.DTYPES:
        table = cells.make_table(dtype, 500, 8)
        limit.load(table)
        read = limit.program(cell, sets)
        rows = table.rows if table.fused is None else table.fused
        words = np.ascontiguousarray(rows).view(np.uint64).reshape(500, -1)
        for i, batches in enumerate(sets):
            ids = np.concatenate([batch.ids for batch in batches])
            total, results = read(i)
            assert total == int(words[ids].sum(dtype=np.uint64))
            assert results.any() == writes


@pytest.mark.slow
@pytest.mark.parity
def test_all_installed_peers_agree(tmp_path):
    axes = {"vocabulary": [1000], "dim": [8, 32], "batch": [1, 33], "valency": [8]}
    arguments = [text for name, values in axes.items() for text in (f"--{name}", *map(str, values))]
    arguments += ["--cell-seconds", "0.01", "--no-limit", "--no-whole-call", "--out", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "lookup.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "## Wrong results" not in (tmp_path / "lookup-part.md").read_text()


@pytest.mark.slow
@pytest.mark.parity
def test_all_whole_calls_agree():
    program = """
from whole_call import WholeCall, measure_whole_call
result = measure_whole_call(WholeCall(3, 500, 8, 4, 16, batches=(1, 5), seconds=0.05))
assert not result.wrong, result.wrong
assert (5, "jaxembed") in result.timings
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
