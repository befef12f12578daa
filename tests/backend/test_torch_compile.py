"""Protects `torch_compile`: the same results as without it, compiled once, its time said, no compiler an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from msft.errors import InputError
from tests.conformance.tiny_engines import RUNTIME, UNTIED, batch, build, full, lora

COMPILED = replace(RUNTIME, compile=True)


@pytest.mark.parametrize("tuning", [lora(UNTIED, dropout=0.1), full(UNTIED)], ids=["lora", "full"])
def test_a_compiled_engine_takes_the_same_steps(tuning):
    plain, compiled = (build("torch", UNTIED, tuning, runtime) for runtime in (RUNTIME, COMPILED))
    said = compiled.describe()["norm, rotation, SwiGLU"]
    assert said.startswith("torch.compile (took ") and compiled.model.decoder.compile_seconds > 0
    assert plain.describe()["norm, rotation, SwiGLU"] == "each its own operator"
    counts = []
    for seed, rows in enumerate((2, 3, 1)):
        expected, taken = (engine.train_step([batch(seed, rows)], 1e-3) for engine in (plain, compiled))
        assert taken.loss == pytest.approx(expected.loss, rel=1e-6)
        assert taken.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1
    weights, expected = compiled.export_state().weights, plain.export_state().weights
    for name, array in expected.items():
        # AdamW turns the rounding of a tiny gradient into a part of its step, which is 1e-3.
        np.testing.assert_allclose(weights[name], array, rtol=1e-4, atol=3e-5)


def test_without_a_compiler_the_key_is_named(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    with pytest.raises(InputError, match=r"torch_compile: .*No working C\+\+ compiler"):
        build("torch", UNTIED, lora(UNTIED), COMPILED)
