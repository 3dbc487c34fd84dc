"""The configuration file of a training job: types, overrides, and errors that say what is allowed."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import pytest
from pydantic import ValidationError

from jaxembed.checkpoint import whole_steps
from jaxembed.cli import main
from jaxembed.optimizers import Adam
from jaxembed.train.job import MovieLensData, ParquetData, TableOptimizer, Training, load_config

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
MINIMAL = 'out = "runs/x"\n[data]\nkind = "movielens"\n'


def write(tmp_path, text, name="job.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_load(path):
    assert load_config(path).data.kind == path.stem


def test_toml_and_json_are_the_same(tmp_path):
    toml = load_config(write(tmp_path, MINIMAL))
    assert toml == load_config(write(tmp_path, '{"out": "runs/x", "data": {"kind": "movielens"}}', "job.json"))
    assert isinstance(toml.data, MovieLensData)


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    sets = ["training.batch_size=64", "model.top=[8, 4]", "tables.optimizer.name=adam", "data.path=some/where"]
    config = load_config(
        path, [*sets, 'tables.plan.user="replicated"', "tables.optimizer.arguments.beta_1=0.8"]
    )
    assert (config.training.batch_size, config.model.top) == (64, (8, 4))
    assert (config.data.path, config.tables.plan) == ("some/where", {"user": "replicated"})
    assert config.tables.optimizer.build() == Adam(0.05, beta_1=0.8)
    config = load_config(path, ["tables.plan=auto", "tables.overrides.user=div"])
    assert (config.tables.plan, config.tables.overrides) == ("auto", {"user": "div"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", r"training.batch_size: must be greater than 0, got 0"),
        ("training.batch_size='8'", r"training.batch_size: must be a valid integer, got '8'"),
        ("training.batch_size=true", r"training.batch_size: must be a valid integer, got True"),
        ("training.seed=-1", r"training.seed: must be greater than or equal to 0, got -1"),
        ("training.seed=9223372036854775808", r"training.seed: must be less than 9223372036854775808, got 92"),
        ("training.seed=99999999999999999999", r"training.seed: .*, got 99999999999999999999"),
        (
            'data={kind="synthetic", seed=-1}',
            r"data.synthetic.seed: must be greater than or equal to 0, got -1",
        ),
        (
            'data={kind="synthetic", vocabulary_sizes=3000000000}',
            r"data.synthetic.vocabulary_sizes.*: must be less than 2147483648, got 3000000000",
        ),
        (
            'data={kind="criteo", path="x", vocabulary_sizes=[2147483648]}',
            r"data.criteo.vocabulary_sizes.*: must be less than 2147483648, got 2147483648",
        ),
        ("tables.exchange=ring", r"tables.exchange: must be 'auto', 'all_gather' or 'all_to_all', got 'ring'"),
        ("training.batchsize=8", r"training.batchsize: there is no such key; those are batch_size, epochs"),
        ("tables.plan=best", r"tables.plan.*: must be 'auto', got 'best'"),
        ("tables.plan.user=ring", r"tables.plan.*user: must be 'mod', 'div', .* got 'ring'"),
        ("tables.overrides.user=mod", r"tables: overrides are of plan = \"auto\", got plan {}"),
        ("data.history=8", r"history: there is no such key; those are kind, path, max_history"),
        ("data.kind=netflix", r"'movielens', 'criteo', 'parquet', 'synthetic'"),
        ("tables.optimizer.name=lion", r"tables.optimizer: .*lion.*adagrad"),
        ("tables.optimizer.arguments.beta=1", r"tables.optimizer: arguments of adagrad cannot be .*beta"),
        (
            "dense_optimizer.learning_rate=-1.0",
            r"dense_optimizer.learning_rate: must be greater than 0, got -1.0",
        ),
        ("distributed.process_id=1", r"distributed: .* must be given together"),
        ("out=gs://bucket/run", r"out must be a folder that is mounted, got the address 'gs://bucket/run'"),
        ('data={kind="parquet", train=[], labels="y", features={}}', r"train: Tuple .* at least 1 item"),
        ("out.x=1", r"'out' is a value, not a table"),
        ("out", r"--set must be of the form a.b=c, got 'out'"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


def test_all_wrong_keys_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)job.toml is not.*out: must be given.*training.steps: must be"):
        load_config(write(tmp_path, '[data]\nkind = "movielens"\n[training]\nsteps = 0\n'))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("job.yaml", "", "must be a .toml or .json file"),
        ("job.toml", "a = ", "is not TOML"),
        ("job.json", "[1]", "must hold an object, got list"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text, name))


def test_files_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    path = tmp_path / "job.toml"
    path.write_bytes(MINIMAL.replace("runs/x", "runs/é").encode())
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "latin-1")
    assert load_config(path).out == "runs/é"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no configuration file at .*job\.toml; examples/ .* to start from"
    ):
        load_config(tmp_path / "job.toml")


def test_checked_at_construction_and_frozen():
    with pytest.raises(ValidationError, match="batch_size"):
        Training(batch_size=-1)
    with pytest.raises(ValidationError, match="unknown optimizer 'lion'"):
        TableOptimizer("lion")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Training().batch_size = 3


def test_parquet_features_are_typed(tmp_path):
    config = load_config(EXAMPLES / "parquet.toml")
    assert isinstance(config.data, ParquetData)
    assert config.data.features["history"].table == "item"


def test_the_command_reports_errors(tmp_path, capsys):
    assert main(["train", "--config", str(write(tmp_path, MINIMAL)), "--set", "training.steps=0"]) == 2
    assert "training.steps: must be greater than 0, got 0" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2


@pytest.mark.slow
def test_the_command_trains_and_goes_on(tmp_path, capfd):
    command = ["train", "--config", str(EXAMPLES / "synthetic.toml")]
    for value in (
        f"out={tmp_path}/run",
        "data.examples=300",
        "data.evaluation_examples=100",
        "data.vocabulary_sizes=50",
        "training.batch_size=64",
    ):
        command += ["--set", value]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*command, "--set", "training.steps=2"]) == 0
        assert main([*command, "--set", "training.steps=3"]) == 0
    assert "goes on from step 2 of 3" in capfd.readouterr().out
    assert whole_steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_module_and_command_are_one(capsys):
    command = [sys.executable, "-m", "jaxembed.train", "--help"]
    module = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "usage: jaxembed train" in module
    assert module.split() == capsys.readouterr().out.split()
