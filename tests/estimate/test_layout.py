"""Protects layouts: what a recipe's keys mean, what is refused, what is tried."""

from math import prod
from pathlib import Path

import pytest

from msft.config import derive
from msft.config.load import load_recipe
from msft.errors import InputError
from msft.estimate.layout import MACHINE, Layout, divisors, layout_of, on_devices, tensor_sizes
from msft.estimate.search import candidates
from msft.estimate.sizes import sizes_of, work_of
from msft.models.families import spec_from_hf

CONFIGS = Path(__file__).parents[2] / "configs" / "llama2"


def loaded(name, *words):
    return load_recipe(CONFIGS / f"{name}.yaml", words)


def placed(devices, *words, name="lora_llama2_7b"):
    recipe = loaded(name, *words)
    return on_devices(recipe, layout_of(recipe), devices, derive.model_spec(recipe))


def test_the_keys_of_mindformers():
    assert layout_of(loaded("finetune_llama2_70b")) == Layout(2, 4, 8, True, 128, True, False)
    # Without a pipeline MindFormers' micro_batch_num does nothing.
    assert layout_of(loaded("lora_llama2_7b")) == Layout(8, 1, 1, False, 1, True, True)
    assert layout_of(loaded("lora_llama2_7b", "--gradient_accumulation_steps=3")).micro_batches == 3
    assert layout_of(loaded("finetune_llama2_70b", "--gradient_accumulation_steps=3")).micro_batches == 384


def test_without_use_parallel_or_keys_it_is_one_device():
    assert layout_of(loaded("lora_llama2_7b", "--use_parallel=False")) == Layout()
    words = [f"parallel_config.{key}=null" for key in ("data_parallel", "model_parallel", "pipeline_stage")]
    assert layout_of(loaded("lora_llama2_7b", *words))[:3] == (1, 1, 1)


def test_devices_that_share_rows_count():
    words = ("parallel_config.context_parallel=2", "parallel_config.model_parallel=2")
    found = placed(8, *words)
    assert (found.data, found.tensor, found.context, found.replicas, found.devices) == (2, 2, 2, 4, 8)
    assert str(found).startswith("data 2 x tensor 2 x pipeline 1 x context 2")
    with pytest.raises(InputError, match="which model_parallel 2 x pipeline_stage 1 x context_parallel 2 does not"):
        placed(6, *words)
    alone = placed(2, "parallel_config.context_parallel=2")
    assert (alone.data, alone.optimizer_sharding) == (1, True)


def test_fsdp_deals_everything_out_on_torch():
    words = ("--backend=torch", "--strategy=fsdp", "parallel_config.model_parallel=2")
    found = placed(8, *words)
    assert (found.data, found.tensor, found.moment_parts) == (4, 2, 4)
    assert found.fully_sharded and not found.optimizer_sharding
    assert str(found).endswith(", fully sharded")
    # Nobody has the same slices.
    assert not placed(2, *words).fully_sharded
    assert not placed(8, "--strategy=fsdp").fully_sharded, "on MindSpore the key has no effect"


def test_data_parallelism_takes_the_devices_that_are_left():
    assert placed(None).data == 8
    assert placed(16, "parallel_config.model_parallel=4")[:3] == (4, 4, 1)
    assert placed(1) == Layout(whole_embedding=True)


@pytest.mark.parametrize(
    ("devices", "words", "said"),
    [
        (0, (), "--devices is 0, it must be 1 or more"),
        (12, ("parallel_config.model_parallel=8",), "--devices is 12, which model_parallel 8 x pipeline_stage 1 does"),
        (3, ("parallel_config.model_parallel=3",), "which does not divide 32 heads, 32 key-value heads"),
        (3, ("parallel_config.model_parallel=3",), "feed-forward width 11008; 2 would do"),
        (
            3,
            ("parallel_config.model_parallel=3", "parallel_config.vocab_emb_dp=False"),
            "feed-forward width 11008, 32000 tokens; 2 would do",
        ),
        (16, ("parallel_config.model_parallel=16",), "is 16, which does not divide a machine of 8 devices; 8 would do"),
        (5, ("parallel_config.pipeline_stage=5",), "pipeline_stage is 5, which does not divide 32 layers; 4 would do"),
        (None, ("parallel_config.data_parallel=0",), "data_parallel"),
        (None, ("parallel_config.data_parallel=many",), "data_parallel"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_place(devices, words, said):
    with pytest.raises(InputError) as raised:
        placed(devices, *words)
    assert said in str(raised.value)


def test_layers_that_are_not_dealt_are_refused_as_training_refuses_them():
    recipe = loaded("lora_llama2_7b", "parallel_config.model_parallel=2")
    config = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(InputError, match="model_parallel: the layers of gpt2 are not dealt to several processes yet"):
        on_devices(recipe, layout_of(recipe), 8, spec_from_hf(config))


def test_the_file_and_line_of_a_layout_are_named(tmp_path):
    text = (CONFIGS / "lora_llama2_7b.yaml").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("pipeline_stage: 1", "pipeline_stage: 5"))
    (line,) = (number for number, line in enumerate(text.splitlines(), 1) if "pipeline_stage: 1" in line)
    recipe = load_recipe(path)
    with pytest.raises(InputError, match=rf"recipe.yaml:{line}: parallel_config.pipeline_stage is 5"):
        on_devices(recipe, layout_of(recipe), 40, derive.model_spec(recipe))


def test_divisors_and_tensor_groups():
    assert divisors(1) == [1] and divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(49) == [1, 7, 49]
    assert tensor_sizes(derive.model_spec(loaded("lora_llama2_7b"))) == [1, 2, 4, 8]
    few = loaded("lora_llama2_7b", "model.model_config.n_kv_heads=2")
    assert tensor_sizes(derive.model_spec(few)) == [1, 2]
    odd = derive.model_spec(loaded("lora_llama2_7b", "model.model_config.vocab_size=32002"))
    assert tensor_sizes(odd) == [1, 2] and tensor_sizes(odd, whole_embedding=True) == [1, 2, 4, 8]


@pytest.mark.parametrize(("name", "devices"), [("lora_llama2_7b", 8), ("finetune_llama2_70b", 64)])
def test_every_candidate_is_valid_and_has_the_steps_rows(name, devices):
    recipe = loaded(name)
    spec = derive.model_spec(recipe)
    layout, work = layout_of(recipe), work_of(recipe, "npu")
    rows = work.rows * layout.micro_batches * layout.data
    found = list(candidates(sizes_of(spec, derive.tuning(recipe, spec)), work, layout))
    for split, tried in found:
        assert prod(split[:3]) == devices and split.tensor <= MACHINE
        assert not any(whole % split.tensor for whole in (spec.num_key_value_heads, spec.intermediate_size))
        assert spec.num_hidden_layers % split.pipeline == 0
        assert tried.rows * split.micro_batches * split.data == rows
    assert len(set(found)) == len(found)
    assert layout[:3] in {split[:3] for split, _ in found}
