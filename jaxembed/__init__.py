"""jaxembed: TensorFlow's TPU embedding in JAX."""

from jaxembed.backends import backend, use_backend
from jaxembed.config import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.inputs import RaggedTensor, SparseTensor, as_input
from jaxembed.lookup import serving_embedding_lookup
from jaxembed.preprocessing import preprocess
from jaxembed.quantized_table import QuantizedTable

__all__ = [
    "FeatureConfig",
    "HashBuckets",
    "QuantizationConfig",
    "QuantizedTable",
    "RaggedTensor",
    "SparseTensor",
    "TableConfig",
    "VocabularyFile",
    "as_input",
    "backend",
    "preprocess",
    "serving_embedding_lookup",
    "use_backend",
]
