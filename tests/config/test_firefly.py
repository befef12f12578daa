"""Firefly's train_args files are read as the recipe that trains as it does there, and say where they cannot be."""

import json

import pytest
from foreign_texts import FIREFLY
from recipe_texts import load, problems

from msft.config import derive
from msft.config.report import ignored_lines
from msft.config.schema_train import CheckpointMonitor, LossMonitor


def text(left_out=(), **changes):
    return json.dumps({key: value for key, value in {**FIREFLY, **changes}.items() if key not in left_out}, indent="\t")


def test_a_file_like_their_own_is_the_recipe_that_it_says(tmp_path):
    recipe = load(tmp_path, text())
    model, runner = recipe.model, recipe.runner_config
    assert (recipe.backend, recipe.run_mode, recipe.seed) == ("torch", "finetune", 42)
    assert (model.pretrained, model.seq_length) == ("models/tiny", 1024)
    assert (model.compute_dtype, model.param_init_type) == ("float16", "float16")
    pet = model.pet_config
    assert (pet.lora_rank, pet.lora_alpha, pet.lora_dropout, pet.target_modules) == (64, 16, 0.05, [".*"])
    assert (runner.batch_size, runner.gradient_accumulation_steps, runner.epochs) == (1, 16, 1)
    assert derive.schedule(recipe) == derive.Schedule("constant", 2e-4, 0.0, None, None, 100, 0.0, None, 0.5)
    assert derive.max_grad_norm(recipe) == 0.3 and derive.optimizer(recipe).weight_decay == 0
    assert derive.recompute(recipe) and not recipe.train_dataset.drop_remainder
    raw = recipe.train_dataset.data_loader.raw
    assert [file.model_dump(exclude_none=True) for file in raw.files] == [{"path": "./data/dummy_data.jsonl"}]
    assert (raw.template, raw.max_length) == ("firefly:qwen", 1024)
    assert recipe.callbacks == [
        LossMonitor(type="MFLossMonitor", per_print_times=100),
        CheckpointMonitor(type="CheckpointMonitor", save_checkpoint_steps=100, keep_checkpoint_max=1),
    ]
    assert recipe.output_dir == "output/firefly-tiny-sft-lora" and recipe.toolkit == "Firefly"


def test_what_does_nothing_here_is_told_with_its_line(tmp_path):
    assert [line.replace(f"{tmp_path}/", "") for line in ignored_lines(load(tmp_path, text()))] == [
        "r.yaml: read as a file of Firefly; recipe.yaml in output_dir says what it means here",
        "r.yaml: 4 keys do nothing, or something else, here (line numbers in brackets):",
        "  disable_tqdm (21): every step is in trainer_log.jsonl and in TensorBoard's events",
        "  optim (22): AdamW with float32 moments, which are not paged here",
        "  dataloader_num_workers (26), remove_unused_columns (30): rows are prepared and batches are made by msft "
        "itself",
    ]


def test_an_older_file_without_modes_and_templates_tunes_all_weights_on_plain_words(tmp_path):
    older = text(("train_mode", "template_name", "lora_rank", "lora_alpha", "lora_dropout", "fp16"))
    recipe = load(tmp_path, older)
    assert recipe.model.pet_config is None and recipe.train_dataset.data_loader.raw.template == "firefly:plain"


def test_pretraining_reads_a_folder_of_texts(tmp_path):
    recipe = load(tmp_path, text(task_type="pretrain", train_file="./data/pretrain", train_mode="full"))
    raw = recipe.train_dataset.data_loader.raw
    assert (raw.files[0].path, raw.running_text, raw.begin, raw.end) == ("./data/pretrain", True, True, False)


@pytest.mark.parametrize(
    ("left_out", "changes", "line", "message"),
    [
        ((), {"train_mode": "qlora"}, 6, "train_mode: 'qlora' is not supported: --train_mode lora trains the same"),
        (("train_mode",), {}, 16, "lora_rank: lora_rank without train_mode means qlora; 'qlora' is not supported"),
        ((), {"task_type": "dpo"}, 31, "task_type: 'dpo' is not supported: task_type sft and pretrain are built"),
        ((), {"template_name": "qwn"}, 5, "template_name: unknown template 'qwn', did you mean 'qwen'? (known: bai"),
        (
            (),
            {"max_seq_lenght": 3},
            31,
            "max_seq_lenght: unknown key in a file of Firefly, did you mean 'max_seq_length'",
        ),
        ((), {"learning_rate": "x"}, 10, "learning_rate: must be a number, not 'x'"),
        ((), {"use_dora": True}, 31, "use_dora: True is not supported: adapters are plain LoRA here"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_with_file_line_and_key(tmp_path, left_out, changes, line, message):
    (problem,) = problems(tmp_path, text(left_out, **changes))
    assert problem.startswith(f"r.yaml:{line}: {message}")
