"""What several test folders share: a tiny Llama as a Hugging Face folder, MindRecord data, recipes."""

import json
import os

os.environ.setdefault("GLOG_v", "3")
# The suite's own processes share the cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import yaml
from hypothesis import settings

# CI tries the same examples each time; elsewhere every run tries new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

VOCABULARY = 128
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face folder: random Llama (2 layers, hidden 32, vocabulary 128), a tokenizer of words w3 .. w127."""
    from msft.convert.random_weights import RandomWeights
    from msft.convert.weights import write_hf_folder
    from msft.models.families import spec_from_hf

    folder = tmp_path_factory.mktemp("models") / "tiny"
    spec = spec_from_hf(TINY)
    write_hf_folder(RandomWeights(spec, 7), spec, folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """Put a tokenizer of words w3 .. w127 into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def counting_rows(count, length=24, seed=0):
    """Rows that can be learned: each counts up by 3 from a random start; the first quarter is not supervised.

    `length` + 1 ids, right-padded with 0; lengths differ.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = int(generator.integers(length // 2, length + 2))
        ids = 3 + (int(generator.integers(0, 120)) + 3 * np.arange(size)) % 120
        labels = np.where(np.arange(size) < size // 4, -100, ids)
        padding = length + 1 - size
        rows.append(
            {
                "input_ids": np.pad(ids, (0, padding)).astype(np.int32),
                "labels": np.pad(labels, (0, padding), constant_values=-100).astype(np.int32),
            }
        )
    return rows


def write_rows(path, rows):
    """Write rows as a MindRecord file."""
    from msft.data.mindrecord import MindRecordWriter

    with MindRecordWriter(path, {"input_ids": "int32", "labels": "int32"}) as writer:
        for row in rows:
            writer.write(row)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """(training file of 48 rows, evaluation file of 10 rows), rows of up to 24 tokens."""
    folder = tmp_path_factory.mktemp("data")
    return (
        write_rows(folder / "train.mindrecord", counting_rows(48, seed=1)),
        write_rows(folder / "eval.mindrecord", counting_rows(10, seed=2)),
    )


@pytest.fixture
def write_recipe(tmp_path, tiny_model, tiny_data):
    """The recipe writer of a test's own folder."""
    return recipe_writer(tmp_path, tiny_model, tiny_data)


def recipe_writer(folder, tiny_model, tiny_data):
    """Return a function that writes a small LoRA recipe, changed by dotted keys, and gives its path.

    Results go to folder / 'output'; a key set to None is taken out.
    """

    def write(backend="torch", name="recipe.yaml", **changes):
        recipe = {
            "backend": backend,
            "device": "cpu",
            "seed": 3,
            "run_mode": "finetune",
            "output_dir": str(folder / "output"),
            "model": {
                "pretrained": str(tiny_model),
                "pet_config": {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            },
            "runner_config": {"epochs": 2, "batch_size": 4},
            "optimizer": {"type": "AdamW", "learning_rate": 0.02},
            "train_dataset": {"data_loader": {"dataset_dir": str(tiny_data[0])}, "padding": "max_length"},
            "callbacks": [{"type": "MFLossMonitor"}],
        }
        for key, value in changes.items():
            _put(recipe, key.split("__"), value)
        path = folder / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write


def _put(block, keys, value):
    *way, last = keys
    for key in way:
        block = block.setdefault(key, {})
    if value is None:
        block.pop(last, None)
    else:
        block[last] = value
