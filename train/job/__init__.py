"""Training from a configuration file: what `jaxembed train` and `python -m jaxembed.train` run."""

from .config import (
    Checkpoints,
    DenseOptimizer,
    Distributed,
    JobConfig,
    Logs,
    Model,
    TableOptimizer,
    Tables,
    Training,
)
from .config_file import load_config
from .data_config import CriteoData, MovieLensData, ParquetData, SyntheticData
from .loop import Result, train
from .sources import Sources, open_sources
from .watch import TrainingDiverged

__all__ = [
    "Checkpoints",
    "CriteoData",
    "DenseOptimizer",
    "Distributed",
    "JobConfig",
    "Logs",
    "Model",
    "MovieLensData",
    "ParquetData",
    "Result",
    "Sources",
    "SyntheticData",
    "TableOptimizer",
    "Tables",
    "Training",
    "TrainingDiverged",
    "load_config",
    "open_sources",
    "train",
]
