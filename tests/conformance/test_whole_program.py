"""Protects the program that MindSpore's semi-automatic mode cuts: in one process it computes what both engines do.

Strategies have no effect in one process. That Ascend gives the same on several was never run.
"""

from dataclasses import replace

import numpy as np
import pytest

from msft.backend.contract import Batch
from msft.backend.plan import Plan
from tests.conformance.tiny_engines import CONFIGS, RUNTIME, batch, build, full, lora, run

WHOLE = replace(RUNTIME, plan=Plan())
# MindSpore compiles the other engine's blocks for each case; the two engines are held against each other elsewhere.
ENGINES = ("torch", pytest.param("mindspore", marks=pytest.mark.slow))
CASES = [
    ("untied", "full"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tied", "full"), ("untied", "lora with dropout"))),
]


def config_of(kind):
    """One layer, because a step's program is compiled anew for each test."""
    return {**CONFIGS[kind], "num_hidden_layers": 1}


def built(engine, kind, tuning, runtime=RUNTIME):
    config = config_of(kind)
    tunings = {"lora with dropout": lora(config, dropout=0.1), "full": full(config)}
    return build(engine, config, tunings[tuning], runtime)


def whole(kind, tuning):
    return built("mindspore", kind, tuning, WHOLE)


def random_weights(engine):
    """Weights for what is tuned, adapters' B too, which begins as zeros and hides A's gradient."""
    generator = np.random.default_rng(5)
    return {
        name: generator.normal(0, 0.2, shape).astype(np.float32) for name, shape in engine.model.tuned_shapes().items()
    }


def packed():
    """One row of two examples, of which the second's positions begin anew, and a row with padding."""
    one = batch(3, rows=2, padding=False)
    positions, segments, numbers = (array.copy() for array in (one.position_ids, one.segment_ids, one.row_ids))
    positions[0, 8:] -= 8
    segments[0, 8:], numbers[0, 8:] = 2, 2
    segments[1, 15:] = 0
    labels = np.where(segments == 0, -100, one.labels)
    return Batch(one.input_ids, labels, positions, segments, numbers)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("kind", "tuning"), CASES)
def test_loss_and_gradients_are_those_of_both_engines(kind, tuning, name):
    program, engine = whole(kind, tuning), built(name, kind, tuning)
    weights = random_weights(program)
    program.model.import_tuned(weights)
    engine.model.import_tuned(weights)
    (loss, gradients), (expected_loss, expected) = (
        one.model.loss_and_gradients(packed(), 0.5, 2) for one in (program, engine)
    )
    found, expected = program.optimizer.to_numpy(gradients), engine.optimizer.to_numpy(expected)
    np.testing.assert_allclose(loss, float(expected_loss), rtol=1e-5)
    assert found.keys() == expected.keys()
    for tensor, gradient in expected.items():
        product = (gradient * found[tensor]).sum(dtype=np.float64)
        lengths = [np.linalg.norm(one.astype(np.float64)) for one in (gradient, found[tensor])]
        assert product / np.prod(lengths) > 0.99999, tensor
        np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-4, err_msg=tensor)


@pytest.mark.slow
def test_what_else_an_engine_shows_is_the_same():
    program, engine, rows = whole("tied", "full"), built("torch", "tied", "full"), packed()
    assert program.evaluate(rows)[1] == engine.evaluate(rows)[1]
    np.testing.assert_allclose(program.evaluate(rows)[0], engine.evaluate(rows)[0], rtol=1e-5)
    np.testing.assert_allclose(program.token_logprobs(rows), engine.token_logprobs(rows), atol=2e-5)
    np.testing.assert_allclose(program.logits(rows)[0], engine.logits(rows)[0], atol=2e-5)
    expected = engine.activations(rows)
    for name, found in program.activations(rows).items():
        np.testing.assert_allclose(found, expected[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("tuning", ["lora with dropout", pytest.param("full", marks=pytest.mark.slow)])
def test_steps_are_those_of_the_shared_engine(tuning, name):
    """Two micro-batches of unequal size, clipping and decay in one program; the state is one that either takes."""
    program, engine = whole("tied", tuning), built(name, "tied", tuning)
    np.testing.assert_allclose(run(program, 3), run(engine, 3), rtol=1e-5)
    found, expected = program.export_state(), engine.export_state()
    assert found.counters == expected.counters
    for tensor, value in expected.weights.items():
        np.testing.assert_allclose(found.weights[tensor], value, atol=2e-4, err_msg=tensor)
    engine.import_state(found)
    program.import_state(expected)
    np.testing.assert_allclose(run(program, 1, start=3), run(engine, 1, start=3), rtol=1e-4)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing():
    program = whole("tied", "lora with dropout")
    weights = random_weights(program)
    name = next(iter(weights))
    program.model.import_tuned({**weights, name: weights[name] * np.float32(np.inf)})
    before = program.export_state()
    result = program.train_step([batch(0)], 1e-2)
    after = program.export_state()
    assert result.skipped and after.counters["optimizer_step"] == 0 and after.counters["step"] == 1
    for kind in ("weights", "first_moment", "second_moment"):
        for tensor, value in getattr(before, kind).items():
            np.testing.assert_array_equal(getattr(after, kind)[tensor], value, err_msg=tensor)
