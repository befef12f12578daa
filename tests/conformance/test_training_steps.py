"""Training on both engines against transformers, peft and torch.optim, and against each other, on a tiny Llama."""

import importlib
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from msft.backend import names, random
from msft.backend.contract import Lora, LossScale, Optimizer, Precision, Runtime, Sampling, Tuning
from msft.errors import RunError
from msft.models.adapters import peft_names
from tests.conformance.tiny_engines import (
    CONFIGS,
    ENGINES,
    RUNTIME,
    TIED,
    UNTIED,
    Perturbed,
    attention_modules,
    batch,
    build,
    full,
    lora,
    micro_batches,
    oracle,
    oracle_loss,
    run,
    shared,
    spec_of,
)


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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind,tuning,same", [("tied", "lora", lora), ("untied", "full", full)], ids=["lora", "full"])
def test_twenty_steps_are_those_of_transformers_peft_and_torch(engine, kind, tuning, same):
    """Accumulation with the exact token mean, clipping, AdamW with undecayed norms and biases, LoRA's scaling."""
    config = CONFIGS[kind]
    expected, weights = reference_run(config, same(config), 20)
    ours = shared(engine, kind, tuning)
    results = run(ours, 20)
    np.testing.assert_allclose(results[:, 0], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(results[:3], expected[:3], rtol=1e-5)
    state = ours.export_state().weights
    for name, array in weights.items():
        trained = state[name.replace(".default", "")]
        assert np.linalg.norm(trained - array) <= 2e-3 * np.linalg.norm(array) + 1e-6, name


def test_twenty_steps_with_dropout_agree_between_the_engines():
    results = [run(shared(engine, "tied", "lora with dropout"), 20, rate=3e-3) for engine in ENGINES]
    np.testing.assert_allclose(results[0][:, 0], results[1][:, 0], atol=1e-4)
    undropped = run(shared("torch", "tied", "lora"), 1, rate=3e-3)
    # The first loss differs only where the adapter does something, so compare the first gradient norm.
    assert abs(results[0][0, 1] - undropped[0, 1]) > 1e-3


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


def test_a_run_goes_on_on_the_other_engine():
    engines = {name: shared(name, "tied", "lora with dropout") for name in ENGINES}
    for engine in engines.values():
        run(engine, 5, rate=3e-3)
    middles = {name: engine.export_state() for name, engine in engines.items()}
    wholes = {name: run(engine, 5, start=5, rate=3e-3) for name, engine in engines.items()}
    for first, second in (("torch", "mindspore"), ("mindspore", "torch")):
        engines[second].import_state(middles[first])
        crossed = run(engines[second], 5, start=5, rate=3e-3)
        np.testing.assert_allclose(crossed[:, 0], wholes[first][:, 0], rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_recompute_changes_nothing(engine):
    plain = run(shared(engine, "tied", "lora with dropout"), 2)
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
    plain = run(shared(engine, "tied", "lora"), 2)
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
def test_the_reference_model_is_the_one_without_adapter(engine):
    one = batch()
    ours = shared(engine, "tied", "lora")
    untrained = ours.token_logprobs(one)
    run(ours, 2)
    assert np.abs(ours.token_logprobs(one) - untrained).max() > 1e-2
    np.testing.assert_allclose(ours.token_logprobs(one, adapter=False), untrained, atol=1e-5)
    with pytest.raises(RunError, match="no adapter"):
        shared(engine, "tied", "full").token_logprobs(one, adapter=False)


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
