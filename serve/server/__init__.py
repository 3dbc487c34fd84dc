"""A server of bundles: Open Inference Protocol v2 and TensorFlow Serving's REST predict; extra `server`."""

from .batcher import Batcher
from .config import ServerConfig
from .errors import RequestError
from .served import BundleModel, ServedModel, Signature
from .versions import Versions

__all__ = ["Batcher", "BundleModel", "RequestError", "ServedModel", "ServerConfig", "Signature", "Versions"]
