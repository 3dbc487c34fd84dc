"""MovieLens-100K from data to served predictions: train, checkpoint, convert, serve, and compare.

    python examples/movielens.py [--data DIR] [--out DIR] [--epochs N]

Predicts whether a rating is 4 or more. Trains a DLRM on sharded tables as movielens.toml says, evaluates it and saves
an Orbax checkpoint every 40 steps, converts the best one into a bundle, serves that without any code of the model,
asserts that the served predictions are the trainer's own, and prints the AUC beside that of a logistic regression on
the same features. OUT/loss.png shows loss and AUC over the steps.
"""

import argparse
import json
import pathlib
import shutil
import time

import jax
import matplotlib
import numpy as np
from sklearn.linear_model import LogisticRegression

import jaxembed
from jaxembed.checkpoint import convert_to_bundle, whole_steps
from jaxembed.serve import ServingModel, export_model
from jaxembed.train import Checkpointer, TrainState
from jaxembed.train.data import batches
from jaxembed.train.job import load_config, open_sources, train
from jaxembed.train.metrics import auc, log_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from baseline import baseline_features

CONFIG, BATCH = pathlib.Path(__file__).with_name("movielens.toml"), 512


def main(arguments=None):
    """Runs the whole job; raises if serving and training disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="MovieLens folder; default: data/ml-100k, fetched if it is not there")
    parser.add_argument("--out", default="runs/movielens", help="where checkpoints and plots go")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(arguments)
    out = pathlib.Path(options.out)

    # The best checkpoint may be any of them.
    overrides = [f"out={json.dumps(str(out))}", f"training.epochs={options.epochs}", "checkpoints.keep=none"]
    overrides += [f"data.path={json.dumps(options.data)}"] if options.data else []
    config = load_config(CONFIG, overrides)
    sources = open_sources(config.data, config.model.dim)
    sets = {"train": sources.train, "validation": sources.evaluation, "test": sources.test}
    print("examples: " + ", ".join(f"{name} {len(examples):,}" for name, examples in sets.items()))

    result, checkpoint = run(config, sources)
    trainer = result.trainer
    bundle = convert(trainer, sets["train"], checkpoint, out / "bundles")
    labels, logits = restored_predictions(trainer, sets["test"], checkpoint)
    serve = serve_and_compare(bundle, sets["test"], logits)
    print_tables(serve.embedding)
    show_one(sets["test"], serve)
    theirs = baseline(sources.feature_config, sets)
    plot(result.history, int(checkpoint.name), theirs["validation"], out / "loss.png")
    print(
        f"test AUC: DLRM {auc(labels, logits):.4f}, logistic regression {theirs['test']:.4f}; "
        f"log-loss {log_loss(labels, logits):.4f}"
    )
    print(f"loss curve: {out / 'loss.png'}\ncheckpoint: {checkpoint}\nbundle: {bundle}")


def run(config, sources):
    """Trains, as `jaxembed train` does; returns its result and the best checkpoint."""
    since = time.perf_counter()
    result = train(config, sources)
    print(
        f"trained to step {result.step:,} on {jax.device_count()} devices in {time.perf_counter() - since:.1f} s"
    )
    kept = set(whole_steps(result.checkpoints))  # an earlier run in the same folder may have kept fewer
    evaluated = [entry for entry in result.history if entry["step"] in kept]
    best = max(evaluated, key=lambda entry: entry["evaluation"]["auc"])
    return result, result.checkpoints / str(best["step"])


def predict(trainer, state, examples):
    """Labels and logits of all examples, in their order."""
    labels, logits = [], []
    for batch in batches(examples, BATCH, shuffle=False, num_epochs=1):
        real = batch.mask > 0
        logits.append(np.asarray(trainer.predict(state, trainer.shard_batch(batch)))[real])
        labels.append(batch.labels[real])
    return np.concatenate(labels), np.concatenate(logits)


def convert(trainer, examples, checkpoint, out):
    """Converts the checkpoint, with the dense model as a program, into a bundle; returns its path."""
    template = trainer.init(jax.random.key(0))
    exported = export_model(
        lambda variables, activations, dense: trainer.apply_model(variables, dense["dense"], activations),
        trainer.variables(template.model),
        trainer.embedding.feature_config,
        dense_inputs={"dense": examples.dense.shape[1]},
        weighted=["history"],
    )
    shutil.rmtree(out / checkpoint.name, ignore_errors=True)  # of an earlier run
    report = convert_to_bundle(checkpoint, out, select_model=trainer.variables, exported=exported)
    size = sum(table.num_bytes for table in report.tables)
    print(
        f"converted {len(report.tables)} tables ({size / 2**20:.1f} MiB) and the model ({len(exported):,} bytes)"
    )
    return report.path


def restored_predictions(trainer, test, checkpoint):
    """Labels, and what the trainer predicts once it is restored from the checkpoint."""
    with Checkpointer(checkpoint.parent, trainer.embedding) as checkpointer:
        template = trainer.init(jax.random.key(0))
        restored = checkpointer.restore(int(checkpoint.name), model=template.model)
    state = TrainState(restored.state, **restored.model)
    return predict(trainer, state, test)


def serve_and_compare(bundle, test, logits):
    """Serves the test set from the bundle alone; raises unless it gives the trainer's `logits`."""
    serve = ServingModel(bundle, max_batch_size=128).warm_up(progress=True)
    compiled = serve.compile_count
    served, start = [], time.perf_counter()
    sizes = np.random.default_rng(0).integers(1, 300, len(test))  # requests of any size
    borders = np.minimum(np.cumsum(sizes), len(test))
    begin = 0
    for end in borders[: int(np.searchsorted(borders, len(test))) + 1]:
        part = test.select(np.arange(begin, end))
        batch = part.take(np.arange(len(part)), len(part), part.capacities(len(part)))
        served.append(serve(batch.features, batch.weights, {"dense": batch.dense}))
        begin = end
    seconds = time.perf_counter() - start
    served = np.concatenate(served)

    difference = float(np.abs(served - logits).max())
    if not difference <= 1e-5:
        raise AssertionError(f"serving and training differ by {difference}; they must agree to 1e-5")
    if serve.compile_count != compiled:
        raise AssertionError(f"{serve.compile_count - compiled} compilations after warm-up; there must be none")
    print(
        f"served {len(served):,} held-out examples on {jaxembed.backend()} in {seconds:.2f} s, "
        f"0 compilations after warm-up; largest difference to the trainer: {difference:.1e}"
    )
    return serve


def show_one(test, serve):
    """One request as a client would write it, with its answer."""
    example = test.select(np.arange(len(test) - 1, len(test)))
    batch = example.take(np.arange(1), 1, example.capacities(1))
    request = {
        name: ids.to_lists() if isinstance(ids, jaxembed.RaggedTensor) else ids.tolist()
        for name, ids in batch.features.items()
    }
    weights = {"history": batch.weights["history"].to_lists()}
    score = serve(request, weights, {"dense": batch.dense.tolist()})[0]
    request["history"] = [request["history"][0][-3:]]
    liked = "4 or 5" if example.labels[0] else "below 4"
    print(
        f"served example: {request} (history: the last 3) -> P(rating >= 4) = {sigmoid(score):.3f}; it was {liked}"
    )


def sigmoid(x):
    """The probability of a logit."""
    return 1 / (1 + np.exp(-x))


def baseline(config, sets):
    """AUC of a logistic regression on the same features, by set; its strength chosen on the validation set."""
    x = {name: baseline_features(examples, config) for name, examples in sets.items()}
    scores = []
    for c in (0.01, 0.1, 1.0):
        fitted = LogisticRegression(C=c, max_iter=300).fit(x["train"], sets["train"].labels)
        scores.append(
            {name: auc(sets[name].labels, fitted.decision_function(x[name])) for name in ("validation", "test")}
        )
    return max(scores, key=lambda score: score["validation"])


def print_tables(embedding):
    """One line per table."""
    print(f"{'table':<12}{'rows':>8}{'dim':>6}{'dtype':>10}{'KiB':>8}  mean row norm")
    for config, table in embedding.embedding_tables.items():
        norm = float(np.linalg.norm(np.asarray(table), axis=1).mean())
        kib = table.size * table.dtype.itemsize / 1024
        print(
            f"{config.name:<12}{table.shape[0]:>8,}{table.shape[1]:>6}{table.dtype.name:>10}{kib:>8.0f}  {norm:.3f}"
        )


def plot(history, served, baseline_auc, path):
    """Loss and AUC over the steps; those of training are of the steps since the evaluation before."""
    steps = np.array([entry["step"] for entry in history])
    between = (np.append(0, steps[:-1]) + steps) / 2
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, title, trained, evaluated in zip(
        axes, ("log-loss", "AUC"), ("loss", "auc"), ("log_loss", "auc"), strict=True
    ):
        axis.plot(between, [entry["train"][trained] for entry in history], color="tab:gray", label="training")
        values = [entry["evaluation"][evaluated] for entry in history]
        axis.plot(steps, values, "o-", markersize=3.5, color="tab:blue", label="validation")
        best = values[list(steps).index(served)]
        axis.plot(
            served, best, "o", markersize=9, fillstyle="none", color="tab:red", label=f"served: step {served}"
        )
        axis.set(xlabel="step", title=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[1].axhline(baseline_auc, color="tab:orange", linestyle="--", label="logistic regression, validation")
    axes[1].legend(frameon=False)
    figure.suptitle("MovieLens-100K: is a rating 4 or more?", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
