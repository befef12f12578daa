"""The small files of a model folder: its config, from wherever it is known, and its tokenizer."""

from pathlib import Path

from msft.convert import hf_folder
from msft.convert import open as opening
from msft.convert.detect import Kind, detect
from msft.convert.rank_folder import ranks_in
from msft.errors import InputError
from msft.models.families import spec_from_hf
from msft.models.llama import hf_config_from_mindformers
from msft.models.spec import ModelSpec

NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "ice_text.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_spec(config: Path | None, weights: Path) -> ModelSpec:
    """Return the ModelSpec from `--config`, or else from what lies beside the weights.

    `config` is a config.json, a folder with one, or a MindFormers recipe (`model.model_config`).
    """
    if config is not None and config.suffix in (".yaml", ".yml"):
        return spec_from_hf(_from_recipe(config), str(config))
    if config is not None:
        return opening.read_spec(config)
    kind, file = detect(weights)
    if kind not in (Kind.META, Kind.GGUF) and not opening.find_config(file):
        raise InputError(
            f"{file}: no {opening.sidecar(file).name} or config.json beside it, and the number of heads cannot be seen "
            "in the weights: give --config with the model's config.json, its folder, or MindFormers' recipe (YAML)"
        )
    return opening.read_spec(weights)


def find(config: Path | None, weights: Path) -> dict[str, bytes | Path]:
    """Return the tokenizer's and generation's files for a new model folder, by name.

    They are taken from the folder of `config` if it has any, else from beside the weights or their
    `rank_0`; a GGUF's are made from its metadata.
    """
    folders = [place if place.is_dir() else place.parent for place in (config, weights) if place is not None]
    folders += [folder.parent for folder in folders if folder.name.startswith("rank_")]
    for folder in folders:
        names = [name for name in NAMES if (folder / name).is_file() and hf_folder.inside(folder.resolve(), name)]
        if names:
            return {name: folder / name for name in names}
    if ranks_in(weights):  # a distributed checkpoint, maybe of several steps
        return {}
    kind, file = detect(weights)
    if kind is Kind.GGUF:
        from msft.convert.gguf_tokenizer import tokenizer_files

        return tokenizer_files(file)
    return {}


def _from_recipe(path: Path) -> dict:
    from msft.config.yaml_lines import read_yaml

    document = read_yaml(path)
    if document.problems:
        raise InputError(*map(str, document.problems[:20]))
    model = document.data.get("model")
    block = model.get("model_config") if isinstance(model, dict) else None
    if block is None:
        raise InputError(f"{path}: has no model.model_config")
    if not isinstance(block, dict) or not str(block.get("type", "LlamaConfig")).startswith("Llama"):
        raise InputError(f"{path}: model.model_config is no LlamaConfig")
    try:
        return hf_config_from_mindformers(block)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: model.model_config holds an impossible size: {error}") from error
