"""One self-contained HTML page about what was opened: no script, no font and no image from elsewhere."""

import importlib.resources
import json
import pathlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from jaxembed import structure
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.convert.interface import Place
from jaxembed.convert.progress import progress_bar
from jaxembed.inspection.describing import feature_facts, headline
from jaxembed.inspection.opening import Inspected, open_any
from jaxembed.inspection.plots import norm_histogram, rank_curve
from jaxembed.inspection.statistics import NOT_QUANTIZABLE, TableStats, table_stats

#: Rows of each table whose most similar rows are shown.
NUM_SAMPLES = 6
FREQUENCY = "id_frequency"


def html_report(
    path: str | pathlib.Path,
    *,
    step: int | None = None,
    progress: bool | None = False,
    keys: Mapping[str, Place] | None = None,
) -> str:
    """The page: configuration, tables with figures and plots of their rows, and how often ids were looked up.

    Args:
      path: whatever `open_any` opens; its tables are read by blocks and verified.
      step: default: the latest.
      progress: whether to draw a bar; None on a terminal.
      keys: as `open_any`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    opened = open_any(path, step, keys)
    configs, cards = opened.configs, []
    frequencies = opened.metadata.get(FREQUENCY)
    with progress_bar(opened.num_bytes, progress) as advance:
        for name, array in opened.tables.items():
            config = configs.get(name)
            found = table_stats(
                array,
                quantization_config=None if config is None else config.quantization_config,
                num_samples=NUM_SAMPLES,
                advance=advance,
            )
            frequency = frequencies.get(name) if isinstance(frequencies, dict) else None
            cards.append(_card(name, array, config, opened.slots.get(name, {}), found, frequency))
    title = f"{_name(opened)}: {opened.kind} at step {opened.step}"
    style = importlib.resources.files("jaxembed.inspection").joinpath("page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"{_header(opened)}{_overview(opened)}{''.join(cards)}{_features(opened)}{_metadata(opened)}"
        "</main></body></html>\n"
    )


def _header(opened: Inspected) -> str:
    digest = f"<p>digest <code>{escape(opened.digest)}</code></p>" if opened.digest else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in opened.notes)
    return (
        f"<header><p class=kind>jaxembed inspect</p><h1>{escape(_name(opened))}</h1>"
        f"<p>{escape(headline(opened))}</p><p><code>{escape(str(opened.path))}</code></p>{digest}{notes}</header>"
    )


def _name(opened: Inspected) -> str:
    """The last of its path, and of a step or version the folder that it is one of."""
    path = opened.path
    return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name or str(path)


def _overview(opened: Inspected) -> str:
    """All tables in one, each a link to its card."""
    total = max(opened.num_bytes, 1)
    rows = []
    for name, array in opened.tables.items():
        slots = ", ".join(opened.slots.get(name, {}))
        share = f'<span class="share"><span style="width:{100 * array.num_bytes / total:.2f}%"></span></span>'
        link = f'<a href="#{_anchor(name)}">{escape(name)}</a>'
        rows.append(
            [
                link,
                f"{array.shape[0]:,}",
                str(array.shape[1]),
                escape(array.form),
                _size(array.num_bytes) + share,
                escape(opened.optimizer(name)),
                escape(slots),
            ]
        )
    return f"<section><h2>Tables</h2>{_table(['name', 'rows', 'dim', 'type', 'bytes', 'optimizer', 'slots'], rows)}</section>"


def _card(
    name: str,
    array: StoredArray,
    config: TableConfig | None,
    slots: dict[str, StoredArray],
    found: TableStats,
    frequency: Any,
) -> str:
    low, middle, high = found.norms
    facts = [
        ("rows", f"{array.shape[0]:,}", ""),
        ("dim", str(array.shape[1]), ""),
        ("type", array.form, ""),
        ("size", _size(array.num_bytes), ""),
        ("dead rows", f"{found.num_dead:,}", "warn" if found.num_dead else ""),
        ("NaN or infinite", f"{found.num_bad:,}", "bad" if found.num_bad else ""),
        ("duplicates", f"{found.num_duplicates:,}", "warn" if found.num_duplicates else ""),
        ("norm, least", f"{low:.4g}", ""),
        ("norm, median", f"{middle:.4g}", ""),
        ("norm, greatest", f"{high:.4g}", ""),
    ]
    chips = "".join(
        f'<div class="fact {style}"><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>'
        for key, value, style in facts
    )
    figures = [_figure("Norms of rows", norm_histogram(*found.norm_counts))]
    figures.append(_figure("Ids, by how often they were looked up", *_frequency(frequency)))
    sections = [
        f'<dl class="facts">{chips}</dl>',
        _config(config),
        f'<div class="plots">{"".join(figures)}</div>',
    ]
    sections.append(_neighbours(found))
    if found.quantization:
        rows = [
            [escape(how), *([f"{e.max:.4g}", f"{e.mean:.4g}"] if e else [NOT_QUANTIZABLE, ""])]
            for how, e in found.quantization.items()
        ]
        sections.append("<h4>Error to expect if quantized</h4>" + _table(["as", "largest", "mean"], rows))
    if slots:
        rows = [
            [escape(slot), escape(str(list(stored.shape))), stored.dtype.name, _size(stored.num_bytes)]
            for slot, stored in slots.items()
        ]
        sections.append("<h4>Slots</h4>" + _table(["slot", "shape", "type", "bytes"], rows))
    return f'<section id="{_anchor(name)}"><h3>{escape(name)}</h3>{"".join(sections)}</section>'


def _config(config: TableConfig | None) -> str:
    if config is None:
        return ""
    parts = {"initializer": config.initializer, "optimizer": config.optimizer, "combiner": config.combiner}
    parts["quantization"] = config.quantization_config
    rows = [
        [escape(key), f"<code>{escape(str(value))}</code>"] for key, value in parts.items() if value is not None
    ]
    return f"<details><summary>Configuration</summary>{_table(['what', 'value'], rows)}</details>"


def _neighbours(found: TableStats) -> str:
    if not any(found.neighbours.values()):
        return ""
    rows = []
    for row, neighbours in found.neighbours.items():
        chips = " ".join(
            f'<span class="chip">{n.row:,} <small>{n.similarity:.3f}</small></span>' for n in neighbours
        )
        rows.append([f"<b>{row:,}</b>", chips])
    return "<h4>Most similar rows of some, by cosine</h4>" + _table(["row", "nearest"], rows)


def _frequency(frequency: Any) -> tuple[str, str]:
    """The plot of what the trainer logged, and a line on it; empty where it is of no known form."""
    if not isinstance(frequency, dict):
        return "", ""
    counts: Any = frequency.get("counts", frequency.get("counts_by_rank"))
    ranks: Any = frequency.get("ranks", range(1, len(counts) + 1) if isinstance(counts, list) else None)
    numbers = (
        [*(ranks or []), *(counts or [])]
        if isinstance(counts, list) and isinstance(ranks, list | range)
        else []
    )
    if not numbers or len(ranks) != len(counts) or not all(isinstance(n, int | float) for n in numbers):
        return "", ""
    notes = [
        f"{frequency[key]:,} {text}"
        for key, text in (("lookups", "lookups"), ("distinct", "different ids"), ("num_examples", "examples"))
        if isinstance(frequency.get(key), int)
    ]
    since, hosts = frequency.get("since_step"), frequency.get("num_hosts")
    if isinstance(since, int) and since:
        notes.append(f"since step {since:,}, where the job went on")
    if isinstance(hosts, int) and hosts > 1:
        notes.append(f"those of one of {hosts} hosts")
    return rank_curve(list(ranks), counts), ", ".join(notes)


def _figure(title: str, plot: str, note: str = "") -> str:
    if not plot:
        return ""
    return f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>{plot}</figure>"


def _features(opened: Inspected) -> str:
    if opened.feature_config is None:
        return ""
    return f'<section><h2>Feature configuration</h2><div class="tree">{_tree(_nested(opened.feature_config))}</div></section>'


def _nested(feature_config: Any) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, feature in structure.flatten(feature_config):
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1] if path else "(the only one)"] = feature
    return root


def _tree(node: dict[str, Any]) -> str:
    items = []
    for key, child in node.items():
        if isinstance(child, FeatureConfig):
            link = f'<a href="#{_anchor(child.table.name)}">{escape(feature_facts(child))}</a>'
            items.append(f"<li>{escape(key)} → {link}</li>")
        else:
            items.append(f"<li><details open><summary>{escape(key)}</summary>{_tree(child)}</details></li>")
    return f"<ul>{''.join(items)}</ul>"


def _metadata(opened: Inspected) -> str:
    rest = {key: value for key, value in opened.metadata.items() if key != FREQUENCY}
    if not rest:
        return ""
    text = json.dumps(rest, indent=2, ensure_ascii=False, default=str)
    return f"<section><h2>Metadata</h2><pre>{escape(text)}</pre></section>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{escape(h)}</th>" for h in head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _anchor(name: str) -> str:
    return "table-" + name.encode().hex()


def _size(num_bytes: float) -> str:
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= bound:
            return f"{num_bytes / bound:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
