"""The sharding of every table: as it was given, or what `plan_tables` chooses for a mesh and a batch like those to come."""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxembed.config import TableConfig
from jaxembed.control_groups import memory_limits
from jaxembed.features import feature_tables, match
from jaxembed.inputs import RaggedTensor
from jaxembed.lookup import plan_lookup
from jaxembed.optimizers import Optimizer
from jaxembed.preprocessing import preprocess

from .batch import inner_size
from .planner import ShardingPlan, plan_tables

#: The rest is for activations, the dense model and what travels.
_SHARE_OF_TABLES = 0.75
_LOG = logging.getLogger("jaxembed")


def chosen_plan(
    plan: Mapping[str, str] | ShardingPlan | str | None,
    feature_config: Any,
    optimizer: Optimizer | None,
    mesh: Mesh,
    num_shards: int,
    cores: int,
    exchange: str,
    example_batch: Any,
    overrides: Mapping[str, str] | None,
) -> Mapping[str, str] | ShardingPlan | None:
    """The plan as it was given, or for "auto" the one for `example_batch`.

    Args:
      plan: as of ShardedEmbedding.
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      mesh: of the devices.
      num_shards: n of them that tables are spread over.
      cores: SparseCores of each that the engine uses.
      exchange: how rows travel, as of ShardedEmbedding.
      example_batch: as of `ShardedEmbedding.shard_batch`, of this host's rows, all of them real.
      overrides: table name to sharding.

    Raises:
      ValueError: if it is of no such form, "auto" comes without a batch, or what belongs to it without "auto".
    """
    if plan is not None and not isinstance(plan, Mapping | ShardingPlan | str):
        raise ValueError(
            "plan must be a mapping of table names to shardings, what plan_tables returned, 'auto' with an "
            f"example_batch, or None, got {plan!r}."
        )
    if (example_batch is not None or overrides is not None) and plan != "auto":
        raise ValueError(f"example_batch and overrides are of plan='auto', got plan={plan!r}.")
    if not isinstance(plan, str):
        return plan
    if plan != "auto" or example_batch is None:
        raise ValueError(
            f"plan must be 'auto' with an example_batch, a plan, or sharding by table, got {plan!r} and "
            f"example_batch {type(example_batch).__name__}."
        )
    batch = preprocess(example_batch, feature_config)
    return plan_for_batch(feature_config, optimizer, mesh, num_shards, cores, exchange, batch, overrides)


def shardings_of(
    plan: Mapping[str, str] | ShardingPlan | None, tables: Mapping[str, TableConfig], num_shards: int
) -> dict[str, str]:
    """The sharding of every table.

    Raises:
      ValueError: if the plan is for another number of devices, or names a table that is not there.
    """
    if isinstance(plan, ShardingPlan):
        if plan.num_shards != num_shards:
            raise ValueError(
                f"the plan is for {plan.num_shards} devices, got a mesh of {num_shards}; make it with "
                f"plan_tables(..., num_shards={num_shards})."
            )
        plan = plan.shardings
    plan = dict(plan or {})
    unknown = sorted(set(plan) - set(tables))
    if unknown:
        raise ValueError(f"plan names no table of the configuration: {unknown}; it has {list(tables)}.")
    return {name: plan.get(name, "mod") for name in tables}


def plan_for_batch(
    feature_config: Any,
    optimizer: Optimizer | None,
    mesh: Mesh,
    num_shards: int,
    cores: int,
    exchange: str,
    batch: Any,
    overrides: Mapping[str, str] | None,
) -> ShardingPlan:
    """Plans for three quarters of the devices' memory, and logs the plan.

    With several hosts, each gives its own rows, and all plan for the sums: they must call it together.

    Args:
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      mesh: of the devices.
      num_shards: n of them that tables are spread over.
      cores: SparseCores of each that the engine uses.
      exchange: how rows travel, as of ShardedEmbedding.
      batch: as of `ShardedEmbedding.shard_batch`, of this host's rows, after preprocessing.
      overrides: table name to sharding.

    Raises:
      ValueError: if the batch does not fit the configuration, or the tables not the devices.
    """
    ids, bags, memory = _of_all_hosts(*ids_and_bags(batch, feature_config), memory_of_device(mesh))
    plan = plan_tables(
        feature_config,
        optimizer,
        num_shards,
        memory_per_device=int(_SHARE_OF_TABLES * memory),
        ids_per_batch=ids,
        bags_per_batch=bags,
        overrides=overrides,
        cores=cores,
        exchange=exchange,
    )
    _LOG.info("Plan of the tables:\n%s", plan)
    return plan


def ids_and_bags(batch: Any, feature_config: Any) -> tuple[dict[str, int], dict[str, int]]:
    """By table, how many ids this host's batch looks up in it, and for how many output rows."""
    ids = dict.fromkeys(feature_tables(feature_config), 0)
    bags = dict(ids)
    for item in match(batch, None, feature_config):
        bag = plan_lookup(item, None).bag
        rows = bag.num_bags if bag.layout == "ragged" else (item.ids.shape or (1,))[0]
        name = item.feature.table.name
        ids[name] += _num_ids(item.ids)
        bags[name] += int(rows * inner_size(bag, item.ids))
    return ids, bags


def _num_ids(ids: Any) -> int:
    if isinstance(ids, RaggedTensor):
        return int(ids.row_splits[-1])  # values of padding follow
    return int((ids.values if hasattr(ids, "values") else ids).size)


def _of_all_hosts(ids: dict[str, int], bags: dict[str, int], memory: int) -> tuple[dict, dict, int]:
    """Sums of the counts and the least memory, so that all hosts find the same plan."""
    if jax.process_count() == 1:
        return ids, bags, memory
    # As digits of 2^30: JAX computes in 32 bits.
    own = [[value >> 30, value & (2**30 - 1)] for value in (*ids.values(), *bags.values(), memory)]
    found = np.asarray(multihost_utils.process_allgather(np.asarray(own, np.int32)), np.int64)
    hosts = (found[..., 0] << 30) + found[..., 1]
    sums = hosts[:, :-1].sum(0).tolist()
    return (
        dict(zip(ids, sums, strict=False)),
        dict(zip(bags, sums[len(ids) :], strict=True)),
        int(hosts[:, -1].min()),
    )


def memory_of_device(mesh: Mesh, root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that the smallest local device of the mesh has; CPU devices share the machine's, or a container's limit.

    Args:
      mesh: of the devices.
      root: of the files that tell the limit.
    """
    limits = []
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            limited = [limit for limit in memory_limits(root) if limit is not None]
            return min([total, *limited]) // len(mesh.local_devices)
        limits.append(stats["bytes_limit"])
    return min(limits)
