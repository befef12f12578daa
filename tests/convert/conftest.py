"""A tiny Llama made by transformers, and ways to read our formats back with other people's readers."""

import json
import os

import numpy as np
import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore's logs

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def config():
    return dict(CONFIG)


@pytest.fixture(scope="session")
def spec():
    from msft.models.families import spec_from_hf

    return spec_from_hf(dict(CONFIG))


@pytest.fixture(scope="session")
def model():
    """transformers' LlamaForCausalLM with random weights, norms included, so that no two tensors are alike."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.2, 0.5)
    return model


@pytest.fixture(scope="session")
def hf_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def expected(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def write_folder(tmp_path):
    """Write (config, tensors) as an HF folder with the safetensors library."""

    def write(tensors, config=CONFIG, name="folder"):
        from safetensors.numpy import save_file

        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays have equal dtype, shape and bytes (NaN payloads and signs of zero included)."""
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.fixture(scope="session", name="same_bits")
def same_bits_fixture():
    return same_bits
