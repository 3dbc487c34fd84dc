"""The configuration, tables and slots of what was opened, as text."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxembed import structure
from jaxembed.config import FeatureConfig, TableConfig
from jaxembed.convert.interface import Place
from jaxembed.convert.progress import progress_bar
from jaxembed.features import flat_features
from jaxembed.inspection.opening import Inspected, open_any
from jaxembed.inspection.statistics import NOT_QUANTIZABLE, TableStats, array_digest, table_stats


def describe(
    path: str | pathlib.Path,
    *,
    step: int | None = None,
    stats: bool = False,
    progress: bool | None = False,
    keys: Mapping[str, Place] | None = None,
) -> str:
    """What is in it, as text.

    Args:
      path: whatever `open_any` opens.
      step: default: the latest.
      stats: also read the tables, and give figures of their rows; and slots, for their digests, where the format has none.
      progress: whether to draw a bar; None on a terminal.
      keys: as `open_any`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    opened = open_any(path, step, keys)
    lines = [headline(opened)]
    if opened.digest is not None:
        lines.append(f"digest {opened.digest}")
    lines += [f"note: {note}" for note in opened.notes]
    if opened.feature_config is not None:
        lines += ["", "features", *config_lines(opened.feature_config)]
    lines += ["", "tables"]
    configs = opened.configs
    undigested = [
        array
        for name, of_table in opened.slots.items()
        for slot, array in of_table.items()
        if slot not in opened.slot_digests.get(name, {})
    ]
    total = opened.num_bytes + sum(array.num_bytes for array in undigested)
    with progress_bar(total, progress if stats else False) as advance:
        for name, array in opened.tables.items():
            config = configs.get(name)
            lines.append(f"  {name}: {', '.join(table_facts(array, config, opened.optimizer(name)))}")
            found = None
            if stats:
                quantization = None if config is None else config.quantization_config
                found = table_stats(array, quantization_config=quantization, advance=advance)
            digest = opened.table_digests.get(name) or (found and found.digest)
            lines += [f"    xxh3-128 {digest}"] if digest else []
            for slot, stored in opened.slots.get(name, {}).items():
                facts = f"{list(stored.shape)} {stored.dtype.name}, {stored.num_bytes:,} bytes"
                digest = opened.slot_digests.get(name, {}).get(slot)
                if digest is None and stats:
                    digest = array_digest(stored, advance)
                lines.append(f"    slot {slot}: {facts}{f', xxh3-128 {digest}' if digest else ''}")
            lines += [f"    {line}" for line in _stats_lines(found)] if found else []
    return "\n".join(lines)


def headline(opened: Inspected) -> str:
    """Kind, step and sizes in a line."""
    features = (
        "" if opened.feature_config is None else f"{len(flat_features(opened.feature_config))} features, "
    )
    return f"{opened.kind} at step {opened.step}: {features}{len(opened.tables)} tables, {opened.num_bytes:,} bytes"


def config_lines(feature_config: Any) -> Iterator[str]:
    """The structure of a feature configuration as an indented tree."""
    shown: tuple[str, ...] = ()
    for path, feature in structure.flatten(feature_config):
        for depth, key in enumerate(path[:-1]):
            if shown[: depth + 1] != path[: depth + 1]:
                yield f"{'  ' * (depth + 1)}{key}/"
                shown = path[: depth + 1]
        shown = path[:-1]
        yield f"{'  ' * max(len(path), 1)}{path[-1] if path else '(the only one)'} -> {feature_facts(feature)}"


def feature_facts(feature: FeatureConfig) -> str:
    """Table and options of a feature in a line."""
    facts = [feature.table.name]
    if feature.max_sequence_length:
        facts.append(f"sequence of {feature.max_sequence_length}")
    if feature.output_shape is not None:
        facts.append(f"output shape {list(feature.output_shape)}")
    return ", ".join(facts)


def table_facts(array: Any, config: TableConfig | None, optimizer: str = "") -> list[str]:
    """Size, type and configuration of a table."""
    facts = [f"{array.shape[0]:,} x {array.shape[1]} {array.form}", f"{array.num_bytes:,} bytes"]
    facts += [optimizer] if optimizer else []
    if config is None:
        return facts
    facts.append(
        f"combiner {config.combiner if isinstance(config.combiner, str) else type(config.combiner).__name__}"
    )
    quantization = config.quantization_config
    if quantization is not None:
        facts.append(f"{quantization.num_buckets} buckets in [{quantization.lower:g}, {quantization.upper:g}]")
    return facts


def _stats_lines(found: TableStats) -> Iterator[str]:
    low, middle, high = found.norms
    yield (
        f"norms {low:.4g} / {middle:.4g} / {high:.4g} (least, median, greatest); dead rows "
        f"{found.num_dead:,}, NaN or infinite {found.num_bad:,}, duplicates {found.num_duplicates:,}"
    )
    if found.quantization:
        errors = "; ".join(
            f"{how} {f'{e.max:.3g} / {e.mean:.3g}' if e else NOT_QUANTIZABLE}"
            for how, e in found.quantization.items()
        )
        yield f"error to expect (largest / mean): {errors}"
