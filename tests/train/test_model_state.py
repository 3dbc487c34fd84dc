"""Models with BatchNorm and Dropout: trained, evaluated, saved, resumed and served."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxembed as je
from jaxembed.checkpoint import convert_to_bundle, read_checkpoint
from jaxembed.cli import main
from jaxembed.optimizers import Adagrad
from jaxembed.serve import ServingModel, export_model
from jaxembed.train import Checkpointer, Embedding, ShardedEmbedding, Trainer, TrainState
from jaxembed.train.data import Batch
from jaxembed.train.dlrm import DLRM

TABLE = je.TableConfig(32, 4, combiner="sum", name="t")
CONFIG = {"a": je.FeatureConfig(TABLE), "b": je.FeatureConfig(TABLE)}
B, D = 8, 4


class Model(nnx.Module):
    """BatchNorm and Dropout; `seen` counts calls, as a variable of one's own does."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, 1, rngs=rngs)])
        self.norm = nnx.BatchNorm(D, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, dense, activations, mask=None):
        self.seen[...] += 1
        x = self.layers[0](activations["a"] + activations["b"] + dense)
        x = self.dropout(self.norm(x, mask=None if mask is None else mask[:, None]))
        return self.layers[1](x)[:, 0]


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax's Adam mixes a float with an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def mesh(devices):
    return jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])


def make_trainer(devices=8, model=None, optimizer=None):
    embedding = ShardedEmbedding(CONFIG, Adagrad(0.3), mesh(devices))
    return Trainer(embedding, model or Model(nnx.Rngs(0)), optimizer or optax.adam(0.03))


def batch(seed, real=B):
    """Its rows beyond `real` fill it up."""
    rng = np.random.default_rng(seed)
    features = {
        "a": je.RaggedTensor.from_lists([[int(x), int(x) + 1] for x in rng.integers(0, 30, B)]),
        "b": rng.integers(0, 32, B).astype(np.int32),
    }
    dense = rng.normal(size=(B, D)).astype(np.float32)
    mask = (np.arange(B) < real).astype(np.float32)
    return Batch(features, {"a": None, "b": None}, dense, rng.integers(0, 2, B).astype(np.float32), mask)


def trained(trainer, state, seeds):
    for seed in seeds:
        state, metrics = trainer.step(state, trainer.shard_batch(batch(seed)))
    return state, metrics


def same_bits(one, other):
    for (path, a), (other_path, b) in zip(*map(jax.tree.leaves_with_path, (one, other)), strict=True):
        assert (path, a.dtype) == (other_path, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def normalized_input(trainer, state, given):
    """What BatchNorm gets, in numpy."""
    tables = trainer.embedding.embedding_tables(state.embedding)
    found = je.serving_embedding_lookup(given.features, None, tables, CONFIG)
    linear = state.params["layers"][0]
    x = np.asarray(found["a"]) + np.asarray(found["b"]) + given.dense
    return x @ np.asarray(linear["kernel"]) + np.asarray(linear["bias"])


@pytest.mark.parametrize("real", [B, 5], ids=["whole", "filled_up"])
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_batch_norm_averages_over_the_rows_of_all_devices(devices, real):
    trainer = make_trainer(devices)
    state, given = trainer.init(jax.random.key(0)), batch(0, real)
    x = normalized_input(trainer, state, given)[:real]
    after, _ = trainer.step(state, trainer.shard_batch(given))
    norm = after.model_state["norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * x.var(0), rtol=1e-4)
    assert norm["mean"].sharding.is_fully_replicated
    assert after.model_state["seen"] == 1


class Distant(nnx.Module):
    """Divides by what is 0 of rows of zeros, or of rows that are alike: norms, deviations and distances."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, dense, activations):
        one, other = self.linear(activations["a"]), activations["b"]
        cosine = (one / jnp.linalg.norm(one, axis=1, keepdims=True) * other).sum(1)
        deviation = jnp.std(other, axis=1) + 1 / jnp.linalg.norm(other, axis=1)
        return cosine / deviation + jnp.linalg.norm(activations["a"] - other, axis=1)


def test_rows_of_padding_are_nothing_that_a_model_cannot_divide_by():
    """A loss that leaves them out does not keep NaN from the gradients of the parameters."""
    ids = np.array([1, 2, 3, 1], np.int32)
    after = []
    for count in (4, 3):
        trainer = make_trainer(1, Distant(nnx.Rngs(0)), optax.sgd(0.1))
        real = np.float32([1, 1, 1, 0])[:count]
        features = {"a": ids[:count], "b": ids[:count] + 1}
        given = trainer.shard_batch(
            Batch(features, {"a": None, "b": None}, np.zeros((count, 0), np.float32), real, real)
        )
        state, metrics = trainer.step(trainer.init(jax.random.key(0)), given)
        predicted = trainer.predict(state, given)
        assert np.isfinite(np.concatenate([metrics["logits"], predicted])).all()
        after.append((metrics["loss"], state.params, trainer.embedding.to_canonical(state.embedding)[:2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *after)


class Dropped(nnx.Module):
    """What Dropout makes of ones is in the logits."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, dense, activations):
        noise = self.dropout(jnp.ones_like(dense))
        return self.scale * (noise * 3.0 ** jnp.arange(D)).sum(1) + 0 * activations["b"].sum(1)


@pytest.mark.slow
def test_dropout_draws_the_same_on_every_mesh_and_anew_in_every_step():
    draws = {}
    for devices in (1, 4, 8):
        trainer = make_trainer(devices, Dropped(nnx.Rngs(7)), optax.set_to_zero())
        state, draws[devices] = trainer.init(jax.random.key(0)), []
        for seed in range(3):
            state, metrics = trainer.step(state, trainer.shard_batch(batch(seed)))
            draws[devices].append(np.asarray(metrics["logits"]))
        assert state.model_state["dropout"]["rngs"]["count"] == 3
        assert set(np.asarray(trainer.predict(state, trainer.shard_batch(batch(0))))) == {1 + 3 + 9 + 27}
    np.testing.assert_array_equal(draws[1], draws[8])
    np.testing.assert_array_equal(draws[1], draws[4])
    first, second, _ = draws[8]
    assert len(set(first)) > 2, "rows must differ"
    assert (first != second).any(), "steps must differ"


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, dense, activations):
        return linen.Dense(1)(dense + activations["a"])[:, 0]


def test_a_linen_module_trains_once_it_is_wrapped():
    """The wrapper draws keys in evaluation, too."""
    with pytest.raises(ValueError, match=r"model must be a flax.nnx.Module, got OfLinen; wrap .*ToNNX\("):
        make_trainer(model=OfLinen())
    zeros = jnp.zeros((B, D))
    model = nnx.bridge.ToNNX(OfLinen(), rngs=nnx.Rngs(0)).lazy_init(zeros, {"a": zeros})
    trainer = make_trainer(1, model)
    state, given = trainer.init(jax.random.key(0)), trainer.shard_batch(batch(0))
    before = np.asarray(state.params["Dense_0"]["kernel"])
    state, _ = trainer.step(state, given)
    assert (state.params["Dense_0"]["kernel"] != before).all()
    predicted = np.asarray(trainer.predict(state, given))
    np.testing.assert_allclose(predicted, trainer.step(state, given)[1]["logits"], rtol=1e-5)


def test_training_and_evaluation_mode():
    model = Model(nnx.Rngs(0))
    model.eval()  # what a caller left it in is of no effect
    kinds = nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngCount)
    before = nnx.to_pure_dict(nnx.state(model, kinds))
    trainer = make_trainer(model=model)
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(5))
    kept = jax.tree.map(np.asarray, state)
    given = trainer.shard_batch(batch(9))
    found = np.asarray(trainer.predict(state, given))
    np.testing.assert_array_equal(found, trainer.predict(state, given))
    same_bits(kept, state)
    same_bits(before, nnx.to_pure_dict(nnx.state(model, kinds)))
    assert model.dropout.deterministic
    assert model.norm.use_running_average
    x = normalized_input(trainer, state, batch(9))
    norm = kept.params["norm"] | kept.model_state["norm"]
    x = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    last = kept.params["layers"][1]
    np.testing.assert_allclose(found, (x @ last["kernel"] + last["bias"])[:, 0], rtol=1e-4, atol=1e-5)
    assert trainer.step._cache_size() == 1


def test_it_learns():
    trainer = make_trainer()
    state, given, losses = trainer.init(jax.random.key(0)), trainer.shard_batch(batch(0)), []
    for _ in range(60):
        state, metrics = trainer.step(state, given)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    trainer = make_trainer()
    uninterrupted, _ = trained(trainer, trainer.init(jax.random.key(0)), range(6))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(3))
    with Checkpointer(tmp_path, trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model)
    # Another model of the same kind: where the run goes on does not depend on what it started from.
    trainer = make_trainer(model=Model(nnx.Rngs(5)))
    with Checkpointer(tmp_path, trainer.embedding) as checkpointer:
        restored = checkpointer.restore(model=trainer.init(jax.random.key(1)).model)
    state, _ = trained(trainer, TrainState(restored.state, **restored.model), range(3, 6))
    same_bits(uninterrupted, state)
    assert state.model_state["seen"] == 6


def test_restored_on_another_mesh(tmp_path):
    # Adam would make steps of the rounding errors that are the gradient of a bias before BatchNorm.
    trainer = make_trainer(8, optimizer=optax.sgd(0.03))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(3))
    with Checkpointer(tmp_path, trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model)
    other = make_trainer(2, optimizer=optax.sgd(0.03))
    with Checkpointer(tmp_path, other.embedding) as checkpointer:
        restored = checkpointer.restore(model=other.init(jax.random.key(1)).model)
    moved = TrainState(restored.state, **restored.model)
    same_bits(state.model, moved.model)
    (ours, _), (theirs, _) = trained(trainer, state, range(3, 5)), trained(other, moved, range(3, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours.model, theirs.model)


def test_a_model_without_such_state_is_saved_as_before(tmp_path):
    class Head(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, 1, rngs=rngs)

        def __call__(self, dense, activations):
            return self.linear(activations["a"] + activations["b"] + dense)[:, 0]

    trainer = make_trainer(model=Head(nnx.Rngs(0)))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    assert state.model_state == {}
    assert state.model.keys() == {"params", "opt_state"}
    with Checkpointer(tmp_path, trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model={"params": state.params, "opt_state": state.opt_state})
        restored = checkpointer.restore(model=trainer.init(jax.random.key(1)).model)
    same_bits(state, TrainState(restored.state, **restored.model))
    with_more = make_trainer()
    with (
        Checkpointer(tmp_path, with_more.embedding) as checkpointer,
        pytest.raises(ValueError, match=r"model must have the leaves .*'model_state.norm.mean'"),
    ):
        checkpointer.restore(model=with_more.init(jax.random.key(1)).model)


@pytest.mark.parametrize("by", ["function", pytest.param("command", marks=pytest.mark.slow)])
def test_served_as_it_is_evaluated(tmp_path, by):
    trainer = make_trainer(model=DLRM(D, 2, D, dropout=0.5, batch_norm=True, rngs=nnx.Rngs(0)))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(4))
    with Checkpointer(tmp_path / "checkpoints", trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model)
    exported = export_model(
        lambda variables, activations, dense: trainer.apply_model(variables, dense["dense"], activations),
        trainer.variables(trainer.abstract_state().model),
        CONFIG,
        dense_inputs={"dense": D},
    )
    if by == "function":
        convert_to_bundle(
            tmp_path / "checkpoints", tmp_path / "bundles", select_model=trainer.variables, exported=exported
        )
    else:
        (tmp_path / "model").write_bytes(exported)
        line = ["convert", str(tmp_path / "checkpoints"), "--to", "serving", str(tmp_path / "bundles")]
        line += ["--model-key", "params", "--model-key", "model_state", "--exported", str(tmp_path / "model")]
        assert main(line) == 0
    served = ServingModel(tmp_path / "bundles", max_batch_size=B)
    given = batch(9)
    expected = trainer.predict(state, trainer.shard_batch(given))
    np.testing.assert_allclose(
        served(given.features, None, {"dense": given.dense}), expected, rtol=1e-5, atol=1e-6
    )
    assert np.abs(np.asarray(expected)).max() > 0.1


def test_a_list_of_more_than_ten_layers_is_saved_and_served(tmp_path):
    """Its places are keys that are numbers: 10 comes after 2, "10" before "2"."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(12)])

        def __call__(self, dense, activations):
            x = activations["a"] + activations["b"] + dense
            for layer in self.layers:
                x = x + layer(x)
            return x.sum(1)

    trainer = make_trainer(model=Deep(nnx.Rngs(0)), optimizer=optax.sgd(1e-6))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    with Checkpointer(tmp_path / "checkpoints", trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model, metadata={2: "b", 10: "a"}, data={2: 0, 10: 1})
        restored = checkpointer.restore(model=trainer.init(jax.random.key(1)).model)
    assert (restored.metadata, restored.data) == ({"2": "b", "10": "a"}, {"2": 0, "10": 1})
    same_bits(state, TrainState(restored.state, **restored.model))
    exported = export_model(
        lambda variables, activations, dense: trainer.apply_model(variables, dense["dense"], activations),
        trainer.variables(trainer.abstract_state().model),
        CONFIG,
        dense_inputs={"dense": D},
    )
    convert_to_bundle(
        tmp_path / "checkpoints", tmp_path / "bundles", select_model=trainer.variables, exported=exported
    )
    served, given = ServingModel(tmp_path / "bundles", max_batch_size=B), batch(9)
    np.testing.assert_allclose(
        served(given.features, None, {"dense": given.dense}),
        trainer.predict(state, trainer.shard_batch(given)),
        rtol=1e-5,
        atol=1e-4,  # of sums that reach a hundred
    )


def test_parts_of_a_model_that_do_not_lie_side_by_side(tmp_path, capsys):
    trainer = make_trainer()
    with Checkpointer(tmp_path / "checkpoints", trainer.embedding) as checkpointer:
        model = {"one": {"w": jnp.zeros(1)}, "two": {"w": jnp.ones(1)}}
        checkpointer.save(trainer.init(jax.random.key(0)).embedding, model=model)
    line = ["convert", str(tmp_path / "checkpoints"), "--to", "serving", str(tmp_path / "bundles")]
    assert main([*line, "--model-key", "one", "--model-key", "two"]) == 2
    assert "--model-key two: it has an entry that a part before it has, too" in capsys.readouterr().err


def test_the_variables_of_a_checkpoint_are_those_of_the_state(tmp_path):
    trainer = make_trainer()
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    with Checkpointer(tmp_path, trainer.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model)
    found = trainer.variables(read_checkpoint(tmp_path).model)
    same_bits(trainer.variables(state.model), found)
    assert set(found) == {"layers", "norm", "seen"}  # no random keys
    assert set(found["norm"]) == {"scale", "bias", "mean", "var"}


def test_abstract_state_compiles_the_step():
    trainer = make_trainer()
    state = trainer.init(jax.random.key(0))
    abstract = trainer.abstract_state()
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (abstract, state)]
    assert forms[0] == forms[1]
    compiled = trainer.step.lower(abstract, trainer.abstract_batch(batch(0))).compile()
    after, _ = compiled(state, trainer.shard_batch(batch(0)))
    expected, _ = make_trainer().step(trainer.init(jax.random.key(0)), trainer.shard_batch(batch(0)))
    same_bits(after, expected)


def test_an_abstract_batch_has_the_rows_of_all_hosts(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    abstract = trainer.abstract_batch(batch(0))
    rows = {x.shape[0] for x in (abstract.dense, abstract.labels, abstract.mask)}
    assert rows == {2 * len(batch(0).labels)}
    activations = jax.eval_shape(
        trainer.embedding.lookup, trainer.abstract_state().embedding, abstract.features
    )
    assert {x.shape[0] for x in jax.tree.leaves(activations)} == rows


def test_an_optimizer_that_keeps_the_first_parameters():
    """As optax.contrib.dog does: a step cannot be given one array twice."""
    anchored = optax.GradientTransformation(
        lambda params: {"anchor": params, "again": params},
        lambda gradients, state, params: (jax.tree.map(lambda g: -0.1 * g, gradients), state),
    )
    trainer = make_trainer(optimizer=anchored)
    first = jax.tree.map(np.asarray, trainer.init(jax.random.key(0)).params)
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    same_bits(first, state.opt_state["anchor"])
    same_bits(first, state.opt_state["again"])
    assert trainer.step._cache_size() == 1


def test_keys_of_another_kind():
    key = jax.random.key(3, impl="rbg")
    trainer = make_trainer(model=Dropped(nnx.Rngs(key)))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    assert state.model_state["dropout"]["rngs"]["key"].shape == (4,)


def test_values_that_are_no_arrays_or_are_trees_of_them():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, 1, rngs=rngs)
            self.rate = nnx.data(0.5)
            self.sums = nnx.Variable({"x": jnp.zeros(D), "more": (jnp.ones(()),)})

        def __call__(self, dense, activations):
            self.sums.set_value({"x": self.sums["x"] + dense.sum(0), "more": self.sums["more"]})
            return self.rate * self.linear(activations["a"] + activations["b"])[:, 0]

    trainer = make_trainer(model=Mixed(nnx.Rngs(0)))
    state, _ = trained(trainer, trainer.init(jax.random.key(0)), range(2))
    expected = batch(0).dense.sum(0) + batch(1).dense.sum(0)
    np.testing.assert_allclose(state.model_state["sums"]["x"], expected, rtol=1e-4, atol=1e-5)
    assert trainer.step._cache_size() == 1


def test_state_that_a_call_makes_is_an_error():
    class Growing(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, 1, rngs=rngs)

        def __call__(self, dense, activations):
            self.last = nnx.BatchStat(dense.sum(0))
            return self.linear(activations["a"] + activations["b"])[:, 0]

    trainer = make_trainer(model=Growing(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"only before or only after it: \['last'\] float32\[4\]. Make all"):
        trained(trainer, trainer.init(jax.random.key(0)), [0])


def test_tables_inside_of_the_model_are_an_error():
    class Holding(nnx.Module):
        def __init__(self, rngs):
            self.tables = Embedding(CONFIG, Adagrad(0.1), mesh(8), rngs=rngs)

        def __call__(self, dense, activations):
            return dense.sum(1)

    with pytest.raises(ValueError, match=r"got a model that holds others at tables\.state\. Look them up"):
        make_trainer(model=Holding(nnx.Rngs(0)))
