"""Compiles whole DLRM train steps for TPU topologies that need not be there, and prints what they cost.

    python benchmarks/tpu_compile.py --costs costs.jsonl --output docs/benchmarks/tpu_compile.md
    python benchmarks/tpu_compile.py --topology v5e:4x4 --vocabulary 1e6 --row-kernels pallas

libtpu's compiler runs on any x86-64 Linux host (`pip install 'jaxembed[tpu]'`). A step is 26 features of a
table each, about 10 ids a bag, 256 examples a device, D 128, float32 Adagrad. Bytes touched are those of the
compiler's cost analysis, a loop's body counted once; of a Pallas kernel, which the compiler cannot look into, they are
what the kernel says that its copies read and write. All of it takes an hour or more; --costs keeps what is compiled, and
a second run goes on from there.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
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
#: What reads and updates rows on the `xla` engine; the default takes the latter here, where there is no device to try.
ROW_KERNELS = ("xla", "pallas")
#: Measured on 2026-11-25 and 2026-11-27 with libtpu 0.0.42.1; operations compiled alone unless a step is meant.
WHERE_BYTES_GO = """
## Where the bytes go

The compiler's cost analysis counts whole tiles of 8 rows. 76,032 rows of 128 float32 are 38.9 MB; gathering them from a
table counts as 351 MB, writing or adding them to one as 662 MB. A step of Adagrad takes a gather for the lookup, and a
gather and two scatters for the update: 2.0 GB. An update that reads the rows, as clipping and weight decay do, counts
0.35 GB more. Rows and accumulators side by side, [V, 2, 128], which this library does not store so, would count 157 MB for
a gather and 234 MB for a scatter of both. Taken apart and put together again for the rule, an update would count 1.05 GB
in place of 1.83 and a lookup 0.23 GB in place of 0.35, with 78 MB of memory for the pairs: 2.9 GB for the step, by these
parts. Such a step was not built. [V, 1, 128] and [V, 256] count as [V, 128] does, or more.

Row kernels (2026-11-27, v5e:4x4, V 1,000,000, all_to_all, windows of 72,832 rows, 37.3 MB):

| of a step | by XLA, as the compiler counts it | by kernels, as their copies move it |
|---|---:|---:|
| gather of the lookup | 336 MB | 75 MB: rows read and written |
| update of Adagrad | 1,604 MB: a gather and two scatters | 187 MB: gradients, and rows and accumulators read and written |
| all else, as the compiler counts it | 1.88 GB | 1.71 GB |
| temporary memory | 46.6 MB | 8.4 MB |

A row of 128 float32 is one piece of 512 bytes of its tile, and a copy moves that and no more; of wider rows, each 128 values are
one. New rows and slots wait for no scatter, so that they are not written to memory first. XLA then keeps the rows between
lookup, exchange and sums in the 128 MB of fast memory of a v5e: hence the temporary memory. In the compiled text table and
accumulators are operands of the kernel as they are, `f32[1625000,128]{1,0:T(8,128)}`, and its results by
`output_to_operand_aliasing`, within the loop of rounds as well: no copy and no other layout.

What Mosaic takes, tried alone on v5e, v5p and v6e: copies of one row of a float32 [V, D] in HBM at any row number, D 128 and 256,
with the table as it is. Seen as [V, 1, 128] (v5e) a table costs no copy either, as [V, 1, 256] it is copied whole. Mosaic has no
`expm1`: the bias correction of Adam is computed outside of the kernel.

What is left of the 1.97 GB, by the sizes of operands and results of each operation, largest first: gradients put into one array
feature by feature, 10.4 MB for each of 24, as the whole array counts each time; two exchanges of rows, 75 MB each; the sums of bags, of the rows
that are sent and of those that come, 41 to 75 MB each; then the dense model, below 20 MB an operation.

Tried on 2026-11-27, on a v5e, each operation compiled alone with 72,832 rows; none is in the library:

- Rows in pairs, the table seen as [V / 2, 2, 128], which takes no copy. Gathering pairs counts 150 MB in place of 336, writing
  them 224 MB in place of 634; one row of a pair counts as before. A step that updates pairs would count about 1 GB less, and
  hold sums, slots and results of pairs, 75 MB each in place of 37: more memory than the 60 MB wanted.
- Products with matrices of ones in place of scatter-adds: 563 MB in place of 153 for the sums of bags, 569 in place of 187
  for those that the owners of rows take, 733 in place of 365 for those that they are sent.
- Windows of one row kept as such in the scatter: the compiler makes a loop over the rows of it, whose body alone it counts.
- One stacked gradient in place of 26 concatenated ones: the whole step counts the same, 3.83 GB.
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
    row_kernels: str = "xla"

    @property
    def cell(self) -> tuple[str, int, str, str]:
        """What was compiled."""
        return self.topology, self.vocabulary, self.exchange, self.row_kernels

    @property
    def what(self) -> str:
        """What moves rows between and on devices."""
        return self.exchange if self.row_kernels == "xla" else f"{self.exchange}, row kernels"


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
    row_kernels: str = "auto",
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
      row_kernels: of ShardedEmbedding, on the `xla` engine.

    Returns:
      What it costs; `row_kernels` as chosen.
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
        embedding = ShardedEmbedding(
            config, optimizer, mesh, exchange=exchange, engine="xla", row_kernels=row_kernels
        )
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
        "pallas" if "pallas" in embedding.row_kernels.values() else "xla",
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
            f"| {c.what} | {c.topology} | {c.vocabulary:,} | "
            f"{'-' if c.exchange == 'sparsecore' else f'{c.touched / 1e9:.2f}'} | {sum(c.exchanged.values()) / 1e6:.1f} | {c.predicted / 1e6:.1f} | {c.temporary / 1e6:.1f} | "
            f"{aliased} | {c.copies} | {c.seconds:.0f} |"
        )
    return "\n".join(lines)


def targets_of(costs: list[Cost]) -> str:
    """What is wanted, and what was found, as Markdown; lines of which nothing was compiled are left out."""
    found = {c.cell: c for c in costs}
    kinds = list(itertools.product(EXCHANGES, ROW_KERNELS))
    small, large = VOCABULARIES
    lines = ["| wanted | found | holds |", "|---|---|---|"]

    def line(wanted, text, holds):
        lines.append(f"| {wanted} | {text} | {'yes' if holds else 'no'} |")

    for kernels in ROW_KERNELS:
        cost = found.get(("v5e:4x4", small, "all_to_all", kernels))
        if cost is None:
            continue
        for what, limit, unit, value in (
            ("touched", 3.0, "GB", cost.touched / 1e9),
            ("exchanged", 90, "MB", sum(cost.exchanged.values()) / 1e6),
            ("temporary", 60, "MB", cost.temporary / 1e6),
        ):
            wanted = f"v5e:4x4, V {small:,}, {cost.what}: at most {limit} {unit} {what}"
            line(wanted, f"{value:.2f}", value <= limit)
    worst = max(costs, key=lambda c: c.copies)
    line("no whole-table copy, everywhere", f"at most {worst.copies}", worst.copies == 0)
    aliased = min(c.aliased / c.table_bytes for c in costs)
    line("all table and slot bytes aliased, everywhere", f"at least {min(aliased, 1):.0%}", aliased >= 1)
    for exchange, kernels in kinds:
        last = [c for c in costs if c.cell[1:] == (large, exchange, kernels)]
        first = [found.get((c.topology, small, exchange, kernels)) for c in last]
        pairs = [(a, b) for a, b in zip(first, last, strict=True) if a]
        names = ["temporary"] if exchange == "sparsecore" else ["touched", "temporary"]
        for name in names:
            changes = {a.topology: getattr(b, name) / getattr(a, name) - 1 for a, b in pairs}
            if changes:
                text = ", ".join(f"{topology} {change:+.1%}" for topology, change in changes.items())
                wanted = f"{last[0].what}: {name} flat from V {small:,} to {large:,}, within 2%"
                line(wanted, text, all(abs(change) <= 0.02 for change in changes.values()))
    for exchange, kernels in kinds:
        few, many = (found.get((t, small, exchange, kernels)) for t in ("v5e:4x4", "v5e:8x8"))
        if few and many:
            few_bytes, many_bytes = (sum(c.exchanged.values()) - c.dense_bytes for c in (few, many))
            grown, formula = many_bytes / few_bytes, many.predicted / few.predicted
            wanted = f"{few.what}: exchanged for tables, from 16 to 64 devices no more than the formula"
            line(wanted, f"{grown:.3f}x, formula {formula:.3f}x", grown <= formula * 1.001)
    return "## What is wanted\n\n" + "\n".join(lines) + "\n"


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
        "exchanged. The compiler counts all of a table that SparseCores read as touched; no figure is given.\n\n"
        '"Row kernels" are steps with `row_kernels="pallas"`, which is what the default, "auto", takes where there is no '
        'device to try it on; the others are `row_kernels="xla"`. The compiler cannot count what '
        "a kernel does: of the bytes touched, those of kernels are what their copies read and write at most, computed "
        "from the sizes and handed to the compiler as `pl.CostEstimate`; all others are counted by it.\n\n"
        + targets_of(costs)
    )
    refusals = "\n## Refused\n\n" + "\n".join(refused) + "\n" if refused else ""
    return text + WHERE_BYTES_GO + refusals


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--vocabulary", nargs="+", type=lambda x: int(float(x)), default=VOCABULARIES)
    parser.add_argument("--exchange", nargs="+", choices=EXCHANGES, default=EXCHANGES)
    parser.add_argument("--row-kernels", nargs="+", choices=ROW_KERNELS, default=ROW_KERNELS)
    parser.add_argument("--costs", type=Path, help="JSON lines of what was compiled, read and added to")
    parser.add_argument("--output", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    costs, refused = [], []
    known = {}
    if options.costs and options.costs.exists():
        found = [Cost(**json.loads(line)) for line in options.costs.read_text().splitlines()]
        known = {c.cell: c for c in found}
    for cell in itertools.product(options.topology, options.vocabulary, options.exchange, options.row_kernels):
        if cell[2] == "sparsecore" and (cell[0].startswith("v5e") or cell[3] != "xla"):
            continue  # a v5e has none, and they have kernels of their own
        if cell in known:
            costs.append(known[cell])
            continue
        try:
            costs.append(compile_step(*cell[:3], row_kernels=cell[3]))
            print(table_of(costs[-1:]).splitlines()[-1], flush=True)
            if options.costs:
                with options.costs.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(costs[-1])) + "\n")
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
