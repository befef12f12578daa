"""Protects routed experts on both engines: the balance loss, experts without tokens, pieces of an expert's tokens."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from msft.backend.contract import Batch
from tests.conformance import families
from tests.conformance.tiny_engines import ENGINES

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
COEFFICIENT = 0.7


@pytest.fixture
def balanced(monkeypatch):
    """Engines that train with the balance loss."""
    monkeypatch.setattr(families, "RUNTIME", replace(families.RUNTIME, balance=COEFFICIENT))


def oracle_of(model, one):
    """Cross-entropy and balance loss of transformers, and all gradients of the first plus COEFFICIENT x the second."""
    ids, labels = (torch.from_numpy(array).long() for array in (one.input_ids, one.labels))
    mask = torch.from_numpy((one.segment_ids != 0).astype(np.int64))
    found = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    model.zero_grad()
    (loss + COEFFICIENT * found.aux_loss).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return loss.item(), found.aux_loss.item(), gradients


def assert_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 0.05 * largest)
        np.testing.assert_allclose(found[name], gradient, atol=2e-5 * scale, err_msg=name)


CASES = [
    pytest.param(name, engine, marks=[] if engine == "torch" or name == "qwen2_moe" else pytest.mark.families)
    for engine in ENGINES
    for name in FAMILIES
]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_the_balance_loss_is_transformers(name, engine, balanced):
    """Its value and every gradient, the step's loss; an evaluation has none of it."""
    built, one = families.build(engine, name, families.full(name)), families.batch()
    loss, uneven, gradients = oracle_of(families.oracle(name), one)
    assert_gradients(built.gradients(one), gradients)
    assert built.evaluate(one)[0] / one.supervised == pytest.approx(loss, abs=1e-5)
    result = built.train_step([one], 0.0)
    assert result.balance == pytest.approx(uneven, abs=1e-6) and uneven > 1
    assert result.loss == pytest.approx(loss + COEFFICIENT * uneven, abs=1e-5)
    applied = built.describe()
    assert "none dropped" in applied["experts"] and applied["balance loss"].startswith("x 0.7, ")


@pytest.mark.parametrize("engine", ["torch", pytest.param("mindspore", marks=pytest.mark.families)])
def test_a_steps_balance_loss_is_the_mean_of_its_micro_batches(engine, balanced):
    """Each weighs as much as it has supervised tokens."""
    built = families.build(engine, "qwen2_moe", families.lora("qwen2_moe"))
    parts = [families.batch(0), families.batch(1, rows=1)]
    results = [built.train_step([part], 0.0) for part in parts]
    whole, counts = built.train_step(parts, 0.0), [part.supervised for part in parts]
    assert results[0].balance != pytest.approx(results[1].balance, rel=1e-3)
    assert whole.balance == pytest.approx(np.average([result.balance for result in results], weights=counts), rel=1e-6)
    assert whole.loss == pytest.approx(np.average([result.loss for result in results], weights=counts), rel=1e-5)


def one_token():
    """A text of a single token, whose answer is supervised."""
    ids, labels, one, zero = (np.array([[value]], np.int32) for value in (7, 9, 1, 0))
    return Batch(ids, labels, zero, one, zero)


@pytest.mark.parametrize("engine", ENGINES)
def test_experts_without_a_token_have_no_gradient(engine):
    """Of five experts a single token has two; the other three stay as they are, here and in transformers."""
    built, one = families.build(engine, "mixtral", families.full("mixtral")), one_token()
    loss, gradients = families.oracle_gradients(families.oracle("mixtral"), one)
    found = built.gradients(one)
    assert built.evaluate(one)[0] == pytest.approx(loss, abs=1e-5)
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        used = np.abs(gradients[name]).max((1, 2)) > 0
        assert used.sum() == 2 and not found[name][~used].any()
    assert_gradients(found, gradients)


def test_an_experts_tokens_are_computed_in_pieces(monkeypatch):
    """Many small pieces and a few large ones are the same: 50 tokens in pieces of 16 and 4, and in one of 64."""
    name, one = "mixtral", families.batch()
    module = importlib.import_module("msft.backend.mindspore.experts")
    built = families.build("mindspore", name, families.full(name))
    expected = built.logits(one), built.gradients(one)
    monkeypatch.setattr(module, "PIECES", (16, 4))
    np.testing.assert_allclose(built.logits(one), expected[0], atol=1e-5)
    assert_gradients(built.gradients(one), expected[1])


@pytest.mark.parametrize("engine", ["torch", pytest.param("mindspore", marks=pytest.mark.families)])
def test_blocks_that_are_computed_again_are_counted_once(engine, balanced, monkeypatch):
    name, one = "qwen2_moe", families.batch()
    built = families.build(engine, name, families.full(name))
    expected, step = built.gradients(one), built.train_step([one], 0.0)
    monkeypatch.setattr(families, "RUNTIME", replace(families.RUNTIME, recompute=True))
    again = families.build(engine, name, families.full(name))
    assert_gradients(again.gradients(one), expected)
    assert again.train_step([one], 0.0).balance == pytest.approx(step.balance, abs=1e-7)
