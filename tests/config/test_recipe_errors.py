"""What a wrong recipe is told: file, line, key, the nearest right thing, and all of it at once."""

import pytest
from recipe_texts import MINIMAL, SIZES, load, problems

from msft.config.checks import check_device, check_paths
from msft.errors import InputError

HEAD = "model: {pretrained: x}\n"

ONE_PROBLEM = {
    # unknown keys: the nearest name in the block, the block it belongs in, the nearest anywhere
    "runner_config: {epoch: 3}": "runner_config.epoch: unknown key, did you mean 'epochs'?",
    "runner_config: {weight_decay: 0.1}": "runner_config.weight_decay: unknown key, it belongs in optimizer",
    "learning_rate: 1e-4": "learning_rate: unknown key, it belongs in optimizer or lr_schedule",
    "compute_dtype: float32": "compute_dtype: unknown key, it belongs in model",
    "gradient_accumulation: 3": (
        "gradient_accumulation: unknown key, did you mean 'runner_config.gradient_accumulation_steps'?"
    ),
    "epochs: 3": "epochs: unknown key, it belongs in runner_config",
    "runner_config: {seed: 3}": "runner_config.seed: unknown key, it belongs in the top level",
    "zzz: 3": "zzz: unknown key",
    '"a\\n\\tb": 3': "'a\\n\\tb': unknown key",
    # wrong types
    "seed: x": "seed: must be a whole number, not 'x'",
    "seed: True": "seed: must be a whole number, not True",
    "seed: 1.5": "seed: must be a whole number, not 1.5",
    "seed: [1]": "seed: must be a whole number, not [1]",
    "output_dir: 7": "output_dir: must be text, not 7 (put it in quotes)",
    "output_dir: ''": "output_dir: must be some text, not ''",
    "do_eval: Flase": "do_eval: must be True or False, not 'Flase', did you mean 'False'?",
    "do_eval: 3": "do_eval: must be True or False, not 3",
    "optimizer: {beta1: x}": "optimizer.beta1: must be a number, not 'x'",
    "optimizer: {beta1: True}": "optimizer.beta1: must be a number, not True",
    "optimizer: {learning_rate: .inf}": "optimizer.learning_rate: must be a finite number, not inf",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate: must be a finite number, not nan",
    "lr_schedule: cosine": (
        "lr_schedule: must be a block of keys (type, learning_rate, lr_end, warmup_ratio, warmup_epochs, "
        "warmup_steps ...), not 'cosine'"
    ),
    "callbacks: {type: CheckpointMonitor}": "callbacks: must be a list, not {'type': 'CheckpointMonitor'}",
    "callbacks: [3]": (
        "callbacks.0: must be a block of keys (type, per_print_times, prefix, save_checkpoint_steps, "
        "keep_checkpoint_max, integrated_save ...), not 3"
    ),
    "callbacks: [{prefix: x}]": "callbacks.0: must be a block with the key type",
    "train_dataset: {input_columns: 3}": "train_dataset.input_columns: must be text or a list of texts, not 3",
    "resume_training: 3": "resume_training: must be True, False or the name of a checkpoint, not 3",
    "recompute_config: {recompute: x}": (
        "recompute_config.recompute: must be True, False or numbers of layers, not 'x'"
    ),
    "runner_wrapper: {scale_sense: x}": "runner_wrapper.scale_sense: must be a number, not 'x'",
    # wrong values and ranges
    "backend: torh": "backend: must be mindspore or torch, not 'torh', did you mean 'torch'?",
    "device: tpu": "device: must be auto, cpu, cuda or npu, not 'tpu', did you mean 'npu'?",
    "run_mode: finetun": (
        "run_mode: must be train, finetune, eval or predict, not 'finetun', did you mean 'finetune'?"
    ),
    "optimizer: {type: Adamw}": (
        "optimizer.type: must be AdamW, FP32StateAdamWeightDecay or AdamWeightDecay, not 'Adamw', did you mean 'AdamW'?"
    ),
    "callbacks: [{type: CheckpointMonitr}]": (
        "callbacks.0: must be MFLossMonitor, CheckpointMonitor, TrainCallBack, ObsMonitor, SummaryMonitor, "
        "ProfileMonitor, EvalCallBack or ColdHotExpertMointor, not 'CheckpointMonitr', "
        "did you mean 'CheckpointMonitor'?"
    ),
    "seed: -1": "seed: must be at least 0, not -1",
    "runner_config: {epochs: 0}": "runner_config.epochs: must be above 0, not 0",
    "optimizer: {beta2: 1.0}": "optimizer.beta2: must be below 1, not 1.0",
    "lr_schedule: {warmup_ratio: 1.5}": "lr_schedule.warmup_ratio: must be at most 1, not 1.5",
    "eval_step_interval: 0": (
        "eval_step_interval: must be a number of steps or epochs above 0, or -1 for never, not 0"
    ),
    "runner_wrapper: {scale_sense: 0}": "runner_wrapper.scale_sense: must be above 0, not 0",
    "runner_wrapper: {scale_sense: {scale_factor: 1}}": (
        "runner_wrapper.scale_sense.scale_factor: must be above 1, not 1"
    ),
    "runner_wrapper: {scale_sense: {loss_scale: 1}}": (
        "runner_wrapper.scale_sense.loss_scale: unknown key, did you mean 'loss_scale_value'?"
    ),
    "callbacks: [{type: CheckpointMonitor, prefix: ../x}]": (
        "callbacks.0.prefix: must be the first part of a file name, not '../x'"
    ),
    "callbacks: [{type: CheckpointMonitor, keep_checkpoint_max: 0}]": (
        "callbacks.0.keep_checkpoint_max: must be above 0, not 0"
    ),
    "train_dataset: {padding: max}": ("train_dataset.padding: must be longest, bucket or max_length, not 'max'"),
    # packing and length grouping, by the names that other toolkits have for them too
    "packing: True": "packing: unknown key, it belongs in train_dataset or eval_dataset",
    "length_grouping: True": "length_grouping: unknown key, it belongs in train_dataset",
    "neat_packing: True": "neat_packing: unknown key, here it is called 'train_dataset.packing'",
    "train_dataset: {group_by_length: True}": (
        "train_dataset.group_by_length: unknown key, here it is called 'train_dataset.length_grouping'"
    ),
    "train_dataset: {packing: bfd}": "train_dataset.packing: must be True or False, not 'bfd'",
    "train_dataset: {packing: True, length_grouping: True}": (
        "train_dataset.length_grouping: stands beside packing, which fills every row: write one of the two"
    ),
    "train_dataset: {padding: max_length, length_grouping: True}": (
        "train_dataset.length_grouping: stands beside padding max_length, which makes all rows equally long: "
        "write bucket or longest"
    ),
    "train_dataset: {length_grouping: True, data_loader: {shuffle: False}}": (
        "train_dataset.length_grouping: groups the rows of a shuffled order, but data_loader.shuffle is False"
    ),
    "eval_dataset: {length_grouping: True}": (
        "eval_dataset.length_grouping: True is not supported: evaluation takes the rows in the file's order; "
        "packing serves it too"
    ),
    # keys that would change the result in a way that is not built
    "lr_scale: True": "lr_scale: True is not supported: write the learning rate that is meant",
    "base_config: a.yaml": "base_config: 'a.yaml' is not supported: write all keys into one file",
    "lr_schedule: {decay_steps: 5}": (
        "lr_schedule.decay_steps: 5 is not supported: the rate always falls until total_steps"
    ),
    "callbacks: [{type: TrainCallBack, stop_step: 5}]": (
        "callbacks.0.stop_step: 5 is not supported: write it as runner_config.stop_step"
    ),
    # rules between keys
    "lr_schedule: {warmup_steps: 9, total_steps: 5}": (
        "lr_schedule.warmup_steps: 9 warm-up steps do not fit into total_steps (5)"
    ),
    "lr_schedule: {learning_rate: 1e-5, lr_end: 1e-4}": (
        "lr_schedule.lr_end: 0.0001 is above the learning rate (1e-05)"
    ),
    "optimizer: {betas: [0.9, 0.95], beta1: 0.8}": (
        "optimizer.betas: stands beside beta1 or beta2: write one of the two forms"
    ),
    "callbacks: [{type: MFLossMonitor}, {type: MFLossMonitor}]": (
        "callbacks.1: MFLossMonitor stands twice (entries 0 and 1)"
    ),
    "train_dataset_task: {dataset_config: {repeat: 2}}": (
        "train_dataset_task.dataset_config: differs from train_dataset, which is the block that is read "
        "(write it there, or as *train_dataset)"
    ),
}


@pytest.mark.parametrize("text,message", ONE_PROBLEM.items())
def test_one_problem(tmp_path, text, message):
    assert problems(tmp_path, HEAD + text) == [f"r.yaml:2: {message}"]


MODEL_PROBLEMS = {
    "pretrained: x\n  model_config: {}": (
        "2: model.pretrained: stands beside model_config: sizes come from one of the two"
    ),
    "arch: {}": "1: model: needs pretrained (a Hugging Face folder) or model_config (sizes)",
    "pretrained: x\n  hidden_size: 64": (
        "3: model.hidden_size: unknown key: sizes stand in model.model_config, or come from the config.json of "
        "model.pretrained"
    ),
    "pretrained: x\n  arch: {type: GPT2}": "3: model.arch.type: must be LlamaForCausalLM, not 'GPT2'",
    "model_config: {}\n  seq_length: 5": (
        "3: model.seq_length: belongs in model.model_config ('model.model_config.seq_length')"
    ),
    "model_config: {hidden_size: 100, num_heads: 3}": (
        "2: model.model_config.num_heads: 3 heads do not divide hidden_size (100)"
    ),
    "model_config: {hidden_size: 99, num_heads: 3}": (
        "2: model.model_config.num_heads: 3 heads make heads of odd size (33), rotary embedding needs an even one"
    ),
    "model_config: {num_heads: 32, n_kv_heads: 5}": (
        "2: model.model_config.n_kv_heads: 5 key-value heads do not divide num_heads (32)"
    ),
    "model_config: {vocab_size: 2}": "2: model.model_config.eos_token_id: 2 is outside the vocabulary (2 tokens)",
    "model_config: {qkv_has_bias: some}": "2: model.model_config.qkv_has_bias: must be True or False, not 'some'",
    "model_config: {extend_method: NTK}": (
        "2: model.model_config.extend_method: 'NTK' is not supported: write a longer context as rope_scaling"
    ),
    "model_config: {compute_dtype: float61}": (
        "2: model.model_config.compute_dtype: must be float32, bfloat16 or float16, not 'float61', "
        "did you mean 'float16'?"
    ),
    "model_config: {n_layers: 2}": "2: model.model_config.n_layers: unknown key, did you mean 'num_layers'?",
    "model_config: {lora_rank: 2}": (
        "2: model.model_config.lora_rank: unknown key, it belongs in model.model_config.pet_config"
    ),
    "model_config: {pet_config: {pet_type: ptuning2}}": (
        "2: model.model_config.pet_config.pet_type: must be lora, not 'ptuning2'"
    ),
    "model_config: {pet_config: {lora_dropout: 1}}": (
        "2: model.model_config.pet_config.lora_dropout: must be below 1, not 1"
    ),
}


@pytest.mark.parametrize("text,message", MODEL_PROBLEMS.items())
def test_one_problem_of_the_model(tmp_path, text, message):
    assert problems(tmp_path, f"model:\n  {text}\n") == [f"r.yaml:{message}"]


def test_all_problems_at_once_in_the_order_of_lines(tmp_path):
    text = """\
backend: torh
seed: 1
model:
  pretrained: x
  model_config: {num_heads: 5}
runner_config:
  epoch: 3
  batch_size: many
optimizer: {beta1: 2}
callbacks:
  - type: CheckpointMonitor
    keep_checkpoint_max: -1
  - type: nothing
  - type: CheckpointMonitor
    keep_checkpoint_per_n_minutes: 3
seed: 2
"""
    found = problems(tmp_path, text, "--epochs", "x")
    assert found == [
        "r.yaml:1: backend: must be mindspore or torch, not 'torh', did you mean 'torch'?",
        "r.yaml:4: model.pretrained: stands beside model_config: sizes come from one of the two",
        "r.yaml:5: model.model_config.num_heads: 5 heads do not divide hidden_size (4096)",
        "r.yaml:7: runner_config.epoch: unknown key, did you mean 'epochs'?",
        "r.yaml:8: runner_config.batch_size: must be a whole number, not 'many'",
        "r.yaml:9: optimizer.beta1: must be below 1, not 2",
        "r.yaml:12: callbacks.0.keep_checkpoint_max: must be above 0, not -1",
        "r.yaml:13: callbacks.1: must be MFLossMonitor, CheckpointMonitor, TrainCallBack, ObsMonitor, SummaryMonitor, "
        "ProfileMonitor, EvalCallBack or ColdHotExpertMointor, not 'nothing'",
        "r.yaml:14: callbacks.2: CheckpointMonitor stands twice (entries 0 and 2)",
        "r.yaml:15: callbacks.2.keep_checkpoint_per_n_minutes: 3 is not supported: checkpoints are kept by number",
        "r.yaml:16: seed: stands twice (first in line 2)",
        "--epochs: runner_config.epochs: must be a whole number, not 'x'",
    ]


def test_a_problem_inside_an_anchor_is_told_once_where_it_is_written(tmp_path):
    text = HEAD + "train_dataset: &data\n  repeats: 2\ntrain_dataset_task:\n  dataset_config: *data\n"
    assert problems(tmp_path, text) == ["r.yaml:3: train_dataset.repeats: unknown key, did you mean 'repeat'?"]


def test_a_key_without_a_value_counts_as_not_written(tmp_path):
    recipe = load(tmp_path, HEAD + "seed:\noptimizer:\ndevice: null\n")
    assert (recipe.seed, recipe.optimizer.type, recipe.device) == (0, "AdamW", None)
    assert problems(tmp_path, HEAD + "sed:\n") == ["r.yaml:2: sed: unknown key, did you mean 'seed'?"]


def refused(check, *arguments) -> list[str]:
    with pytest.raises(InputError) as caught:
        check(*arguments)
    return list(caught.value.problems)


def test_missing_paths_are_all_named(tmp_path):
    text = HEAD + "do_eval: True\ntrain_dataset:\n  data_loader: {dataset_dir: no/such}\n"
    text += "processor: {tokenizer: {vocab_file: t}}\n"
    recipe = load(tmp_path, text, "--load_checkpoint", "{path}/llama2_7b.ckpt")
    file = tmp_path / "r.yaml"
    assert refused(check_paths, recipe) == [
        f"{file}:4: train_dataset.data_loader.dataset_dir: no/such does not exist",
        f"{file}: eval_dataset.data_loader.dataset_dir: no data is named (give a MindRecord file or folder here or "
        "with --eval_dataset_dir)",
        f"{file}:1: model.pretrained: x is no Hugging Face folder (it has no config.json)",
        "--load_checkpoint: load_checkpoint: {path}/llama2_7b.ckpt is a placeholder: write the real path",
        f"{file}:5: processor.tokenizer.vocab_file: t does not exist",
    ]


def test_paths_that_exist_pass_and_only_the_ones_needed_are_looked_at(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = ("--model.pretrained", str(tmp_path), "--train_dataset_dir", str(tmp_path))
    check_paths(load(tmp_path, MINIMAL, *words))
    check_paths(load(tmp_path, MINIMAL, *words[:2], "--run_mode", "predict", "--predict_data", "Hello"))
    found = refused(check_paths, load(tmp_path, MINIMAL, *words[:2], "--run_mode", "predict"))
    assert found == [
        f"{tmp_path}/r.yaml: predict_data: no prompts are named (give texts, or a file of them, with --predict_data)"
    ]


def test_fine_tuning_needs_weights_training_does_not(tmp_path):
    words = ("--train_dataset_dir", str(tmp_path))
    check_paths(load(tmp_path, SIZES, *words))
    found = refused(check_paths, load(tmp_path, SIZES, *words, "--run_mode", "finetune"))
    assert found == [
        f"{tmp_path}/r.yaml: load_checkpoint: run_mode finetune needs weights (name them here or with "
        "--load_checkpoint)"
    ]
    check_paths(load(tmp_path, SIZES, *words, "--run_mode", "finetune", "--load_checkpoint", str(tmp_path)))
    check_paths(load(tmp_path, SIZES, *words, "--run_mode", "finetune", "--resume_training", "True"))


def test_half_precision_on_the_cpu_of_mindspore_is_refused_with_the_reason(tmp_path):
    text = "model:\n  pretrained: x\n  compute_dtype: bf16\n  rotary_dtype: float16\n"
    recipe = load(tmp_path, text)
    assert refused(check_device, recipe, "cpu") == [
        f"{tmp_path}/r.yaml:3: model.compute_dtype: MindSpore has no bfloat16 matrix product on CPU; use float32 "
        "(--model.compute_dtype float32), another device, or backend torch",
        f"{tmp_path}/r.yaml:4: model.rotary_dtype: MindSpore's float16 cross-entropy gives NaN on CPU; use float32 "
        "(--model.rotary_dtype float32), another device, or backend torch",
    ]
    check_device(recipe, "npu")
    check_device(load(tmp_path, text, "--backend", "torch"), "cpu")
    check_device(load(tmp_path, HEAD), "cpu")


def test_mindformers_half_precision_defaults_are_refused_there_too(tmp_path):
    found = refused(check_device, load(tmp_path, SIZES), "cpu")
    assert [line.split(": ")[1] for line in found] == [
        "model.model_config.compute_dtype",
        "model.model_config.param_init_type",
    ]
