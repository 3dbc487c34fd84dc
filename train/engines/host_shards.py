"""Which hosts the shards of a mesh are on: each passes its own rows of a batch, so that they must divide alike."""

import math

import numpy as np
from jax.sharding import Mesh


def hosts_of_shards(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """The process of each device: int [n, copies], in the order of the shards over `axes`."""
    hosts = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    own = [mesh.axis_names.index(axis) for axis in axes]
    hosts = np.moveaxis(hosts, own, range(len(own)))
    return hosts.reshape(math.prod(hosts.shape[: len(own)]), -1)


def check_host_shards(
    hosts: np.ndarray, num_hosts: int, axes: tuple[str, ...], all_axes: tuple[str, ...]
) -> None:
    """Refuses shards that are not a host's own, as many on each: hosts pass equal parts of a batch, one a shard.

    Args:
      hosts: int [n, copies], the process of each device of each shard.
      num_hosts: processes of the job.
      axes: of the mesh, over which a batch is sharded.
      all_axes: of the mesh.

    Raises:
      ValueError: if a shard is on several, or some have more than others.
    """
    shared = np.flatnonzero((hosts != hosts[:, :1]).any(axis=1))
    counts = np.bincount(hosts[:, 0], minlength=num_hosts)
    if shared.size:
        found = f"shard {shared[0]} on hosts {sorted(set(hosts[shared[0]].tolist()))}"
    elif (counts != counts[0]).any():
        found = f"{counts.tolist()} shards by host"
    else:
        return
    raise ValueError(
        f"axis must span all hosts, each with as many shards of its own, got {axes} of a mesh of {all_axes}, which gives "
        f"{found}; name all axes, or those that lead from host to host, and take a mesh of all devices."
    )
