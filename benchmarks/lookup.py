"""Times jaxembed's CPU lookup against its peers and against memory, and the whole call.

    python benchmarks/lookup.py            # the full grid; --cell-seconds 0.1 --peers torch FBGEMM took 34 to 65 minutes
    python benchmarks/lookup.py --quick    # a part of it, about 3 minutes
    python benchmarks/lookup.py --compile  # compiles alone, on a machine that may be busy; the next run finds it all

Writes benchmarks/results/lookup.md, .png and .csv (lookup-part.* for anything but the full grid).
Peers that are not installed (pip install 'jaxembed[bench]') are left out by name.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from cells import FULL_GRID, QUICK_GRID, Cell, Ids, grid, make_sets, make_table
from memory_limit import MemoryLimit, memory_limits
from peers import NUMPY, OURS, Jax, Peer, disagreement, installed_peers
from plot import draw
from report import write_report
from results import Results, geometric_mean, targets
from timing import interleave
from tqdm import tqdm
from whole_call import WholeCall, measure_whole_call

from jaxembed import backend

COMPILED = Path(__file__).parent / "results" / "compiled"
_PACKAGES = ("jaxembed", "jax", "jaxlib", "numpy", "torch", "fbgemm-gpu-cpu", "tensorflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a contender's outputs were wrong."""
    options = _parse(arguments)
    # Results are waited for after each call anyway; computing them in the calling thread, as the peers do,
    # spares every call a change of threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    started = time.time()
    axes = {name: getattr(options, name) or values for name, values in options.grid.items()}
    cells = grid(axes)
    if options.compile:
        compile_cells(cells)
        return 0
    results = Results(cache_bytes=_cache_bytes())
    results.facts = _facts(options, results.cache_bytes)
    if os.getloadavg()[0] > 0.5:
        print(
            f"Something else is running (load {os.getloadavg()[0]:.1f}): ratios will mislead.", file=sys.stderr
        )
    limits = [] if options.no_limit else memory_limits()
    results.stream = limits[0].stream() if limits else None
    full = {name: tuple(values) for name, values in axes.items()} == FULL_GRID and options.peers is None
    path = options.out / ("lookup.md" if full else "lookup-part.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.resume:
        if not path.with_suffix(".csv").exists():
            print(f"{path.with_suffix('.csv')} is not there: run once without --resume.", file=sys.stderr)
            return 2
        results.read_csv(path.with_suffix(".csv"))
        if options.again is not None:
            print(f"Before: {_means(results)}", file=sys.stderr)
            results.drop([cell for cell in results.cells if results.closest(cell) < options.again])
        results.facts["runs"] = "several, one after another; all contenders of a cell in the same one"
    run_cells(cells, results, options.cell_seconds, options.peers, path.with_suffix(".csv"), limits)
    results.sort(cells)
    if not options.no_whole_call:
        print("Timing the whole call.", file=sys.stderr)
        spec = WholeCall() if not options.quick else WholeCall(seconds=2.0)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            results.whole = pool.submit(
                measure_whole_call, spec, options.peers, not options.async_dispatch
            ).result()
        results.wrong = [text for text in results.wrong if "whole call at B=" not in text] + results.whole.wrong
    results.facts["took"] = f"{(time.time() - started) / 60:.1f} minutes"
    _write(results, path)
    return 1 if results.wrong else 0


def compile_cells(cells: list[Cell]) -> None:
    """Puts our programs for all cells into the cache of compiled ones."""
    peers = [peer for peer in installed_peers([])[0] if isinstance(peer, Jax)]
    shapes = list(dict.fromkeys(dataclasses.replace(cell, ids="uniform") for cell in cells))
    with tqdm(total=len(shapes), unit="cell", disable=None) as progress:
        for key, group in itertools.groupby(shapes, key=lambda cell: (cell.dtype, cell.vocabulary, cell.dim)):
            table, ids = make_table(*key), Ids(key[1], "uniform")
            for peer in peers:
                peer.load(table)
            for cell in group:
                progress.set_description(str(cell))
                for peer in peers:
                    for every, slow in ((True, True), (False, peer.slow)):
                        sets = make_sets(cell, ids, 1, _lookups_per_call(cell, slow))
                        peer.program(cell, sets, every)(0)
                progress.update()
            for peer in peers:
                peer.unload()
            jax.clear_caches()


def run_cells(
    cells: list[Cell],
    results: Results,
    seconds: float,
    only: list[str] | None = None,
    keep: Path | None = None,
    limits: Sequence[MemoryLimit] = (),
) -> None:
    """Times every installed contender in every cell, after checking that its outputs are right.

    Args:
      cells: to run; those that `results` has already are left out.
      results: takes the timings.
      seconds: for each cell.
      only: names of the peers that are wanted; default: all.
      keep: CSV file of all timings so far, written after each table.
      limits: take their turns where a lookup is bound by memory.
    """
    peers, results.left_out = installed_peers(only)
    run_peers(peers, cells, results, seconds, keep, limits)


def run_peers(
    peers: list[Peer],
    cells: list[Cell],
    results: Results,
    seconds: float,
    keep: Path | None = None,
    limits: Sequence[MemoryLimit] = (),
) -> None:
    """`run_cells` of given contenders, among them numpy's, whose outputs are the reference."""
    done = set(results.cells)
    cells = [cell for cell in cells if cell not in done]
    results.drop(cells)  # what is left of those in which ours was wrong
    results.contenders = [peer.name for peer in peers]
    pools: dict[tuple[int, str], Ids] = {}
    with tqdm(total=len(cells), unit="cell", disable=None) as progress:
        for key, group in itertools.groupby(cells, key=lambda cell: (cell.dtype, cell.vocabulary, cell.dim)):
            table = make_table(*key)
            loaded = [*peers, *limits]
            for peer in loaded:
                peer.load(table)
            for cell in group:
                progress.set_description(str(cell))
                kind = cell.vocabulary, cell.ids
                if kind not in pools:
                    pools[kind] = Ids(*kind)
                _run_cell(cell, peers, pools[kind], results, seconds, limits)
                progress.update()
            for peer in loaded:
                peer.unload()
            jax.clear_caches()
            gc.collect()
            if keep is not None:
                results.write_csv(keep)


def _run_cell(
    cell: Cell,
    peers: list[Peer],
    ids: Ids,
    results: Results,
    seconds: float,
    limits: Sequence[MemoryLimit],
) -> None:
    counts = {slow: _lookups_per_call(cell, slow) for slow in (False, True)}
    sets = make_sets(cell, ids, 4, counts[False])
    few = [batches[: counts[True]] for batches in sets]
    reference = next(peer for peer in peers if peer.name == NUMPY)
    expected = reference.outputs(reference.program(cell, few, True)(0))
    programs, lookups = {}, {}
    for peer in peers:
        why = peer.refuses(cell)
        if why is not None:
            kind = f"weighted {cell.dtype}" if cell.weighted else cell.dtype
            results.refused.setdefault((peer.name, why), set()).add(kind)
            continue
        rounded_sums = peer.sums_in_bfloat16 and cell.dtype == "bfloat16"
        difference = disagreement(cell, expected, peer.outputs(peer.program(cell, few, True)(0)), rounded_sums)
        if difference is None:
            programs[peer.name] = peer.program(cell, few if peer.slow else sets, False)
            lookups[peer.name] = counts[peer.slow]
            programs[peer.name](0)
        else:
            results.wrong.append(f"{peer.name}, {cell}: {difference}")
    if results.beyond_cache(cell):
        for limit in limits:
            programs[limit.name], lookups[limit.name] = limit.program(cell, sets), counts[False]
    for name, timing in interleave(programs, len(sets), seconds, seed=len(results.timings)).items():
        results.timings[cell, name] = timing.per(lookups[name])


def _lookups_per_call(cell: Cell, slow: bool) -> int:
    """Several, so that the price of a call from Python weighs little: 0.1 ms where other code filled the caches."""
    values = cell.num_ids * cell.dim
    return 16 if values <= 2**17 or not slow else 8 if values <= 2**19 else 4 if values <= 2**21 else 1


def _means(results: Results) -> str:
    names = [name for name in ("torch", "FBGEMM") if any(n == name for _, n in results.timings)]
    results.contenders = names
    return ", ".join(f"{name} {geometric_mean(results.ratios(name).values()):.3f}x" for name in names)


def _write(results: Results, path: Path) -> None:
    results.write_csv(path.with_suffix(".csv"))
    write_report(results, path)
    if any(name == OURS for _, name in results.timings):
        draw(results, path.with_suffix(".png"))
    for target in targets(results):
        met = {True: "met   ", False: "MISSED", None: "-     "}[target.met]
        print(f"{met}  {target.promise}: {target.measured}")
    for line in results.wrong:
        print(f"WRONG   {line}")
    print(f"wrote {path}, {path.with_suffix('.png').name}, {path.with_suffix('.csv').name}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the grid, about 3 minutes")
    parser.add_argument("--compile", action="store_true", help="only compile, on a machine that may be busy")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="V, instead of the grid's; so also:")
    parser.add_argument("--dim", type=int, nargs="+", help="D")
    parser.add_argument("--batch", type=int, nargs="+", help="B")
    parser.add_argument("--valency", type=int, nargs="+", help="mean number of ids of a bag")
    parser.add_argument(
        "--weighted", type=lambda text: {"on": True, "off": False}[text], nargs="+", help="on, off"
    )
    parser.add_argument("--ids", choices=FULL_GRID["ids"], nargs="+")
    parser.add_argument("--dtype", choices=FULL_GRID["dtype"], nargs="+")
    parser.add_argument("--peers", nargs="*", choices=("torch", "FBGEMM", "TensorFlow"), help="only these")
    parser.add_argument("--cell-seconds", type=float, default=0.5, help="time for each cell (default 0.5)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the cells that the report in --out has, which must be there; run the others",
    )
    parser.add_argument(
        "--again",
        type=float,
        metavar="RATIO",
        help="with --resume, runs those cells again in which torch or FBGEMM takes less than RATIO times as long; "
        "means of all cells, some of which had their luck corrected, rise by this alone",
    )
    parser.add_argument("--no-limit", action="store_true", help="leave out the memory limit")
    parser.add_argument(
        "--async-dispatch", action="store_true", help="the whole call with JAX's default, a thread of XLA's own"
    )
    parser.add_argument("--no-whole-call", action="store_true", help="leave out the whole call")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the report"
    )
    options = parser.parse_args(arguments)
    if options.again is not None and not options.resume:
        parser.error("--again needs --resume: without it all cells are run, and the report is written anew")
    options.grid = QUICK_GRID if options.quick else FULL_GRID
    options.command = "python benchmarks/lookup.py " + " ".join(
        sys.argv[1:] if arguments is None else arguments
    )
    return options


def _facts(options: argparse.Namespace, cache_bytes: int) -> dict[str, str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "CPU": _cpu(),
        "cores": str(os.cpu_count()),
        "last-level cache": f"{cache_bytes / 2**20:.0f} MB",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "jaxembed's path": backend(),
        "command": f"`{options.command.strip()}`",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = [value.strip() for key, value in fields.items() if key.strip() == "model name"]
    return names[0] if names else platform.machine()


def _cache_bytes() -> int:
    """Of the last level, 32 MB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


if __name__ == "__main__":
    sys.exit(main())
