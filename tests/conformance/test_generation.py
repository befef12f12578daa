"""Protects the cached block of both engines: over the cache a token gets the logits that it gets in its whole text."""

from dataclasses import replace

import numpy as np
import pytest

from msft.backend.contract import Precision
from tests.conformance.tiny_engines import CONFIGS, ENGINES, LENGTH, RUNTIME, batch, build, lora, shared

# The prompts' lengths; what follows them is taken token by token.
PROMPTS = (6, 11, 8)
# Logits are up to 8; a bfloat16 of that size is 0.03 from the next, a float16 0.004.
CASES = {"tied float32": 2e-5, "untied float32": 2e-5, "untied float16": 0.02, "untied bfloat16": 0.15}
# MindSpore has no bfloat16 products on CPU.
RUNS = [(engine, case) for engine in ENGINES for case in CASES if (engine, case) != ("mindspore", "untied bfloat16")]


def adapted(engine, case):
    """An engine with adapters whose factors are all other than zero."""
    kind, compute = case.split()
    if compute == "float32":
        built = shared(engine, kind, "lora")
    else:
        runtime = replace(RUNTIME, precision=Precision(compute=compute))
        built = build(engine, CONFIGS[kind], lora(CONFIGS[kind]), runtime)
    shapes = built.model.tuned_shapes()
    drawn = np.random.default_rng(7)
    built.load_adapter({name: drawn.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()})
    return built


@pytest.mark.parametrize(("engine", "case"), RUNS)
def test_logits_over_the_cache_are_those_of_the_whole_text(engine, case):
    built, whole = adapted(engine, case), batch(padding=False)
    steps = LENGTH - max(PROMPTS)
    session = built.session(built.model, steps)
    width = -(-max(PROMPTS) // session.bucket) * session.bucket
    prompts = np.zeros((len(PROMPTS), width), np.int32)
    for row, length in enumerate(PROMPTS):
        prompts[row, width - length :] = whole.input_ids[row, :length]
    expected = built.logits(whole)
    logits, rows = session.prefill(prompts, width - np.array(PROMPTS)), np.arange(len(PROMPTS))
    for step in range(steps):
        places = np.array(PROMPTS) + step
        np.testing.assert_allclose(logits, expected[rows, places - 1], rtol=0, atol=CASES[case])
        logits = session.decode(whole.input_ids[rows, places])
