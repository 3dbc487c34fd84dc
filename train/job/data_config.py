"""What a job trains on: one frozen dataclass for each `kind` of data."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

#: Of every dataclass of a job's configuration.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
#: What numpy and JAX take as one; JAX keeps the lower 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
#: Ids are int32.
Size = Annotated[int, Field(gt=0, lt=2**31)]
Sizes = Size | tuple[Size, ...]
#: Fields below that name files.
PATHS = ("path", "text", "train", "evaluation")
#: V of Criteo's features where a job does not say it.
CRITEO_SIZE = 1_000_000


@dataclass(frozen=True, config=STRICT)
class MovieLensData:
    """MovieLens: the oldest ratings train, the next evaluate.

    Args:
      path: its folder; None takes MovieLens-100K, fetched to data/ml-100k if it is not there.
      max_history: the longest history of a user.
      validation: fraction of the ratings to evaluate on.
      test: fraction kept for a last test, which a job does not read.
    """

    kind: Literal["movielens"] = "movielens"
    path: str | None = None
    max_history: PositiveInt = 50
    validation: Fraction = 0.1
    test: Fraction = 0.1


@dataclass(frozen=True, config=STRICT)
class CriteoData:
    """Criteo's click logs, Kaggle's or the terabyte's: the first examples train, the last evaluate.

    Args:
      path: folder that `convert_criteo` wrote; made from `text` where it does not exist. One that was made from
        another `text` or for other `vocabulary_sizes` is an error.
      text: the tab-separated files, in order; empty takes `path` as it is.
      vocabulary_sizes: V of every feature, or one for all, below 2**31; None takes those of `path`, which is made with
        1,000,000.
      validation: fraction of the examples to evaluate on.
    """

    path: str
    kind: Literal["criteo"] = "criteo"
    text: tuple[str, ...] = ()
    vocabulary_sizes: Sizes | None = None
    validation: Fraction = 0.05


@dataclass(frozen=True, config=STRICT)
class ParquetFeature:
    """One feature in Parquet files.

    Args:
      vocabulary_size: V of its table, below 2**31.
      column: of ids, integers or lists of them; None takes the feature's name.
      weights: column of weights, parallel to the ids; None for no weights.
      table: name of its table, which features may share; None takes the feature's name.
      combiner: of bags.
    """

    vocabulary_size: Size
    column: str | None = None
    weights: str | None = None
    table: str | None = None
    combiner: Literal["sum", "mean", "sqrtn"] = "mean"


@dataclass(frozen=True, config=STRICT)
class ParquetData:
    """Parquet files, read row group by row group.

    Args:
      train: files, or patterns such as "train/*.parquet".
      labels: name of the label column.
      features: by name.
      evaluation: like `train`; empty evaluates nothing.
      dense: names of the dense columns.
    """

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: str
    features: dict[str, ParquetFeature]
    kind: Literal["parquet"] = "parquet"
    evaluation: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class SyntheticData:
    """Made-up click logs of Criteo's shape (`synthetic_criteo`).

    Args:
      examples: to train on.
      evaluation_examples: to evaluate on.
      vocabulary_sizes: V of every feature, or one for all; below 2**31.
      ids_per_feature: mean length of a bag; 1 gives one id an example.
      exponent: of the Zipf law of ids.
      seed: of the examples, in [0, 2**63).
    """

    kind: Literal["synthetic"] = "synthetic"
    examples: PositiveInt = 100_000
    evaluation_examples: Count = 10_000
    vocabulary_sizes: Sizes = 10_000
    ids_per_feature: Annotated[float, Field(ge=1)] = 1.0
    exponent: PositiveFloat = 1.05
    seed: Seed = 0


Data = Annotated[MovieLensData | CriteoData | ParquetData | SyntheticData, Field(discriminator="kind")]


def sizes_of(sizes: int | Sequence[int]) -> int | list[int]:
    """Vocabulary sizes as the loaders take them."""
    return sizes if isinstance(sizes, int) else list(sizes)
