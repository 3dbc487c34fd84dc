"""`--import`: what checkpoints and bundles with functions of the user's own need it for, and what they do without."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, TableConfig, combiners
from jaxembed.checkpoint import layout, open_bundle
from jaxembed.checkpoint.writing import write_step
from jaxembed.cli import main
from jaxembed.optimizers import SGD, registry
from jaxembed.serialization import feature_config_to_json
from jaxembed.serve import EmbeddingForServing
from jaxembed.train import ShardedEmbedding

ROWS = np.arange(8, dtype=np.float32).reshape(4, 2)
MODULE = """
import dataclasses
from jaxembed.combiners import register_combiner
from jaxembed.optimizers import SGD, register_optimizer

@register_combiner("my_sum")
def my_sum(valency, vectors):
    return vectors.sum(axis=0)

@register_optimizer
@dataclasses.dataclass(frozen=True)
class MySGD(SGD):
    name = "my_sgd"
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """In the working folder, and not imported yet."""
    (tmp_path / "my_names.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(combiners, "_REGISTRY", dict(combiners._REGISTRY))
    monkeypatch.setattr(registry, "_OPTIMIZERS", dict(registry._OPTIMIZERS))
    yield
    sys.modules.pop("my_names", None)


def write_checkpoint(folder, **names):
    """Of a table whose configuration names what nothing registered; that configuration, as stored."""
    stored = json.loads(feature_config_to_json({"x": FeatureConfig(TableConfig(4, 2, name="t"))}))
    stored["tables"][0].update(names)
    (folder / "0").mkdir(parents=True)
    parts = {"t": (ROWS.shape, ROWS.dtype, [(0, ROWS)])}
    write_step(folder / "0", 0, json.dumps(stored), parts, {}, {}, {}, {})
    return stored


def test_optimizers_and_initializers_need_no_module(tmp_path, capsys):
    optimizer = SGD(0.1).to_dict()
    optimizer["arguments"]["learning_rate"] = {"function": "my_rate"}
    names = {"optimizer": optimizer, "initializer": {"name": "my_initializer", "arguments": {"a": 1}}}
    stored = write_checkpoint(tmp_path / "checkpoint", combiner="sum", **names)
    assert main(["convert", "checkpoint", "--to", "serving", "bundles"]) == 0
    for folder in ("checkpoint", "bundles"):
        assert main(["inspect", folder]) == 0
        assert "sgd" in capsys.readouterr().out
        embedding = EmbeddingForServing.restore(folder)
        found = embedding({"x": RaggedTensor.from_lists([[0, 1], [3]])})["x"]
        assert found.tolist() == [[2, 4], [6, 7]]
    # Nothing of them is lost on the way back.
    assert main(["convert", "bundles", "--to", "jaxembed", "again"]) == 0
    again = layout.read_manifest(tmp_path / "again" / "0")["feature_config"]
    assert json.loads(again) == stored
    np.savez(tmp_path / "tables.npz", t=ROWS)
    (tmp_path / "features.json").write_text(json.dumps(stored))
    line = "convert tables.npz --to jaxembed of_arrays --feature-config features.json"
    assert main(line.split()) == 0
    assert json.loads(layout.read_manifest(tmp_path / "of_arrays" / "0")["feature_config"]) == stored
    table = open_bundle("bundles").feature_config["x"].table
    with pytest.raises(ValueError, match="unknown initializer 'my_initializer'"):
        table.initializer(jax.random.key(0), (4, 2))
    with pytest.raises(ValueError, match="unknown function 'my_rate'"):
        ShardedEmbedding({"x": FeatureConfig(table)}, None, jax.make_mesh((1,), ("d",)))


@pytest.mark.parametrize(
    "line", ["inspect checkpoint", "diff checkpoint checkpoint", "convert checkpoint --to serving bundles"]
)
def test_combiners_need_their_module(tmp_path, line, capsys):
    combiner = {"combiner_computation": "my_sum", "max_valency": 4, "num_weights": 0, "initializer": None}
    combiner["combiner_weights_learning_rate"] = 0.01
    write_checkpoint(tmp_path / "checkpoint", combiner=combiner)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'checkpoint' / '0'}: table 't': unknown combiner 'my_sum'; known: " in error
    assert "commands do so with --import MODULE." in error
    assert main([*line.split(), "--import", "my_names"]) == 0


def test_optimizers_of_a_job(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pydantic")
    from jaxembed.train.job import command

    built = []

    def train(config):
        built.append(config.tables.optimizer.build())
        raise ValueError("that is all")

    monkeypatch.setattr(command, "train", train)
    optimizer = "[tables.optimizer]\nname = 'my_sgd'\nlearning_rate = 0.5\n"
    (tmp_path / "job.toml").write_text(f"out = 'out'\n[data]\nkind = 'movielens'\n{optimizer}")
    assert main(["train", "--config", "job.toml"]) == 2
    assert "tables.optimizer: unknown optimizer 'my_sgd'" in capsys.readouterr().err
    assert main(["train", "--config", "job.toml", "--import", "my_names"]) == 2
    assert "that is all" in capsys.readouterr().err
    assert [(optimizer.name, optimizer.learning_rate) for optimizer in built] == [("my_sgd", 0.5)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nosuch",
            "--import nosuch cannot be imported: No module named 'nosuch'; install it, or name its folder",
        ),
        ("my/names.py", "--import must be a module, such as my.combiners, got 'my/names.py'"),
    ],
)
def test_modules_that_cannot_be_imported(name, said, capsys):
    assert main(["inspect", "checkpoint", "--import", name]) == 2
    assert said in capsys.readouterr().err
