"""Changed config, index, adapter and tokenizer files beside sound weights: used, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from msft.cli.main import main as msft
from msft.convert import companions
from msft.convert.adapter import adapter_lora, check_adapter, read_adapter, write_adapter
from msft.convert.check import check_against
from msft.convert.open import open_weights, read_spec
from msft.data.encode import encode_prompt
from msft.data.templates import chat_or_none
from msft.data.tokenizers import open_tokenizer
from msft.models.rope import frequencies
from msft.models.targets import lora_modules
from msft.predict.loading import end_ids
from tests.conftest import TINY
from tests.data.small_mindrecord import write_small
from tests.data.text_folders import byte_level_folder, metaspace_folder
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import changed, damaged, values, written

CONFIG = TINY | {
    "head_dim": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "torch_dtype": "float32",
    "auto_map": {"AutoModelForCausalLM": "modeling.Canary"},
}


def contents(document):
    """A changed document as a file's bytes, sometimes with bytes changed too."""
    sound = written(document)
    return st.one_of(
        changed(document).map(written), changed(document).map(written), damaged(sound), values.map(written)
    )


@pytest.fixture
def folder(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(written(CONFIG))
    return tmp_path / "model"


@short_and_long(80, 3000)
def test_config(folder, count):
    def check(content):
        (folder / "config.json").write_bytes(content)
        spec = result_or_error(lambda: read_spec(folder), str(folder))
        assert result_or_error(lambda: companions.load_spec(None, folder), str(folder)) == spec
        if spec and spec.num_hidden_layers <= 100:
            result_or_error(lambda: frequencies(spec, 10), "rope")
            result_or_error(lambda: lora_modules(None, spec), ":")
            source = open_weights(folder, spec)
            result_or_error(lambda: check_against(spec, source), "config")

    try_all(count, contents(CONFIG), check)


@short_and_long(60, 1500)
def test_index(folder, count):
    """Two shards; an index that promises more, or points elsewhere, is refused."""
    shutil.copy(folder / "model.safetensors", folder / "one.safetensors")
    names = list(open_weights(folder).tensors)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_bytes(written(index))
    spec = read_spec(folder)
    assert len(open_weights(folder, spec).tensors) == len(names)

    def check(content):
        (folder / "model.safetensors.index.json").write_bytes(content)
        source = result_or_error(lambda: open_weights(folder, spec), str(folder))
        for name in source.tensors if source else ():
            assert source.file_of(name) == str(folder / "one.safetensors")

    try_all(count, contents(index), check)


def test_an_adapter(folder, tmp_path):
    config, weights = _adapter(folder, tmp_path)
    assert adapter_lora(config, weights, "x").alpha == 8


def _adapter(folder, tmp_path):
    from msft.backend.contract import Lora

    spec = read_spec(folder)
    modules = tuple(lora_modules(None, spec))
    lora = Lora(4, 8.0, 0.05, modules)
    weights = {}
    for module in modules:
        rows, columns = open_weights(folder).tensors[f"{module}.weight"].shape
        weights[f"base_model.model.{module}.lora_A.weight"] = np.ones((4, columns), np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = np.ones((rows, 4), np.float32)
    write_adapter(tmp_path / "adapter", lora, weights, "base", spec)
    return read_adapter(tmp_path / "adapter")


@short_and_long(60, 2000)
def test_adapter_config(folder, tmp_path, count):
    _adapter(folder, tmp_path)
    place, spec = tmp_path / "adapter", read_spec(folder)
    config = json.loads((place / "adapter_config.json").read_text())
    config |= {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}

    def check(content):
        (place / "adapter_config.json").write_bytes(content)
        found = result_or_error(lambda: read_adapter(place), str(place))
        if found:
            lora = adapter_lora(*found, str(place))
            assert lora.rank == 4 and isinstance(lora.alpha, float) and 0 <= lora.dropout < 1
            result_or_error(lambda: check_adapter(lora, found[1], spec, str(place)), str(place))

    try_all(count, contents(config), check)


RECIPE = {
    "model": {
        "model_config": {
            "type": "LlamaConfig",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "n_kv_heads": 2,
            "vocab_size": 128,
            "intermediate_size": 48,
            "multiple_of": 16,
            "ffn_dim_multiplier": 1.3,
            "seq_length": 64,
            "rms_norm_eps": 1e-5,
            "theta": 10000.0,
            "tie_word_embeddings": False,
        }
    }
}


@short_and_long(40, 1000)
def test_a_mindformers_recipe_as_config(folder, tmp_path, count):
    recipe = tmp_path / "run.yaml"

    def check(document):
        recipe.write_text(yaml.safe_dump(document))
        spec = result_or_error(lambda: companions.load_spec(recipe, folder), str(recipe))
        assert spec is None or spec.hidden_size > 0

    try_all(count, changed(RECIPE), check)


@short_and_long(40, 1000)
def test_metas_params(tmp_path, count):
    import torch

    folder = tmp_path / "meta"
    folder.mkdir()
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"rope_theta": 5e5, "use_scaled_rope": True, "multiple_of": 4}
    names = ["tok_embeddings", "norm", "layers.0.feed_forward.w1", "layers.0.attention.wq", "layers.0.attention.wk"]
    tensors = {f"{name}.weight": torch.ones(8, 8) for name in names}
    torch.save(tensors | {"norm.weight": torch.ones(8)}, folder / "consolidated.00.pth")

    def check(content):
        (folder / "params.json").write_bytes(content)
        result_or_error(lambda: read_spec(folder), str(folder))
        source = result_or_error(lambda: open_weights(folder), str(folder))
        for name in source.tensors if source else ():
            result_or_error(lambda name=name: source.read(name), str(folder))

    try_all(count, contents(params), check)


@short_and_long(40, 1000)
def test_generation_config(folder, count):
    spec = read_spec(folder)

    def check(content):
        (folder / "generation_config.json").write_bytes(content)
        found = result_or_error(lambda: end_ids(spec, folder), str(folder))
        assert found is None or set(found) >= set(spec.eos_token_ids)

    try_all(count, contents({"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}), check)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@short_and_long(40, 1200)
def test_tokenizer(tmp_path, capfd, kind, name, count):
    folder = (byte_level_folder if kind == "byte_level" else metaspace_folder)(tmp_path / "tokenizer")
    document = json.loads((folder / name).read_text())
    if name == "tokenizer_config.json":
        document["added_tokens_decoder"] = {"0": {"content": "<|extra|>", "special": True, "lstrip": False}}
        document["additional_special_tokens"] = ["<|more|>"]

    def check(content):
        (folder / name).write_bytes(content)
        tokenizer = result_or_error(lambda: open_tokenizer(folder), str(folder))
        if tokenizer:
            _use(tokenizer, str(folder))

    try_all(count, contents(document), check)


def _use(tokenizer, named: str) -> None:
    """Tokenize and render; a chat template that cannot be used is refused by name."""
    text = "Hello é 你 <|im_start|>"
    for encoding in tokenizer.encode([text, ""]):
        assert len(encoding.ids) == len(encoding.starts) == len(encoding.ends)
    tokenizer.decode([int(token) for token in tokenizer.encode([text])[0].ids])
    assert all(isinstance(word, str) for word in tokenizer.named_tokens.values())
    template = result_or_error(lambda: chat_or_none(tokenizer), ":")
    if template:
        messages = [{"role": "user", "content": "Hi"}]
        result_or_error(lambda: encode_prompt(tokenizer, template, messages), ":")


@short_and_long(10, 400)
def test_the_command_ends_with_code_0_or_2(write_recipe, folder, tmp_path, capfd, count):
    """`msft train --dry_run` over folders with a changed file; exit code 1 would be an error nobody foresaw."""
    _adapter(folder, tmp_path)
    data = write_small(tmp_path / "x.mindrecord", ids=(3, 128), labels=700)
    report = tmp_path / "x.mindrecord.report.json"
    report.write_text(json.dumps({"pad_id": 0, "seq_length": 24, "rows": {"read": 48}}))
    recipe = write_recipe(
        model__pretrained=str(folder),
        load_checkpoint=str(tmp_path / "adapter"),
        train_dataset__data_loader__dataset_dir=str(data),
    )
    texts = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    texts += [report, tmp_path / "adapter" / "adapter_config.json"]
    sound = {path: path.read_bytes() for path in [*texts, folder / "model.safetensors"]}
    choices = [contents(json.loads(sound[path])).map(lambda content, path=path: (path, content)) for path in texts]
    choices.append(damaged(sound[folder / "model.safetensors"]).map(lambda data: (folder / "model.safetensors", data)))

    def check(drawn):
        path, content = drawn
        path.write_bytes(content)
        if "tokenizer" in path.name:
            report.unlink()
        code = msft(["train", str(recipe), "--dry_run"])
        path.write_bytes(sound[path])
        report.write_bytes(sound[report])
        error = capfd.readouterr().err
        assert code in (0, 2) and "Traceback" not in error, error

    assert msft(["train", str(recipe), "--dry_run"]) == 0
    try_all(count, st.one_of(choices), check)
