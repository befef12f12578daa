"""Protects contexts that are longer than a tile, packed, and computed again on the way back, on both engines."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from msft.backend.contract import Batch
from msft.errors import RunError
from tests.conformance import families
from tests.conformance.tiny_engines import ENGINES

LENGTHS, CONTEXTS = (200, 90), (150, 10)


def packed():
    """Two texts in one row, whose answers alone are learned."""
    generator = np.random.default_rng(3)
    ids = generator.integers(21, families.VOCABULARY, sum(LENGTHS))
    segments = np.repeat([1, 2], LENGTHS)
    places = np.concatenate([np.arange(length) for length in LENGTHS])
    contexts = np.repeat(CONTEXTS, LENGTHS)
    ids[places == contexts] = families.BEGIN
    ids[places == contexts - 1] = 9
    labels = np.where(places >= contexts, generator.integers(1, families.VOCABULARY, len(ids)), -100)
    arrays = (ids, labels, places, segments, ids * 0)
    return Batch(*(array[None].astype(np.int32) for array in arrays))


@pytest.mark.parametrize("engine", ENGINES)
def test_long_contexts_beside_each_other_are_computed_as_the_equations_say(engine, monkeypatch):
    monkeypatch.setattr(families, "RUNTIME", replace(families.RUNTIME, recompute=True))
    built, model, one = (
        families.build(engine, "chatglm1", families.full("chatglm1")),
        families.oracle("chatglm1"),
        packed(),
    )
    ids = one.input_ids[0].tolist()
    expected = torch.cat([model.text(ids[: LENGTHS[0]]), model.text(ids[LENGTHS[0] :])])
    np.testing.assert_allclose(built.logits(one)[0], expected.detach().numpy(), atol=3e-5)
    labels = torch.from_numpy(one.labels[0]).long()
    torch.nn.functional.cross_entropy(expected, labels, ignore_index=-100).backward()
    for name, gradient in built.gradients(one).items():
        theirs = model.weights[name].grad.numpy()
        np.testing.assert_allclose(gradient, theirs, atol=3e-5 * np.abs(theirs).max() + 1e-7, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_learned_or_answered_is_refused(engine):
    built, one = families.build(engine, "chatglm1", families.lora("chatglm1")), families.batch()
    early = replace(one, labels=one.input_ids)
    for call in (built.evaluate, built.gradients, lambda batch: built.train_step([batch], 1e-3)):
        with pytest.raises(RunError, match="labels before <sop>"):
            call(early)
    with pytest.raises(RunError, match="prompt 1 has no <sop>"):
        built.generate([[5, 6, 7]], families.Sampling(max_new_tokens=2))
