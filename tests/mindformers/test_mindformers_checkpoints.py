"""What MindFormers' training leaves must load here: checkpoints with optimizer state, and adapters."""

import pytest
from mindformers_logits import assert_same_on_real_tokens, transformers_logits

from msft.convert.adapter import adapter_lora, read_adapter, write_adapter

pytestmark = pytest.mark.mindformers

LORA_ALPHA = 16


@pytest.mark.parametrize("file", ["checkpoint", "network"])
def test_its_checkpoint_becomes_a_hugging_face_model(full_run, full_logits, tiny, msft, tmp_path, file):
    arguments = ("--input_path", getattr(full_run, file), "--output_path", tmp_path / "hf")
    msft("convert_weight", "--model", "llama", "--reversed", "True", *arguments, "--config", full_run.recipe)
    assert_same_on_real_tokens(full_logits, transformers_logits(tmp_path / "hf", tiny.ids), tiny)


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
def test_its_checkpoint_loads_in_our_engines(full_run, full_logits, engine_logits, tiny, backend):
    assert_same_on_real_tokens(full_logits, engine_logits(backend, full_run.checkpoint), tiny)


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
def test_its_adapter_loads_in_our_engines(lora_run, lora_logits, engine_logits, tiny, backend):
    ours = engine_logits(backend, tiny.ckpt, lora_run.checkpoint, LORA_ALPHA)
    assert_same_on_real_tokens(lora_logits, ours, tiny)


@pytest.mark.parametrize("file", ["checkpoint", "network"])
def test_its_adapter_merges_into_its_final_logits(lora_run, lora_logits, tiny, msft, tmp_path, file):
    files = ("--adapter", getattr(lora_run, file), "--output_path", tmp_path / "merged")
    msft("merge", "--model", tiny.ckpt, *files, "--config", lora_run.recipe, "--lora_alpha", LORA_ALPHA)
    assert_same_on_real_tokens(lora_logits, transformers_logits(tmp_path / "merged", tiny.ids), tiny)


def test_its_adapter_becomes_a_peft_adapter(lora_run, lora_logits, tiny, tmp_path):
    config, weights = read_adapter(lora_run.checkpoint)
    lora = adapter_lora(config, weights, "CKPT", LORA_ALPHA)
    write_adapter(tmp_path / "adapter", lora, weights, str(tiny.hf))
    ours = transformers_logits(tiny.hf, tiny.ids, tmp_path / "adapter")
    assert_same_on_real_tokens(lora_logits, ours, tiny)


def test_the_base_in_its_lora_checkpoint_is_bit_equal_to_ours(lora_run, tiny, msft, tmp_path):
    from safetensors.torch import load_file

    arguments = ("--input_path", lora_run.checkpoint, "--output_path", tmp_path / "hf", "--config", lora_run.recipe)
    msft("convert_weight", "--model", "llama", "--reversed", "True", *arguments)
    back = load_file(tmp_path / "hf/model.safetensors")
    assert back.keys() == tiny.state.keys()
    assert all(back[name].equal(tiny.state[name]) for name in back)


def test_mindformers_computes_its_final_logits_from_our_merged_ckpt(
    full_run, lora_run, lora_logits, their_logits, tiny, msft, tmp_path
):
    files = ("--adapter", lora_run.checkpoint, "--output_path", tmp_path / "merged.ckpt")
    msft("merge", "--model", tiny.hf, *files, "--lora_alpha", LORA_ALPHA)
    assert_same_on_real_tokens(lora_logits, their_logits(full_run.recipe, tmp_path / "merged.ckpt"), tiny)
