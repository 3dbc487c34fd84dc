"""What a served model takes and gives, for servers and their clients."""

import dataclasses
from collections.abc import Mapping, Sequence

from .exported import ArraySpec, ExportedModel
from .exporting import activation_specs
from .features import ServedFeature


@dataclasses.dataclass(frozen=True)
class FeatureSignature:
    """One feature of a request.

    Attributes:
      path: in the feature configuration, such as "user/history".
      kind: "bag", whose ids are combined, or "sequence", of which the first `max_ids` are used.
      max_ids: the largest number of ids of one row; more are an error, or are cut off a sequence.
      weighted: whether its ids may carry weights.
      vocabulary_size: V.
      dtype: of its ids, "int64" or "string".
      preprocessed: whether they are hashed or looked up in a vocabulary; else they must be in [0, V).

    Examples:
      >>> FeatureSignature("watched", "bag", max_ids=128, weighted=False, vocabulary_size=4).dtype
      'int64'
    """

    path: str
    kind: str
    max_ids: int
    weighted: bool
    vocabulary_size: int
    dtype: str = "int64"
    preprocessed: bool = False


@dataclasses.dataclass(frozen=True)
class Signature:
    """Of a ServingModel.

    Attributes:
      features: in the order of the feature configuration.
      dense: dense inputs, float32 [B, *shape] each; all of them must be given.
      outputs: [B, *shape] each, named by their path in the result; "" where the result is one array.

    Examples:
      >>> import numpy as np
      >>> import jaxembed as je
      >>> from jaxembed.serve import EmbeddingForServing, ServingFunction
      >>> movie = je.TableConfig(vocabulary_size=4, dim=2, name="movie")
      >>> embedding = EmbeddingForServing({"watched": je.FeatureConfig(movie)}, {"movie": np.eye(4, 2, dtype=np.float32)})
      >>> signature = make_signature(ServingFunction(embedding).features, None)
      >>> signature.features[0].path, signature.outputs[0].shape
      ('watched', (2,))
    """

    features: tuple[FeatureSignature, ...]
    dense: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]


def make_signature(
    features: Sequence[ServedFeature], exported: ExportedModel | None, types: Mapping[str, str] | None = None
) -> Signature:
    """The signature of these features and of the exported model, or of the activations.

    Args:
      features: in the order of the configuration.
      exported: on top of them.
      types: of lookups, by table, where they are not what the configuration says.
    """
    described = tuple(
        FeatureSignature(
            path=feature.path,
            kind="sequence" if feature.config.max_sequence_length else "bag",
            max_ids=feature.max_ids,
            weighted=feature.weighted,
            vocabulary_size=feature.config.table.vocabulary_size,
            dtype=feature.config.preprocessing.dtype if feature.config.preprocessing else "int64",
            preprocessed=feature.config.preprocessing is not None,
        )
        for feature in features
    )
    if exported is None:
        specs, types = activation_specs(features), types or {}
        outputs = [
            dataclasses.replace(spec, dtype=types.get(feature.config.table.name, spec.dtype))
            for spec, feature in zip(specs, features, strict=True)
        ]
        return Signature(described, (), tuple(outputs))
    return Signature(described, exported.dense, exported.outputs[1])
