"""Protects models with states on texts of several strips: logits, recompute, generation from long and short prompts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from msft.backend.contract import Batch, Sampling
from tests.conformance import families
from tests.conformance.tiny_engines import ENGINES

# Longer than two strips of 64, than a chunk; a single token, which the convolution reaches beyond.
PROMPTS = [[int(token) for token in np.random.default_rng(3).integers(3, families.VOCABULARY, 135)], [7], [5, 6, 9]]
MARKS = {("mindspore", name): pytest.mark.families for name in ("mamba", "mamba2")}
CASES = [
    pytest.param(engine, name, marks=MARKS.get((engine, name), ()))
    for engine in ENGINES
    for name in ("mamba", "mamba2")
]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_long_texts_are_computed_as_transformers_does(engine, name, monkeypatch):
    """Two examples a row, each as if alone, with what is kept for gradients and with what is computed again."""
    apart = families.batch(5, rows=2, length=150)
    model, real = families.oracle(name), apart.segment_ids.reshape(-1) != 0
    expected = families.oracle_logits(model, apart).detach().numpy().reshape(-1, families.VOCABULARY)[real]
    _, gradients = families.oracle_gradients(model, apart)
    for recompute in (False, True):
        monkeypatch.setattr(families, "RUNTIME", replace(families.RUNTIME, recompute=recompute))
        built, together = families.build(engine, name, families.full(name)), families.packed(apart)
        found = built.logits(together).reshape(-1, families.VOCABULARY)[real]
        np.testing.assert_allclose(found, expected, atol=5e-5)
        for tensor, gradient in built.gradients(together).items():
            largest = np.abs(gradients[tensor]).max()
            np.testing.assert_allclose(gradient, gradients[tensor], atol=5e-5 * largest, err_msg=tensor)


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_prompts_of_unequal_length_go_on_as_each_by_itself(engine, name):
    """A batch's greedy tokens, with states, are those of transformers' whole passes."""
    built, model, expected = families.build(engine, name, families.full(name)), families.oracle(name), []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert built.generate(PROMPTS, Sampling(max_new_tokens=6)) == expected


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_adapters_act_while_generating(engine, name):
    """After steps that change what is said, greedy tokens are those of the engine's own whole passes."""
    built = families.build(engine, name, families.lora(name))
    before = built.generate(PROMPTS, Sampling(max_new_tokens=4))
    for step in range(3):
        built.train_step([families.batch(step)], 0.05)
    found = built.generate(PROMPTS, Sampling(max_new_tokens=4))
    assert found != before
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = np.array([prompt + answer[:-1]], np.int32)
        ones, places = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
        logits = built.logits(Batch(ids, ids, places, ones, ones * 0))[0]
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer
