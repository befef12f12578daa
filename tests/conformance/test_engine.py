"""What both engines compute against transformers, and against each other, on a tiny random Llama."""

import importlib

import numpy as np
import pytest
import torch

from msft.backend import context, random
from msft.backend.contract import Batch, Lora, Sampling, Tuning
from msft.errors import RunError
from tests.conformance.tiny_engines import (
    CONFIGS,
    ENGINES,
    LENGTH,
    TIED,
    UNTIED,
    batch,
    build,
    oracle,
    oracle_loss,
    shared,
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logits_are_transformers(engine, kind):
    one = batch()
    with torch.no_grad():
        model = oracle(CONFIGS[kind])
        expected = model(input_ids=torch.from_numpy(one.input_ids).long()).logits
    logits = shared(engine, kind, "full").logits(one)
    real = one.segment_ids != 0
    np.testing.assert_allclose(logits[real], expected.numpy()[real], atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_gradients_of_every_weight_are_autograds(engine, kind):
    one, model = batch(), oracle(CONFIGS[kind])
    oracle_loss(model, [one]).backward()
    gradients = shared(engine, kind, "full").gradients(one)
    for name, gradient in gradients.items():
        expected = model.get_parameter(name).grad.numpy()
        assert np.abs(gradient - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()), name


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_logprobs_are_those_of_the_logits(engine):
    one, model = batch(), shared(engine, "tied", "lora")
    logits = torch.from_numpy(model.logits(one))
    expected = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(one.labels).long().clamp(min=0)[..., None])
    logprobs = model.token_logprobs(one)
    supervised = one.labels != -100
    np.testing.assert_allclose(logprobs[supervised], expected.squeeze(-1).numpy()[supervised], atol=1e-5)
    assert (logprobs[~supervised] == 0).all()
    loss, tokens = model.evaluate(one)
    assert tokens == supervised.sum()
    assert loss == pytest.approx(-logprobs.sum(), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_segments_do_not_see_each_other(engine):
    """Two examples in one row give the logits they give alone, whatever stands before them."""
    one = batch(padding=False)
    cut = 8
    segments = np.where(np.arange(LENGTH) < cut, 1, 2) * np.ones_like(one.segment_ids)
    positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut) * np.ones_like(segments)
    packed = Batch(one.input_ids, one.labels, positions.astype(np.int32), segments.astype(np.int32), one.row_ids)
    rolled = [np.roll(array, -cut, axis=1) for array in (one.input_ids, one.labels)]
    alone = Batch(*rolled, one.position_ids, one.segment_ids, one.row_ids)
    model = shared(engine, "tied", "full")
    np.testing.assert_allclose(model.logits(packed)[:, cut:], model.logits(alone)[:, : LENGTH - cut], atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_masks_are_those_that_numpy_computes(engine):
    ops = importlib.import_module(f"msft.backend.{engine}.ops")
    tokens, features = random.token_keys(1, 2, np.arange(3)[:, None], np.arange(7)), random.feature_keys("a.module", 33)
    make = torch.from_numpy if engine == "torch" else importlib.import_module("mindspore").Tensor
    mask = ops.keep_mask(make(tokens), make(features), 0.3)
    mask = mask.numpy() if engine == "torch" else mask.asnumpy()
    np.testing.assert_array_equal(mask, random.keep_mask(tokens, features, 0.3))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_greedy_generation_is_transformers(engine, kind):
    """A batch of prompts of different lengths; transformers generates them one by one."""
    prompts = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6], [42]]
    answers = shared(engine, kind, "full").generate(prompts, Sampling(max_new_tokens=12))
    model = oracle(CONFIGS[kind]).eval()
    model.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert answer == whole[0, len(prompt) :].tolist()


def test_sampling_draws_the_same_tokens_on_both_engines():
    sampling = Sampling(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9, seed=5)
    answers = [shared(engine, "tied", "full").generate([[5, 7, 11], [3]], sampling) for engine in ENGINES]
    assert answers[0] == answers[1]
    assert answers[0] != shared("torch", "tied", "full").generate([[5, 7, 11], [3]], Sampling(12))


@pytest.mark.parametrize("engine", ENGINES)
def test_dynamic_rotary_frequencies_are_those_of_the_batch_alone(engine):
    """transformers' module remembers the longest batch so far, so each batch gets a new oracle."""
    config = {**TIED, "max_position_embeddings": 12, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    ours, one = build(engine, config, Tuning()), batch(padding=False)
    for length in (14, LENGTH, 14, 8):
        short = Batch(*(array[:, :length] for array in vars(one).values()))
        with torch.no_grad():
            expected = oracle(config)(input_ids=torch.from_numpy(short.input_ids).long()).logits
        np.testing.assert_allclose(ours.logits(short), expected.numpy(), atol=5e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_and_adapters_of_another_model_are_refused(engine):
    with pytest.raises(RunError, match="token id 96, but the model's vocabulary ends at 95"):
        shared(engine, "tied", "full").generate([[5], [7, 96]], Sampling(2))
    for module in ("lm_head", "model.layers.9.self_attn.q_proj"):
        with pytest.raises(RunError, match=f"LoRA on {module}"):
            build(engine, UNTIED, Tuning(lora=Lora(4, 8.0, 0.0, (module,))))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_needs_whole_rows_is_refused_for_rows_that_ranks_share(engine):
    built, part = shared(engine, "tied", "lora"), context.share(batch(), 2, 0)
    with pytest.raises(RunError, match="gradients of one batch are for rows that one process computes"):
        built.gradients(part)
    with pytest.raises(RunError, match="hidden states of modules are for rows that one process computes"):
        built.activations(part)


@pytest.mark.parametrize("engine", ENGINES)
def test_states_that_do_not_fit_are_named(engine):
    ours = shared(engine, "tied", "lora")
    state = ours.export_state()
    name = next(iter(state.weights))
    state.weights["base_model.model.model.layers.9.lora_A.weight"] = state.weights.pop(name)
    with pytest.raises(RunError, match=f"'{name}' is missing.*layers.9.lora_A.weight' is not tuned here"):
        ours.import_state(state)
    wrong = {other: array[:1] for other, array in ours.export_state().weights.items()}
    with pytest.raises(RunError, match="has shape"):
        ours.load_adapter(wrong)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_without_supervision_is_an_error_not_a_nan(engine):
    one = batch()
    silent = Batch(one.input_ids, np.full_like(one.labels, -100), one.position_ids, one.segment_ids, one.row_ids)
    ours = shared(engine, "tied", "lora")
    with pytest.raises(RunError, match="no token of the batch is supervised"):
        ours.train_step([silent], 1e-3)
    assert ours.evaluate(silent) == (0.0, 0)
    assert not ours.token_logprobs(silent).any()
    assert not any(gradient.any() for gradient in ours.gradients(silent).values())
