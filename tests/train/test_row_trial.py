"""Row kernels as the default: tried on a device first, and left where they are wrong, slower or refused."""

import logging
import threading
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import SGD, Adagrad, Adam
from jaxembed.train import ShardedEmbedding
from jaxembed.train.engines import pallas_rows, row_kernels, row_trial

gather, update = pallas_rows.gather, pallas_rows.update_unique


@pytest.fixture(autouse=True)
def small_and_interpreted(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jaxembed")
    monkeypatch.setattr(row_kernels, "_PLATFORMS", ("cpu",))
    monkeypatch.setattr(row_trial, "_VALUES", 128 * 24)
    monkeypatch.setattr(row_trial, "_CALLS", 1)
    row_trial.try_kernels.cache_clear()
    # Not by a context, which a thread does not see.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=pltpu.InterpretParams()))
    yield
    row_trial.try_kernels.cache_clear()
    pltpu.reset_tpu_interpret_mode_state()


def seconds(monkeypatch, *each):
    """Of kernels, and of XLA, in turn."""
    found = iter(each)
    monkeypatch.setattr(row_trial._Programs, "seconds", lambda *arguments: next(found))


def chosen(**tables):
    tables = {"wide": TableConfig(40, 128, name="wide"), **tables}
    config = {name: FeatureConfig(table) for name, table in tables.items()}
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    return ShardedEmbedding(config, Adagrad(0.1), mesh).row_kernels


def test_kernels_that_are_right_and_no_slower_are_taken(monkeypatch, caplog):
    seconds(monkeypatch, 1.0, 1.0)
    assert chosen(narrow=TableConfig(40, 8, name="narrow")) == {"wide": "pallas", "narrow": "xla"}
    # Once for all tables that differ in their rates only.
    other = TableConfig(40, 128, name="other", optimizer=Adagrad(lambda step: 0.2))
    assert set(chosen(other=other).values()) == {"pallas"}
    (tried,) = [r.getMessage() for r in caplog.records if "us, by XLA" in r.getMessage()]
    assert tried.startswith("row kernels for Adagrad, D 128, on cpu: 1000000 us, by XLA 1000000 us; taken")


def test_slower_ones_are_left_to_xla(monkeypatch, caplog):
    seconds(monkeypatch, 1.01, 1.0)
    assert chosen() == {"wide": "xla"}
    assert "XLA takes their place" in caplog.text


@pytest.mark.slow
def test_each_rule_and_width_is_tried(monkeypatch):
    seconds(monkeypatch, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0)
    tables = {
        "adam": TableConfig(40, 128, name="adam", optimizer=Adam(0.1)),
        "wider": TableConfig(40, 256, name="wider"),
    }
    found = chosen(**tables)
    assert sorted(found.values()) == ["pallas", "pallas", "xla"]


def test_times_are_of_both(monkeypatch):
    """An interpreter is slower than XLA."""
    trial = row_trial.try_kernels(SGD(1.0), 128, jax.devices()[0])
    assert trial.problem is None
    assert trial.kernels > trial.xla > 0
    assert not trial.is_passed


def refuse(*arguments, **options):
    raise NotImplementedError("no such kernel here")


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("gather", lambda table, rows: gather(table, rows + 1), "it gathers other rows"),
        (
            "update_unique",
            lambda optimizer, *rest: update(Adagrad(2.0), *rest[:3], rest[3] * 1.1, *rest[4:]),
            "it updates rows to other values",
        ),
        (
            "update_unique",
            lambda optimizer, table, *rest: update(optimizer, table * 1.0001, *rest),
            "it changes rows that it should not",
        ),
        ("update_unique", refuse, "NotImplementedError: no such kernel here"),
    ],
)
def test_wrong_ones_are_left_to_xla_and_it_is_said(name, broken, said, monkeypatch, caplog):
    seconds(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(pallas_rows, name, broken)
    assert chosen() == {"wide": "xla"}
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert said in record.getMessage()


def test_one_that_does_not_end_says_what_to_do(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(row_trial, "_PATIENCE", 0.1)
    monkeypatch.setattr(row_trial, "_trial", lambda *arguments: left.wait(60))
    with pytest.raises(
        RuntimeError, match=r"Adagrad, D 128, on cpu did not end within 0.1 s.*row_kernels='xla'"
    ):
        chosen()
    left.set()


def test_an_embedding_made_inside_of_a_jitted_function_tries_them(monkeypatch):
    seconds(monkeypatch, 1.0, 2.0)
    found = []
    jax.jit(lambda x: found.append(chosen()) or x)(1.0)
    assert found == [{"wide": "pallas"}]
