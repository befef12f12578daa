"""Protects that both engines compute every family as transformers does, and train it alike."""

from dataclasses import replace

import numpy as np
import pytest

from msft.backend.contract import Batch
from msft.errors import RunError
from msft.models.families import FAMILIES
from tests.conformance import families
from tests.conformance.tiny_engines import ENGINES

# Rounding of a gradient that is a sum of large parts, as softmax's is for what is added to all keys.
NOTHING = 1e-6


# Of MindSpore, which compiles for some seconds, those that have between them all that a family can have.
COMPILED = ("qwen3", "gemma2", "glm", "gpt2", "gpt_neox", "bloom", "falcon, groups of heads", "baichuan, normed head")
COMPILED += ("mamba2", "chatglm1", "t5, gated, with a head")
LONGROPE = "phi3, turned otherwise beyond 16 tokens"
CASES = [
    pytest.param(name, engine, marks=[] if engine == "torch" or name in COMPILED else pytest.mark.families)
    for engine in ENGINES
    for name in families.CONFIGS
]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_logits_and_gradients_are_transformers(name, engine):
    built, model, one = families.build(engine, name, families.full(name)), families.oracle(name), families.batch()
    expected, real = families.oracle_logits(model, one).detach().numpy(), one.segment_ids != 0
    np.testing.assert_allclose(built.logits(one)[real], expected[real], atol=2e-5, rtol=1e-5)
    loss, gradients = families.oracle_gradients(model, one)
    assert built.evaluate(one)[0] / one.supervised == pytest.approx(loss, abs=1e-5)
    found = built.gradients(one)
    assert found.keys() == gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for tensor, gradient in gradients.items():
        scale = np.abs(gradient).max()
        if scale < NOTHING * largest:
            assert np.abs(found[tensor]).max() < 10 * NOTHING * largest
            continue
        cosine = (found[tensor] * gradient).sum() / np.sqrt((found[tensor] ** 2).sum() * (gradient**2).sum())
        assert cosine > 0.99999, tensor
        np.testing.assert_allclose(found[tensor], gradient, atol=2e-5 * scale, err_msg=tensor)


@pytest.mark.families
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", families.CONFIGS)
def test_generation_and_packed_examples(name, engine):
    """Greedy tokens with a cache are those of whole passes; an example in a row with another sees itself alone."""
    built = families.build(engine, name, families.full(name))
    assert families.generation(built, 12) == families.oracle_generation(families.oracle(name), 12)
    apart = families.batch(7, rows=2, length=12)
    real = apart.segment_ids.reshape(-1) != 0
    alone = built.logits(apart).reshape(-1, families.VOCABULARY)[real]
    together = built.logits(families.packed(apart)).reshape(-1, families.VOCABULARY)[real]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.families
@pytest.mark.parametrize("tuned", ["lora", "full"])
@pytest.mark.parametrize("name", families.CONFIGS)
def test_both_engines_train_alike(name, tuned):
    """Losses and norms of three steps with dropout, accumulation, decay and clipping; what has been learned."""
    tuning = getattr(families, tuned)(name)
    built = {engine: families.build(engine, name, tuning) for engine in ENGINES}
    results = {engine: families.steps(one) for engine, one in built.items()}
    np.testing.assert_allclose(results["mindspore"], results["torch"], rtol=1e-5)
    states = [one.export_state().weights for one in built.values()]
    for tensor, array in states[0].items():
        np.testing.assert_allclose(states[1][tensor], array, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("name", families.OF_TRANSFORMERS)
def test_adapters_are_pefts_and_can_be_merged(name, tmp_path):
    """What PyTorch has trained: as peft computes it, and merged into the base weights."""
    built = families.build("torch", name, families.lora(name))
    families.steps(built, 2)
    real, expected = families.batch().segment_ids != 0, built.logits(families.batch())
    alone = families.build("torch", name, families.full(name)).logits(families.batch())
    assert np.abs(expected - alone)[real].max() > 1e-3
    theirs = families.through_peft(name, built, tmp_path / "adapter")
    np.testing.assert_allclose(theirs[real], expected[real], atol=2e-5)
    np.testing.assert_allclose(families.merged(name, built, tmp_path)[real], expected[real], atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_does_not_make_a_text_long(engine):
    """Texts of up to 12 tokens in rows of 24, of a model that turns those of more than 16 in another way."""
    built = families.build(engine, LONGROPE, families.lora(LONGROPE))
    one = families.batch(7, rows=2, length=12)
    real = one.segment_ids != 0
    wide = [np.pad(getattr(one, name), ((0, 0), (0, 12))) for name in ("input_ids", "labels", "segment_ids", "row_ids")]
    ids, labels, segments, rows = wide
    padded = Batch(ids, labels, np.tile(np.arange(24, dtype=np.int32), (2, 1)), segments, rows)
    np.testing.assert_allclose(built.logits(padded)[:, :12][real], built.logits(one)[real], atol=1e-6)
    model = families.oracle(LONGROPE)
    expected = families.oracle_logits(model, one).detach().numpy()
    np.testing.assert_allclose(built.logits(one)[real], expected[real], atol=2e-5)


def test_every_family_is_here():
    assert {families.spec_of(name).family for name in families.CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_positions_end(engine):
    """MindSpore would read zeros behind a table, torch an error about an index."""
    built, long = families.build(engine, "gpt2", families.lora("gpt2")), families.batch(rows=1, length=70)
    with pytest.raises(RunError, match=r"a text has \d\d tokens, but this gpt2 model has learned 64 positions"):
        built.evaluate(long)
    with pytest.raises(RunError, match="a text has 73 tokens"):
        families.generation(built, 64)


@pytest.mark.parametrize(("name", "compiled"), [("qwen3", True), ("gpt2", False), ("bloom", False)])
def test_torch_compile_says_where_it_has_no_effect(name, compiled, monkeypatch):
    monkeypatch.setattr(families, "RUNTIME", replace(families.RUNTIME, compile=True))
    if compiled:
        monkeypatch.setattr("msft.backend.torch.warm_up.compile_parts", lambda decoder: 1.5)
    said = families.build("torch", name, families.lora(name)).describe()["norm, rotation, SwiGLU"]
    expected = "torch.compile (took 1.5 s)" if compiled else "torch_compile has no effect on this family"
    assert expected in said
