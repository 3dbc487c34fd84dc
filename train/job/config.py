"""The configuration of a training job: frozen dataclasses, their types and ranges checked by pydantic."""

from typing import Any, Literal

import optax
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass

from jaxembed.optimizers import Optimizer, optimizer_class

from .data_config import PATHS, STRICT, Count, Data, Fraction, Seed

Sharding = Literal["mod", "div", "table", "column", "replicated"]


@dataclass(frozen=True, config=STRICT)
class Model:
    """The DLRM: D, the widths of the hidden layers of its two MLPs, and what is in these."""

    dim: PositiveInt = 16
    bottom: tuple[PositiveInt, ...] = (64,)
    top: tuple[PositiveInt, ...] = (64, 32)
    concat_embeddings: bool = False
    dropout: Fraction = 0.0
    batch_norm: bool = False


@dataclass(frozen=True, config=STRICT)
class TableOptimizer:
    """Optimizer of the tables.

    Args:
      name: "sgd", "adagrad", "adagrad_momentum", "ftrl" or "adam", or that of one that a module of --import registers.
      learning_rate: a number.
      arguments: others of its constructor.
    """

    name: str = "adagrad"
    learning_rate: PositiveFloat = 0.05
    arguments: dict[str, bool | int | float | tuple[float, float]] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Optimizer:
        """The optimizer.

        Raises:
          ValueError: if there is none of that name, or its arguments are not its own.
        """
        cls: Any = optimizer_class(self.name)
        try:
            return cls(learning_rate=self.learning_rate, **self.arguments)
        except TypeError as e:
            raise ValueError(f"arguments of {self.name} cannot be {self.arguments!r}: {e}") from e


@dataclass(frozen=True, config=STRICT)
class DenseOptimizer:
    """optax optimizer of the dense parameters."""

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: PositiveFloat = 1e-3

    def build(self) -> optax.GradientTransformation:
        """The optimizer."""
        return getattr(optax, self.name)(self.learning_rate)


@dataclass(frozen=True, config=STRICT)
class Tables:
    """How tables are trained and spread; arguments of `ShardedEmbedding`.

    Args:
      optimizer: of all tables.
      plan: sharding by table; "auto" plans for the first batch and the devices' memory.
      overrides: of `plan = "auto"`: sharding by table.
      exchange: how rows travel.
      engine: "xla", "sparsecore" or "auto".
      row_kernels: "xla", "pallas" on TPUs, or "auto".
      capacity: entries that a shard has room for in each stack.
    """

    optimizer: TableOptimizer = Field(default_factory=TableOptimizer)
    plan: Literal["auto"] | dict[str, Sharding] = Field(default_factory=dict)
    overrides: dict[str, Sharding] = Field(default_factory=dict)
    exchange: Literal["auto", "all_gather", "all_to_all"] = "auto"
    engine: str = "auto"
    row_kernels: Literal["auto", "xla", "pallas"] = "auto"
    capacity: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.overrides and self.plan != "auto":
            raise ValueError(
                f'overrides are of plan = "auto", got plan {self.plan!r}; name the tables in one of the two'
            )


@dataclass(frozen=True, config=STRICT)
class Training:
    """How long, and on what batches.

    Args:
      batch_size: B, over all hosts.
      epochs: passes over the data, which follow each other without a gap; the last batch is filled up from the next one.
        Of no effect where `steps` is given.
      steps: training steps in all; None takes `epochs`.
      seed: of the initial parameters and the order of the examples, in [0, 2**63).
      evaluate_every: steps between evaluations; None evaluates after every epoch. The end evaluates too.
      evaluation_batches: how many batches an evaluation reads at most; None for all.
      prefetch: batches made ahead while a step runs; 0 makes each when it is asked for.
      data_changed: whether a run goes on where its data is not what it was: "refuse", or "accept", which keeps the number
        of the batch, so that examples may come twice in an epoch, or not at all.
    """

    batch_size: PositiveInt = 4096
    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    seed: Seed = 0
    evaluate_every: PositiveInt | None = None
    evaluation_batches: PositiveInt | None = None
    prefetch: Count = 2
    data_changed: Literal["refuse", "accept"] = "refuse"


@dataclass(frozen=True, config=STRICT)
class Checkpoints:
    """When to save.

    Args:
      every: steps between checkpoints; None saves after every epoch. The end saves too.
      keep: how many; None keeps all.
    """

    every: PositiveInt | None = None
    keep: PositiveInt | None = 3


@dataclass(frozen=True, config=STRICT)
class Logs:
    """What is shown: every how many steps, whether to TensorBoard (OUT/logs) and on a progress bar."""

    every: PositiveInt = 20
    tensorboard: bool = True
    progress: bool = True


@dataclass(frozen=True, config=STRICT)
class Distributed:
    """Processes of one job; arguments of `jax.distributed.initialize`.

    Args:
      enabled: whether there are several. On Cloud TPU the rest may stay None: the slice says it.
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which one this is.
      cpu_devices: how many devices a process has, on CPU.
    """

    enabled: bool = False
    coordinator_address: str | None = None
    num_processes: PositiveInt | None = None
    process_id: Count | None = None
    cpu_devices: PositiveInt | None = None

    def __post_init__(self) -> None:
        given = [self.coordinator_address, self.num_processes, self.process_id]
        if any(x is None for x in given) and any(x is not None for x in given):
            raise ValueError(
                "coordinator_address, num_processes and process_id must be given together, or none of them, "
                f"got {given}"
            )
        if any(x is not None for x in given) and not self.enabled:
            raise ValueError(f"enabled must be true where processes are named, got false and {given}")


@dataclass(frozen=True, config=STRICT)
class JobConfig:
    """A training job.

    Args:
      out: where checkpoints (OUT/checkpoints) and logs go. A job that finds its own checkpoints goes on.
      data: what to train on, by `kind`.
      model: the dense model.
      tables: optimizer and sharding of the tables.
      dense_optimizer: of the dense model.
      training: how long, and on what batches.
      checkpoints: when to save.
      logs: what is shown.
      distributed: processes of the job.

    Raises:
      ValueError: if a value is not of its type or out of range (pydantic's ValidationError).
    """

    out: str
    data: Data
    model: Model = Field(default_factory=Model)
    tables: Tables = Field(default_factory=Tables)
    dense_optimizer: DenseOptimizer = Field(default_factory=DenseOptimizer)
    training: Training = Field(default_factory=Training)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    logs: Logs = Field(default_factory=Logs)
    distributed: Distributed = Field(default_factory=Distributed)

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise ValueError(f"out must be a folder that is mounted, got the address {self.out!r}")

    def batches_key(self) -> dict[str, Any]:
        """JSON-able: what decides which examples of some data batch i holds. A run may only resume on the same.

        Where files lie does not: what is in them, `Sources.origin` tells.
        """
        data = TypeAdapter(Data).dump_python(self.data, mode="json")
        settings = {f"data.{key}": value for key, value in data.items() if key not in PATHS}
        return {
            **settings,
            "training.batch_size": self.training.batch_size,
            "training.seed": self.training.seed,
        }
