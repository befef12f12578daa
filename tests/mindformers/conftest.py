"""What every test of the exchange with MindFormers uses: the oracle's processes and one tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mindformers_recipe
import mindformers_rows
import numpy as np
import pytest

ORACLE = Path(__file__).parent / "oracle"
PYTHON = mindformers_recipe.ENVIRONMENT / "bin/python"


def run(command, folder: Path, timeout: int = 300) -> str:
    """Run a command in `folder`; return its standard output, or fail the test with the end of what it said."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Call `oracle("logits.py", ...)` to run one of the oracle's programs inside MindFormers' environment."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make test-mindformers`, which installs it", pytrace=False)
    folder = tmp_path_factory.mktemp("mindformers")
    return lambda program, *arguments: run([PYTHON, ORACLE / program, *arguments], folder)


@pytest.fixture(scope="session")
def msft(tmp_path_factory):
    """Call `msft("convert_weight", ...)` to run one of our commands as a user would."""
    folder = tmp_path_factory.mktemp("msft")
    return lambda command, *arguments: run([sys.executable, "-m", "msft", command, *arguments], folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, msft):
    """A random Llama as transformers wrote it (`folder`), its CKPT by our converter, and its logits for `ids`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = mindformers_recipe.MODEL
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=176,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=mindformers_recipe.SEQ_LENGTH,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.1 * torch.randn_like(weight))
    base = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(base / "hf")
    # MindFormers' attention mask takes rows of exactly seq_length; the second is padded half-way.
    ids = np.random.default_rng(1).integers(3, sizes["vocab_size"], (2, mindformers_recipe.SEQ_LENGTH), dtype=np.int32)
    ids[1, mindformers_recipe.SEQ_LENGTH // 2 :] = 0
    np.save(base / "ids.npy", ids)
    with torch.no_grad():
        logits = model(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
    ckpt = base / "tiny.ckpt"
    msft("convert_weight", "--model", "llama", "--input_path", base / "hf", "--output_path", ckpt)
    return SimpleNamespace(
        hf=base / "hf", ckpt=ckpt, ids=ids, ids_file=base / "ids.npy", logits=logits, state=model.state_dict()
    )


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    """A small sentencepiece model of Llama 2's kind: BPE, byte fallback, unknown 0, begin 1, end 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [" ".join(row.values()) for row in mindformers_rows.ALPACA] + mindformers_rows.PROMPTS * 3
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=mindformers_recipe.MODEL["vocab_size"],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def records(tmp_path_factory, msft, tokenizer_model):
    """Alpaca rows made into MindRecord by our two commands: 10 rows, so 4 epochs are 20 steps of 2 rows."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "alpaca.json").write_text(json.dumps(mindformers_rows.ALPACA))
    msft("alpaca_converter", "--data_path", folder / "alpaca.json", "--output_path", folder / "chats.json")
    arguments = ("--dataset_type", "qa", "--input_glob", folder / "chats.json", "--model_file", tokenizer_model)
    path, length = folder / "train.mindrecord", str(mindformers_recipe.SEQ_LENGTH)
    msft("llama_preprocess", *arguments, "--seq_length", length, "--output_file", path, "--num_workers", "1")
    return path


@pytest.fixture(scope="session")
def train_there(tmp_path_factory, oracle, tiny):
    """Call `train_there(kind, data)` to train with MindFormers; returns the recipe and all that the run left.

    `changes` and `ours` are `mindformers_recipe.write`'s.
    """

    def train(kind: str, data: Path, changes: dict | None = None, ours: bool = False):
        folder = tmp_path_factory.mktemp(f"{kind}_there")
        output = folder / "output"
        recipe = mindformers_recipe.write(folder / "recipe.yaml", kind, data, tiny.ckpt, output, changes, ours)
        oracle("train.py", recipe, folder / "run")
        [checkpoint] = (output / "checkpoint/rank_0").glob("*.ckpt")
        [network] = (output / "checkpoint_network/rank_0").glob("*.ckpt")
        facts = json.loads((folder / "run.json").read_text())
        start = folder / "run.ckpt"
        return SimpleNamespace(recipe=recipe, start=start, checkpoint=checkpoint, network=network, **facts)

    return train


@pytest.fixture(scope="session")
def full_run(train_there, records):
    """20 steps of MindFormers' own full fine-tuning."""
    return train_there("finetune", records)


@pytest.fixture(scope="session")
def lora_run(train_there, records):
    """20 steps of MindFormers' own LoRA fine-tuning."""
    return train_there("lora", records)


@pytest.fixture(scope="session")
def adamw_run(train_there, records):
    """Full fine-tuning by MindFormers with its AdamW, a linear schedule, dynamic loss scale and no clipping."""
    changes = {
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "learning_rate": 1e-3, "weight_decay": 0.1},
        "lr_schedule": {"type": "LinearWithWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 3, "total_steps": 24},
        "runner_wrapper": {
            "type": "MFTrainOneStepCell",
            "scale_sense": {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 4096, "scale_factor": 2}
            | {"scale_window": 1000},
        },
    }
    return train_there("finetune", records, changes)


@pytest.fixture(scope="session")
def their_logits(oracle, tiny, tmp_path_factory):
    """Call `their_logits(recipe, ckpt)` for the logits of MindFormers' model on `tiny.ids`."""

    def compute(recipe: Path, ckpt: Path) -> np.ndarray:
        out = tmp_path_factory.mktemp("logits") / "logits.npz"
        oracle("logits.py", recipe, ckpt, tiny.ids_file, out)
        return np.load(out)["logits"]

    return compute


@pytest.fixture(scope="session")
def engine_logits(tiny):
    """Call `engine_logits(backend, weights, adapter=None, alpha=None)` for our engine's logits on `tiny.ids`."""
    from importlib import import_module

    from msft.backend.contract import Batch, Runtime, Tuning
    from msft.convert.adapter import adapter_lora, read_adapter
    from msft.convert.open import open_weights, read_spec

    spec = read_spec(tiny.hf)
    positions = np.tile(np.arange(tiny.ids.shape[1], dtype=np.int32), (len(tiny.ids), 1))
    real = (tiny.ids != 0).astype(np.int32)
    unlabelled = np.full_like(tiny.ids, -100)
    batch = Batch(tiny.ids, unlabelled, positions, real, np.arange(len(tiny.ids), dtype=np.int32)[:, None] * real)

    def compute(backend: str, weights: Path, adapter: Path | None = None, alpha: float | None = None) -> np.ndarray:
        config, factors = read_adapter(adapter) if adapter else ({}, {})
        lora = adapter_lora(config, factors, str(adapter), alpha) if adapter else None
        build = import_module(f"msft.backend.{backend}.engine").build
        engine = build(spec, open_weights(weights, spec), Tuning(lora=lora), Runtime())
        if lora:
            engine.load_adapter(factors)
        return engine.logits(batch)

    return compute


@pytest.fixture(scope="session")
def full_logits(full_run, their_logits):
    """What MindFormers computes with the model it fine-tuned."""
    return their_logits(full_run.recipe, full_run.checkpoint)


@pytest.fixture(scope="session")
def lora_logits(lora_run, their_logits):
    """What MindFormers computes with the adapter it trained."""
    return their_logits(lora_run.recipe, lora_run.checkpoint)
