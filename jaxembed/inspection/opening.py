"""Opens whatever holds tables: a checkpoint, a bundle, or a file or folder of another framework."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import is_bundle, open_bundle
from jaxembed.checkpoint.reading import open_checkpoint
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.config import TableConfig
from jaxembed.convert import formats, open_source
from jaxembed.convert.interface import Options, Place, path_of
from jaxembed.features import feature_tables


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What was opened; no table is read yet.

    Attributes:
      path: where.
      kind: "checkpoint", "bundle", or the name of another format.
      step: number of training steps taken, 0 where nothing says so.
      feature_config: or None.
      tables: by name, [V, D].
      slots: by table and slot name.
      metadata: what the trainer put in.
      notes: what the reader guessed or left out.
      digest: of a bundle, else None.
      table_digests: by name, where the format has digests: `layout.table_digest`, as conversions report it.
      slot_digests: by table and slot name, likewise.
      optimizers: by table, what trained it, as `Optimizer.to_dict` gives it, where the format says so.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
      has_model: whether a dense model is with them.
    """

    path: pathlib.Path
    kind: str
    step: int
    feature_config: Any
    tables: dict[str, StoredArray]
    slots: dict[str, dict[str, StoredArray]]
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    digest: str | None = None
    table_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    slot_digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    combiner_weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    has_model: bool = False

    @property
    def configs(self) -> dict[str, TableConfig]:
        """The tables' configurations by name; empty where there is no feature configuration."""
        return {} if self.feature_config is None else feature_tables(self.feature_config)

    def optimizer(self, table: str) -> str:
        """What trained a table, in a line; empty where nothing says so."""
        stored, config = self.optimizers.get(table), self.configs.get(table)
        if stored is None and config is not None and config.optimizer is not None:
            stored = layout.optimizers_to_json({table: config.optimizer})[table]
        if stored is None:
            return ""
        arguments = stored.get("arguments")
        rate = arguments.get("learning_rate") if isinstance(arguments, dict) else None
        return stored["name"] + (f", learning rate {rate:g}" if isinstance(rate, int | float) else "")

    @property
    def num_bytes(self) -> int:
        """Of all tables."""
        return sum(array.num_bytes for array in self.tables.values())


def open_any(
    path: str | pathlib.Path, step: int | None = None, keys: Mapping[str, Place] | None = None
) -> Inspected:
    """Opens it; what is read later is verified where the format has digests.

    Args:
      path: a checkpoint or one step of it, a bundle or the folder of its versions, or what `jaxembed.convert` reads.
      step: default: the latest whole one. Of a bundle: the version.
      keys: of a file of another framework, as `convert` takes them; None guesses, and says so.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or of no known format.
    """
    path = path_of(path)
    name = "jaxembed" if is_bundle(path) else formats.guess_source(path)
    if keys is not None and name == "jaxembed":
        raise ValueError(f"{path} is of jaxembed and says itself what its tables are; leave keys (--keys) out.")
    if is_bundle(path):
        bundle = open_bundle(path, step)
        return Inspected(
            bundle.directory,
            "bundle",
            bundle.step,
            bundle.feature_config,
            bundle.stored(),
            {},
            bundle.metadata,
            digest=bundle.digest,
            table_digests=bundle.table_digests,
            notes=() if bundle.base_version is None else (f"a delta of version {bundle.base_version}",),
            combiner_weights=bundle.combiner_weights,
            has_model=bundle.model is not None,
        )
    if name == "jaxembed":
        opened = open_checkpoint(path, step)
        digests = opened.manifest["digests"]
        return Inspected(
            opened.directory,
            "checkpoint",
            opened.manifest["step"],
            opened.feature_config,
            opened.tables,
            opened.slots,
            opened.manifest["metadata"],
            table_digests={name: layout.table_digest(digests["tables"][name]) for name in opened.tables},
            slot_digests={
                name: {slot: layout.table_digest(digests["slots"][name][slot]) for slot in arrays}
                for name, arrays in opened.slots.items()
            },
            optimizers=layout.optimizers(opened.manifest),
            combiner_weights=layout.combiner_weights(opened.manifest),
            has_model=layout.MODEL in digests,
        )
    found = open_source(path, name, Options(step, keys))
    return Inspected(
        path,
        name,
        found.step,
        found.feature_config,
        found.tables,
        found.slots,
        found.metadata,
        found.notes,
        optimizers=found.optimizers,
        combiner_weights=found.combiner_weights,
    )
