"""Values from the command line: MindFormers' flags, dotted keys, and what a wrong one is told."""

import pytest
from recipe_texts import MINIMAL, SIZES, load, problems

from msft.config.overrides import FLAGS

# One value for every flag of MindFormers' run_mindformer.py, and where it must arrive.
FLAG_VALUES = {
    "backend": ("mindspore", "mindspore"),
    "device": ("cpu", "cpu"),
    "run_mode": ("predict", "predict"),
    "do_eval": ("True", True),
    "train_dataset_dir": ("a/b", "a/b"),
    "eval_dataset_dir": ("123", "123"),
    "predict_data": ("Hello", ["Hello"]),
    "predict_batch_size": ("3", 3),
    "load_checkpoint": ("{path}/x.ckpt", "{path}/x.ckpt"),
    "resume_training": ("True", True),
    "seed": ("7", 7),
    "use_parallel": ("False", False),
    "epochs": ("5", 5),
    "batch_size": ("6", 6),
    "gradient_accumulation_steps": ("2", 2),
    "sink_mode": ("False", False),
    "num_samples": ("50", 50),
    "output_dir": ("1e5", "1e5"),
    "mode": ("1", 1),
    "device_id": ("0", 0),
    "device_target": ("CPU", "CPU"),
    "adapter_id": ("a", "a"),
    "src_strategy_path_or_dir": ("s", "s"),
    "auto_trans_ckpt": ("True", True),
    "transform_process_num": ("1", 1),
    "only_save_strategy": ("False", False),
    "strategy_load_checkpoint": ("s.ckpt", "s.ckpt"),
    "remote_save_url": ("u", "u"),
    "profile": ("False", False),
}


def at(recipe, dotted: str):
    value = recipe.model_dump(by_alias=True)
    for key in dotted.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    return value


def test_every_flag_of_the_table_is_tested_here():
    assert FLAG_VALUES.keys() | {"register_path"} == FLAGS.keys()


@pytest.mark.parametrize("flag", FLAG_VALUES)
def test_a_flag_of_mindformers_sets_its_keys(tmp_path, flag):
    text, value = FLAG_VALUES[flag]
    for words in ([f"--{flag}", text], [f"--{flag}={text}"]):
        recipe = load(tmp_path, MINIMAL, *words)
        for key in FLAGS[flag]:
            assert at(recipe, key) == value
            assert recipe.source[key] == f"--{flag}"


def test_python_files_are_not_run(tmp_path):
    assert problems(tmp_path, MINIMAL, "--register_path", "research/x") == [
        "--register_path: 'research/x' is not supported: python files named by a recipe are not run"
    ]


FORMS = {
    "--optimizer.weight_decay 0.1": ("optimizer.weight_decay", 0.1),
    "--optimizer.weight_decay=1e-2": ("optimizer.weight_decay", 1e-2),
    "optimizer.weight_decay=1.e-2": ("optimizer.weight_decay", 1e-2),
    "--optimizer.betas [0.9,0.95]": ("optimizer.betas", (0.9, 0.95)),
    "--callbacks.1.save_checkpoint_steps 7": ("callbacks.1.save_checkpoint_steps", 7),
    "--eval_step_interval -1": ("eval_step_interval", -1),
    "--options optimizer.weight_decay=0.5 seed=9": ("optimizer.weight_decay", 0.5),
    "seed=9": ("seed", 9),
    "--model.pet_config.target_modules .*wq|.*wk": ("model.pet_config.target_modules", [".*wq|.*wk"]),
    "--model.pet_config.target_modules [q_proj,wk]": ("model.pet_config.target_modules", ["q_proj", "wk"]),
    "--train_dataset.data_loader.dataset_dir None": ("train_dataset.data_loader.dataset_dir", "None"),
    "--device gpu": ("device", "cuda"),
}


@pytest.mark.parametrize("line", FORMS)
def test_forms_of_a_dotted_key(tmp_path, line):
    key, value = FORMS[line]
    assert at(load(tmp_path, MINIMAL, *line.split()), key) == value


def test_a_mapping_as_a_value(tmp_path):
    recipe = load(tmp_path, MINIMAL, "--runner_wrapper.scale_sense", "{scale_window: 5}")
    assert recipe.runner_wrapper.scale_sense.scale_window == 5
    assert recipe.runner_wrapper.scale_sense.loss_scale_value == 65536


def test_several_prompts_and_an_empty_value(tmp_path):
    words = ("--predict_data", "How are you?", "x: y", "--load_checkpoint", "", "--seed", "3")
    recipe = load(tmp_path, MINIMAL, *words)
    assert recipe.predict_data == ["How are you?", "x: y"]
    assert (recipe.load_checkpoint, recipe.seed) == ("", 3)


def test_the_command_line_wins_over_the_file_and_its_last_word_wins(tmp_path):
    assert load(tmp_path, MINIMAL).runner_config.epochs == 2
    recipe = load(tmp_path, MINIMAL, "--epochs", "3", "runner_config.epochs=4")
    assert recipe.runner_config.epochs == 4
    assert recipe.source["runner_config.epochs"] == "runner_config.epochs"
    assert recipe.source["runner_config.batch_size"].endswith("r.yaml:10")
    assert "seed" not in recipe.source


def test_a_block_can_be_replaced_by_a_flag(tmp_path):
    text = SIZES.replace("hidden_size: 64", "hidden_size: 65")
    assert problems(tmp_path, text) == [
        "r.yaml:5: model.model_config.num_heads: 4 heads do not divide hidden_size (65)"
    ]
    recipe = load(tmp_path, text, "--model", "{pretrained: x}")
    assert (recipe.model.pretrained, recipe.model.config) == ("x", None)


@pytest.mark.parametrize(
    "line,messages",
    {
        "--runner_config.epoch 3": ["--runner_config.epoch: unknown key, did you mean 'epochs'?"],
        "runner_config.epoch=3": ["runner_config.epoch: unknown key, did you mean 'epochs'?"],
        "--epochs many": ["--epochs: runner_config.epochs: must be a whole number, not 'many'"],
        "--epoch 3": ["--epoch: unknown flag, did you mean '--epochs'?"],
        "--learning_rate 1e-4": ["--learning_rate: unknown key, it belongs in optimizer or lr_schedule"],
        "--use_parallel Flase": ["--use_parallel: must be True or False, not 'Flase', did you mean 'False'?"],
        "--seed": ["--seed: needs a value"],
        "--seed --epochs 3": ["--seed: needs a value"],
        "lonely": ["lonely: is no flag and no key=value"],
        "-x 3": ["-x: is no flag and no key=value", "3: is no flag and no key=value"],
        "--seed.a 3": ["--seed.a: 'seed' is a single value, it has no keys"],
        "--callbacks.9.prefix x": [
            "--callbacks.9.prefix: 'callbacks' is a list with the entries 0 to 1, it has no '9'"
        ],
        "--callbacks.x 1": ["--callbacks.x: 'callbacks' is a list with the entries 0 to 1, it has no 'x'"],
        "a.b=c": ["a.b: a: unknown key"],
        "--model.compute_dtpe float32": ["--model.compute_dtpe: unknown key, did you mean 'compute_dtype'?"],
        "--seed 9223372036854775808": [
            "--seed: must be at most 9223372036854775807, not 9223372036854775808",
        ],
        "--epochs 0 --seed x": [
            "--epochs: runner_config.epochs: must be above 0, not 0",
            "--seed: must be a whole number, not 'x'",
        ],
    }.items(),
)
def test_wrong_words_are_named(tmp_path, line, messages):
    assert problems(tmp_path, MINIMAL + "seed: 1\n", *line.split()) == messages
