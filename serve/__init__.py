"""Serving of embedding tables on CPU: restore, look up, and run a model at a bounded set of shapes."""

from .embedding import EmbeddingForServing
from .exporting import export_model
from .function import ServingFunction
from .loading import Loaded, load
from .model import ServingModel
from .signature import FeatureSignature, Signature

__all__ = [
    "EmbeddingForServing",
    "FeatureSignature",
    "Loaded",
    "ServingFunction",
    "ServingModel",
    "Signature",
    "export_model",
    "load",
]
