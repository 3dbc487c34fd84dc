"""`plan="auto"`: what `plan_tables` chooses for a mesh and a batch like those to come."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.features import feature_tables, match
from jaxembed.lookup import plan_lookup
from jaxembed.optimizers import Optimizer

from .batch import inner_size
from .planner import ShardingPlan, plan_tables

#: The rest is for activations, the dense model and what travels.
_SHARE_OF_TABLES = 0.75
_LOG = logging.getLogger("jaxembed")


def plan_for_batch(
    feature_config: Any,
    optimizer: Optimizer | None,
    mesh: Mesh,
    num_shards: int,
    batch: Any,
    overrides: Mapping[str, str] | None,
) -> ShardingPlan:
    """Plans for three quarters of the devices' memory, and logs the plan.

    Args:
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      mesh: of the devices.
      num_shards: n of them that tables are spread over.
      batch: as of `ShardedEmbedding.shard_batch`, of this host's rows, after preprocessing.
      overrides: table name to sharding.

    Raises:
      ValueError: if the batch does not fit the configuration, or the tables not the devices.
    """
    ids, bags = ids_and_bags(batch, feature_config)
    plan = plan_tables(
        feature_config,
        optimizer,
        num_shards,
        memory_per_device=int(_SHARE_OF_TABLES * memory_of_device(mesh)),
        ids_per_batch=ids,
        bags_per_batch=bags,
        overrides=overrides,
    )
    _LOG.info("Plan of the tables:\n%s", plan)
    return plan


def ids_and_bags(batch: Any, feature_config: Any) -> tuple[dict[str, int], dict[str, int]]:
    """By table, how many ids a batch like this one of every host looks up in it, and for how many output rows."""
    ids = dict.fromkeys(feature_tables(feature_config), 0)
    bags = dict(ids)
    for item in match(batch, None, feature_config):
        bag = plan_lookup(item, None).bag
        values = item.ids.values if hasattr(item.ids, "values") else item.ids
        rows = bag.num_bags if bag.layout == "ragged" else (item.ids.shape or (1,))[0]
        name = item.feature.table.name
        ids[name] += int(values.size) * jax.process_count()
        bags[name] += int(rows * inner_size(bag, item.ids)) * jax.process_count()
    return ids, bags


def memory_of_device(mesh: Mesh) -> int:
    """Bytes that the smallest local device of the mesh has; CPU devices share the machine's."""
    limits = []
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return total // len(mesh.local_devices)
        limits.append(stats["bytes_limit"])
    return min(limits)
