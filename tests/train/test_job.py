"""The training job: resumes to the very bits, stops on SIGTERM and on NaN, logs and evaluates."""

import dataclasses
import os
import re
import shutil
import signal
import threading
import time
import types
from unittest import mock

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxembed.checkpoint import CheckpointError, read_checkpoint, steps, whole_steps
from jaxembed.train import Checkpointer, Trainer, data, hosts
from jaxembed.train.engines.auto_plan import ids_and_bags
from jaxembed.train.job import (
    CriteoData,
    Logs,
    TrainingDiverged,
    load_config,
    loop,
    open_sources,
    report,
    train,
)
from jaxembed.train.job.evaluation import evaluate
from jaxembed.train.job.feeding import feed
from jaxembed.train.job.report import Report
from jaxembed.train.metrics import auc, log_loss

from .jobs import BATCH, EXAMPLES, assert_same_bits, job, write_config, write_data


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """optax's Adam takes a power of a float to an integer, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A job that ran to its end without a stop."""
    directory = tmp_path_factory.mktemp("whole")
    return job(directory), train(job(directory))


def test_evaluates_logs_and_saves(whole):
    config, result = whole
    assert (result.step, result.preempted) == (9, False)
    assert whole_steps(result.checkpoints) == [6, 9]
    assert [entry["step"] for entry in result.history] == [6, 9]
    assert all(0 < entry["train"]["loss"] < 2 for entry in result.history)
    assert result.history[-1]["evaluation"]["examples"] == EXAMPLES
    events = next((result.checkpoints.parent / "logs").iterdir()).read_bytes()
    for tag in (b"train/loss", b"train/auc", b"train/examples_per_second", b"evaluation/auc"):
        assert tag in events
    again = load_config(result.checkpoints.parent / "config.json")
    assert again == config


def test_evaluation_is_that_of_the_saved_state(whole):
    config, result = whole
    sources = open_sources(config.data, config.model.dim)
    labels, logits = [], []
    for batch in data.batches(sources.evaluation, BATCH, shuffle=False, num_epochs=1):
        real = batch.mask > 0
        placed = result.trainer.shard_batch(batch)
        logits.append(np.asarray(result.trainer.predict(result.state, placed))[real])
        labels.append(batch.labels[real])
    labels, logits = np.concatenate(labels), np.concatenate(logits)
    found = read_checkpoint(result.checkpoints).metadata["evaluation"]
    assert found["auc"] == pytest.approx(auc(labels, logits), abs=1e-3)
    assert found["log_loss"] == pytest.approx(log_loss(labels, logits), abs=1e-6)


def test_id_frequency_is_in_the_checkpoint(whole):
    _, result = whole
    found = read_checkpoint(result.checkpoints).metadata["id_frequency"]
    assert set(found) == {"bag", "id"}
    # Batches made ahead are counted too: of 9 steps at most two.
    assert 9 * BATCH <= found["id"]["lookups"] <= 12 * BATCH
    assert found["id"]["counters"] == 50
    assert (found["id"]["since_step"], found["id"]["num_hosts"]) == (0, 1)
    for table in found.values():
        assert table["counts"] == sorted(table["counts"], reverse=True)
        assert table["ranks"][-1] == table["distinct"]
        assert table["shares"][-1] == pytest.approx(1)


def test_a_planned_job_trains_as_any_other(whole, tmp_path, capfd):
    _, expected = whole
    planned = job(
        tmp_path, **{"tables.plan": "auto", "tables.overrides": {"id": "div"}, "logs.tensorboard": False}
    )
    result = train(planned)
    plan = result.trainer.embedding.plan
    assert plan.shardings["id"] == "div"
    assert str(plan) in capfd.readouterr().out
    first = next(iter(data.batches(open_sources(planned.data, 8).train, BATCH, prefetch=0)))
    ids, bags = ids_and_bags(first.features, result.trainer.embedding.feature_config)
    assert ids == {"bag": first.features["bag"].row_splits[-1], "id": BATCH}
    assert bags == {"bag": BATCH, "id": BATCH}
    for name in ("tables", "slots"):
        ours, theirs = (getattr(read_checkpoint(r.checkpoints, slots=True), name) for r in (result, expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


class Interrupting:
    """A source that sends this process SIGTERM when batch `at` is read."""

    def __init__(self, examples, at):
        self._examples, self._at, self._reads = examples, at, 0

    def __getattr__(self, name):
        return getattr(self._examples, name)

    def __len__(self):
        return len(self._examples)

    def take(self, *args):
        self._reads += 1
        if self._reads == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._examples.take(*args)


def test_bad_ids_and_overflows_are_shown_and_logged(tmp_path, capfd):
    """Each shard asks one owner for more rows than a round has room for; 3 ids in 4 rows are outside of their table."""
    rng = np.random.default_rng(0)
    path = tmp_path / "skewed.parquet"
    columns = {
        "bag": [(rng.permutation(512)[:64] * 8).tolist() for _ in range(32)],
        "id": np.where(np.arange(32) % 4 == 0, 1, [-1, 50, 2**40, 7] * 8),
        "x": np.zeros(32, np.float32),
        "clicked": np.arange(32) % 2,
    }
    pq.write_table(pa.table(columns), path)
    features = {"bag": {"vocabulary_size": 4096}, "id": {"vocabulary_size": 50}}
    options = {
        "data.features": features,
        "data.dense": ["x"],
        "tables.exchange": "all_to_all",
        "training.steps": 4,
        "training.evaluate_every": 2,
        "logs.progress": True,
    }
    result = train(job(tmp_path, path, **options))
    bad = sum(not 0 <= id < 50 for id in columns["id"].tolist())
    assert bad > 8
    for entry in result.history:
        # Two steps are one epoch.
        assert entry["train"]["bad_ids"] == entry["evaluation"]["bad_ids"] == bad
        assert entry["train"]["extra_rounds"] >= 2
    output, errors = capfd.readouterr()
    (line,) = [line for line in output.splitlines() if "outside [0, 50)" in line]
    assert "ids of feature 'id'" in line
    assert len(re.findall(r"step \d+: \d rounds of all_to_all for stack", output)) == 1
    assert re.search(r"[1-9]\d* bad ids, [1-9]\d* extra rounds, ", errors)
    events = next((result.checkpoints.parent / "logs").iterdir()).read_bytes()
    for tag in (b"train/bad_ids", b"train/extra_rounds", b"evaluation/bad_ids"):
        assert tag in events


def test_sigterm_saves_and_the_next_start_ends_in_the_same_bits(whole, tmp_path):
    _, expected = whole
    path = write_config(tmp_path, write_data(tmp_path))
    config = load_config(path, ["training.prefetch=0"])
    sources = open_sources(config.data, config.model.dim)
    interrupted = dataclasses.replace(sources, train=Interrupting(sources.train, at=5))
    before = signal.getsignal(signal.SIGTERM)
    result = train(config, interrupted)
    assert (result.preempted, result.step) == (True, 5)
    assert signal.getsignal(signal.SIGTERM) == before
    assert whole_steps(result.checkpoints)[-1] == 5
    result = train(load_config(path))
    assert (result.preempted, result.step) == (False, 9)
    assert read_checkpoint(result.checkpoints).metadata["id_frequency"]["id"]["since_step"] == 5
    # The batches of the data differ in `train`'s path alone, which the bits do not.
    assert_same_bits(result.checkpoints, expected.checkpoints)


def test_sigterm_stops_an_evaluation(whole, tmp_path):
    _, expected = whole
    config = job(tmp_path)
    sources = open_sources(config.data, config.model.dim)
    interrupted = dataclasses.replace(sources, evaluation=Interrupting(sources.evaluation, at=2))
    result = train(config, interrupted)
    assert (result.preempted, result.step, result.history) == (True, 6, [])
    assert whole_steps(result.checkpoints)[-1] == 6
    result = train(config, sources)
    assert (result.preempted, result.step) == (False, 9)
    assert_same_bits(result.checkpoints, expected.checkpoints)
    assert result.history == expected.history


def test_an_evaluation_that_is_due_when_sigterm_comes_is_made_up(whole, tmp_path):
    _, expected = whole
    config = job(tmp_path, **{"training.prefetch": 0})
    sources = open_sources(config.data, config.model.dim)
    result = train(config, dataclasses.replace(sources, train=Interrupting(sources.train, at=6)))
    assert (result.preempted, result.step, result.history) == (True, 6, [])
    result = train(job(tmp_path))
    assert (result.step, result.history) == (9, expected.history)


def test_sigterm_stops_the_last_evaluation_and_the_next_start_makes_it_up(tmp_path, monkeypatch, capfd):
    config = job(tmp_path, **{"training.steps": 6})
    sources = open_sources(config.data, config.model.dim)
    for _ in range(2):  # the second is stopped while it makes the evaluation up
        interrupted = dataclasses.replace(sources, evaluation=Interrupting(sources.evaluation, at=2))
        result = train(config, interrupted)
        assert (result.preempted, result.step, result.history) == (True, 6, [])
    before = read_checkpoint(result.checkpoints).metadata
    assert before["pending"]["step"] == 6
    result = train(config, sources)
    assert (result.preempted, result.step) == (False, 6)
    assert [entry["step"] for entry in result.history] == [6]
    assert "nothing to do" not in capfd.readouterr().out
    after = read_checkpoint(result.checkpoints).metadata
    made_up = {"evaluation": result.history[-1]["evaluation"], "history": result.history, "pending": None}
    assert after == {**before, **made_up}
    assert whole_steps(result.checkpoints) == [3, 6]
    assert sorted(path.name for path in result.checkpoints.iterdir() if "writing" in path.name) == []
    monkeypatch.setattr(loop, "evaluate", lambda *_: pytest.fail("it was stored"))
    assert train(config, sources).history == result.history
    assert "nothing to do: step 6 of 6" in capfd.readouterr().out


def test_sigterm_while_the_last_step_is_written_does_not_lose_it(tmp_path, monkeypatch):
    wait, handlers = Checkpointer.wait, []

    def waiting(self):
        handlers.append(signal.getsignal(signal.SIGTERM))
        wait(self)

    monkeypatch.setattr(Checkpointer, "wait", waiting)
    assert train(job(tmp_path, **{"training.steps": 1})).step == 1
    assert handlers
    assert signal.getsignal(signal.SIGTERM) not in handlers


def test_epochs_are_passes_over_the_data(tmp_path):
    """Of 200 examples in batches of 16: an epoch ends within batch 13."""
    changes = {
        "training.steps": None,
        "training.epochs": 2,
        "training.evaluate_every": None,
        "training.evaluation_batches": 2,
        "checkpoints.every": None,
        "dense_optimizer": {"name": "sgd", "learning_rate": 0.01},
    }
    result = train(job(tmp_path, **changes))
    assert result.step == -(-2 * EXAMPLES // BATCH) == 25
    assert whole_steps(result.checkpoints) == [13, 25]
    assert [entry["step"] for entry in result.history] == [13, 25]
    assert [entry["evaluation"]["examples"] for entry in result.history] == [2 * BATCH] * 2


def test_data_that_a_host_cannot_open_stop_all(tmp_path, monkeypatch):
    """Others would wait for it."""
    failed = []
    # Another host can write, but not read.
    monkeypatch.setattr(
        hosts, "processes_where", lambda condition: failed.append(condition) or [1] * (len(failed) != 1)
    )
    with pytest.raises(ValueError, match=r"processes \[1\] cannot open the data; their errors say why"):
        train(job(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        hosts.on_all(lambda: open_sources(job(tmp_path, tmp_path / "none.parquet").data, 4), "open the data")
    assert failed == [False, False, True]
    # Process 1, where process 0 does not convert.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"cannot open the data"):
        open_sources(CriteoData(path=str(tmp_path / "columns"), text=("none.txt",)), 4)
    assert failed == [False, False, True, False]


def test_logs_of_a_run_without_a_checkpoint_are_taken_back(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: taken.append(purge_step))
    for start in (0, 6):
        Report(Logs(progress=False), tmp_path, BATCH, start, 9)
    assert taken == [1, 7]


def test_evaluation_and_saving_are_not_training_time(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=lambda: clock.now, now=100.0)
    monkeypatch.setattr(report, "time", clock)
    shown = Report(Logs(progress=False, tensorboard=False), tmp_path, BATCH, 0, 9)
    for _ in range(3):
        shown.step()
    clock.now += 2
    for seconds in (5, 10):  # paused once more before it goes on
        shown.pause()
        clock.now += seconds
    shown.resume()
    clock.now += 2
    shown.resume()
    assert shown.training(3, {})["examples_per_second"] == 2 * BATCH / 4


@pytest.mark.parametrize(
    "act", [lambda own: loop.Job._trained(own, 9, own), lambda own: loop.Job._save(own, own, None)]
)
def test_steps_that_are_counted_are_training_time_to_their_end(act):
    own = mock.MagicMock()
    own._config.batches_key.return_value = {}
    act(own)
    order = [name for name, *_ in own.mock_calls if name in ("_watch.finish", "_report.pause")]
    assert order == ["_watch.finish", "_report.pause"]


def test_a_process_without_a_standard_error_shows_no_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    shown = Report(Logs(progress=True, tensorboard=False), tmp_path, BATCH, 0, 9)
    shown.step()
    shown.say("a line")
    shown.close()
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.slow
def test_dropout_and_batch_norm_resume_to_the_same_bits(tmp_path):
    checkpoints = []
    for name, at in (("whole", None), ("stopped", 5)):
        (tmp_path / name).mkdir()
        changes = {"model.dropout": 0.3, "model.batch_norm": True, "training.prefetch": 0}
        config = job(tmp_path / name, **changes)
        sources = open_sources(config.data, config.model.dim)
        if at is not None:
            interrupted = dataclasses.replace(sources, train=Interrupting(sources.train, at=at))
            assert train(config, interrupted).step == at
        result = train(config, sources)
        assert (result.preempted, result.step) == (False, 9)
        checkpoints.append(result.checkpoints)
    assert_same_bits(*checkpoints)
    state = read_checkpoint(checkpoints[0]).model["model_state"]
    assert state["top"]["dropout"]["rngs"]["count"] == 9
    assert np.abs(state["bottom"]["norms"]["0"]["mean"]).max() > 1e-3


def test_batches_are_laid_out_on_another_thread_ahead_of_the_step(whole):
    config, result = whole
    examples = open_sources(config.data, config.model.dim).train
    threads = []
    fed = feed(result.trainer, examples, BATCH, observe=lambda batch: threads.append(threading.get_ident()))
    batch, state = next(fed)
    assert isinstance(batch.dense, jax.Array)
    end = time.monotonic() + 30
    while len(threads) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(threads) >= 3, "batches are made only when they are asked for"
    assert threading.get_ident() not in threads
    # The place to resume from is that of the batch taken, whatever was made ahead.
    following = next(fed)[0]
    again, _ = next(feed(result.trainer, examples, BATCH, state=state))
    np.testing.assert_array_equal(again.dense, following.dense)


def test_a_finished_job_does_nothing(whole):
    config, result = whole
    again = train(config)
    assert (again.step, again.history) == (9, result.history)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, result.state.params)
    canonical = [r.trainer.embedding.to_canonical(r.state.embedding) for r in (again, result)]
    jax.tree.map(np.testing.assert_array_equal, *canonical)


def test_going_on_makes_no_tables_beside_those_that_are_restored(whole, monkeypatch):
    config, _ = whole
    monkeypatch.setattr(Trainer, "init", lambda *_: pytest.fail("tables would be there twice"))
    assert train(config).step == 9


def test_a_damaged_latest_step_says_how_to_go_on(whole, tmp_path):
    config, result = whole
    run = shutil.copytree(result.checkpoints.parent, tmp_path / "run")
    for file in (run / "checkpoints" / "9" / "tables" / "d").iterdir():
        file.write_bytes(b"")
    moved = dataclasses.replace(config, out=type(config.out)(run))
    with pytest.raises(
        CheckpointError, match=r"go on from the step before it, move it away: mv (.*/9) \1\.damaged$"
    ):
        train(moved)
    (run / "checkpoints" / "9").rename(run / "checkpoints" / "9.damaged")
    again = train(moved)
    assert again.step == 9
    jax.tree.map(np.testing.assert_array_equal, again.state.params, result.state.params)


def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path):
    (tmp_path / "bad").mkdir()
    bad = write_data(tmp_path / "bad", nan_at=EXAMPLES - 1)
    good = str(write_data(tmp_path))
    changes = {"checkpoints.every": 1, "training.steps": 40, "data.evaluation": [good]}
    message = r"the loss \(nan\) is not finite at step (\d+)\. .* the checkpoint of step (\d+) in .* is whole"
    with pytest.raises(TrainingDiverged, match=message) as e:
        train(job(tmp_path, bad, **changes))
    at, last = map(int, re.search(message, str(e.value)).groups())
    read = read_checkpoint(tmp_path / "run" / "checkpoints", slots=True)
    assert read.step == last == at - 1
    leaves = jax.tree.leaves((read.tables, read.slots, read.model))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in leaves)


def test_nan_in_the_evaluation_is_told_apart(whole, tmp_path):
    config, result = whole
    bad = write_data(tmp_path, nan_at=EXAMPLES - 1)
    examples = open_sources(job(tmp_path, bad).data, config.model.dim).evaluation
    message = "look for bad dense features, labels or weights in the evaluation data"
    with pytest.raises(ValueError, match=message):
        evaluate(result.trainer, result.state, examples, BATCH)
    good = open_sources(config.data, config.model.dim).evaluation.load()
    labels = np.where(np.arange(EXAMPLES) == 3, np.nan, good.labels)
    with pytest.raises(ValueError, match=message):
        evaluate(result.trainer, result.state, dataclasses.replace(good, labels=labels), BATCH)


def test_ids_of_padding_are_not_counted_in_the_evaluation(whole):
    config, result = whole
    examples = open_sources(config.data, config.model.dim).evaluation.load().select(slice(BATCH + 1))
    features = {**examples.features, "id": np.where(np.arange(BATCH + 1) == BATCH, 99, 0)}
    found = evaluate(result.trainer, result.state, dataclasses.replace(examples, features=features), BATCH)
    assert (found["examples"], found["bad_ids"]) == (BATCH + 1, 1)


def test_a_step_that_one_host_does_not_list_yet_is_gone_on_from(whole, monkeypatch):
    config, result = whole
    monkeypatch.setattr(Checkpointer, "latest_step", lambda _: 6)
    monkeypatch.setattr(loop, "largest", lambda step: max(step, 9))
    monkeypatch.setattr(steps, "whole_steps", lambda _: [6])
    assert train(config).history == result.history


def test_the_latest_step_of_all_hosts(monkeypatch):
    assert (hosts.largest(3), hosts.largest(None)) == (3, None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for own, other, found in ((3, 5, 5), (None, 5, 5), (5, -1, 5), (None, -1, None)):
        gather = lambda value, other=other: np.array([value, other])  # noqa: E731
        monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
        assert hosts.largest(own) == found


def test_other_batches_are_an_error(whole, tmp_path):
    _, result = whole
    values = tmp_path / "job.json"
    values.write_text((result.checkpoints.parent / "config.json").read_text())
    changed = load_config(values, ["training.batch_size=24"])
    with pytest.raises(
        ValueError,
        match=r"training.batch_size changed from \{'training.batch_size': 16\} to \{'training.batch_size': 24\}",
    ):
        train(changed)
    assert whole_steps(result.checkpoints) == [6, 9]


@pytest.mark.parametrize("at", ["run", "run/checkpoints"])
def test_out_must_be_a_folder(tmp_path, at):
    (tmp_path / at).parent.mkdir(exist_ok=True)
    (tmp_path / at).write_text("a file")
    with pytest.raises(
        ValueError, match=rf"{at} is no folder, so nothing can be written at .*; pass another path"
    ):
        train(job(tmp_path))


@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_data_without_examples_are_named(tmp_path, part):
    path, empty = write_data(tmp_path), tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), empty)
    with pytest.raises(ValueError, match=rf"data\.{part} must hold examples to (train|evaluate) on, got none"):
        open_sources(job(tmp_path, path, **{f"data.{part}": [str(empty)]}).data, 4)


def test_patterns_reach_all_folders_and_take_a_file_once(tmp_path, monkeypatch):
    path = write_data(tmp_path)
    (tmp_path / "2026" / "11").mkdir(parents=True)
    deep = shutil.copy(path, tmp_path / "2026" / "11" / "a.parquet")
    odd = shutil.copy(path, tmp_path / "day[1].parquet")
    shutil.copy(path, tmp_path / "day1.parquet")

    def files(*patterns):
        train = [f"{tmp_path}/{pattern}" for pattern in patterns]
        return list(open_sources(job(tmp_path, path, **{"data.train": train}).data, 4).train.counts)

    assert files("2026/**/*.parquet") == files("2026/11/a.parquet") == [str(deep)]
    (tmp_path / "2026" / "old.parquet").mkdir()
    assert files("2026/**") == [str(deep)]
    assert len(files("**/*.parquet")) == 4
    (tmp_path / "2026" / "old.parquet" / "part-0").write_bytes(b"")
    with pytest.raises(
        IsADirectoryError, match=r"2026/old\.parquet is a folder, .*: '.*/old\.parquet/\*\.parquet'\."
    ):
        files("2026/**/*.parquet")
    (tmp_path / "2026" / "old.parquet" / "part-0").unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    home = job(tmp_path, path, **{"data.train": ["~/data.parquet"], "data.evaluation": ["~/2026/**/*.parquet"]})
    assert list(open_sources(home.data, 4).evaluation.counts) == [str(deep)]
    assert files("day[1].parquet") == [str(odd)]
    assert files("data.parquet", "./2026/11/../../data.parquet", "d*a.parquet") == [str(path)]
    with pytest.raises(FileNotFoundError, match=r"no Parquet file is at '.*/2025/\*\*/\*\.parquet'"):
        files("data.parquet", "2025/**/*.parquet")


def test_batches_of_several_hosts_must_divide_over_the_sparsecores(tmp_path, monkeypatch):
    config = job(tmp_path, **{"training.batch_size": 48})
    sources = open_sources(config.data, config.model.dim)
    stacks = {"a": types.SimpleNamespace(cores=4), "b": types.SimpleNamespace(cores=0)}
    embedding = types.SimpleNamespace(stacks=stacks, num_shards=8)
    monkeypatch.setattr(loop, "build_trainer", lambda *_: types.SimpleNamespace(embedding=embedding))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = "training.batch_size must be a multiple of the 32 SparseCores of 2 hosts, got 48"
    with pytest.raises(ValueError, match=message):
        loop.Job(config, sources)


def test_batches_must_divide_over_the_devices(tmp_path):
    with pytest.raises(ValueError, match=r"training.batch_size must be a multiple of the 8 devices, got 12"):
        train(job(tmp_path, **{"training.batch_size": 12}))
