"""The canonical checkpoint: per table [V, D] rows and named slots, independent of mesh and engine."""

from jaxembed.checkpoint.bundle import convert_to_bundle
from jaxembed.checkpoint.bundle_reading import Bundle, is_bundle, open_bundle
from jaxembed.checkpoint.digests import CheckpointError, Digests, digest_arrays
from jaxembed.checkpoint.reading import Checkpoint, open_checkpoint, read_checkpoint
from jaxembed.checkpoint.steps import latest_step, whole_steps

__all__ = [
    "Bundle",
    "Checkpoint",
    "CheckpointError",
    "Digests",
    "convert_to_bundle",
    "digest_arrays",
    "is_bundle",
    "latest_step",
    "open_bundle",
    "open_checkpoint",
    "read_checkpoint",
    "whole_steps",
]
