"""Reads a checkpoint without a mesh, a trainer or the program that wrote it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import Bundle, is_bundle, open_bundle
from jaxembed.checkpoint.digests import CheckpointError, Digests
from jaxembed.checkpoint.steps import step_directory
from jaxembed.checkpoint.stored import StoredArray, open_array, shared_cache
from jaxembed.features import feature_tables


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One step, on the host.

    Attributes:
      step: number of training steps taken.
      feature_config: the feature configuration it was trained with.
      tables: by name, [V, D] arrays; of a bundle also QuantizedTables.
      slots: by table and slot name, [V, D] arrays; empty unless asked for.
      model: nested dicts of arrays as saved, or None.
      metadata: what the trainer put in.
      combiner_weights: by table, the float32 [num_weights] of its CustomCombiner.
    """

    step: int
    feature_config: Any
    tables: dict[str, Any]
    slots: dict[str, dict[str, np.ndarray]]
    model: Any
    metadata: dict[str, Any]
    combiner_weights: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """One step, its arrays not yet read.

    Attributes:
      directory: of the step.
      manifest: as stored.
      feature_config: the feature configuration it was trained with.
      tables: by name.
      slots: by table and slot name.
      verify: whether what is read is compared with its digests.
    """

    directory: pathlib.Path
    manifest: dict[str, Any]
    feature_config: Any
    tables: dict[str, StoredArray]
    slots: dict[str, dict[str, StoredArray]]
    verify: bool

    def model(self) -> Any:
        """The dense model as nested dicts of numpy arrays, or None.

        Raises:
          CheckpointError: if it is damaged.
        """
        digests = self.manifest["digests"].get(layout.MODEL)
        if digests is None:
            return None
        model = read_arrays(self.directory / layout.MODEL)
        if self.verify:
            check_model(self.directory, model, digests)
        return model


def read_checkpoint(
    path: str | pathlib.Path,
    step: int | None = None,
    *,
    slots: bool = False,
    model: bool = True,
    verify: bool = True,
) -> Checkpoint:
    """Reads a step into host memory, or maps a serving bundle.

    Args:
      path: a checkpoint directory, or one step in it; or a bundle, or the folder of its versions.
      step: default: the latest whole one. Of a bundle: the version.
      slots: also read the optimizers' slots.
      model: also read the dense model.
      verify: compare what is read with the digests that were saved with it.

    Raises:
      FileNotFoundError: if there is no such whole step.
      ValueError: if what is stored does not fit its own feature configuration, or is damaged.
    """
    if is_bundle(path):
        return _from_bundle(open_bundle(path, step), slots, model, verify)
    opened = open_checkpoint(path, step, verify=verify)
    return Checkpoint(
        step=opened.manifest["step"],
        feature_config=opened.feature_config,
        tables={name: array.read() for name, array in opened.tables.items()},
        slots={
            name: {slot: array.read() for slot, array in arrays.items()}
            for name, arrays in opened.slots.items()
        }
        if slots
        else {},
        model=opened.model() if model else None,
        metadata=opened.manifest["metadata"],
        combiner_weights=layout.combiner_weights(opened.manifest),
    )


def open_checkpoint(
    path: str | pathlib.Path, step: int | None = None, *, verify: bool = True
) -> OpenedCheckpoint:
    """Opens a step, to be read by blocks of rows.

    Args: as `read_checkpoint`.

    Raises:
      FileNotFoundError: if there is no such whole step.
      ValueError: if what is stored does not fit its own feature configuration.
    """
    directory = step_directory(path, step)
    layout.check_files(directory)
    manifest = layout.read_manifest(directory)
    if directory.name.isdecimal() and int(directory.name) != manifest.get("step"):
        raise CheckpointError(
            f"checkpoint {directory} was saved as step {manifest.get('step')}: it was renamed, or copied over another; "
            "give it back its name, or restore another step."
        )
    try:
        feature_config = layout.read_feature_config(manifest, directory)
        table_digests, slot_digests = manifest["digests"]["tables"], manifest["digests"]["slots"]
        if type(manifest["step"]) is not int or not isinstance(manifest["metadata"], dict):
            raise TypeError("step must be an int and metadata an object")
        if not isinstance(manifest["digests"].get(layout.MODEL, {}), dict):
            raise TypeError("the digests of the model must be an object")
        tables, slots, cache = {}, {}, shared_cache()
        for name, config in feature_tables(feature_config).items():
            what = f"checkpoint {directory}: table {name!r}"
            if name not in table_digests:
                raise CheckpointError(f"{what} is missing, though its feature configuration names it.")
            digests = Digests.from_json(table_digests[name], what)
            if (digests.shape, digests.dtype) != ((config.vocabulary_size, config.dim), config.dtype.name):
                raise CheckpointError(
                    f"{what} must be {config.dtype.name}[{config.vocabulary_size}, {config.dim}], "
                    f"got {digests.dtype}{list(digests.shape)}."
                )
            key = layout.encode_name(name)
            tables[name] = _open(directory / layout.TABLES, key, what, digests, verify, cache)
            slots[name] = {}
            for slot, stored in slot_digests.get(name, {}).items():
                what = f"checkpoint {directory}: slot {slot!r} of table {name!r}"
                digests = Digests.from_json(stored, what)
                slot_key = f"{key}.{layout.encode_name(slot)}"
                slots[name][slot] = _open(directory / layout.SLOTS, slot_key, what, digests, verify, cache)
    except (LookupError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"the manifest of {directory} is incomplete: {type(e).__name__}: {e}.") from e
    slots = {name: arrays for name, arrays in slots.items() if arrays}
    return OpenedCheckpoint(directory, manifest, feature_config, tables, slots, verify)


def read_arrays(directory: pathlib.Path) -> Any:
    """The Orbax arrays of one part as nested dicts of numpy arrays.

    Raises:
      CheckpointError: if they cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp

    handler: Any = ocp.PyTreeCheckpointHandler()  # is typed for paths of its own
    try:
        tree = handler.metadata(directory).tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    except Exception as e:  # Orbax and tensorstore raise many types
        raise CheckpointError(f"{directory} cannot be read: {str(e)[:300]}; restore another step.") from e


def flat_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names that Orbax stores them under.

    Raises:
      ValueError: if two leaves have one name.
    """
    import orbax.checkpoint as ocp

    leaves: dict[str, Any] = {}
    for path, leaf in ocp.tree.to_flat_dict(tree).items():
        name = ".".join(map(str, path))
        if name in leaves:
            raise ValueError(f"model has two leaves that are stored as {name!r}; give one another name.")
        leaves[name] = leaf
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def check_model(directory: pathlib.Path, model: Any, stored: Mapping[str, Any]) -> None:
    """Compares the leaves of a model with their digests.

    Raises:
      CheckpointError: naming the first leaf that is not what was saved.
    """
    leaves = flat_arrays(model)
    if leaves.keys() != stored.keys():
        raise CheckpointError(
            f"checkpoint {directory}: model is damaged: it has the leaves {sorted(leaves)}, saved were "
            f"{sorted(stored)}; restore another step."
        )
    for key, leaf in leaves.items():
        what = f"checkpoint {directory}: model leaf {key!r}"
        digests, found = Digests.from_json(stored[key], what), _whole(leaf)
        if (found.shape, found.dtype.name) != (digests.shape, digests.dtype):
            raise CheckpointError(
                f"{what} is damaged: saved as {digests.dtype}{list(digests.shape)}, on disk it is "
                f"{found.dtype.name}{list(found.shape)}; restore another step."
            )
        digests.check(found, what)


def _whole(leaf: Any) -> np.ndarray:
    """On this host; of an array that is spread over several, all of them call this."""
    if not getattr(leaf, "is_fully_addressable", True) and not leaf.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _from_bundle(bundle: Bundle, slots: bool, model: bool, verify: bool) -> Checkpoint:
    if slots:
        raise ValueError(f"bundle {bundle.directory} has no slots; read the checkpoint that it was made from.")
    if verify:
        bundle.verify()
    return Checkpoint(
        step=bundle.step,
        feature_config=bundle.feature_config,
        tables=dict(bundle.tables),
        slots={},
        model=bundle.model if model else None,
        metadata=bundle.metadata,
        combiner_weights=bundle.combiner_weights,
    )


def _open(part: pathlib.Path, key: str, what: str, digests: Digests, verify: bool, cache: Any) -> StoredArray:
    array = open_array(part, key, what, digests, cache)
    return array if verify else dataclasses.replace(array, digests=None)
