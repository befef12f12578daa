"""What follows from a recipe: MindFormers' meaning of its keys, our defaults, and what is ignored."""

import pytest
from recipe_texts import MINIMAL, SIZES, load

from msft.backend.contract import LossScale, Optimizer, Precision, Sampling
from msft.config import derive
from msft.config.load import load_recipe
from msft.config.report import ignored_lines

HEAD = "model: {pretrained: x}\n"


def sized(tmp_path, keys: str = "", rest: str = ""):
    return load(tmp_path, f"model:\n  model_config: {{{keys}}}\n{rest}")


def test_defaults_of_a_minimal_recipe(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert len(MINIMAL.splitlines()) <= 20
    assert derive.device(recipe) == "auto"
    assert (derive.micro_batch_size(recipe), derive.gradient_accumulation(recipe), derive.epochs(recipe)) == (4, 1, 2)
    assert derive.optimizer(recipe) == Optimizer(0.9, 0.999, 1e-8, 0.0, True, False)
    assert derive.schedule(recipe) == derive.Schedule("cosine", 1e-4, 0.0, 0.1, None, 0, 0.0, None, 0.5)
    assert derive.max_grad_norm(recipe) == 1.0
    assert derive.saving(recipe) == derive.Saving(500, 5)
    assert derive.evaluation(recipe) is None
    assert derive.weights(recipe) == derive.tokenizer(recipe) == "models/tiny"
    assert derive.stop_step(recipe) is None
    assert recipe.ignored == [] and ignored_lines(recipe) == []
    runtime = derive.runtime(recipe, "cpu", parallel=False)
    assert (runtime.precision, runtime.loss_scale) == (Precision(), LossScale())
    assert (runtime.recompute, runtime.seed, runtime.device) == (False, 0, "cpu")


@pytest.mark.parametrize(
    "text,device",
    [
        ("backend: mindspore\ncontext: {device_target: Ascend}", "npu"),
        ("backend: mindspore\ncontext: {device_target: CPU}", "cpu"),
        ("backend: mindspore\ncontext: {device_target: GPU}", "cuda"),
        ("backend: mindspore\ncontext: {device_target: Ascend}\ndevice: cpu", "cpu"),
        ("backend: mindspore\ncontext: {device_target: Ascend}\ndevice: auto", "auto"),
        ("backend: torch\ncontext: {device_target: Ascend}", "auto"),
        ("backend: torch\ndevice: npu", "npu"),
        ("seed: 1", "auto"),
    ],
)
def test_the_device_asked_for(tmp_path, text, device):
    assert derive.device(load(tmp_path, HEAD + text)) == device


@pytest.mark.parametrize(
    "text,optimizer",
    [
        ("type: AdamW", Optimizer(eps=1e-8)),
        ("type: FP32StateAdamWeightDecay", Optimizer(eps=1e-6, bias_correction=False)),
        ("type: AdamWeightDecay, eps: 1.e-8", Optimizer(eps=1e-8, bias_correction=False)),
        ("betas: [0.8, 0.95], weight_decay: '1e-2'", Optimizer(0.8, 0.95, weight_decay=0.01)),
        ("decay_norms_and_biases: True", Optimizer(decay_norms_and_biases=True)),
    ],
)
def test_the_optimizer(tmp_path, text, optimizer):
    assert derive.optimizer(load(tmp_path, f"{HEAD}optimizer: {{{text}}}")) == optimizer


def test_learning_rates_and_schedules(tmp_path):
    def of(text):
        return derive.schedule(load(tmp_path, HEAD + text))

    assert (of("optimizer: {learning_rate: 1e-3}").kind, of("optimizer: {learning_rate: 1e-3}").learning_rate) == (
        "constant",
        1e-3,
    )
    both = of("optimizer: {learning_rate: 1e-3}\nlr_schedule: {type: LinearWithWarmUpLR, learning_rate: 1e-5}")
    assert (both.kind, both.learning_rate) == ("linear", 1e-5)
    assert of("lr_schedule: {learning_rate: 0}").learning_rate == 0
    assert of("lr_schedule: {type: linear, warmup_steps: 3, total_steps: 9}")[4:8] == (None, 3, 0.0, 9)
    assert of("seed: 0").learning_rate == 1e-5
    assert derive.learning_rate(load(tmp_path, "model: {pretrained: x, pet_config: {}}")) == 1e-4


@pytest.mark.parametrize(
    "text,norm",
    [
        ("", 1.0),
        ("runner_wrapper: {max_grad_norm: 0.5}", 0.5),
        ("runner_wrapper: {scale_sense: 1.0}", 1.0),
        ("runner_wrapper: {use_clip_grad: False}", None),
        ("runner_wrapper: {type: MFTrainOneStepCell}", None),  # MindFormers' own default for this cell
        ("runner_wrapper: {type: MFTrainOneStepCell, use_clip_grad: True}", 1.0),
        ("runner_wrapper: {type: MFPipelineWithLossScaleCell}", 1.0),
    ],
)
def test_clipping(tmp_path, text, norm):
    assert derive.max_grad_norm(load(tmp_path, HEAD + text)) == norm


@pytest.mark.parametrize(
    "sense,scale",
    [
        ("3", LossScale(3.0)),
        ("'128'", LossScale(128.0)),
        ("{loss_scale_value: 4294967296, scale_factor: 4, scale_window: 9}", LossScale(4294967296.0, 4.0, 9)),
        ("{type: FixedLossScaleUpdateCell, loss_scale_value: 8}", LossScale(8.0, 2.0, 0)),
    ],
)
def test_loss_scale(tmp_path, sense, scale):
    assert derive.loss_scale(load(tmp_path, f"{HEAD}runner_wrapper: {{scale_sense: {sense}}}"), "cpu") == scale


def test_unset_loss_scale_moves_only_where_float16_computes(tmp_path):
    assert derive.loss_scale(sized(tmp_path), "npu") == LossScale(65536.0, 2.0, 1000)
    assert derive.loss_scale(sized(tmp_path, "compute_dtype: bf16"), "npu") == LossScale()
    assert derive.loss_scale(load(tmp_path, HEAD), "cuda") == LossScale()


def test_precision(tmp_path):
    float16, float32, bfloat16 = "float16", "float32", "bfloat16"
    assert derive.precision(sized(tmp_path), "npu") == Precision(float16, float16, float32, float32, float32)
    assert derive.precision(load(tmp_path, HEAD), "cpu") == Precision()
    assert derive.precision(load(tmp_path, HEAD), "cuda") == Precision(bfloat16, bfloat16)
    recipe = load(tmp_path, "model: {pretrained: x, compute_dtype: BF16, param_init_type: fp32, rotary_dtype: fp16}")
    assert derive.precision(recipe, "cpu") == Precision(float32, bfloat16, rotary=float16)


def test_batches_epochs_and_steps(tmp_path):
    assert derive.max_skipped_steps(load(tmp_path, HEAD)) == 10
    assert load(tmp_path, HEAD).hang_timeout == 1200
    assert derive.max_skipped_steps(load(tmp_path, HEAD + "runner_config: {max_skipped_steps: 3}")) == 3
    text = HEAD + "runner_config: {batch_size: 2, gradient_accumulation_steps: 3, epochs: 4, stop_step: 9}\n"
    text += "train_dataset: {batch_size: 5, repeat: 2}\nmicro_batch_interleave_num: 2\n"
    recipe = load(tmp_path, text)
    assert derive.micro_batch_size(recipe) == derive.eval_batch_size(recipe) == 2
    assert derive.gradient_accumulation(recipe) == 6
    assert derive.global_batch_size(recipe, 4) == 48
    assert (derive.epochs(recipe), derive.stop_step(recipe)) == (8, 9)
    assert derive.micro_batch_size(load(tmp_path, HEAD + "train_dataset: {batch_size: 5}")) == 5
    assert derive.eval_batch_size(load(tmp_path, HEAD + "eval_dataset: {batch_size: 7}")) == 7


def test_padding_follows_from_packing_unless_it_is_written(tmp_path):
    """And the recipe that a run writes gives the same again."""
    for keys, expected in (
        ("", "bucket"),
        ("packing: True", "max_length"),
        ("packing: True, padding: bucket", "bucket"),
        ("padding: longest", "longest"),
        ("length_grouping: True", "bucket"),
    ):
        recipe = load(tmp_path, f"{HEAD}train_dataset: {{{keys}}}")
        again = load(tmp_path, recipe.to_yaml())
        for one in (recipe, again):
            assert derive.padding(one.train_dataset) == expected, keys


@pytest.mark.parametrize("value,on", [("True", 1), ("False", 0), ("[0, 3]", 1), ("[0, 0]", 0), ("4", 1), ("0", 0)])
def test_recompute(tmp_path, value, on):
    assert derive.recompute(load(tmp_path, f"{HEAD}recompute_config: {{recompute: {value}}}")) is bool(on)


def test_callbacks_and_evaluation(tmp_path):
    recipe = load(tmp_path, HEAD + "callbacks: [{type: MFLossMonitor, per_print_times: 5}]\ndo_eval: True\n")
    assert (derive.log_every(recipe), derive.saving(recipe)) == (5, None)
    assert derive.evaluation(recipe) == derive.Evaluation(100, None)
    recipe = load(
        tmp_path,
        HEAD + "callbacks: [{type: CheckpointMonitor}]\ndo_eval: True\neval_step_interval: -1\n"
        "eval_epoch_interval: 2\n",
    )
    assert (derive.log_every(recipe), derive.saving(recipe)) == (1, derive.Saving(1, 5))
    assert derive.evaluation(recipe) == derive.Evaluation(None, 2)
    assert derive.saving_when_stopped() == derive.Saving(1, 5, background=True)
    recipe = load(tmp_path, HEAD + "callbacks: [{type: CheckpointMonitor, async_save: False}]\n")
    assert derive.saving(recipe) == derive.Saving(1, 5, background=False)
    recipe = load(tmp_path, HEAD + "callbacks: [{type: CheckpointMonitor, integrated_save: True, prefix: llama}]\n")
    assert derive.saving(recipe) == derive.Saving(1, 5, True, ckpt=True, prefix="llama") and not recipe.ignored
    recipe = load(tmp_path, HEAD + "callbacks: [{type: CheckpointMonitor, prefix: llama}]\n")
    (ignored,) = recipe.ignored
    assert (ignored.path, ignored.why) == ("callbacks.0.prefix", "it names the CKPTs of integrated_save, which is off")


def test_sampling(tmp_path):
    assert derive.sampling(load(tmp_path, HEAD)) == Sampling(128, 0.0, 0, 1.0)
    assert derive.sampling(sized(tmp_path), 24) == Sampling(1000, 1.0, 5, 1.0)
    assert derive.sampling(sized(tmp_path, "do_sample: False, max_decode_length: 9"), 24).max_new_tokens == 1
    recipe = sized(tmp_path, "max_new_tokens: 7, temperature: 0.5, top_p: 0.9")
    assert derive.sampling(recipe, 24) == Sampling(7, 0.5, 5, 0.9)


def test_where_weights_come_from(tmp_path):
    assert derive.weights(sized(tmp_path)) is None
    assert derive.weights(sized(tmp_path, "checkpoint_name_or_path: llama2_7b")) is None
    assert derive.weights(sized(tmp_path, f"checkpoint_name_or_path: {tmp_path}")) == str(tmp_path)
    assert derive.weights(load(tmp_path, HEAD, "--load_checkpoint", "a.ckpt")) == "a.ckpt"


def test_sizes_from_model_config_and_from_a_folder(tmp_path):
    spec = derive.model_spec(load(tmp_path, SIZES, "--model.model_config.multiple_of", "16"))
    assert (spec.hidden_size, spec.num_hidden_layers, spec.intermediate_size) == (64, 2, 176)
    assert spec.max_position_embeddings == 2048
    import json

    (tmp_path / "config.json").write_text(json.dumps(spec.hf_config))
    recipe = load(tmp_path, MINIMAL, "--model.pretrained", str(tmp_path))
    assert derive.model_spec(recipe) == spec
    tuning = derive.tuning(recipe, spec)
    assert tuning.parameters == ()
    assert tuning.lora.modules == tuple(
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    )
    assert (tuning.lora.rank, tuning.lora.alpha, tuning.lora.dropout) == (8, 16.0, 0.01)
    full = derive.tuning(load(tmp_path, SIZES), spec)
    assert full.lora is None and len(full.parameters) == 2 * 9 + 3


def test_the_resolved_recipe_loads_to_the_same(tmp_path):
    for text in (MINIMAL, SIZES, HEAD + "callbacks: [{type: ObsMonitor, x: 1}]\noutput_dir: '1e5'\nprofile: False\n"):
        recipe = load(tmp_path, text, "--optimizer.betas", "[0.9, 0.99]", "--predict_data", "a: b", "#")
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        again = load_recipe(resolved)
        assert again.model_dump() == recipe.model_dump()
        assert [entry.path for entry in again.ignored] == [entry.path for entry in recipe.ignored]
        assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_cannot_be_changed(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        recipe.optimizer.weight_decay = 0.1


def test_keys_without_meaning_are_listed_with_line_and_reason(tmp_path):
    text = HEAD + "profile: False\ncontext:\n  mode: 0\n  device_target: CPU\nparallel_config: {expert_parallel: 8}\n"
    text += "callbacks:\n  - type: ObsMonitor\nrunner_config: {batch_size: 2}\ntrain_dataset: {batch_size: 4}\n"
    text += "optimizer: {learning_rate: 1e-5}\nlr_schedule: {learning_rate: 1e-4, warmup_ratio: 0.1, warmup_steps: 3}\n"
    recipe = load(tmp_path, text, "--profile_memory", "True")
    assert [(entry.place.text.split("/")[-1], entry.path) for entry in recipe.ignored] == [
        ("r.yaml:2", "profile"),
        ("r.yaml:4", "context.mode"),
        ("r.yaml:6", "parallel_config.expert_parallel"),
        ("r.yaml:8", "callbacks.0"),
        ("r.yaml:10", "train_dataset.batch_size"),
        ("r.yaml:11", "optimizer.learning_rate"),
        ("r.yaml:12", "lr_schedule.warmup_steps"),
        ("--profile_memory", "profile_memory"),
    ]
    lines = ignored_lines(recipe)
    assert lines[0].endswith("r.yaml: 8 keys do nothing here (line numbers in brackets):")
    assert "  profile (2), profile_memory (--profile_memory): profiling is left to the framework's own tools" in lines
    assert "  train_dataset.batch_size (10): runner_config.batch_size (2) wins" in lines


def test_a_key_of_one_backend_is_reported_on_the_other(tmp_path):
    text = HEAD + "context: {device_target: CPU}\n"
    assert load(tmp_path, text).ignored == []
    (entry,) = load(tmp_path, text, "--backend", "torch").ignored
    assert str(entry).endswith("r.yaml:2: context.device_target: it is for backend mindspore; `device` decides")
    (entry,) = load(tmp_path, text, "--device", "npu").ignored
    assert entry.why == "device (npu) wins"
    assert derive.runtime(load(tmp_path, HEAD + "backend: torch\ntorch_compile: True\n"), "cpu", False).compile
    recipe = load(tmp_path, HEAD + "backend: mindspore\ntorch_compile: True\n")
    assert not derive.runtime(recipe, "cpu", False).compile
    assert recipe.ignored[0].why == "it is for backend torch; its blocks are always compiled"
