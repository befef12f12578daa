"""Protects T5's description: buckets of distances, its config.json in all its forms, fresh weights, its files."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention

from msft.convert.check import check_against
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_hf_folder
from msft.errors import InputError
from msft.models.encoder import RelativePositions
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS

TIED, GATED = CONFIGS["t5"], CONFIGS["t5, gated, with a head"]


def test_buckets_by_hand():
    """8 buckets: single distances 0 to 3 where attention is causal, then ranges up to 10; half as many each way."""
    positions = RelativePositions("", 8, 10)
    behind = -np.arange(12)
    assert positions.bucket(behind, True).tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 7]
    assert positions.bucket(np.array([3]), True).tolist() == [0]
    assert positions.bucket(behind[:8], False).tolist() == [0, 1, 2, 2, 2, 3, 3, 3]
    assert positions.bucket(-behind[:8], False).tolist() == [0, 5, 6, 6, 6, 7, 7, 7]


@pytest.mark.parametrize(("buckets", "longest"), [(8, 10), (32, 128), (6, 9), (64, 1000)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_buckets_are_transformers(buckets, longest, is_causal):
    distance = np.arange(-3000, 3000)
    how = {"bidirectional": not is_causal, "num_buckets": buckets, "max_distance": longest}
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), **how).numpy()
    np.testing.assert_array_equal(RelativePositions("", buckets, longest).bucket(distance, is_causal), theirs)


def test_what_the_releases_configs_say():
    first, second = spec_from_hf(TIED), spec_from_hf(GATED)
    assert first.tie_word_embeddings and first.encoder.output_scale == 32**-0.5 and not first.block.is_gated
    assert not second.tie_word_embeddings and second.encoder.output_scale == 1 and second.block.is_gated
    assert (second.encoder.num_hidden_layers, second.num_hidden_layers) == (2, 3)
    assert not first.is_like_llama


def test_a_head_of_its_own_is_known_from_what_transformers_5_writes():
    """It forces tie_word_embeddings to true, and says the rest by scale_decoder_outputs."""
    written = AutoConfig.for_model(**GATED).to_dict()
    assert written["tie_word_embeddings"] is True
    assert not spec_from_hf(written).tie_word_embeddings
    assert spec_from_hf(AutoConfig.for_model(**TIED).to_dict()).tie_word_embeddings


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("feed_forward_proj", "gated-silu", "'feed_forward_proj' is 'gated-silu'; only 'relu' or 'gated-gelu'"),
        ("is_encoder_decoder", False, "'is_encoder_decoder' is False; only True is supported"),
        ("num_layers", 0, "'num_layers' must be a whole number above 0, not 0"),
        ("relative_attention_max_distance", 4, "'relative_attention_max_distance' (4) more than half of it"),
        ("decoder_start_token_id", None, ""),
        ("decoder_start_token_id", -3, "'decoder_start_token_id' must be a token's number, not -3"),
    ],
)
def test_impossible_values_are_named(key, value, problem):
    if not problem:
        assert spec_from_hf({**TIED, key: value}).encoder.start_id == 0
        return
    with pytest.raises(InputError) as error:
        spec_from_hf({**TIED, key: value}, "c.json")
    assert f"c.json: {problem}" in str(error.value) or problem in str(error.value)


def test_fresh_weights_deviate_as_transformers_makes_them():
    config = {**TIED, "d_model": 128, "d_ff": 512, "d_kv": 48, "vocab_size": 500, "initializer_factor": 0.5}
    theirs = dict(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config)).named_parameters())
    ours = RandomWeights(spec_from_hf(config), 3)
    for name in ours.tensors:
        if theirs[name].ndim == 2 and theirs[name].numel() > 1000:
            assert ours.read(name).std() == pytest.approx(theirs[name].std().item(), rel=0.03), name


def folder_of(config, path):
    spec = spec_from_hf(config)
    write_hf_folder(RandomWeights(spec, 3), spec, path, bar=False)
    return spec, path / "model.safetensors"


def test_a_folder_holds_what_transformers_writes_and_reads(tmp_path):
    spec, file = folder_of(GATED, tmp_path / "ours")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert model.generation_config.decoder_start_token_id == 0
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(file), load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    again = open_weights(tmp_path / "theirs")
    check_against(spec, again)


def test_copies_of_the_embedding_are_left_out_and_said_and_others_refused(tmp_path, capsys):
    spec, file = folder_of(TIED, tmp_path / "model")
    old = load_file(file)
    copies = {f"{stack}.embed_tokens.weight": old["shared.weight"] for stack in ("encoder", "decoder")}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 4), np.float32)}
    save_file({**old, **copies, **unused}, file)
    check_against(spec, open_weights(tmp_path / "model", spec))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "decoder.embed_tokens.weight, encoder.embed_tokens.weight left out; equal to shared.weight" in said
    save_file({**old, "encoder.embed_tokens.weight": old["shared.weight"] + 1}, file)
    with pytest.raises(InputError, match="unexpected tensor 'encoder.embed_tokens.weight'"):
        check_against(spec, open_weights(tmp_path / "model", spec))
    alone = {name: array for name, array in old.items() if name != "shared.weight"}
    save_file({**alone, "encoder.embed_tokens.weight": old["shared.weight"]}, file)
    opened = open_weights(tmp_path / "model", spec)
    check_against(spec, opened)
    np.testing.assert_array_equal(opened.read("shared.weight"), old["shared.weight"])
