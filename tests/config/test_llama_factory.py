"""LLaMA-Factory's files are read as the recipe that trains as it does there, and say where they cannot be."""

import dataclasses
import re

import pytest
from foreign_texts import INFO, LLAMA_FACTORY, write_info
from recipe_texts import load, problems

from msft.config import derive
from msft.config.checks import check_paths
from msft.config.importers.llama_factory import OWN_TEMPLATE
from msft.config.importers.training_arguments import TrainingArguments
from msft.config.report import ignored_lines
from msft.config.schema_train import CheckpointMonitor, LossMonitor
from msft.errors import InputError

MINIMAL = "model_name_or_path: models/tiny\nstage: sft\ndataset: identity\ntemplate: llama3\n"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A folder like a LLaMA-Factory checkout."""
    monkeypatch.chdir(tmp_path)
    write_info(tmp_path / "data")


def test_a_file_like_their_examples_is_the_recipe_that_it_says(tmp_path):
    recipe = load(tmp_path, LLAMA_FACTORY)
    model, runner, rows = recipe.model, recipe.runner_config, recipe.train_dataset
    assert (recipe.backend, recipe.run_mode, recipe.seed) == ("torch", "finetune", 42)
    assert (model.pretrained, model.seq_length) == ("models/tiny", 1024)
    assert (model.compute_dtype, model.param_init_type) == ("bfloat16", "bfloat16")
    pet = model.pet_config
    assert (pet.lora_rank, pet.lora_alpha, pet.lora_dropout, pet.target_modules) == (4, 8, 0.0, [".*"])
    assert (runner.batch_size, runner.gradient_accumulation_steps, runner.epochs) == (1, 8, 3)
    assert derive.schedule(recipe) == derive.Schedule("cosine", 1e-4, 0.0, 0.1, None, 0, 0.0, None, 0.5, True)
    optimizer = derive.optimizer(recipe)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert optimizer.bias_correction and derive.max_grad_norm(recipe) == 1.0
    assert derive.recompute(recipe) and not rows.drop_remainder and rows.data_loader.shuffle and not rows.packing
    assert recipe.callbacks == [
        LossMonitor(type="MFLossMonitor", per_print_times=10),
        CheckpointMonitor(type="CheckpointMonitor", save_checkpoint_steps=200, keep_checkpoint_max=1_000_000),
    ]
    raw = rows.data_loader.raw
    assert [file.model_dump(exclude_none=True) for file in raw.files] == [
        {"path": "data/identity.json", "formatting": "alpaca", "num_samples": 1000},
        {
            "path": "data/chats.jsonl",
            "formatting": "sharegpt",
            "columns": INFO["chats"]["columns"],
            "tags": INFO["chats"]["tags"],
            "num_samples": 1000,
        },
    ]
    assert (raw.template, raw.max_length, raw.num_workers) == ("llama_factory:llama3", 1024, 16)
    assert not raw.last_answer_only and not raw.running_text
    assert derive.evaluation(recipe) == derive.Evaluation(100, None)
    assert (recipe.eval_dataset.data_loader.held_out, recipe.eval_dataset.batch_size) == (0.1, 2)
    assert recipe.output_dir == "saves/tiny/lora/sft" and recipe.resume_training is False
    assert recipe.toolkit == "LLaMA-Factory"


def test_what_is_not_written_has_their_defaults(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    pet = recipe.model.pet_config
    assert (pet.lora_rank, pet.lora_alpha, pet.lora_dropout) == (8, 16, 0)
    # Without bf16 and fp16 nothing is said of dtypes.
    assert (recipe.model.compute_dtype, recipe.model.param_init_type) == (None, None)
    assert derive.schedule(recipe) == derive.Schedule("linear", 5e-5, 0.0, None, None, 0, 0.0, None, 0.5)
    assert (recipe.runner_config.batch_size, recipe.runner_config.epochs, recipe.model.seq_length) == (8, 3, 2048)
    assert derive.evaluation(recipe) is None and derive.log_every(recipe) == 500
    assert derive.saving(recipe).every_steps == 500 and recipe.output_dir == "trainer_output"


def test_the_defaults_and_keys_are_those_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = {field.name: field.default for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    ours = TrainingArguments.model_fields
    assert not theirs.keys() - ours.keys()
    # LLaMA-Factory needs output_dir; the two AdamW of torch compute the same.
    elsewhere = {"output_dir", "optim"}
    for name in ours.keys() & theirs.keys() - elsewhere:
        if ours[name].default is not None and theirs[name] is not None:
            assert ours[name].default == theirs[name], name


def test_the_recipe_that_a_run_writes_is_the_same_recipe(tmp_path):
    recipe = load(tmp_path, LLAMA_FACTORY)
    again = load(tmp_path, recipe.to_yaml())
    assert again.model_dump() == recipe.model_dump() and again.toolkit == ""


MAPPED = {
    "finetuning_type: full": lambda recipe: recipe.model.pet_config is None,
    "lora_alpha: 7": lambda recipe: recipe.model.pet_config.lora_alpha == 7,
    "use_rslora: true": lambda recipe: recipe.model.pet_config.lora_alpha == pytest.approx(16 * 8**0.5),
    "lora_target: q_proj,v_proj": lambda recipe: (
        recipe.model.pet_config.target_modules == [r"(.*\.)?q_proj$", r"(.*\.)?v_proj$"]
    ),
    "additional_target: embed_tokens": lambda recipe: recipe.model.pet_config.freeze_exclude == ["*embed_tokens*"],
    "adapter_name_or_path: saves/a": lambda recipe: recipe.load_checkpoint == "saves/a",
    "fp16: true": lambda recipe: (
        (recipe.model.compute_dtype, recipe.model.param_init_type) == ("float16",) * 2
        and recipe.runner_wrapper.scale_sense.scale_window == 2000
    ),
    "moe_aux_loss_coef: 0.02": lambda recipe: recipe.model.moe_aux_loss_coef == 0.02,
    "pure_bf16: true": lambda recipe: recipe.model.compute_dtype == "bfloat16",
    "max_steps: 7": lambda recipe: (
        (recipe.runner_config.stop_step, recipe.lr_schedule.total_steps, recipe.runner_config.epochs) == (7, 7, 7)
    ),
    "max_steps: 7\nwarmup_steps: 9": lambda recipe: (
        (recipe.runner_config.stop_step, recipe.lr_schedule.total_steps, recipe.lr_schedule.warmup_steps) == (7, -1, 9)
    ),
    "warmup_steps: 5": lambda recipe: recipe.lr_schedule.warmup_steps == 5 and recipe.lr_schedule.warmup_ratio is None,
    "warmup_steps: 0.1": lambda recipe: recipe.lr_schedule.warmup_ratio == 0.1,
    "lr_scheduler_type: constant": lambda recipe: recipe.lr_schedule.type == "ConstantWarmUpLR",
    "max_grad_norm: 0": lambda recipe: derive.max_grad_norm(recipe) is None,
    "max_grad_norm: 0.3": lambda recipe: derive.max_grad_norm(recipe) == 0.3,
    "adam_beta2: 0.95": lambda recipe: derive.optimizer(recipe).beta2 == 0.95,
    "adam_epsilon: 1e-6": lambda recipe: derive.optimizer(recipe).eps == 1e-6,
    "weight_decay: 0.1": lambda recipe: derive.optimizer(recipe).weight_decay == 0.1,
    "seed: 5": lambda recipe: recipe.seed == 5,
    "save_total_limit: 2": lambda recipe: derive.saving(recipe).keep == 2,
    "save_strategy: 'no'": lambda recipe: derive.saving(recipe) is None,
    "resume_from_checkpoint: true": lambda recipe: recipe.resume_training is True,
    "resume_from_checkpoint: a/b": lambda recipe: recipe.resume_training == "a/b",
    "disable_gradient_checkpointing: true": lambda recipe: not derive.recompute(recipe),
    "disable_shuffling: true": lambda recipe: not recipe.train_dataset.data_loader.shuffle,
    "group_by_length: true": lambda recipe: recipe.train_dataset.length_grouping,
    "train_sampling_strategy: group_by_length": lambda recipe: recipe.train_dataset.length_grouping,
    "dataloader_drop_last: true": lambda recipe: recipe.train_dataset.drop_remainder,
    "neat_packing: true": lambda recipe: recipe.train_dataset.packing,
    "train_on_prompt: true": lambda recipe: recipe.train_dataset.input_columns == ["input_ids"],
    "mask_history: true": lambda recipe: recipe.train_dataset.data_loader.raw.last_answer_only,
    "eval_strategy: epoch\neval_dataset: identity": lambda recipe: (
        derive.evaluation(recipe) == derive.Evaluation(None, 1)
        and recipe.eval_dataset.data_loader.raw.files[0].path == "data/identity.json"
    ),
    "eval_strategy: steps\nval_size: 5": lambda recipe: derive.evaluation(recipe) == derive.Evaluation(500, None),
    "deepspeed: ds.json": lambda recipe: (recipe.strategy, recipe.deepspeed) == ("deepspeed", "ds.json"),
    "fsdp: full_shard auto_wrap": lambda recipe: recipe.strategy == "fsdp",
    # Keys of a recipe beside theirs.
    "backend: mindspore": lambda recipe: recipe.backend == "mindspore",
    "device: cpu": lambda recipe: recipe.device == "cpu",
    "parallel_config: {model_parallel: 2}": lambda recipe: recipe.parallel_config.model_parallel == 2,
}


@pytest.mark.parametrize("text", MAPPED, ids=lambda text: re.split(r"[\n]", text)[0])
def test_every_mapped_key_says_in_the_recipe_what_it_says_there(tmp_path, text):
    assert MAPPED[text](load(tmp_path, f"{MINIMAL}{text}\n"))


def test_pretraining_joins_texts_and_cuts_them(tmp_path):
    raw = load(tmp_path, MINIMAL.replace("sft", "pt")).train_dataset.data_loader.raw
    assert raw.running_text and (raw.begin, raw.end, raw.max_length) == (False, True, 2048)


REFUSED = {
    "stage: dpo": "stage: 'dpo' is not supported: stages sft and pt are built, with finetuning_type lora or full",
    "finetuning_type: freeze": "finetuning_type: 'freeze' is not supported: stages sft and pt are built",
    "quantization_bit: 4": "quantization_bit: 4 is not supported: quantized models are not built",
    "use_dora: true": "use_dora: True is not supported: adapters are plain LoRA here",
    "neftune_noise_alpha: 5": "neftune_noise_alpha: 5 is not supported: noise on embeddings is not built",
    "packing: true": "packing: packing without neat_packing lets examples see each other",
    "optim: adamw_8bit": "optim: 'adamw_8bit' is not supported: AdamW with float32 moments",
    "lr_scheduler_type: polynomial": "lr_scheduler_type: 'polynomial' is not supported: linear, cosine, constant",
    "num_train_epochs: 0.5": "num_train_epochs: 0.5 is not supported: parts of an epoch are written as max_steps",
    "fsdp: shard_grad_op": "fsdp: 'shard_grad_op' is not supported: full_shard is what is built",
    "template: lama3": "template: unknown template 'lama3', did you mean 'llama3'? (known: alpaca, baichuan",
    "dataset: identiti": "dataset: data/dataset_info.json has no data set 'identiti', did you mean 'identity'?",
    "dataset: online": "data/dataset_info.json: online: hf_hub_url 'llamafactory/alpaca_en' is not downloaded here",
    "dataset: pairs": "dataset: data/dataset_info.json: pairs: ranking is for stages that compare answers",
    "dataset_dir: nowhere": "dataset_dir: nowhere/dataset_info.json: cannot be read: No such file or directory",
    "learning_rat: 1": "learning_rat: unknown key in a file of LLaMA-Factory, did you mean 'learning_rate'?",
    "bf16: maybe": "bf16: must be True or False, not 'maybe'",
    "bf16: true\nfp16: true": "fp16: stands beside bf16: write one of the two",
    "adapter_name_or_path: a,b": "adapter_name_or_path: several adapters are not supported",
    "mask_history: true\ntrain_on_prompt: true": "mask_history: stands beside train_on_prompt",
    # What the recipe's own schema finds, by their key.
    "lora_rank: -1": "lora_rank: must be above 0, not -1",
    "save_steps: 0.1": "save_steps: 0.1 is not supported: write a number of steps",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: re.split(r"[\n]", text)[0])
def test_what_would_train_otherwise_is_refused_with_file_line_and_key(tmp_path, text):
    keys = [line.split(":")[0] for line in text.splitlines()]
    lines = [line for line in MINIMAL.splitlines() if line.split(":")[0] not in keys] + text.splitlines()
    (problem,) = problems(tmp_path, "\n".join(lines))
    key = REFUSED[text].split(":")[0] if REFUSED[text].split(":")[0] in keys else keys[0]
    line = 1 + next(number for number, written in enumerate(lines) if written.startswith(f"{key}:"))
    assert problem.startswith(f"r.yaml:{line}: ") and REFUSED[text] in problem


def test_all_problems_are_told_at_once_whoever_finds_them(tmp_path):
    words = [
        "--learning_rate",
        "x",
        "quantization_bit=4",
        "learning_rat=1",
        "--runner_config.batch_size",
        "0",
        "--zz",
        "1",
    ]
    found = problems(tmp_path, MINIMAL.replace("sft", "ppo"), *words)
    assert {problem.split(":")[0] for problem in found} == {
        "r.yaml",
        "--learning_rate",
        "quantization_bit",
        "learning_rat",
        "--runner_config.batch_size",
        "--zz",
    }


def test_what_the_recipe_refuses_names_their_key_and_line(tmp_path):
    text = f"{MINIMAL}group_by_length: true\nneat_packing: true\n"
    assert problems(tmp_path, text) == [
        "r.yaml:5 group_by_length: train_dataset.length_grouping: stands beside packing, which fills every row: "
        "write one of the two"
    ]


def test_what_is_not_on_this_disk_names_their_key_and_line(tmp_path):
    with pytest.raises(InputError) as refusal:
        check_paths(load(tmp_path, MINIMAL.replace("models/tiny", "meta-llama/Llama-3-8B")))
    lines = [line.replace(f"{tmp_path}/", "") for line in refusal.value.problems]
    assert lines == [
        "r.yaml:3 dataset: train_dataset.data_loader.raw.files.0.path: data/identity.json does not exist",
        "r.yaml:1 model_name_or_path: model.pretrained: meta-llama/Llama-3-8B is no Hugging Face folder (it has no "
        "config.json); to fetch it: hf download meta-llama/Llama-3-8B --local-dir DIR",
    ]


def test_a_model_that_hugging_face_has_downloaded_is_found(tmp_path, monkeypatch):
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load(tmp_path, MINIMAL.replace("models/tiny", "org/name")).model.pretrained == str(snapshot)
    assert load(tmp_path, MINIMAL.replace("models/tiny", "org/other")).model.pretrained == "org/other"


def test_flags_of_both_toolkits_change_it(tmp_path):
    words = [
        "learning_rate=3e-4",
        "gradient_accumulation_steps=5",
        "--lora_rank",
        "2",
        "--epochs",
        "5",
        "--optimizer.weight_decay",
        "0.1",
    ]
    recipe = load(tmp_path, LLAMA_FACTORY, *words, "--backend", "mindspore", "--output_dir", "out")
    assert derive.learning_rate(recipe) == 3e-4 and recipe.source["lr_schedule.learning_rate"] == "learning_rate"
    assert (recipe.model.pet_config.lora_rank, recipe.model.pet_config.lora_alpha) == (2, 4)
    assert (recipe.runner_config.epochs, recipe.optimizer.weight_decay) == (5, 0.1)
    assert recipe.runner_config.gradient_accumulation_steps == 5
    assert (recipe.backend, recipe.output_dir) == ("mindspore", "out")


def test_a_mindrecord_on_the_command_line_takes_the_place_of_their_data(tmp_path):
    text = MINIMAL.replace("dataset: identity", "dataset: nothing")
    recipe = load(tmp_path, text, "--train_dataset_dir", "x.mindrecord")
    assert recipe.train_dataset.data_loader.dataset_dir == "x.mindrecord" and not recipe.train_dataset.data_loader.raw
    assert "the command line names a MindRecord file, which wins" in "\n".join(ignored_lines(recipe))


def test_what_does_nothing_here_is_told_once_by_reason(tmp_path):
    recipe = load(tmp_path, f"{LLAMA_FACTORY}eval_delay: 3\ndebug: x\n")
    lines = [line.replace(f"{tmp_path}/", "") for line in ignored_lines(recipe)]
    assert lines == [
        "r.yaml: read as a file of LLaMA-Factory; recipe.yaml in output_dir says what it means here",
        "r.yaml: 7 keys do nothing, or something else, here (line numbers in brackets):",
        "  trust_remote_code (3): code beside a model is never run",
        "  overwrite_cache (17): rows are prepared and batches are made by msft itself",
        "  plot_loss (24): training_loss.png is drawn wherever matplotlib is installed",
        "  overwrite_output_dir (25): a new run sets the results of an earlier one aside",
        "  ddp_timeout (36): hang_timeout says how long silence may last",
        "  eval_delay (44), debug (45): has no equal here",
    ]


@pytest.mark.parametrize("template", ["", *(f"template: {name}\n" for name in OWN_TEMPLATE)])
def test_templates_that_have_no_text_of_their_own_are_the_tokenizers(tmp_path, template):
    recipe = load(tmp_path, MINIMAL.replace("template: llama3\n", template))
    assert recipe.train_dataset.data_loader.raw.template == ""
    assert [entry.path for entry in recipe.ignored] == (["template"] if template else [])


def test_a_recipe_is_no_file_of_theirs(tmp_path):
    assert problems(tmp_path, "model: {pretrained: x}\nmodel_name_or_path: x\n") == [
        "r.yaml:2: model_name_or_path: unknown key"
    ]
