"""What a checkpoint holds beside the rows of its tables, and whether it fits."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxembed.checkpoint import CheckpointError, layout
from jaxembed.checkpoint.digests import Digests
from jaxembed.checkpoint.reading import OpenedCheckpoint, check_model, flat_arrays
from jaxembed.features import feature_tables, flat_features
from jaxembed.id_mapping import VocabularyFile

from .embedding import ShardedEmbedding


def check_tables(embedding: ShardedEmbedding, opened: OpenedCheckpoint, may_grow: bool, partial: bool) -> bool:
    """Whether any table has more rows than the checkpoint.

    Args:
      may_grow: whether it may.
      partial: whether the checkpoint may have further tables.

    Raises:
      ValueError: if the tables do not fit.
    """
    stored, wanted = feature_tables(opened.feature_config), feature_tables(embedding.feature_config)
    grows = False
    for name, config in wanted.items():
        found = stored.get(name)
        if found is not None and (found.dim, found.dtype) == (config.dim, config.dtype):
            if found.vocabulary_size == config.vocabulary_size:
                continue
            if may_grow and found.vocabulary_size < config.vocabulary_size:
                grows = True
                continue
        raise ValueError(
            f"checkpoint {opened.directory} does not fit the feature configuration: table {name!r} must be "
            f"{config.dtype.name}[{config.vocabulary_size}, {config.dim}], the checkpoint has "
            + ("none." if found is None else f"{found.dtype.name}[{found.vocabulary_size}, {found.dim}].")
            + " Use the configuration it was saved with"
            + ("." if may_grow else ", or vocabulary_growth='initialize' for tables that have grown.")
        )
    if not partial and (left := sorted(stored.keys() - wanted.keys())):
        raise ValueError(
            f"checkpoint {opened.directory} has tables that the feature configuration has not: {left}; pass "
            "partial=True to leave them behind."
        )
    return grows


def check_meaning(embedding: ShardedEmbedding, opened: OpenedCheckpoint, may_grow: bool) -> None:
    """Rows of the same shape and type may still stand for something else.

    Args:
      may_grow: whether a vocabulary file may have further lines.

    Raises:
      ValueError: if a table is looked up through another quantization, its slots are of other numbers, or a feature's
        ids have become other rows.
    """
    where = f"checkpoint {opened.directory} does not fit the feature configuration"
    what_to_do = "Use the configuration it was saved with, or pass reinterpret=True to go on with the new one."
    stored, wanted = feature_tables(opened.feature_config), feature_tables(embedding.feature_config)
    for name in sorted(stored.keys() & wanted.keys()):
        was, now = stored[name].quantization_config, wanted[name].quantization_config
        if was != now:
            raise ValueError(
                f"{where}: lookups of table {name!r} go through {now or 'no quantization'}, those that it was trained with "
                f"through {was or 'none'}, and give other values. {what_to_do}"
            )
    _check_linears(embedding, opened, where)
    before = flat_features(opened.feature_config)
    for path, feature in flat_features(embedding.feature_config).items():
        if path not in before or before[path].table.name != feature.table.name:
            continue
        was, now = before[path].preprocessing, feature.preprocessing
        grows = isinstance(was, VocabularyFile) and isinstance(now, VocabularyFile) and now.continues(was)
        if was != now and not (may_grow and grows):
            raise ValueError(
                f"{where}: feature {path!r} makes rows of table {feature.table.name!r} of its ids by "
                f"{now or 'nothing'}, when it was saved by {was or 'nothing'}, so that rows would be those of other ids. "
                f"{what_to_do}"
            )


def _check_linears(embedding: ShardedEmbedding, opened: OpenedCheckpoint, where: str) -> None:
    """FTRL keeps other numbers in the slot "linears" under one of its options."""
    option, trained = "multiply_linear_by_learning_rate", layout.optimizers(opened.manifest)
    for stack in embedding.stacks.values():
        now = getattr(stack.optimizer, option, None)
        for placement in stack.placements if now is not None else ():
            name = placement.table.name
            was = trained.get(name, {}).get("arguments", {}).get(option, now)
            if was != now and "linears" in opened.slots.get(name, {}):
                raise ValueError(
                    f"{where}: the slot 'linears' of table {name!r} was saved with {option}={was}, and means another number "
                    f"with {now}. Train on with the optimizer it was saved with."
                )


def check_slots(embedding: ShardedEmbedding, opened: OpenedCheckpoint, partial: bool, fresh: bool) -> None:
    """Raises:
    ValueError: if slots are missing, unless `fresh`, or left over, unless `partial`.
    """
    wanted: dict[str, Any] = embedding.abstract_canonical()[1]
    for name in embedding.tables:
        slots, found = wanted.get(name, {}), opened.slots.get(name, {})
        for slot in slots:
            if slot not in found and not fresh:
                others = f", only {sorted(found)}" if found else ""
                advice = (
                    "train on with the optimizer it was saved with, or in another folder, or " if found else ""
                )
                raise ValueError(
                    f"checkpoint {opened.directory} has no slot {slot!r} of table {name!r}{others}; {advice}pass "
                    "fresh_slots=True to start slots that it lacks at their initial values."
                )
        if not partial and (left := sorted(found.keys() - slots.keys())):
            raise ValueError(
                f"checkpoint {opened.directory} has slots of table {name!r} that its optimizer has not: {left}; "
                "train on with the optimizer it was saved with, or pass partial=True to leave them behind."
            )


def restore_model(opened: OpenedCheckpoint, abstract: Any) -> Any:
    """The dense model, of the structure, types and shardings of `abstract`.

    Raises:
      ValueError: if it was saved with other leaves, shapes or types.
      CheckpointError: if it is damaged.
    """
    directory = opened.directory / layout.MODEL
    stored = opened.manifest["digests"].get(layout.MODEL)
    if stored is None:
        raise ValueError(f"checkpoint {opened.directory} has no model; it was not saved at this step.")
    abstract = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, abstract)
    wanted = flat_arrays(abstract)
    if wanted.keys() != stored.keys():
        raise ValueError(
            f"checkpoint {opened.directory}: model must have the leaves {sorted(wanted)}, got {sorted(stored)}."
        )
    for key, leaf in wanted.items():
        # Orbax casts and pads without a word.
        digests = Digests.from_json(stored[key], f"checkpoint {opened.directory}: model leaf {key!r}")
        shape, dtype = np.shape(leaf), np.dtype(getattr(leaf, "dtype", type(leaf))).name
        if (digests.shape, digests.dtype) != (shape, dtype):
            raise ValueError(
                f"checkpoint {opened.directory}: model leaf {key!r} must be {dtype}{list(shape)}, got "
                f"{digests.dtype}{list(digests.shape)}."
            )
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    handler: Any = ocp.PyTreeCheckpointHandler()  # is typed for paths of its own
    try:
        model = handler.restore(directory, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args))
    except Exception as e:  # Orbax and tensorstore raise many types
        raise CheckpointError(f"{directory} cannot be read: {str(e)[:300]}; restore another step.") from e
    if opened.verify:
        check_model(opened.directory, model, stored)
    return model


def takes_all_hosts(abstract: Any) -> bool:
    """Whether `restore_model` compares values that are spread over several hosts, which takes all of them."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(abstract)]
    return any(not (s is None or s.is_fully_replicated or s.is_fully_addressable) for s in shardings)


def restore_data(opened: OpenedCheckpoint) -> Any:
    """The state of the input pipeline, or None.

    Raises:
      CheckpointError: if it is damaged.
    """
    digest = opened.manifest["digests"].get(layout.DATA)
    return None if digest is None else layout.read_data(opened.directory, digest)
