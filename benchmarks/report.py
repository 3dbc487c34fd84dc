"""The Markdown report of a lookup benchmark: summary first, then every cell."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from cells import Cell
from results import LIMIT_WRITING, OURS, Results, Target, geometric_mean, row_bytes, targets
from whole_call import OURS as WHOLE_OURS

_INTRODUCTION = """\
All contenders run the same lookups in one process, in turns shuffled every round, each as one compiled program (XLA,
TorchScript, `tf.function`; numpy has none) of several lookups over different batches of ids, one after another, of which
Python gets the last one's output.
Every contender's outputs are compared with numpy's before it is timed. Figures are medians over the rounds.
A ratio is the contender's time over jaxembed's in the same cell: above 1, jaxembed is faster."""

_LISTED = 100

_NOTES = """\
- Bags are summed, ids are int32 and ragged, their lengths uniform in [0, 2 valency]; jaxembed, torch and (for float32)
  FBGEMM read one and the same table in memory; all tables are on huge pages.
- torch is `F.embedding_bag`, and `quantized::embedding_bag_byte_rowwise_offsets` for int8. FBGEMM is
  `IntNBitTableBatchedEmbeddingBagsCodegen` without its bounds check; it has no bfloat16 rows, so float16 rows with
  bfloat16 output stand in.
- TensorFlow sums bfloat16 rows in bfloat16, so its outputs are rounded at every id; all others sum in float32.
- jaxembed checks every id and counts bad ones, as it always does.
- The memory limit is what a C++ loop reaches that reads the same rows with prefetching and only adds them up, in turns with
  the contenders, where the table is 8 times the cache or more and 4 MB or more are read."""


def write_report(results: Results, path: Path) -> None:
    """Writes the Markdown file; `path` with .png and .csv name the plot and the raw figures."""
    judged = targets(results)
    sections = [
        "# Embedding lookup on CPU",
        "\n".join(f"- {name}: {fact}" for name, fact in results.facts.items()),
        _INTRODUCTION,
        f"![Lookup rates, ratios and whole calls]({path.with_suffix('.png').name})",
        _wrong(results),
        _targets(judged),
        _means(results),
        _limits(results),
        _whole_call(results),
        _left_out(results),
        "## Notes\n\n" + _NOTES,
        _misses(judged),
        _cells(results, path),
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if column < left else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _wrong(results: Results) -> str:
    if not results.wrong:
        return ""
    lines = "\n".join(f"- {line}" for line in results.wrong)
    return f"## Wrong results\n\nThese disagreed with numpy and were not timed.\n\n{lines}"


def _targets(judged: list[Target]) -> str:
    said = {True: "met", False: "**missed**", None: "-"}
    rows = [(target.promise, target.measured, said[target.met]) for target in judged]
    return "## Targets\n\n" + _table(("target", "measured", ""), rows, left=3)


def _means(results: Results) -> str:
    dtypes = list(dict.fromkeys(cell.dtype for cell in results.cells))
    rows = []
    for name in results.contenders:
        ratios = results.ratios(name)
        if not ratios:
            continue
        groups = [[r for cell, r in ratios.items() if cell.dtype == dtype] for dtype in dtypes]
        slower = sum(ratio < 1 for ratio in ratios.values())
        means = [f"{geometric_mean(group):.2f}" if group else "-" for group in [*groups, list(ratios.values())]]
        rows.append((name, *means, f"{min(ratios.values()):.2f}", f"{slower} of {len(ratios)}"))
    header = ("contender", *dtypes, "all", "least", "cells where jaxembed is slower")
    return "## Ratios to jaxembed, geometric means\n\n" + _table(header, rows)


def _limits(results: Results) -> str:
    if results.stream is None:
        return "## Memory limit\n\nNot measured."
    rows = []
    batch, valency = _largest(results.cells)
    for cell in results.cells:
        limit = results.limit_of(cell)
        if limit is None or (cell.batch, cell.valency, cell.weighted, cell.ids) != (
            batch,
            valency,
            False,
            "uniform",
        ):
            continue
        table = f"{cell.vocabulary * row_bytes(cell) / 1e6:,.0f}"
        rate = results.rate(cell)
        writing = results.limit_of(cell, LIMIT_WRITING)
        of_writing = f"{rate / writing:.0%}" if writing else "-"
        rows.append(
            (cell.dtype, str(cell.dim), table, f"{limit:.2f}", f"{rate:.2f}", f"{rate / limit:.0%}", of_writing)
        )
    text = (
        f"## Memory limit\n\nA streaming read reaches {results.stream:.1f} GB/s on all cores. "
        f"Rows of uniform ids, B = {batch}, valency {valency}, no weights:\n\n"
    )
    return text + _table(
        ("dtype", "D", "table MB", "limit GB/s", "jaxembed GB/s", "of the limit", "of the limit with results"),
        rows,
    )


def _whole_call(results: Results) -> str:
    whole = results.whole
    if whole is None:
        return ""
    spec = whole.spec
    names = list(dict.fromkeys(name for _, name in whole.timings))
    rows = []
    for name in names:
        row = [name]
        for batch in spec.batches:
            timing, ours = whole.timings.get((batch, name)), whole.timings.get((batch, WHOLE_OURS))
            if timing is None:
                row.append("-")
                continue
            ratio = f" ({timing.median / ours.median:.1f}x)" if ours and name != WHOLE_OURS else ""
            row.append(f"{timing.median * 1e6:,.0f}{ratio}")
        rows.append(row)
    text = (
        f"## The whole call\n\n{spec.features} features of {spec.vocabulary:,} rows of {spec.dim}, about "
        f"{spec.valency} ids each, and a two-layer MLP, numpy in, numpy out; microseconds (ratio to jaxembed). "
        "jaxembed is `ServingFunction`, which also checks all ids, with `jax_cpu_enable_async_dispatch` False, as "
        "`jaxembed serve` has it (see its docstring), unless the command says otherwise.\n\n"
    )
    return text + _table(("contender", *(f"B = {batch}" for batch in spec.batches)), rows)


def _left_out(results: Results) -> str:
    lines = [f"- {name}: {why}." for name, why in results.left_out.items()]
    if results.whole:
        lines += [f"- {name} (whole call): {why}." for name, why in results.whole.left_out.items()]
    lines += [
        f"- {name}, {' and '.join(sorted(kinds))}: {why}." for (name, why), kinds in results.refused.items()
    ]
    return "## Left out\n\n" + "\n".join(lines) if lines else ""


def _misses(judged: list[Target]) -> str:
    parts = []
    for target in judged:
        if not target.misses:
            continue
        lines = "\n".join(f"- {line}" for line in target.misses[:_LISTED])
        if len(target.misses) > _LISTED:
            lines += f"\n- and {len(target.misses) - _LISTED} more"
        summary = f"{target.promise}: {len(target.misses)}"
        parts.append(f'<details markdown="1"><summary>{summary}</summary>\n\n{lines}\n\n</details>')
    return "## Cells that miss, worst first\n\n" + "\n\n".join(parts) if parts else ""


def _cells(results: Results, path: Path) -> str:
    """One line for the cells that differ in weights and ids only: our mean time, the least ratio."""
    names = [name for name in results.contenders if name != OURS]
    rows = []
    for key, group in itertools.groupby(
        results.cells, key=lambda c: (c.dtype, c.vocabulary, c.dim, c.batch, c.valency)
    ):
        cells = list(group)
        ours = geometric_mean(results.timings[cell, OURS].median * 1e6 for cell in cells)
        spread = max(_spread(results, cell) for cell in cells)
        row = [
            *(f"{part:,}" if isinstance(part, int) else part for part in key),
            f"{ours:,.1f}",
            f"{spread:.0%}",
        ]
        for name in names:
            ratios = [
                results.timings[cell, name].median / results.timings[cell, OURS].median
                for cell in cells
                if (cell, name) in results.timings
            ]
            row.append(f"{min(ratios):.2f}" if ratios else "-")
        rows.append(row)
    header = ("dtype", "V", "D", "B", "valency", "jaxembed us", "spread", *names)
    return (
        "## Every cell\n\nThe mean time of one lookup in microseconds over weights on and off, uniform and Zipf ids; "
        "the widest quartile range of these in percent of the median; and for each contender the least of their "
        f"ratios. All figures, one by one: [{path.with_suffix('.csv').name}]({path.with_suffix('.csv').name}).\n\n"
        f'<details markdown="1"><summary>{len(rows)} lines</summary>\n\n{_table(header, rows)}\n\n</details>'
    )


def _spread(results: Results, cell: Cell) -> float:
    timing = results.timings[cell, OURS]
    return (timing.high - timing.low) / timing.median


def _largest(cells: list[Cell]) -> tuple[int, int]:
    return max(((cell.batch, cell.valency) for cell in cells), default=(0, 0))
