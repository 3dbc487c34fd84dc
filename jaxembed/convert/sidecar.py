"""The feature configuration, weights of custom combiners, step and metadata beside arrays of a format that has no place for them."""

import json
from collections.abc import Mapping
from typing import Any

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.convert.interface import Contents
from jaxembed.names import UnregisteredError
from jaxembed.serialization import feature_config_from_json, feature_config_to_json, strict_json

SIDECAR = "feature_config.json"
MAX_SIDECAR = 64 << 20
FORMAT = "jaxembed-arrays"


def sidecar_of(contents: Contents) -> bytes:
    """What `read_sidecar` reads.

    Raises:
      ValueError: if the feature configuration holds what cannot be serialized.
    """
    return make_sidecar(
        contents.feature_config,
        contents.combiner_weights,
        step=contents.step,
        metadata=contents.metadata,
        optimizers=contents.optimizers,
    )


def make_sidecar(feature_config: Any, combiner_weights: Mapping[str, Any], **more: Any) -> bytes:
    """As `sidecar_of`, of these alone and whatever JSON is to be beside them."""
    content = {
        "format": FORMAT,
        "step": 0,
        "metadata": {},
        "feature_config": feature_config_to_json(feature_config),
        "combiner_weights": layout.combiner_weights_to_json(combiner_weights),
        "optimizers": {},
        **more,
    }
    return json.dumps({**content, "digest": layout.digest(content)}).encode()


def read_sidecar(where: Any, content: bytes | str) -> dict[str, Any]:
    """What it says of the arrays, as arguments of `Source`.

    Raises:
      CheckpointError: if it is not what `sidecar_of` writes.
      UnregisteredError: if a combiner is not registered.
    """
    try:
        data = strict_json(content)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r:.40}")
        if data.pop("digest", None) != layout.digest(data):
            raise ValueError("it is damaged, for it does not have the digest it was written with")
        step, metadata = data["step"], data["metadata"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(metadata, dict):
            raise ValueError(f"its step is {step!r:.40} and its metadata {type(metadata).__name__}")
        config = feature_config_from_json(data["feature_config"], keep_unregistered=True)
        weights, optimizers = layout.combiner_weights(data), layout.optimizers(data)
    except UnregisteredError as e:
        raise UnregisteredError(f"{where}: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{where} is not what jaxembed writes beside arrays: {str(e)[:300]}") from e
    return {
        "step": step,
        "metadata": metadata,
        "feature_config": config,
        "combiner_weights": weights,
        "optimizers": optimizers,
    }
