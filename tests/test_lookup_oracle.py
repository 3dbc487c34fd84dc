"""Every recorded answer of TensorFlow, eagerly and under jit, on every path.

Compiling takes far longer than looking up, so that the cases run 25 to a program; plain JAX, which XLA takes long to
compile, runs a part of them in most runs, another one eagerly than under jit.
"""

import jax
import pytest

from jaxembed import kernel, serving_embedding_lookup, use_backend
from tests import oracle

IDS = oracle.case_ids()
GROUPS = {f"{group[0]}..{group[-1]}": group for group in (IDS[i : i + 25] for i in range(0, len(IDS), 25))}


def one(at):
    """One group, and the others where there is time."""
    return [pytest.param(group, marks=pytest.mark.slow) if i != at else group for i, group in enumerate(GROUPS)]


@pytest.mark.parametrize("group", GROUPS)
def test_eager(group):
    eagerly(group, "native" if kernel.available() else "xla")


@pytest.mark.parametrize("group", one(0))
def test_eager_plain_jax(group):
    eagerly(group, "xla")


def eagerly(group, path):
    case = oracle.merge({id: oracle.load_case(id) for id in GROUPS[group]})
    with use_backend(path):
        outputs = serving_embedding_lookup(case.inputs, case.weights, case.tables, case.feature_config)
    oracle.check(case, outputs)


@pytest.mark.parametrize("group", GROUPS)
def test_jit(group):
    if not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    under_jit(group, "native")


@pytest.mark.parametrize("group", one(2))
def test_jit_plain_jax(group):
    under_jit(group, "xla")


def under_jit(group, path):
    case = oracle.merge({id: oracle.load_case(id) for id in GROUPS[group]})

    @jax.jit
    def lookup(inputs, weights, tables):
        return serving_embedding_lookup(inputs, weights, tables, case.feature_config)

    with use_backend(path):
        oracle.check(case, lookup(case.inputs, case.weights, case.tables))


def test_all_cases_are_there():
    assert len(IDS) == 250
    assert sum(len(oracle.load_case(id).inputs) for id in IDS) == 629


def test_a_wrong_answer_is_reported_with_its_case_and_feature():
    merged = oracle.merge({IDS[0]: oracle.load_case(IDS[0])})
    outputs = serving_embedding_lookup(merged.inputs, merged.weights, merged.tables, merged.feature_config)
    feature = next(iter(outputs))
    outputs[feature] = outputs[feature] + 1
    with pytest.raises(AssertionError, match=f"{feature}: "):
        oracle.check(merged, outputs)
