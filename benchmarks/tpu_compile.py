"""Compiles whole DLRM train steps for TPU topologies that need not be there, and prints what they cost.

    python benchmarks/tpu_compile.py --topology v5e:4x4 --vocabulary 1e6 --output docs/benchmarks/tpu_compile.md

libtpu's compiler runs on any x86-64 Linux host (`pip install 'jaxembed[tpu]'`). A step is 26 features of a
table each, about 10 ids a bag, 256 examples a device, D 128, float32 Adagrad. Bytes touched are those of the
compiler's cost analysis, a loop's body counted once.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import os
import time
from pathlib import Path

# Before JAX: the topologies are described, not looked for.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hlo
import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxembed import FeatureConfig, QuantizationConfig, RaggedTensor, TableConfig
from jaxembed.optimizers import Adagrad, Optimizer
from jaxembed.train import ShardedEmbedding, Trainer
from jaxembed.train.data import Batch
from jaxembed.train.dlrm import DLRM

TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5p:2x2x2", "v6e:4x4")
VOCABULARIES = (1_000_000, 10_000_000)
#: The exchanges of the `xla` engine, and the other engine.
EXCHANGES = ("all_gather", "all_to_all", "sparsecore")
#: Measured on 2026-11-25 with libtpu 0.0.42.1, each operation compiled alone.
WHERE_BYTES_GO = """
## Where the bytes go

The compiler's cost analysis counts whole tiles of 8 rows. 76,032 rows of 128 float32 are 38.9 MB; gathering them from a
table counts as 351 MB, writing or adding them to one as 662 MB. A step of Adagrad takes a gather for the lookup, and a
gather and two scatters for the update: 2.0 GB. An update that reads the rows, as clipping and weight decay do, counts
0.35 GB more. Rows and accumulators side by side, [V, 2, 128], which this library does not store so, would count 157 MB for
a gather and 234 MB for a scatter of both.
"""
FEATURES, VALENCY, DIM, DENSE, BATCH_PER_DEVICE = 26, 10, 128, 13, 256


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled step costs one device."""

    topology: str
    vocabulary: int
    exchange: str
    devices: int
    touched: float
    exchanged: dict[str, int]
    predicted: int
    dense_bytes: int
    temporary: int
    aliased: int
    table_bytes: int
    copies: int
    seconds: float


def compile_step(
    topology: str,
    vocabulary: int,
    exchange: str,
    *,
    features: int = FEATURES,
    batch: int | None = None,
    dim: int = DIM,
    optimizer: Optimizer | None = None,
    quantization: QuantizationConfig | None = None,
    weighted: bool = False,
) -> Cost:
    """Compiles one train step.

    Args:
      topology: such as "v5e:4x4".
      vocabulary: V of each table.
      exchange: of ShardedEmbedding, on the `xla` engine, or "sparsecore", the engine.
      features: how many, of a table each.
      batch: examples of all devices; None takes `BATCH_PER_DEVICE` of each.
      dim: D.
      optimizer: None is Adagrad.
      quantization: of every table.
      weighted: whether ids have weights.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("devices",))
    config = {
        f"f{i:02}": FeatureConfig(
            TableConfig(vocabulary, dim, name=f"t{i:02}", combiner="sum", quantization_config=quantization)
        )
        for i in range(features)
    }
    optimizer = optimizer or Adagrad(0.05)
    if exchange == "sparsecore":
        embedding = ShardedEmbedding(config, optimizer, mesh, engine="sparsecore")
    else:
        embedding = ShardedEmbedding(config, optimizer, mesh, exchange=exchange, engine="xla")
    model = DLRM(DENSE, features, dim, bottom=(512, 256), top=(1024, 1024, 512), rngs=nnx.Rngs(0))
    trainer = Trainer(embedding, model, optax.sgd(0.01))
    given = trainer.abstract_batch(_batch(config, vocabulary, batch or BATCH_PER_DEVICE * mesh.size, weighted))
    state = trainer.abstract_state()
    start = time.perf_counter()
    compiled = trainer.step.lower(state, given).compile()
    seconds = time.perf_counter() - start
    tables = jax.tree.leaves((state.embedding.tables, state.embedding.slots))
    pieces = [x.sharding.shard_shape(x.shape) for x in tables]
    # SparseCores see the lines of a table as its rows.
    as_rows = {(math.prod(shape) // width, width) for shape in pieces for width in (dim, -(-dim // 8) * 8)}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Cost(
        topology,
        vocabulary,
        exchange,
        mesh.size,
        compiled.cost_analysis()["bytes accessed"],
        hlo.exchanged_bytes(text),
        embedding.predicted_bytes(given.features),
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params)),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        sum(int(np.prod(shape)) * x.dtype.itemsize for shape, x in zip(pieces, tables, strict=True)),
        len(hlo.whole_copies(text, set(pieces) | as_rows)),
        seconds,
    )


def table_of(costs: list[Cost]) -> str:
    """The costs as a Markdown table."""
    lines = [
        "| exchange | topology | V a table | GB touched | MB exchanged | of it predicted | MB temporary | "
        "table bytes aliased | whole-table copies | compiled in s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in costs:
        aliased = f"{min(c.aliased / c.table_bytes, 1):.0%} of {c.table_bytes / 1e6:,.0f} MB"
        lines.append(
            f"| {c.exchange} | {c.topology} | {c.vocabulary:,} | "
            f"{'-' if c.exchange == 'sparsecore' else f'{c.touched / 1e9:.2f}'} | {sum(c.exchanged.values()) / 1e6:.1f} | {c.predicted / 1e6:.1f} | {c.temporary / 1e6:.1f} | "
            f"{aliased} | {c.copies} | {c.seconds:.0f} |"
        )
    return "\n".join(lines)


def _batch(config: dict[str, FeatureConfig], vocabulary: int, batch: int, weighted: bool) -> Batch:
    rng = np.random.default_rng(0)
    lengths = np.full(batch, VALENCY)
    features = {
        name: RaggedTensor.from_row_lengths(rng.integers(0, vocabulary, batch * VALENCY, np.int32), lengths)
        for name in config
    }
    ones = np.ones(batch, np.float32)
    weights = None
    if weighted:
        weights = {
            name: RaggedTensor.from_row_lengths(np.ones(batch * VALENCY, np.float32), lengths)
            for name in config
        }
    return Batch(features, weights, np.zeros((batch, DENSE), np.float32), ones, ones)


def _report(costs: list[Cost], refused: list[str]) -> str:
    import importlib.metadata

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    text = (
        "# Train steps on the TPU compiler\n\n"
        f"{datetime.date.today()}, compiled ahead of time by {versions} on a host of {os.cpu_count()} cores; no "
        f"TPU ran. {FEATURES} features of a table each, {BATCH_PER_DEVICE} examples a device, {VALENCY} ids a bag, "
        f"D {DIM}, float32 Adagrad, full DLRM step; figures are per device.\n\n" + table_of(costs) + "\n\n"
        "Exchanged bytes hold those of the dense model's gradients; the predicted ones are of the tables alone. "
        "A loop counts once: batches that fit the exchange's window take one round. SparseCores exchange rows inside "
        "of their own programs, whose text does not show it: at most the predicted bytes, which are not in those "
        "exchanged. The compiler counts all of a table that SparseCores read as touched; no figure is given.\n"
    )
    refusals = "\n## Refused\n\n" + "\n".join(refused) + "\n" if refused else ""
    return text + WHERE_BYTES_GO + refusals


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--vocabulary", nargs="+", type=lambda x: int(float(x)), default=VOCABULARIES)
    parser.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=EXCHANGES)
    parser.add_argument("--output", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    costs, refused = [], []
    for cell in itertools.product(options.topology, options.vocabulary, options.exchange):
        if cell[2] == "sparsecore" and cell[0].startswith("v5e"):
            continue  # it has none
        try:
            costs.append(compile_step(*cell))
            print(table_of(costs[-1:]).splitlines()[-1], flush=True)
        except jax.errors.JaxRuntimeError as error:
            refused.append(f"- {' '.join(map(str, cell))}: {str(error).splitlines()[0]}")
            print(refused[-1], flush=True)
    report = _report(costs, refused)
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report)


if __name__ == "__main__":
    main()
