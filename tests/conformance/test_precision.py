"""Long float32 sums stay as near to float64 as both engines need to agree: losses, gradient norms, moments."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from msft.backend.contract import Optimizer, Precision
from msft.convert.random_weights import generator
from tests.conformance import tiny_engines

ENGINES = ("torch", "mindspore")


def tensor(engine, array):
    if engine == "torch":
        return importlib.import_module("torch").from_numpy(array)
    return importlib.import_module("mindspore").Tensor(array)


def optimizer(engine, parameters, settings=None):
    model = SimpleNamespace(tuned=parameters, kernels=SimpleNamespace(fused_adamw=True))
    return importlib.import_module(f"msft.backend.{engine}.optimizer").AdamW(model, settings or Optimizer())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vocabulary", [96, 300, 32001, 49152])
def test_losses_of_peaked_distributions_are_those_of_float64(engine, vocabulary):
    """One token has nearly all of the probability; the others, together a few percent, are lost in one long sum."""
    logits = generator(0, "logits").standard_normal((8, vocabulary), np.float32)
    logits[:, 7] += np.float32(np.log(vocabulary) + 3)
    labels = np.arange(8, dtype=np.int32)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(-1)) - wide[np.arange(8), labels]
    ops = importlib.import_module(f"msft.backend.{engine}.ops")
    losses = ops.to_numpy(ops.token_losses(tensor(engine, logits), tensor(engine, labels)))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_norm_of_a_large_gradient_is_that_of_float64(engine):
    """An embedding's gradient has rows of very different sizes, and tens of millions of elements."""
    random = generator(0, "gradient")
    scale = np.exp(2 * random.standard_normal((30_000, 1), np.float32)) * np.float32(1e-4)
    gradients = {"a": random.standard_normal((30_000, 576), np.float32) * scale, "b": np.ones(5, np.float32)}
    expected = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in gradients.values()))
    tensors = {name: tensor(engine, array) for name, array in gradients.items()}
    small = {"a": tensor(engine, np.zeros((1, 1), np.float32)), "b": tensor(engine, np.zeros(1, np.float32))}
    assert optimizer(engine, small).global_norm(tensors) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_moments_are_the_gradients_by_the_betas(engine):
    """1 - 0.999 in float32 is 1.3e-5 too small."""
    gradient = generator(0, "g").standard_normal((16, 16), np.float32)
    ours = optimizer(engine, {"w": tensor(engine, np.zeros((16, 16), np.float32))})
    ours.apply({"w": tensor(engine, gradient.copy())}, 1.0, 1e-3)
    first, second = (moments["w"].astype(np.float64) for moments in ours.moments())
    np.testing.assert_allclose(first, 0.1 * gradient.astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(second, 0.001 * gradient.astype(np.float64) ** 2, rtol=1e-6)


@pytest.mark.parametrize("parameters", ["float32", "float16"])
@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_float16_gradients_agree_between_the_engines(tuned, parameters):
    """Hidden states are float32 where the embedding is, tuned or held so, and float16 elsewhere; the loss is scaled."""
    config = tiny_engines.UNTIED
    tuning = tiny_engines.lora(config) if tuned == "lora" else tiny_engines.full(config)
    runtime = replace(tiny_engines.RUNTIME, precision=Precision(parameters, "float16"))
    ours, theirs = (
        tiny_engines.build(engine, config, tuning, runtime).step_gradients(tiny_engines.micro_batches(0))
        for engine in ENGINES
    )
    assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)
    for name, expected in ours.gradients.items():
        error = np.abs(theirs.gradients[name] - expected).max()
        assert error <= 0.02 * np.abs(expected).max(), name
