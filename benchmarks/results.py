"""What a run of the lookup benchmark found, and how it compares with the targets."""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_type_hints

from cells import Cell
from timing import Timing
from whole_call import OURS as WHOLE_OURS
from whole_call import WholeCallResult

OURS, PLAIN, LIMIT = "jaxembed", "jaxembed, plain JAX", "memory limit"
LIMIT_WRITING = "memory limit, results written"
FAR_LARGER = 8  # times the cache
_SAME = "CPU", "cores", "versions"  # facts that cells must share to be compared


@dataclasses.dataclass
class Results:
    """Timings of one lookup by cell and contender, and all that the report tells.

    Attributes:
      contenders: all that take part.
      refused: (contender, why) to the kinds of cells ("int8", "weighted bfloat16") it was left out of.
      wrong: contenders whose outputs disagreed with the reference; these were not timed.
      left_out: contenders that are not installed, and why.
      facts: lines about machine, versions and command.
      cache_bytes: size of the last-level cache.
      stream: GB/s of a streaming read; None where the memory limit was not measured.
    """

    contenders: list[str] = dataclasses.field(default_factory=list)
    timings: dict[tuple[Cell, str], Timing] = dataclasses.field(default_factory=dict)
    refused: dict[tuple[str, str], set[str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    cache_bytes: int = 0
    stream: float | None = None
    whole: WholeCallResult | None = None

    @property
    def cells(self) -> list[Cell]:
        """The cells in which ours was timed."""
        return [cell for cell, name in self.timings if name == OURS]

    def ratio(self, cell: Cell, name: str) -> float | None:
        """Time of a contender over ours; above 1 ours is faster. Of several names by prefix, the fastest."""
        if name == OURS or (cell, OURS) not in self.timings:
            return None
        names = [n for n in self.contenders if n == name or n.startswith(name + ", ")]
        times = [self.timings[cell, n].median for n in names if (cell, n) in self.timings]
        return min(times) / self.timings[cell, OURS].median if times else None

    def ratios(self, name: str) -> dict[Cell, float]:
        """`ratio` in every cell that both ran."""
        found = {cell: self.ratio(cell, name) for cell in self.cells}
        return {cell: ratio for cell, ratio in found.items() if ratio is not None}

    def closest(self, cell: Cell) -> float:
        """The least ratio of torch and FBGEMM in a cell; infinite if it has neither."""
        times = [
            self.timings[cell, name].median for name in ("torch", "FBGEMM") if (cell, name) in self.timings
        ]
        return min(times, default=math.inf) / self.timings[cell, OURS].median

    def drop(self, cells: Iterable[Cell]) -> None:
        """Forgets the timings of some cells, and who was wrong in them."""
        dropped = set(cells)
        lines = [f", {cell}: " for cell in dropped]
        self.wrong = [text for text in self.wrong if not any(line in text for line in lines)]
        self.timings = {key: timing for key, timing in self.timings.items() if key[0] not in dropped}

    def sort(self, cells: Sequence[Cell]) -> None:
        """Puts the timings in the order of `cells`, others last."""
        order = {cell: place for place, cell in enumerate(cells)}
        self.timings = dict(sorted(self.timings.items(), key=lambda item: order.get(item[0][0], len(order))))

    def rate(self, cell: Cell, name: str = OURS) -> float:
        """GB/s of table rows read."""
        return cell.num_ids * row_bytes(cell) / self.timings[cell, name].median / 1e9

    def limit_of(self, cell: Cell, name: str = LIMIT) -> float | None:
        """GB/s at which the rows of this cell can be read, or None where it was not measured."""
        return self.rate(cell, name) if (cell, name) in self.timings else None

    def beyond_cache(self, cell: Cell) -> bool:
        """Whether a lookup is bound by memory: uniform ids, a table far larger than the cache, 4 MB or more."""
        table = cell.vocabulary * row_bytes(cell)
        read = cell.num_ids * row_bytes(cell)
        return cell.ids == "uniform" and table >= FAR_LARGER * self.cache_bytes and read >= 4_000_000

    def write_csv(self, path: Path) -> None:
        """Every cell and contender, one a line, times in microseconds per lookup.

        Lines that begin with # tell before of the machine, the versions, and who was wrong.
        """
        names = [field.name for field in dataclasses.fields(Cell)]
        with path.open("w", newline="") as file:
            for name in _SAME:
                if name in self.facts:
                    file.write(f"# {name}: {self.facts[name]}\n")
            for line in self.wrong:
                file.write(f"# wrong: {line}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, "contender", "median_us", "low_quartile_us", "high_quartile_us", "rounds"])
            for (cell, name), timing in self.timings.items():
                times = [f"{seconds * 1e6:.3f}" for seconds in timing[:3]]
                writer.writerow([*dataclasses.astuple(cell), name, *times, timing.rounds])

    def read_csv(self, path: Path) -> None:
        """Takes in what `write_csv` wrote, of a run that was cut short or of other cells.

        Raises:
          ValueError: it was written on another processor, or with other versions, or does not say on which.
        """
        parse = {int: int, str: str, bool: lambda text: text == "True"}
        fields = [(name, parse[kind]) for name, kind in get_type_hints(Cell).items()]
        with path.open(newline="") as file:
            lines = file.read().splitlines()
        told = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
        facts = {name: text for name, _, text in told if name != "wrong"}
        missing = [
            f"# {name}: {self.facts[name]}" for name in _SAME if name in self.facts and name not in facts
        ]
        if missing:
            raise ValueError(
                f"{path} does not say what its cells were measured with, so they may not compare with this run's; give "
                "another --out, leave out --resume or, if it was the same, begin the file with:\n"
                + "\n".join(missing)
            )
        for name, text in facts.items():
            if text != self.facts.get(name, text):
                raise ValueError(
                    f"{path} is of {name} {text!r}, this run of {self.facts[name]!r}: cells of both do not "
                    "compare; give another --out, or leave out --resume."
                )
        self.wrong += [text for name, _, text in told if name == "wrong"]
        for line in csv.DictReader(line for line in lines if not line.startswith("# ")):
            cell = Cell(*(read(line[name]) for name, read in fields))
            times = [float(line[name]) / 1e6 for name in ("median_us", "low_quartile_us", "high_quartile_us")]
            self.timings[cell, line["contender"]] = Timing(*times, int(line["rounds"]))


class Target(NamedTuple):
    """One promise, what was measured, whether it is met (None: not measured), and the cells that miss."""

    promise: str
    measured: str
    met: bool | None
    misses: list[str]


def row_bytes(cell: Cell) -> int:
    """Bytes of one row; an int8 row has a float32 scale and bias beside its codes."""
    return {"float32": 4 * cell.dim, "bfloat16": 2 * cell.dim, "int8": cell.dim + 8}[cell.dtype]


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values))); NaN for none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def targets(results: Results) -> list[Target]:
    """The targets of the benchmark, all judged in this one run."""
    found = [
        _every_cell(results, "torch", "as fast as torch in every cell"),
        _mean(results, "torch", 1.3, results.cells, "1.3x torch in the geometric mean"),
        _mean(results, "FBGEMM", 2, results.cells, "2x FBGEMM in the geometric mean"),
    ]
    large = [cell for cell in results.cells if cell.num_ids * cell.dim > 1e5]
    found.append(
        _mean(
            results, "TensorFlow", 10, large, "10x TensorFlow (its faster layout) in the mean where N D > 1e5"
        )
    )
    found += [_memory_target(results), _int8_target(results)]
    found.append(_every_cell(results, PLAIN, "the automatic choice is never slower than plain JAX"))
    return found + _whole_call_targets(results)


def _every_cell(results: Results, name: str, promise: str) -> Target:
    ratios = results.ratios(name)
    misses = [f"{cell}: {ratio:.2f}x" for cell, ratio in _rising(ratios) if ratio < 1]
    if not ratios:
        return Target(promise, "not measured", None, [])
    measured = f"in {len(ratios) - len(misses)} of {len(ratios)} cells; least {min(ratios.values()):.2f}x"
    return Target(promise, measured, not misses, misses)


def _mean(results: Results, name: str, least: float, cells: list[Cell], promise: str) -> Target:
    among = set(cells)
    ratios = {cell: ratio for cell, ratio in results.ratios(name).items() if cell in among}
    if not ratios:
        return Target(promise, "not measured", None, [])
    mean = geometric_mean(ratios.values())
    misses = [f"{cell}: {ratio:.2f}x" for cell, ratio in _rising(ratios) if ratio < least]
    measured = f"{mean:.2f}x; {len(ratios) - len(misses)} of {len(ratios)} cells reach {least:g}x"
    return Target(promise, measured, mean >= least, misses)


def _memory_target(results: Results) -> Target:
    promise = f"85% of the random-row memory limit where the table is {FAR_LARGER}x the cache or more"
    shares = _shares(results, LIMIT)
    if not shares:
        return Target(promise, "not measured", None, [])
    misses = [f"{cell}: {share:.0%}" for cell, share in _rising(shares) if share < 0.85]
    measured = _share_text(shares)
    writing = _shares(results, LIMIT_WRITING)
    if writing:
        measured += f" (of the limit with results to write: {_share_text(writing)})"
    return Target(promise, measured, not misses, misses)


def _shares(results: Results, limit: str) -> dict[Cell, float]:
    rates = {cell: results.limit_of(cell, limit) for cell in results.cells if results.beyond_cache(cell)}
    return {cell: results.rate(cell) / rate for cell, rate in rates.items() if rate}


def _share_text(shares: dict[Cell, float]) -> str:
    reached = sum(share >= 0.85 for share in shares.values())
    return f"{geometric_mean(shares.values()):.0%} in the geometric mean; {reached} of {len(shares)} cells reach 85%"


def _int8_target(results: Results) -> Target:
    promise = "int8 tables 2x as fast as our own float32 there"
    ratios = {}
    for cell in results.cells:
        single = dataclasses.replace(cell, dtype="float32")
        if cell.dtype == "int8" and (single, OURS) in results.timings and results.beyond_cache(cell):
            ratios[cell] = results.timings[single, OURS].median / results.timings[cell, OURS].median
    if not ratios:
        return Target(promise, "not measured", None, [])
    misses = [f"{cell}: {ratio:.2f}x" for cell, ratio in _rising(ratios) if ratio < 2]
    mean = geometric_mean(ratios.values())
    measured = f"{mean:.2f}x in the geometric mean; {len(ratios) - len(misses)} of {len(ratios)} cells reach 2x"
    return Target(promise, measured, not misses, misses)


def _whole_call_targets(results: Results) -> list[Target]:
    if results.whole is None:
        return []
    ratios: dict[str, dict[int, float]] = {"torch": {}, "TensorFlow": {}}
    for batch in results.whole.spec.batches:
        times = {name: t.median for (b, name), t in results.whole.timings.items() if b == batch}
        for peer, by_batch in ratios.items():
            fastest = min((time for name, time in times.items() if name.startswith(peer)), default=None)
            if fastest is not None and WHOLE_OURS in times:
                by_batch[batch] = fastest / times[WHOLE_OURS]
    found = []
    for peer, least, batches, what in (
        ("torch", 2, [1], "whole call: 2x torch at B = 1"),
        ("TensorFlow", 20, [1], "whole call: 20x TensorFlow at B = 1"),
        ("torch", 1, results.whole.spec.batches, "whole call: as fast as torch at every B"),
    ):
        measured = {batch: ratios[peer][batch] for batch in batches if batch in ratios[peer]}
        text = ", ".join(f"B={batch}: {ratio:.2f}x" for batch, ratio in measured.items())
        misses = [f"B={batch}: {ratio:.2f}x" for batch, ratio in measured.items() if ratio < least]
        found.append(Target(what, text or "not measured", not misses if measured else None, misses))
    return found


def _rising(values: dict[Cell, float]) -> list[tuple[Cell, float]]:
    return sorted(values.items(), key=lambda item: item[1])
