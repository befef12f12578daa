"""Protects what the bench computes from its figures: FLOPs of a LoRA token, growth, extrapolation, packed steps."""

import json
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.common.rows import Rows
from benchmarks.common.training import packed_steps
from benchmarks.conversion import weight_bytes
from benchmarks.generation import prompt
from benchmarks.lora_mindspore import Padded, least_seconds_at
from benchmarks.machine_limit import flops_per_token
from benchmarks.programs import random_folder
from msft.models.families import spec_from_hf

MEGA = 1 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def test_the_flops_of_a_token_are_those_of_a_hand_count():
    spec = spec_from_hf(CONFIG)
    # One row of 5 tokens: 4 are read, the last 2 of them predict a supervised token.
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]
    q, k, v, o = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    frozen = 2 * (q + k + v + o + 3 * 8 * 20)
    adapters = 2 * 16 * ((8 + 8) + (8 + 4) + (8 + 4) + (8 + 8))
    forward = 4 * (frozen + adapters) + 2 * 100 * 8
    # Every product but the first block's q, k, v passes a gradient on; adapters have gradients of their own too.
    backward = 4 * (frozen - q - k - v + 2 * adapters) + 2 * 100 * 8
    # 1 + 2 + 3 + 4 pairs, head_dim 4, 2 heads, 2 layers: two products forward, four backward.
    attention = 10 * 4 * 2 * 2 * (2 + 4)
    assert flops_per_token(spec, rows) == pytest.approx(2 * (forward + backward + attention) / 4, rel=1e-12)


def test_growth_is_a_power_and_a_line():
    assert growth.time_power([9.0, 1.0, 2.0]) == 1 and growth.time_power([1.0, 4.0]) == 2
    # 500 + 100 x at x = 1, 2, 4, then 500 + 100 x^2, then nothing but noise.
    assert growth.memory_power([600 * MEGA, 700 * MEGA, 900 * MEGA]) == 1
    assert growth.memory_power([600 * MEGA, 900 * MEGA, 2100 * MEGA]) == 2
    assert growth.memory_power([600 * MEGA, 601 * MEGA, 599 * MEGA]) == 0
    assert growth.line([1, 2, 4], [5.0, 7.0, 11.0]) == (pytest.approx(2), pytest.approx(3))


def test_a_padded_step_takes_at_least_what_the_longest_measured_one_takes_a_token():
    assert least_seconds_at(4096, [Padded(1024, 9.0, 0), Padded(512, 3.0, 0)]) == 36


def test_packed_steps_hold_the_rows_tokens(tmp_path):
    tokens = tmp_path / "tokens.json"
    # 10 rows of 400 tokens and places for 4 * 513.
    tokens.write_text(json.dumps([{"input_ids": [1] * 400}] * 10))
    rows = Rows(Path(), Path(), tokens, Path())
    assert packed_steps(rows, 4) == 1 and packed_steps(rows, 2) == 3


def test_a_prompt_ends_where_the_answer_begins():
    assert prompt({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, -100]}) == [1, 2]


def test_random_weights_are_a_folder_that_transformers_reads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": 4}
    monkeypatch.setattr(random_folder, "CONFIG", random_folder.CONFIG | small | {"num_key_value_heads": 4})
    monkeypatch.setattr(random_folder, "SHARD", 10_000)
    monkeypatch.setattr(random_folder, "BLOCK", 1 << 12)
    random_folder.write(tmp_path / "hf", 2)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert sum(value.numel() * 2 for value in weights.values()) == weight_bytes(tmp_path / "hf")
    q, k = (weights[f"model.layers.0.self_attn.{leaf}_proj.weight"].float() for leaf in "qk")
    assert 0.9 < q.std() < 1.1 and not q.equal(k)
