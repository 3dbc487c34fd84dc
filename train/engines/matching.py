"""Matches a batch to the stacks: what is static of it, before any of its ids is looked at."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxembed.features import FeatureInput, match
from jaxembed.inputs.ids import is_concrete
from jaxembed.lookup import Lookup, plan_lookup
from jaxembed.preprocessing import live_rows
from jaxembed.validation import check_splits

from .batch import BatchLayout, FeatureLayout, Skeleton, inner_size
from .custom import as_sequence, is_custom
from .placement import Stack, places_of


class Plan(NamedTuple):
    """A batch matched to its stacks: what is static of it, the inputs, and by feature which rows have entries.

    These are a bool array of the feature's rows here each, or None where all have.
    """

    layout: BatchLayout
    items: list[FeatureInput]
    lookups: list[Lookup]
    live_rows: list[np.ndarray | None]


def plan_batch(
    inputs: Any,
    weights: Any,
    feature_config: Any,
    stacks: Mapping[str, Stack],
    num_hosts: int = 1,
    mask: Any = None,
) -> Plan:
    """Matches inputs and weights to the stacks.

    Args:
      inputs: the rows of this host, out of `num_hosts` equal ones; those of all hosts inside of a trace, where an
        array is the whole one.
      weights: like `inputs`.
      feature_config: of the tables.
      stacks: by name.
      num_hosts: how many hosts share a batch.
      mask: [B], 0 for the rows that have no entry; None for none. Of features whose activations are [B, ...].

    Raises:
      ValueError: as `serving_embedding_lookup`, or if the rows do not divide over a host's shards where
        there are several hosts, or if no feature has the mask's rows.
    """
    stack_of = {p.table.name: stack for stack in stacks.values() for p in stack.placements}
    segments = dict.fromkeys(stacks, 0)
    features, lookups, live, first_sizes = [], [], [], {}
    mask = None if mask is None else np.asarray(mask) > 0
    items = match(inputs, weights, feature_config)
    if _are_traced(items):
        num_hosts = 1
    for item in items:
        lookup, combined = plan_lookup(item, None), None
        check_splits(item.path, lookup)
        stack = stack_of[item.feature.table.name]
        first_sizes[item.path] = (*lookup.output_shape[:-1], 1)[0]
        num_rows = lookup.bag.num_bags if lookup.bag.layout == "ragged" else (item.ids.shape or (1,))[0]
        inner = inner_size(lookup.bag, item.ids)
        if is_custom(lookup):
            combiner: Any = lookup.bag.combiner
            inner *= combiner.max_valency
            combined = (lookup.output_shape[0] * num_hosts, *lookup.output_shape[1:])
            lookup = as_sequence(lookup)
        num_shards, shape = stack.num_shards // num_hosts, lookup.output_shape
        cores = max(stack.cores, 1)
        # A batch without rows keeps one of padding a shard: collectives of nothing do not compile.
        size = max(max(-(-num_rows // (num_shards * cores)), 1) * inner, 1) * cores
        if num_hosts > 1:
            if num_rows % (num_shards * cores):
                what = f"{num_shards * cores} {'SparseCores' if stack.cores else 'shards'}"
                raise ValueError(
                    f"Feature {item.path!r} has {num_rows} rows on this host; with several hosts they must be a "
                    f"multiple of its {what}: drop or pad the last batch."
                )
            shape = (shape[0] * num_hosts, *shape[1:])
        features.append(
            FeatureLayout(
                item.path,
                item.feature,
                lookup.bag,
                num_rows * num_hosts,
                inner,
                shape,
                stack.name,
                segments[stack.name],
                size,
                combined,
            )
        )
        segments[stack.name] += size
        lookups.append(lookup)
        live.append(live_rows(mask, first_sizes[item.path], num_rows))
    if mask is not None and not mask.all() and items and mask.size not in first_sizes.values():
        raise ValueError(
            f"mask must be [B], of as many rows as the activations of a feature have, got {mask.size}; the features have "
            f"{first_sizes}. Of several ids an example, pass [B, k] or B bags, or set output_shape=(B, k)."
        )
    return Plan(BatchLayout(Skeleton(inputs), tuple(features), places_of(stacks)), items, lookups, live)


def is_traced(plan: Plan) -> bool:
    """Whether an array of the batch is inside of a trace."""
    return _are_traced(plan.items)


def _are_traced(items: list[FeatureInput]) -> bool:
    return not all(is_concrete(leaf) for item in items for leaf in jax.tree.leaves((item.ids, item.weights)))
