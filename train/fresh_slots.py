"""Slots that a checkpoint lacks, for tables that were trained without them or by another optimizer."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.reading import OpenedCheckpoint
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.optimizers import FTRL, CustomOptimizer, Optimizer

from .embedding import ShardedEmbedding


def with_fresh_slots(
    embedding: ShardedEmbedding, opened: OpenedCheckpoint
) -> dict[str, dict[str, StoredArray]]:
    """Slots by table and slot name; those that are missing at their initial values, which take no memory.

    Only where `slot_variable_creation_fn` makes them are they arrays of the host's. Slots that another optimizer meant
    otherwise count as missing, with a warning. FTRL makes rows of its slots: "linears" start as those that make the rows
    that there are.
    """
    trained = layout.optimizers(opened.manifest)
    whole: dict[str, dict[str, StoredArray]] = {}
    for stack in embedding.stacks.values():
        optimizer = stack.optimizer
        for p in stack.placements:
            name, shape = p.table.name, (p.table.vocabulary_size, p.table.dim)
            kept = opened.slots.get(name, {})
            found = {slot: x for slot, x in kept.items() if _means_the_same(slot, optimizer, trained.get(name))}
            whole[name] = found
            dropped = [slot for slot in optimizer.slot_names if slot in kept and slot not in found]
            if dropped:
                warnings.warn(
                    f"Slots {dropped} of table {name!r} start anew: those of checkpoint {opened.directory} are of the "
                    f"optimizer {trained[name]['name']!r}, and not known to mean the same to {optimizer.name!r}. A custom "
                    "one keeps its own where its custom_computation has the registered name that they were saved with.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            missing = [slot for slot in optimizer.slot_names if slot not in found]
            initial: Any = optimizer.slot_initial_values
            if missing and optimizer.slot_variable_creation_fn is not None:
                # Each as a whole: a device has room for its share.
                with _on_host():
                    initial = jax.device_get(optimizer.init_slots(shape))
            for slot in missing:
                values = np.asarray(initial[slot], np.float32)
                found[slot] = StoredArray(
                    f"slot {slot!r} of table {name!r}",
                    np.broadcast_to(values, optimizer.slot_shape(slot, shape)),
                )
            if (
                "linears" in missing
                and isinstance(optimizer, FTRL)
                and type(optimizer).rule is FTRL.rule
                and optimizer.slot_variable_creation_fn is None
            ):
                found["linears"] = _linears(optimizer, opened, name, found["accumulators"])
    return whole


def _on_host() -> AbstractContextManager[Any]:
    """The host's processor as the default device, but where JAX_PLATFORMS leaves it out."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()


def _means_the_same(slot: str, optimizer: Optimizer, trained: Mapping[str, Any] | None) -> bool:
    """Whether a slot is of numbers that the optimizer takes it for; older checkpoints do not say what trained them."""
    if trained is None:
        return True
    if trained["name"] == optimizer.name:
        return not isinstance(optimizer, CustomOptimizer) or _is_function(optimizer.custom_computation, trained)
    # Sums of squared gradients that start above 0; those of AdagradMomentum start from it, where FTRL has no rows.
    is_sum = optimizer.name in ("adagrad", "ftrl", "adagrad_momentum") and getattr(optimizer, "beta2", 1) == 1
    return slot == "accumulators" and trained["name"] in ("adagrad", "ftrl") and is_sum


def _is_function(function: Callable[..., Any], trained: Mapping[str, Any]) -> bool:
    """Whether it is known to be the custom_computation that trained; one without a registered name never is."""
    try:
        stored = CustomOptimizer(function).to_dict()["arguments"]["custom_computation"]
    except ValueError:
        return False
    return stored == trained.get("arguments", {}).get("custom_computation")


def _linears(optimizer: FTRL, opened: OpenedCheckpoint, name: str, accumulators: StoredArray) -> StoredArray:
    rate = optimizer.learning_rate_at(opened.manifest["step"])
    rows = opened.tables[name]

    def block(start: int, stop: int) -> np.ndarray:
        values = jnp.asarray(rows.read_rows(start, stop)).astype(jnp.float32)
        squares = jnp.asarray(accumulators.read_rows(start, stop))
        return np.asarray(optimizer.linears_of(values, squares, rate))

    what = f"slot 'linears' of table {name!r}"
    return StoredArray(what, _Computed(rows.shape, np.dtype(np.float32), block))


@dataclasses.dataclass(frozen=True)
class _Computed:
    """An array that is computed by blocks of rows, as the source of a StoredArray."""

    shape: tuple[int, ...]
    dtype: np.dtype
    block: Callable[[int, int], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.block(rows.start, rows.stop)
