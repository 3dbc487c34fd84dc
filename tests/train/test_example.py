"""The MovieLens example: of its checkpoints none is lost, and the best of those that are there is served."""

import pathlib
import types

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture
def movielens(monkeypatch):
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(EXAMPLES)
    import movielens

    return movielens


def test_keeps_all_checkpoints(movielens, monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def run(config, sources):
        assert config.checkpoints.keep is None
        assert (config.out, config.training.epochs) == (str(tmp_path), 200)
        raise Stop

    monkeypatch.setattr(
        movielens, "open_sources", lambda *_: types.SimpleNamespace(train="", evaluation="", test="")
    )
    monkeypatch.setattr(movielens, "run", run)
    with pytest.raises(Stop):
        movielens.main(["--out", str(tmp_path), "--epochs", "200"])


def test_serves_the_best_of_the_checkpoints_that_are_there(movielens, monkeypatch, tmp_path):
    """Step 1 was deleted by an earlier run that kept fewer."""
    history = [{"step": step, "evaluation": {"auc": auc}} for step, auc in ((1, 0.9), (2, 0.8), (3, 0.7))]
    result = types.SimpleNamespace(step=3, history=history, checkpoints=tmp_path)
    monkeypatch.setattr(movielens, "train", lambda *_: result)
    monkeypatch.setattr(movielens, "whole_steps", lambda path: [2, 3] if path == tmp_path else None)
    assert movielens.run(None, None) == (result, tmp_path / "2")
