"""Protects the configuration that DeepSpeed gets: nothing left to its defaults, nothing against the recipe.

The oracle for "auto" is what transformers' integration fills in (`HfTrainerDeepSpeedConfig`), worked out by hand.
"""

import json
import re
from pathlib import Path

import pytest
from recipe_texts import SIZES, load

from msft.config import deepspeed, derive
from msft.config.report import ignored_lines
from msft.errors import InputError

RECIPE = f"""\
backend: torch
strategy: deepspeed
{SIZES}    compute_dtype: float32
runner_config:
  batch_size: 2
  gradient_accumulation_steps: 4
optimizer:
  type: AdamW
  learning_rate: 2e-4
  weight_decay: 0.1
  betas: [0.9, 0.95]
runner_wrapper:
  max_grad_norm: 0.5
"""


def of(tmp_path, own=None, text=RECIPE, ranks=8, device="cpu"):
    """The configuration of a recipe with a user's JSON (a dict or the file's text)."""
    if own is not None:
        (tmp_path / "ds.json").write_text(own if isinstance(own, str) else json.dumps(own))
        text += f"deepspeed: {tmp_path / 'ds.json'}\n"
    recipe = load(tmp_path, text)
    return deepspeed.whole(recipe, derive.model_spec(recipe), ranks, device)


def problems(*arguments, **settings):
    with pytest.raises(InputError) as caught:
        of(*arguments, **settings)
    return caught.value.problems


def test_what_the_recipe_says_is_written_out(tmp_path):
    whole = of(tmp_path)
    assert whole["train_micro_batch_size_per_gpu"] == 2
    assert whole["gradient_accumulation_steps"] == 4
    assert whole["train_batch_size"] == 64
    assert whole["gradient_clipping"] == 0.5
    kernel = {"torch_adam": True}
    rates = {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert whole["optimizer"] == {"type": "AdamW", "params": kernel | rates}
    assert (whole["bf16"]["enabled"], whole["fp16"]["enabled"]) == (False, False)
    assert whole["data_types"] == {"grad_accum_dtype": "fp32"} and whole["communication_data_type"] == "fp32"
    zero = whole["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (2, "none", "none")
    assert "scheduler" not in whole
    json.dumps(whole)


def test_no_clipping_is_written_as_zero(tmp_path):
    """DeepSpeed clips at 1.0 when the key is left out."""
    text = RECIPE.replace("  max_grad_norm: 0.5", "  use_clip_grad: False")
    assert of(tmp_path, text=text)["gradient_clipping"] == 0.0
    found = problems(tmp_path, {"gradient_clipping": 1.0}, text=text)
    assert len(found) == 1 and "gradient_clipping: is 1.0, but runner_wrapper.use_clip_grad (" in found[0]
    assert found[0].endswith('asks for 0.0; "auto" takes that')


@pytest.mark.parametrize(("dtype", "enabled"), [("float32", (False, False)), ("bfloat16", (True, False))])
def test_dtypes_follow_compute_dtype(tmp_path, dtype, enabled):
    text = RECIPE.replace("compute_dtype: float32", f"compute_dtype: {dtype}")
    whole = of(tmp_path, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, text=text)
    assert (whole["bf16"]["enabled"], whole["fp16"]["enabled"]) == enabled


def test_float16_takes_the_loss_scale_of_the_recipe(tmp_path):
    text = RECIPE.replace("compute_dtype: float32", "compute_dtype: fp16")
    scale = "  scale_sense:\n    type: DynamicLossScaleUpdateCell\n    loss_scale_value: 4096\n    scale_window: 500\n"
    fp16 = of(tmp_path, text=text + scale)["fp16"]
    assert fp16["enabled"] is True and fp16["loss_scale"] == 0
    assert (fp16["initial_scale_power"], fp16["loss_scale_window"]) == (12, 500)


def test_auto_is_filled_in_as_transformers_does(tmp_path):
    """The example of transformers' documentation for ZeRO-3, of a model with hidden size 64."""
    own = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    whole = of(tmp_path, own)
    assert (whole["train_batch_size"], whole["gradient_clipping"]) == (64, 0.5)
    zero = whole["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096
    assert zero["stage3_prefetch_bucket_size"] == 3686
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert whole["steps_per_print"] == 2000 and zero["overlap_comm"] is True
    # What is offloaded is DeepSpeedCPUAdam's.
    assert whole["optimizer"]["params"]["torch_adam"] is False and whole["zero_force_ds_cpu_optimizer"] is True
    assert '"auto"' not in json.dumps(whole)


CONTRADICTIONS = [
    ("train_micro_batch_size_per_gpu", 4, "runner_config.batch_size", "2"),
    ("gradient_accumulation_steps", 1, "runner_config.gradient_accumulation_steps", "4"),
    ("gradient_clipping", 1.0, "runner_wrapper.max_grad_norm", "0.5"),
    ("optimizer.params.lr", 1e-3, "optimizer.learning_rate", "0.0002"),
    ("optimizer.params.betas", [0.9, 0.999], "optimizer.betas", "[0.9, 0.95]"),
    ("optimizer.params.weight_decay", 0.0, "optimizer.weight_decay", "0.1"),
]


@pytest.mark.parametrize(("key", "value", "ours", "wanted"), CONTRADICTIONS, ids=[row[0] for row in CONTRADICTIONS])
def test_a_contradiction_names_both_places(key, value, ours, wanted, tmp_path):
    own = value
    for part in reversed(key.split(".")):
        own = {part: own}
    line = next(
        number for number, text in enumerate(RECIPE.splitlines(), 1) if text.strip().startswith(ours.split(".")[-1])
    )
    (found,) = problems(tmp_path, own)
    assert found.startswith(f"{tmp_path}/ds.json: {key}: is {value!r}, but {ours} (")
    assert f"r.yaml:{line}) asks for {wanted}" in found


def test_all_problems_at_once(tmp_path):
    own = {
        "train_batch_size": 32,
        "gradient_cliping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lion"},
        "scheduler": {"type": "WarmupDecayLR", "params": {}},
        "zero_optimization": {"stage": 0, "allgather_bucket_size": "auto"},
        "curriculum_learning": {},
        "gradient_allreduce_op": "sum",
    }
    found = [problem.removeprefix(f"{tmp_path}/ds.json: ") for problem in problems(tmp_path, own)]
    beginnings = (
        "gradient_cliping: DeepSpeed has no such key, did you mean 'gradient_clipping'?",
        "curriculum_learning: is not taken: it trains otherwise than the recipe says",
        "optimizer.type: is 'Lion', but the recipe's optimizers are AdamW here",
        "scheduler.type: is 'WarmupDecayLR', but lr_schedule.type (",
        "train_batch_size: is 32, but runner_config.batch_size x gradient_accumulation_steps x 8 processes",
        "gradient_allreduce_op: is 'sum', but the loss over all supervised tokens",
        "bf16.enabled: is True, but model.model_config.compute_dtype (",
        "zero_optimization.stage: is 0, it must be 1, 2 or 3",
        'zero_optimization.allgather_bucket_size: "auto" is not known for this key',
    )
    assert len(found) == len(beginnings)
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in found), (beginning, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "the top level must be an object"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "the key 'enabled' stands twice"),
    ],
)
def test_files_that_are_none(text, message, tmp_path):
    (found,) = problems(tmp_path, text)
    assert found.endswith(message) and "ds.json" in found and "r.yaml:" in found


def test_a_file_that_is_not_there(tmp_path):
    (found,) = problems(tmp_path, text=RECIPE + "deepspeed: nowhere.json\n")
    assert found.endswith("deepspeed: nowhere.json: cannot be read: No such file or directory")


def test_keys_in_the_recipe_itself_are_named_by_line(tmp_path):
    inline = "deepspeed:\n  zero_optimization:\n    stage: 3\n  gradient_clipping: 1.0\n"
    (found,) = problems(tmp_path, text=RECIPE + inline)
    line = len(RECIPE.splitlines()) + 4
    assert f"r.yaml:{line}: deepspeed: gradient_clipping: is 1.0, but runner_wrapper.max_grad_norm (" in found
    assert of(tmp_path, text=RECIPE + inline.replace("1.0", "auto"))["zero_optimization"]["stage"] == 3


def test_the_form_without_bias_correction_is_deepspeeds_own_kernel(tmp_path):
    text = RECIPE.replace("type: AdamW", "type: FP32StateAdamWeightDecay")
    params = of(tmp_path, text=text)["optimizer"]["params"]
    assert params["bias_correction"] is False and params["torch_adam"] is False and params["eps"] == 1e-6


def test_without_deepspeed_its_strategy_is_refused(tmp_path, monkeypatch):
    recipe = load(tmp_path, RECIPE)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        deepspeed.check(recipe, derive.model_spec(recipe), 2)
    (found,) = caught.value.problems
    assert found.endswith("r.yaml:2: strategy deepspeed needs deepspeed: pip install 'msft[deepspeed]'")
    deepspeed.check(recipe, derive.model_spec(recipe), 1)


def test_the_readmes_example_is_taken(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"```yaml\n(.*?)```", readme, re.S) if "deepspeed" in text)
    whole = of(tmp_path, text=RECIPE.replace("strategy: deepspeed\n", "") + example)
    assert whole["zero_optimization"]["stage"] == 3 and whole["gradient_clipping"] == 0.5


def test_deepspeed_and_cut_models_are_one_of_two(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, RECIPE + "parallel_config: {model_parallel: 2}\n")
    (found,) = caught.value.problems
    assert found.endswith(
        "r.yaml:2: strategy: deepspeed stands beside parallel_config.model_parallel 2: write one of the two; "
        "fsdp and ddp go with it"
    )


def test_the_key_belongs_to_its_strategy(tmp_path):
    text = RECIPE.replace("strategy: deepspeed", "strategy: fsdp") + "deepspeed: ds.json\n"
    assert any("it is for strategy deepspeed, here it is fsdp" in line for line in ignored_lines(load(tmp_path, text)))
    with pytest.raises(InputError, match="must be the path of a JSON file or a block of DeepSpeed's own keys, not 3"):
        load(tmp_path, RECIPE + "deepspeed: 3\n")


@pytest.mark.parametrize(
    ("own", "where"),
    [
        ({"zero_optimization": True}, "zero_optimization: is True, it must be a block of keys"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer: is 'cpu', it must"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: is True, it must be 1, 2 or 3"),
        ({"optimizer": "Adam"}, "optimizer: is 'Adam', it must be a block of keys"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "optimizer.params: is 3, it must be a block of keys"),
        ({"fp16": True}, "fp16: is True, it must be a block of keys"),
        ({"data_types": None}, "data_types: is None, it must be a block of keys"),
        ({"scheduler": "WarmupLR"}, "scheduler: is 'WarmupLR', it must be a block of keys"),
        ({"scheduler": {"type": [1]}}, "scheduler.type: is "),
        ({"scheduler": {"type": "WarmupLR", "params": [1]}}, "scheduler.params: is "),
    ],
)
def test_a_value_in_the_place_of_a_block_is_neither_dropped_nor_a_crash(own, where, tmp_path):
    (problem,) = problems(tmp_path, own)
    assert where in problem


def test_an_empty_scheduler_is_none(tmp_path):
    assert "scheduler" not in of(tmp_path, {"scheduler": None})


def test_evaluation_goes_without_deepspeed_and_says_so(tmp_path):
    recipe = load(tmp_path, RECIPE + "run_mode: eval\ndeepspeed: {}\n")
    assert derive.strategy(recipe) == "fsdp"
    told = "\n".join(ignored_lines(recipe))
    assert re.search(r"deepspeed \(\d+\), strategy|strategy \(\d+\), deepspeed", told)
    assert "run_mode eval shares the model out as fsdp does" in told
