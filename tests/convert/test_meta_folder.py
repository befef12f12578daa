"""Meta's format: ranks put together along the right axes, rotary pairs reordered as transformers' converter does."""

import json

import numpy as np
import pytest
import torch

from msft.convert.check import check_against
from msft.convert.open import open_weights, read_hf_config, read_spec
from msft.errors import InputError

AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def meta_state(expected) -> dict[str, torch.Tensor]:
    """Turn an HF state dict into Meta's, with the inverse of the permutation in transformers' converter."""

    def pairs(weight, heads):
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    state = {}
    for name, array in expected.items():
        tensor = torch.from_numpy(array)
        if "q_proj" in name or "k_proj" in name:
            tensor = pairs(tensor, 4 if "q_proj" in name else 2)
        name = name.removeprefix("model.")
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        state[name] = tensor.bfloat16().contiguous()
    return state


def write_meta(folder, state, ranks, embedding_axis=1, params=None):
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            axis = (
                embedding_axis
                if "tok_embeddings" in name
                else next((axis for leaf, axis in AXES.items() if leaf in name), None)
            )
            part[name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    params = params or {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(("ranks", "axis"), [(1, 1), (2, 1), (2, 0)])
def test_ranks_are_joined_and_rotary_rows_reordered(tmp_path, expected, spec, ranks, axis):
    folder = write_meta(tmp_path / "meta", meta_state(expected), ranks, axis)
    for path in (folder, folder / "params.json", folder / "consolidated.00.pth"):
        source = open_weights(path)
        check_against(spec, source)
        for name, array in expected.items():
            assert np.array_equal(
                source.read(name).astype(np.float32), torch.from_numpy(array).bfloat16().float().numpy()
            ), name
    assert source.tensors["lm_head.weight"].dtype == "bfloat16"
    check_against(read_spec(folder), source)


def test_the_logits_are_the_models(tmp_path, expected, model):
    """The permutation matters only inside attention, so the logits are the proof."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = write_meta(tmp_path / "meta", meta_state(expected), 2)
    source, config = open_weights(folder), read_hf_config(folder)
    config["max_position_embeddings"] = 64
    again = LlamaForCausalLM(LlamaConfig(**config)).eval()
    again.load_state_dict({name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.tensors})
    reference = LlamaForCausalLM(model.config).eval()
    reference.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)


def test_the_config_of_llama_3_1(tmp_path, expected):
    params = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
        "use_scaled_rope": True,
    }
    config = read_hf_config(write_meta(tmp_path / "meta", meta_state(expected), 1, params=params))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (config["intermediate_size"], config["vocab_size"], config["rope_theta"]) == (48, 96, 5e5)


def test_faults_are_named(tmp_path, expected):
    state = meta_state(expected)
    folder = write_meta(tmp_path / "a", state, 2)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    del part["norm.weight"]
    torch.save(part, folder / "consolidated.01.pth")
    with pytest.raises(InputError, match="consolidated.01.pth: tensor 'norm.weight' is missing"):
        open_weights(folder)
    folder = write_meta(tmp_path / "b", {**state, "layers.0.attention.wx.weight": torch.ones(2)}, 1)
    with pytest.raises(InputError, match="consolidated.00.pth: unexpected tensor 'layers.0.attention.wx.weight'"):
        open_weights(folder)
    part = torch.load(write_meta(tmp_path / "c", state, 2) / "consolidated.01.pth", weights_only=True)
    part["layers.1.feed_forward.w2.weight"] = torch.ones(30, 24).bfloat16()
    torch.save(part, tmp_path / "c" / "consolidated.01.pth")
    with pytest.raises(InputError, match="'layers.1.feed_forward.w2.weight': the ranks' parts do not fit together"):
        open_weights(tmp_path / "c")
    (tmp_path / "c" / "params.json").write_text('{"dim": 32, "n_layers": "2"}')
    with pytest.raises(InputError, match="'n_layers' must be a whole number above 0, not '2'"):
        open_weights(tmp_path / "c")


def test_a_folder_without_embedding_is_named(tmp_path, expected):
    state = {name: tensor for name, tensor in meta_state(expected).items() if "tok_embeddings" not in name}
    with pytest.raises(InputError, match="consolidated.00.pth: the tensor for 'model.embed_tokens.weight' is missing"):
        read_hf_config(write_meta(tmp_path / "meta", state, 1))


def test_heads_that_do_not_fit_the_rows_are_named(tmp_path, expected):
    write_meta(tmp_path / "meta", meta_state(expected), 1)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params | {"n_heads": 32}))
    with pytest.raises(InputError, match="consolidated.00.pth: tensor .*wq.weight' has 32 rows, no pairs for 32 heads"):
        open_weights(tmp_path / "meta")
