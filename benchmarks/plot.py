"""The picture of a lookup benchmark: rates under the memory limit, ratios, and the whole call."""

import io
from pathlib import Path
from typing import Any

from results import OURS, PLAIN, Results, geometric_mean

_COLORS = {
    OURS: "#d62728",
    PLAIN: "#ff9896",
    "numpy": "#7f7f7f",
    "torch": "#1f77b4",
    "torch, eager": "#1f77b4",
    "torch, TorchScript": "#6baed6",
    "torch, FBGEMM": "#17becf",
    "FBGEMM": "#17becf",
    "TensorFlow": "#2ca02c",
    "TensorFlow, ragged": "#2ca02c",
    "TensorFlow, sparse": "#98df8a",
}


_DTYPE_COLORS = {"float32": "#252525", "bfloat16": "#737373", "int8": "#bdbdbd"}


def draw(results: Results, path: Path) -> None:
    """Writes the PNG."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(cell.dtype for cell in results.cells))
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}):
        figure, axes = plt.subplots(2, 3, figsize=(14, 8.5), layout="constrained")
        for axis, dtype in zip(axes[0], dtypes, strict=False):
            _rates(axis, results, dtype)
        for axis in axes[0][len(dtypes) :]:
            axis.set_axis_off()
        _ratios_by_size(axes[1][0], results)
        _means(axes[1][1], results, dtypes)
        _whole_call(axes[1][2], results)
        entries: dict[str, Any] = {}
        for axis in (*axes[0], axes[1][0]):
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=min(5, len(entries)),
            frameon=False,
        )
        cpu, cores = results.facts.get("CPU", ""), results.facts.get("cores", "")
        figure.suptitle(f"Embedding lookup on CPU ({cpu}, {cores} cores)", fontsize=13)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=100)
        plt.close(figure)
    # A palette, as the picture has few colours: a quarter of the bytes.
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _rates(axis: Any, results: Results, dtype: str) -> None:
    """GB/s over D in the largest cells, below what memory gives at most."""
    cells = [c for c in results.cells if c.dtype == dtype]
    largest = max((c.vocabulary, c.batch, c.valency) for c in cells)
    ids = "uniform" if any(c.ids == "uniform" for c in cells) else cells[0].ids
    weighted = all(c.weighted for c in cells)
    cells = [
        c
        for c in cells
        if (c.vocabulary, c.batch, c.valency) == largest and c.ids == ids and c.weighted == weighted
    ]
    for name in results.contenders:
        points = [(c.dim, results.rate(c, name)) for c in cells if (c, name) in results.timings]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name, **_style(name))
    if results.stream is not None:
        axis.axhline(results.stream, color="k", linestyle=":", label="memory limit: one stream")
        axis.set_ylim(0, 1.08 * results.stream)
    limits = [(c.dim, limit) for c in cells if (limit := results.limit_of(c)) is not None]
    if limits:
        dims, rates = zip(*limits, strict=True)
        axis.plot(dims, rates, "k--", marker="_", markersize=12, label="memory limit: rows at random")
        axis.fill_between(dims, rates, axis.get_ylim()[1], color="k", alpha=0.06, linewidth=0)
    vocabulary, batch, valency = largest
    axis.set(
        title=f"{dtype}: rate, and what memory gives",
        xlabel=f"D, at V {vocabulary:,}, B {batch:,}, {valency} {ids} ids a bag",
        ylabel="table rows read, GB/s",
        xscale="log",
    )
    axis.set_ylim(bottom=0)
    dims = sorted({c.dim for c in cells})
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _style(name: str) -> dict[str, Any]:
    """Ours on top of the others."""
    emphasis = {"linewidth": 2.5, "zorder": 3} if name == OURS else {"linewidth": 1.3, "markersize": 4}
    return {"color": _COLORS.get(name), **emphasis}


def _ratios_by_size(axis: Any, results: Results) -> None:
    for name in results.contenders:
        ratios = results.ratios(name)
        if not ratios:
            continue
        sizes = sorted({cell.num_ids for cell in ratios})
        means = [geometric_mean(r for cell, r in ratios.items() if cell.num_ids == size) for size in sizes]
        axis.plot(sizes, means, marker="o", label=name, **_style(name))
    axis.axhline(1, color=_COLORS[OURS], linewidth=2.5)
    axis.set(
        title="Time over jaxembed's, by size of a lookup",
        xlabel="ids in a lookup",
        ylabel="ratio (geometric mean)",
        xscale="log",
        yscale="log",
    )
    _plain_numbers(axis.yaxis)
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.grid(alpha=0.3)


def _means(axis: Any, results: Results, dtypes: list[str]) -> None:
    names = [name for name in results.contenders if results.ratios(name)]
    height = 0.8 / max(1, len(dtypes))
    for i, dtype in enumerate(dtypes):
        values = [
            geometric_mean(r for cell, r in results.ratios(name).items() if cell.dtype == dtype)
            for name in names
        ]
        rows = [n + i * height for n in range(len(names))]
        bars = axis.barh(rows, values, height, label=dtype, color=_DTYPE_COLORS.get(dtype))
        axis.bar_label(
            bars, ["" if value != value else f"{value:.2f}" for value in values], fontsize=7, padding=2
        )
    axis.axvline(1, color=_COLORS[OURS], linewidth=2)
    axis.set_yticks([n + height * (len(dtypes) - 1) / 2 for n in range(len(names))], names)
    axis.invert_yaxis()
    axis.set(title="Time over jaxembed's, all cells", xlabel="ratio (geometric mean)", xscale="log")
    axis.margins(x=0.15)
    _plain_numbers(axis.xaxis)
    axis.legend(frameon=False)


def _whole_call(axis: Any, results: Results) -> None:
    whole = results.whole
    if whole is None or not whole.timings:
        axis.set_axis_off()
        return
    names = list(dict.fromkeys(name for _, name in whole.timings))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        points = [
            (n + (i - (len(names) - 1) / 2) * width, whole.timings[batch, name].median * 1e6)
            for n, batch in enumerate(whole.spec.batches)
            if (batch, name) in whole.timings
        ]
        axis.bar(*zip(*points, strict=True), width, label=name, color=_COLORS.get(name))
    axis.set_xticks(range(len(whole.spec.batches)), [str(batch) for batch in whole.spec.batches])
    axis.set(
        title=f"Whole call: {whole.spec.features} features and MLP",
        xlabel="B",
        ylabel="microseconds",
        yscale="log",
    )
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(frameon=False)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
