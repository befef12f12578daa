"""Training files of other toolkits, read as recipes: LLaMA-Factory's YAML and Firefly's train_args JSON.

A file is recognised by its keys. `translation.py` checks it against its toolkit's own keys and writes the recipe's,
each at the place of the key that it comes from, so that errors name the user's file, line and key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from msft.config.block import Block


class Toolkit(NamedTuple):
    """A toolkit: its name, the block of its keys, and what writes a recipe from a `Translation` of them."""

    name: str
    keys: type[Block]
    translate: Callable[[Any], None]


def toolkit_of(data: dict[str, Any]) -> Toolkit | None:
    """Return the toolkit whose file this is, None for a recipe."""
    if "model_name_or_path" not in data or "model" in data:
        return None
    if "train_file" in data:
        from msft.config.importers import firefly

        return Toolkit("Firefly", firefly.Keys, firefly.translate)
    if {"stage", "finetuning_type", "template", "dataset", "cutoff_len"} & data.keys():
        from msft.config.importers import llama_factory
        from msft.config.importers.llama_factory_keys import LlamaFactoryKeys

        return Toolkit("LLaMA-Factory", LlamaFactoryKeys, llama_factory.translate)
    return None
