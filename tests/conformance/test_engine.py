"""Both engines against transformers, peft and torch.optim, and against each other, on a tiny random Llama."""

import importlib
from dataclasses import replace
from functools import cache

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from msft.backend import names, random
from msft.backend.contract import Batch, Lora, LossScale, Optimizer, Precision, Runtime, Sampling, Tuning
from msft.convert.random_weights import RandomWeights
from msft.errors import RunError
from msft.models import llama
from msft.models.adapters import peft_names

ENGINES = ("torch", "mindspore")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TIED = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
UNTIED = {
    **TIED,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "head_dim": 16,
    "rope_scaling": LLAMA3,
}
RUNTIME = Runtime(seed=3, max_grad_norm=1.0, optimizer=Optimizer(weight_decay=0.1))
LENGTH = 20


class Perturbed(RandomWeights):
    """Random weights whose norms and biases are not ones and zeros, so that a wrong one shows."""

    def read(self, name):
        array = super().read(name)
        if array.ndim == 1:
            array = array + np.random.default_rng(len(name)).normal(0, 0.2, array.shape).astype(np.float32)
        return array


def spec_of(config):
    return llama.spec_from_hf(config)


def attention_modules(config):
    names_of_all = llama.linear_modules(spec_of(config))
    return tuple(name for name in names_of_all if name.endswith(("q_proj", "v_proj", "down_proj")))


def lora(config, dropout=0.0):
    return Tuning(lora=Lora(4, 8.0, dropout, attention_modules(config)))


def full(config):
    return Tuning(parameters=tuple(llama.tensor_shapes(spec_of(config))))


def build(engine, config, tuning, runtime=RUNTIME):
    module = importlib.import_module(f"msft.backend.{engine}.engine")
    return module.build(spec_of(config), Perturbed(spec_of(config), 0), tuning, runtime)


@cache
def shared(engine, kind, tuning):
    """An engine that tests only read from; compiling one costs seconds."""
    config = {"tied": TIED, "untied": UNTIED}[kind]
    return build(engine, config, {"lora": lora(config), "full": full(config)}[tuning])


def oracle(config):
    """transformers' own model with the same weights."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta", "rope_scaling")}
    rope = {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {"rope_type": "default"})}
    model = LlamaForCausalLM(LlamaConfig(**keys, rope_parameters=rope))
    source = Perturbed(spec_of(config), 0)
    weights = {name: torch.from_numpy(source.read(name)) for name in source.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def batch(seed=0, rows=3, padding=True):
    """Right-padded rows of random tokens, the first five unsupervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(10, LENGTH + 1, rows) if padding else np.full(rows, LENGTH)
    real = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(real, generator.integers(1, 96, (rows, LENGTH)), 0)
    labels = np.where(real & (np.arange(LENGTH) >= 5), generator.integers(1, 96, (rows, LENGTH)), -100)
    positions = np.tile(np.arange(LENGTH), (rows, 1))
    arrays = (ids, labels, positions, real.astype(np.int32), np.arange(rows)[:, None] * real)
    return Batch(*(array.astype(np.int32) for array in arrays))


def oracle_loss(model, micro_batches):
    """Summed cross-entropy over the supervised tokens, divided by their number over all micro-batches."""
    total, count = 0.0, 0
    for one in micro_batches:
        logits = model(input_ids=torch.from_numpy(one.input_ids).long(), use_cache=False).logits
        labels = torch.from_numpy(one.labels).long().flatten()
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        total = total + entropy
        count += one.supervised
    return total / count


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logits_are_transformers(engine, kind):
    one = batch()
    with torch.no_grad():
        model = oracle({"tied": TIED, "untied": UNTIED}[kind])
        expected = model(input_ids=torch.from_numpy(one.input_ids).long()).logits
    logits = shared(engine, kind, "full").logits(one)
    real = one.segment_ids != 0
    np.testing.assert_allclose(logits[real], expected.numpy()[real], atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_gradients_of_every_weight_are_autograds(engine, kind):
    one, model = batch(), oracle({"tied": TIED, "untied": UNTIED}[kind])
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


def reference_run(config, tuning, steps, optimizer=RUNTIME.optimizer, rate=1e-2):
    """The same training written with transformers, peft, torch.optim.AdamW and clip_grad_norm_."""
    model = oracle(config)
    model.model.embed_tokens.padding_idx = None
    if tuning.lora:
        settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(tuning.lora.modules))
        model = peft.get_peft_model(model, settings)
        for module in tuning.lora.modules:
            a = model.base_model.model.get_submodule(module).lora_A["default"].weight
            a.data = torch.from_numpy(random.lora_a(RUNTIME.seed, module, 4, a.shape[1]))
    tuned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [parameter for name, parameter in tuned.items() if not names.is_norm_or_bias(name)]
    others = [parameter for name, parameter in tuned.items() if names.is_norm_or_bias(name)]
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    results = []
    for step in range(steps):
        adamw.zero_grad()
        loss = oracle_loss(model, micro_batches(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(tuned.values()), RUNTIME.max_grad_norm)
        adamw.step()
        results.append((loss.item(), norm.item()))
    return np.array(results), {name: parameter.detach().numpy() for name, parameter in tuned.items()}


def micro_batches(step):
    """Two micro-batches of unequal numbers of supervised tokens."""
    return [batch(2 * step, rows=3), batch(2 * step + 1, rows=1)]


def run(engine, steps, start=0, rate=1e-2):
    results = [engine.train_step(micro_batches(step), rate) for step in range(start, start + steps)]
    return np.array([(result.loss, result.grad_norm) for result in results])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind,tuning", [("tied", lora), ("untied", full)], ids=["lora", "full"])
def test_twenty_steps_are_those_of_transformers_peft_and_torch(engine, kind, tuning):
    """Accumulation with the exact token mean, clipping, AdamW with undecayed norms and biases, LoRA's scaling."""
    config = {"tied": TIED, "untied": UNTIED}[kind]
    expected, weights = reference_run(config, tuning(config), 20)
    ours = build(engine, config, tuning(config))
    results = run(ours, 20)
    np.testing.assert_allclose(results[:, 0], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(results[:3], expected[:3], rtol=1e-5)
    state = ours.export_state().weights
    for name, array in weights.items():
        trained = state[name.replace(".default", "")]
        assert np.linalg.norm(trained - array) <= 2e-3 * np.linalg.norm(array) + 1e-6, name


def test_twenty_steps_with_dropout_agree_between_the_engines():
    results = [run(build(engine, TIED, lora(TIED, dropout=0.2)), 20, rate=3e-3) for engine in ENGINES]
    np.testing.assert_allclose(results[0][:, 0], results[1][:, 0], atol=1e-4)
    undropped = run(build("torch", TIED, lora(TIED)), 1, rate=3e-3)
    # The first loss differs only where the adapter does something, so compare the first gradient norm.
    assert abs(results[0][0, 1] - undropped[0, 1]) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_masks_are_those_that_numpy_computes(engine):
    ops = importlib.import_module(f"msft.backend.{engine}.ops")
    tokens, features = random.token_keys(1, 2, np.arange(3)[:, None], np.arange(7)), random.feature_keys("a.module", 33)
    make = torch.from_numpy if engine == "torch" else importlib.import_module("mindspore").Tensor
    mask = ops.keep_mask(make(tokens), make(features), 0.3)
    mask = mask.numpy() if engine == "torch" else mask.asnumpy()
    np.testing.assert_array_equal(mask, random.keep_mask(tokens, features, 0.3))


@pytest.mark.parametrize("engine", ENGINES)
def test_adamw_without_bias_correction_is_mindformers_formula(engine):
    settings = Optimizer(weight_decay=0.1, eps=1e-6, bias_correction=False)
    ours = build(engine, TIED, lora(TIED), Runtime(seed=3, optimizer=settings))
    name = peft_names(attention_modules(TIED)[0])[1]
    weight = ours.export_state().weights[name].astype(np.float64)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(3):
        gradient = ours.gradients(batch(step)).pop(name).astype(np.float64)
        ours.train_step([batch(step)], 1e-2)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight - 1e-2 * (first / (np.sqrt(second) + 1e-6) + 0.1 * weight)
    np.testing.assert_allclose(ours.export_state().weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first,second", [("torch", "mindspore"), ("mindspore", "torch")])
def test_a_run_goes_on_on_the_other_engine(first, second):
    whole = run(build(first, TIED, lora(TIED, dropout=0.1)), 10, rate=3e-3)
    began = build(first, TIED, lora(TIED, dropout=0.1))
    start = run(began, 5, rate=3e-3)
    went_on = build(second, TIED, lora(TIED, dropout=0.1))
    went_on.import_state(began.export_state())
    rest = run(went_on, 5, start=5, rate=3e-3)
    np.testing.assert_allclose(np.concatenate([start, rest])[:, 0], whole[:, 0], rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_recompute_changes_nothing(engine):
    plain = run(build(engine, TIED, lora(TIED, dropout=0.1)), 2)
    runtime = Runtime(seed=3, max_grad_norm=1.0, optimizer=RUNTIME.optimizer, recompute=True)
    np.testing.assert_allclose(run(build(engine, TIED, lora(TIED, dropout=0.1), runtime), 2), plain, rtol=1e-6)


def test_recompute_neither_turns_on_the_models_own_dropout_nor_hurts_generation():
    config, runtime = {**TIED, "attention_dropout": 0.5}, Runtime(seed=3, max_grad_norm=1.0, recompute=True)
    plain = run(build("torch", TIED, lora(TIED), Runtime(seed=3, max_grad_norm=1.0)), 2)
    np.testing.assert_allclose(run(build("torch", config, lora(TIED), runtime), 2), plain, rtol=1e-6)
    prompts, sampling = [[5, 7, 11], [3, 1, 4, 1, 5]], Sampling(max_new_tokens=8)
    for engine in ENGINES:
        ours = build(engine, TIED, full(TIED), runtime)
        assert ours.generate(prompts, sampling) == shared(engine, "tied", "full").generate(prompts, sampling)


MIXED = {
    "adapters in one layer, and weights, biases and norms of their own": (
        UNTIED,
        (
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.1.input_layernorm.weight",
            "lm_head.weight",
        ),
        "layers.0.",
    ),
    "adapters in one layer, and a tied head": (TIED, ("model.embed_tokens.weight",), "layers.1."),
}


@pytest.mark.parametrize("case", MIXED)
def test_adapters_beside_base_parameters_train_alike_with_and_without_recompute(case):
    config, parameters, place = MIXED[case]
    modules = tuple(module for module in attention_modules(config) if place in module)
    tuning = Tuning(parameters, Lora(4, 8.0, 0.1, modules))
    engines = [build("torch", config, tuning)]
    engines += [build("mindspore", config, tuning, replace(RUNTIME, recompute=True))]
    if config is UNTIED:
        engines += [build("mindspore", config, tuning)]
    results = [run(engine, 3) for engine in engines]
    states = [engine.export_state().weights for engine in engines]
    assert len(states[0]) == len(parameters) + 2 * len(modules)
    for result, state in zip(results[1:], states[1:], strict=True):
        np.testing.assert_allclose(result, results[0], rtol=1e-5)
        for name, array in states[0].items():
            np.testing.assert_allclose(state[name], array, atol=1e-4, err_msg=name)


def test_a_single_tuned_tensor_trains_alike():
    tuning = Tuning(parameters=("model.norm.weight",))
    results = [run(build(engine, TIED, tuning), 3) for engine in ENGINES]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    assert results[0][0, 1] > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_scaling_is_exact_and_an_overflow_skips_the_step(engine):
    plain = run(build(engine, TIED, lora(TIED)), 2)
    scaled = Runtime(seed=3, max_grad_norm=1.0, optimizer=RUNTIME.optimizer, loss_scale=LossScale(1024.0))
    np.testing.assert_allclose(run(build(engine, TIED, lora(TIED), scaled), 2), plain, rtol=1e-6)

    dynamic = Runtime(seed=3, optimizer=RUNTIME.optimizer, loss_scale=LossScale(2.0**127, factor=2.0**64, window=2))
    ours = build(engine, TIED, lora(TIED), dynamic)
    before = ours.export_state()
    result = ours.train_step(micro_batches(0), 1e-2)
    assert result.skipped and result.loss_scale == 2.0**127 and np.isfinite(result.loss)
    after = ours.export_state()
    assert after.counters == {"step": 1, "optimizer_step": 0, "loss_scale": 2.0**63, "good_steps": 0}
    for name, array in before.weights.items():
        np.testing.assert_array_equal(array, after.weights[name])
    assert not ours.train_step(micro_batches(1), 1e-2).skipped


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_greedy_generation_is_transformers(engine, kind):
    """A batch of prompts of different lengths; transformers generates them one by one."""
    prompts = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6], [42]]
    answers = shared(engine, kind, "full").generate(prompts, Sampling(max_new_tokens=12))
    model = oracle({"tied": TIED, "untied": UNTIED}[kind]).eval()
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
def test_the_reference_model_is_the_one_without_adapter(engine):
    one = batch()
    untrained = shared(engine, "tied", "lora").token_logprobs(one)
    ours = build(engine, TIED, lora(TIED))
    run(ours, 2)
    assert np.abs(ours.token_logprobs(one) - untrained).max() > 1e-2
    np.testing.assert_allclose(ours.token_logprobs(one, adapter=False), untrained, atol=1e-5)
    with pytest.raises(RunError, match="no adapter"):
        shared(engine, "tied", "full").token_logprobs(one, adapter=False)


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


class Rounded(Perturbed):
    """The same weights with the values that bfloat16 has."""

    def read(self, name):
        return torch.from_numpy(super().read(name)).bfloat16().float().numpy()


def test_float32_compute_on_torch_is_float32_whatever_the_frozen_weights_are():
    runtime = Runtime(seed=3, precision=Precision(parameters="bfloat16", compute="float32"))
    module = importlib.import_module("msft.backend.torch.engine")
    wide = module.build(spec_of(UNTIED), Rounded(spec_of(UNTIED), 0), lora(UNTIED), Runtime(seed=3))
    narrow = build("torch", UNTIED, lora(UNTIED), runtime)
    np.testing.assert_array_equal(run(narrow, 2), run(wide, 2))
    # Tuned weights keep all their digits, beside frozen ones that do not.
    some = build("torch", UNTIED, Tuning(("model.layers.1.mlp.up_proj.weight",)), runtime)
    assert np.isfinite(run(some, 1)).all()
    exact = Perturbed(spec_of(UNTIED), 0).read("model.layers.1.mlp.up_proj.weight")
    untouched = build("torch", UNTIED, Tuning(("model.layers.1.mlp.up_proj.weight",)), runtime).export_state()
    np.testing.assert_array_equal(untouched.weights["model.layers.1.mlp.up_proj.weight"], exact)


@pytest.mark.parametrize("parameters", ["float32", "float16"])
def test_the_backward_pass_keeps_no_narrowed_copy_of_the_head_or_of_frozen_layers(monkeypatch, parameters):
    from msft.backend.torch import ops

    monkeypatch.setattr(ops, "LOSS_CHUNK", 4)
    ours = build("torch", TIED, lora(TIED), Runtime(seed=3, precision=Precision(parameters, "bfloat16")))
    own = {parameter.data_ptr() for parameter in ours.model.decoder.network.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.data_ptr() not in own and {*tensor.shape} & {96, 48}:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours.train_step([batch(rows=4)], 1e-3)
    weights = [tensor for tensor in kept.values() if {*tensor.shape} in ({96, 32}, {48, 32})]
    assert not weights


@pytest.mark.parametrize("tuning", [lora, full])
@pytest.mark.parametrize("compute,tolerance", [("bfloat16", 0.05), ("float16", 0.01)])
def test_sixteen_bit_compute_on_torch_follows_float32(compute, tolerance, tuning):
    precision = Precision(parameters=compute, compute=compute)
    scale = LossScale(2.0**10, window=100) if compute == "float16" else LossScale()
    runtime = Runtime(seed=3, optimizer=RUNTIME.optimizer, precision=precision, loss_scale=scale)
    narrow = run(build("torch", TIED, tuning(TIED), runtime), 10, rate=3e-3)
    wide = run(build("torch", TIED, tuning(TIED), Runtime(seed=3, optimizer=RUNTIME.optimizer)), 10, rate=3e-3)
    assert not np.array_equal(narrow, wide)
    np.testing.assert_allclose(narrow[:, 0], wide[:, 0], rtol=tolerance)
