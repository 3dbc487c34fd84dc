"""Opens the data of a job: examples to train and to evaluate on, and their feature configuration."""

import dataclasses
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np

from jaxembed.config import FeatureConfig, TableConfig

from ..data import (
    ParquetExamples,
    convert_criteo,
    criteo_feature_config,
    fetch,
    load,
    load_criteo,
    movielens_examples,
    movielens_feature_config,
    split_by_time,
    synthetic_criteo,
)
from ..data.examples import Examples
from ..data.movielens import data_files
from ..data.pipeline import ExampleSource
from ..hosts import on_all
from .data_config import (
    CRITEO_SIZE,
    PATHS,
    CriteoData,
    Data,
    MovieLensData,
    ParquetData,
    SyntheticData,
    sizes_of,
)
from .origin import describe_arrays, describe_files

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sources:
    """The data of a job.

    Attributes:
      train: examples to train on.
      evaluation: to evaluate on, or None.
      feature_config: feature name to FeatureConfig.
      num_dense: K.
      test: examples that a job does not read, or None.
      origin: what the data can be known by (`origin.py`), JSON-able; None where it is not known.
    """

    train: ExampleSource
    evaluation: ExampleSource | None
    feature_config: dict[str, FeatureConfig]
    num_dense: int
    test: ExampleSource | None = None
    origin: dict[str, Any] | None = None


def open_sources(data: Data, dim: int) -> Sources:
    """Opens the data.

    Args:
      data: which.
      dim: D of every table.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is not of the form that `data` says.
    """
    data = _at_home(data)
    if isinstance(data, MovieLensData):
        sources = _movielens(data, dim)
    elif isinstance(data, CriteoData):
        sources = _criteo(data, dim)
    elif isinstance(data, ParquetData):
        sources = _parquet(data, dim)
    else:
        sources = _synthetic(data, dim)
    parts = (("train", "train", sources.train), ("evaluation", "evaluate", sources.evaluation))
    for part, use, examples in parts:
        if examples is not None and not len(examples):
            named = f"data.{part}" if data.kind == "parquet" else f"{data.kind} data"
            raise ValueError(f"{named} must hold examples to {use} on, got none.")
    counts = {part: len(examples) for part, _, examples in parts if examples is not None}
    return dataclasses.replace(sources, origin={**(sources.origin or {}), "examples": counts})


def _movielens(data: MovieLensData, dim: int) -> Sources:
    path: Any = data.path
    if path is None:
        path = _first_on_one_process(fetch)
    source = load(path)
    examples = movielens_examples(source, data.max_history)
    train, validation, test = split_by_time(source, data.validation, data.test)
    config = movielens_feature_config(source, dim)
    return Sources(
        examples.select(train),
        _some(examples, validation),
        config,
        examples.dense.shape[1],
        _some(examples, test),
        describe_files(data_files(path)),
    )


def _criteo(data: CriteoData, dim: int) -> Sources:
    path = Path(data.path)
    sizes = None if data.vocabulary_sizes is None else sizes_of(data.vocabulary_sizes)

    def made():
        if data.text and jax.process_index() == 0 and not path.exists():
            convert_criteo(data.text, path, sizes or CRITEO_SIZE)
        # The texts need not be on the other hosts.
        texts = data.text if data.text and jax.process_index() == 0 else None
        return load_criteo(path, paths=texts, vocabulary_sizes=sizes)

    source = _first_on_one_process(made)
    count = len(source.examples)
    border = count - int(count * data.validation)
    return Sources(
        _blocks(source.examples, 0, border),
        _blocks(source.examples, border, count) if border < count else None,
        dict(criteo_feature_config(source.vocabulary_sizes, dim)),
        source.examples.dense.shape[1],
        origin=describe_files([path / name for name in ("ids", "dense", "labels")]),
    )


def _parquet(data: ParquetData, dim: int) -> Sources:
    config = _parquet_features(data, dim)
    columns = {name: feature.column or name for name, feature in data.features.items()}
    weights = {name: f.weights for name, f in data.features.items() if f.weights is not None}

    def opened(patterns):
        return ParquetExamples(_paths(patterns), columns, data.labels, data.dense, weights)

    train, evaluation = opened(data.train), opened(data.evaluation) if data.evaluation else None
    counts = train.counts | (evaluation.counts if evaluation is not None else {})
    return Sources(train, evaluation, config, len(data.dense), origin=describe_files(list(counts), counts))


def _synthetic(data: SyntheticData, dim: int) -> Sources:
    sizes = sizes_of(data.vocabulary_sizes)
    # Drawn together: the hidden effects of the ids are then the same for both.
    examples = synthetic_criteo(
        data.examples + data.evaluation_examples,
        sizes,
        ids_per_feature=data.ids_per_feature,
        exponent=data.exponent,
        seed=data.seed,
    )
    return Sources(
        examples.select(slice(0, data.examples)),
        _some(examples, np.arange(data.examples, len(examples))),
        dict(criteo_feature_config(sizes, dim)),
        examples.dense.shape[1],
        origin={"made": describe_arrays(examples)},
    )


def _parquet_features(data: ParquetData, dim: int) -> dict[str, FeatureConfig]:
    tables: dict[str, TableConfig] = {}
    config = {}
    for name, feature in data.features.items():
        table = TableConfig(feature.vocabulary_size, dim, combiner=feature.combiner, name=feature.table or name)
        known = tables.setdefault(table.name, table)
        if (known.vocabulary_size, known.combiner) != (table.vocabulary_size, table.combiner):
            raise ValueError(
                f"data.features.{name}: features that share the table {table.name!r} must have one vocabulary_size "
                f"and combiner, got {table.vocabulary_size} and {table.combiner!r} beside {known.vocabulary_size} "
                f"and {known.combiner!r}."
            )
        config[name] = FeatureConfig(known)
    return config


def _paths(patterns: tuple[str, ...]) -> list[str]:
    """The files of all patterns in their order, each once, by the first of its names."""
    found: dict[str, str] = {}
    for pattern in patterns:
        # A file that is there is meant itself: a name may hold "[".
        paths = [pattern]
        if not os.path.exists(pattern):
            matched = glob.glob(pattern, recursive=True)
            paths = sorted(path for path in matched if not os.path.isdir(path))
            # "**" finds the folders of its files, too; others may hold what Spark writes as one data set.
            of_files = {folder for path in paths for folder in Path(path).parents}
            for path in sorted(set(matched) - set(paths)):
                if Path(path) not in of_files and any(file.is_file() for file in Path(path).rglob("*")):
                    raise IsADirectoryError(
                        f"{path} is a folder, not a Parquet file; name the files in it: {os.path.join(path, '*.parquet')!r}."
                    )
        if not paths:
            raise FileNotFoundError(f"no Parquet file is at {pattern!r}.")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _at_home(data: Data) -> Data:
    """With ~ for the user's home in its paths."""
    paths = {name: value for name in PATHS if (value := getattr(data, name, None))}
    return dataclasses.replace(
        data,
        **{
            name: os.path.expanduser(value) if isinstance(value, str) else tuple(map(os.path.expanduser, value))
            for name, value in paths.items()
        },
    )


def _some(examples: Examples, rows: np.ndarray) -> Examples | None:
    return examples.select(rows) if rows.size else None


def _blocks(examples: Examples, start: int, stop: int) -> Examples:
    """Neighbouring examples, still mapped from disk, that shuffle in the same blocks."""
    part = examples.select(slice(start, stop))
    inner = [edge - start for edge in examples.block_splits or () if start < edge < stop]
    return dataclasses.replace(part, block_splits=(0, *inner, stop - start))


def _first_on_one_process(make: Callable[[], T]) -> T:
    """Runs `make` on process 0, then on the others, which find what it made (on a disk they share)."""
    is_first = jax.process_index() == 0
    made = on_all(lambda: make() if is_first else None, "open the data")
    return cast(T, made) if is_first else make()
