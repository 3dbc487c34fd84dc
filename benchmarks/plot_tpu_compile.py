"""Draws the table of docs/benchmarks/tpu_compile.md: bytes touched and exchanged, memory, seconds to compile.

python benchmarks/plot_tpu_compile.py                 # writes docs/benchmarks/tpu_compile.png
"""

import argparse
import pathlib

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
PANELS = {
    "GB touched": "GB touched a step and device",
    "MB exchanged": "MB exchanged a step and device",
    "MB temporary": "MB of temporary memory a device",
    "compiled in s": "seconds to compile",
}
COLORS = {
    "all_gather": "#1f77b4",
    "all_gather, row kernels": "#9ecae1",
    "all_to_all": "#d62728",
    "all_to_all, row kernels": "#f4a6a6",
    "sparsecore": "#2ca02c",
}


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of the first table, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((i for i, line in enumerate(lines) if i and line.startswith("| wanted")), len(lines))
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end])
    return [dict(zip(header, row, strict=True)) for row in rows]


def draw(rows: list[dict[str, str]], path: pathlib.Path) -> None:
    """Writes the PNG: groups are topologies and sizes of tables, bars are exchanges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["topology"], row["V a table"]) for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    for axis, (column, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, (exchange, color) in enumerate(COLORS.items()):
            found = {(r["topology"], r["V a table"]): r[column] for r in rows if r["exchange"] == exchange}
            at = [(g, float(found[group])) for g, group in enumerate(groups) if found.get(group, "-") != "-"]
            axis.bar([g + 0.17 * (i - 2) for g, _ in at], [y for _, y in at], 0.16, color=color, label=exchange)
        labels = [f"{topology}\nV {int(v.replace(',', '')) // 1_000_000} M" for topology, v in groups]
        axis.set_xticks(range(len(groups)), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[1].legend(frameon=False)  # where every exchange has a bar
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads the table and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, default=DOCS / "tpu_compile.md")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS / "tpu_compile.png")
    options = parser.parse_args()
    draw(read_table(options.table.read_text()), options.out)


if __name__ == "__main__":
    main()
