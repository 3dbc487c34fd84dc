"""One training step of an embedding table on CPU, against its peers, in turns.

    python benchmarks/train_step.py [--vocabularies 10000 100000 1000000] [--dim 64] [--batch 4096] [--ids 20]

Prints a table of milliseconds and ratios, and with --report writes it to a Markdown file.
"""

import argparse
import datetime
import os
import pathlib
import platform

import numpy as np
from timing import interleave
from train_peers import CONTENDERS, Jaxembed, Problem

from jaxembed.train.data.shuffle import permute
from jaxembed.train.data.synthetic import zipf

NUM_BATCHES, AGREE = 4, 1e-3
# Of SGD, small: the id that a Zipf law draws most is in a batch ten thousand times, and its row would diverge.
LEARNING_RATES = {"sgd": 1e-5, "adagrad": 0.01}


def main(arguments=None):
    """Runs every vocabulary and optimizer; raises where a contender's table is another."""
    options = parse(arguments)
    lines, steps = [], {}
    for optimizer in options.optimizers:
        for vocabulary in options.vocabularies:
            for law in options.laws:
                problem = make_problem(vocabulary, options, optimizer, law)
                times = measure(problem, options)
                steps[optimizer, law, vocabulary] = times
                lines.append(row(optimizer, law, vocabulary, times))
                print(lines[-1], flush=True)
    text = report(options, lines, steps)
    print(text)
    if options.report:
        pathlib.Path(options.report).write_text(text)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adagrad"], choices=["sgd", "adagrad"])
    parser.add_argument("--laws", nargs="+", default=["uniform", "zipf"], choices=["uniform", "zipf"])
    parser.add_argument("--contenders", nargs="+", default=[c.name for c in CONTENDERS])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--ids", type=int, default=20)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each line")
    parser.add_argument("--report", help="Markdown file to write")
    return parser.parse_args(arguments)


def make_problem(vocabulary, options, optimizer, law):
    """Batches of ids, uniform or by a Zipf law of exponent 1.05 scattered over the vocabulary."""
    rng = np.random.default_rng(0)
    shape = options.batch, options.ids

    def draw():
        if law == "uniform":
            return rng.integers(0, vocabulary, shape).astype(np.int32)
        ranks = zipf(rng, options.batch * options.ids, vocabulary)
        return permute(ranks, vocabulary, seed=0).astype(np.int32).reshape(shape)

    ids = [draw() for _ in range(NUM_BATCHES)]
    targets = [rng.standard_normal((options.batch, options.dim)).astype(np.float32) for _ in ids]
    return Problem(vocabulary, options.dim, optimizer, LEARNING_RATES[optimizer], ids, targets)


def measure(problem, options):
    """Median seconds a step by contender, after all have made the same table of the same steps."""
    contenders = {c.name: c(problem) for c in CONTENDERS if c.name in options.contenders}
    seen = np.unique(np.concatenate([ids.reshape(-1) for ids in problem.ids]))[
        :: max(problem.vocabulary // 20_000, 1)
    ]
    found = {}
    for name, contender in contenders.items():
        for i in range(NUM_BATCHES):
            contender.step(i)
        found[name] = contender.rows(seen)
    own = found[Jaxembed.name]
    change = float(np.abs(own - problem.table()[seen]).max())
    for name, rows in found.items():
        gap = float(np.abs(rows - own).max())
        if not change > 0 or not gap <= AGREE * change:
            raise AssertionError(
                f"{name} trained another table than jaxembed: they differ by {gap} of {change}"
            )
    programs = {name: contender.step for name, contender in contenders.items()}
    programs["jaxembed's layout on the host"] = contenders[Jaxembed.name].lay_out
    return {
        name: timing.median
        for name, timing in interleave(programs, NUM_BATCHES, options.budget, seed=0).items()
    }


def row(optimizer, law, vocabulary, times):
    """A line of the table: milliseconds, and how many times jaxembed's in brackets."""
    own = times[Jaxembed.name]
    cells = [
        f"{t * 1e3:.2f} ({t / own:.1f}x)" if name != Jaxembed.name else f"{t * 1e3:.2f}"
        for name, t in times.items()
    ]
    return "| " + " | ".join([optimizer, law, f"{vocabulary:,}", *cells]) + " |"


def report(options, lines, steps):
    """The Markdown text."""
    first = next(iter(steps.values()))
    header = "| " + " | ".join(["optimizer", "ids", "V", *first]) + " |"
    rule = "|---|---|--:|" + "--:|" * len(first)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}"
    return "\n".join(
        [
            "# A training step on CPU",
            "",
            f"{datetime.date.today()}, {machine}. B {options.batch}, {options.ids} ids a bag, D {options.dim}, float32, "
            "bags summed.",
            "",
            "Milliseconds of one step (lookup, gradient and update of one table), medians over rounds in shuffled",
            "turns; in brackets how many times jaxembed's own step. All tables are compared before timing.",
            "",
            header,
            rule,
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
