"""Templates by name: 'chat' is the tokenizer's own, 'llama_factory:NAME' and 'firefly:NAME' those toolkits'.

'plain' has no marks. Every other name is one of FastChat's.
"""

import os
from pathlib import Path

from msft.data.named_template import NamedTemplate
from msft.data.plain_template import PLAIN, PlainTemplate
from msft.data.tokenizer_files import read_json
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError, did_you_mean
from msft.models.families import FAMILIES, name_of
from msft.models.family import DEFAULT_TEMPLATE

CHAT = "chat"


def open_template(name: str, tokenizer: Tokenizer):
    """Return the template `name` for a tokenizer: a ChatTemplate, a PlainTemplate or a NamedTemplate.

    'chat' is the tokenizer's own chat template, 'chat:NAME' one of several it has. Raises InputError.
    """
    from msft.data.turn_formats import is_turn_format, open_turn_format

    if is_turn_format(name):
        return open_turn_format(name, tokenizer)
    if name == CHAT or name.startswith(CHAT + ":"):
        return _chat_template(name, name.partition(":")[2] or "default", tokenizer)
    if name == PLAIN:
        return PlainTemplate()
    tokens = {}
    for llama, own in (("<s>", "bos_token"), ("</s>", "eos_token")):
        if llama not in tokenizer.special_tokens:
            tokens[llama] = tokenizer.named_tokens.get(own, "")
    return NamedTemplate(name, tokens)


def default_template(tokenizer: Tokenizer, model_type: str | None = None) -> str:
    """Return the template where none is named: the tokenizer's own, else its model family's, else vicuna_v1.1."""
    own = FAMILIES[model_type].template if model_type in FAMILIES else DEFAULT_TEMPLATE
    return chat_or_none(tokenizer) or own


def chat_or_none(tokenizer: Tokenizer) -> str | None:
    """Return 'chat' for a tokenizer with a chat template, else None."""
    return CHAT if tokenizer.chat_templates else None


def model_type_beside(path: str | os.PathLike) -> str | None:
    """Return the family of the config.json beside a tokenizer, None where there is none that is known."""
    path = Path(path)
    return name_of(read_json((path if path.is_dir() else path.parent) / "config.json"))


def decoder_start_beside(path: str | os.PathLike) -> int | None:
    """Return the start token that the config.json of an encoder-decoder beside a tokenizer says, else None."""
    path = Path(path)
    config = read_json((path if path.is_dir() else path.parent) / "config.json")
    known = FAMILIES.get(config.get("model_type")) if isinstance(config.get("model_type"), str) else None
    if known is None or not known.is_encoder_decoder:
        return None
    start = config.get("decoder_start_token_id", 0)
    if type(start) is not int or start < 0:
        raise InputError(f"{path}: 'decoder_start_token_id' of config.json must be a token's number, not {start!r:.80}")
    return start


def _chat_template(name: str, key: str, tokenizer: Tokenizer):
    from msft.data.chat_template import ChatTemplate

    templates = tokenizer.chat_templates
    if not templates:
        raise InputError(f"--template {name}: the tokenizer has no chat template; name one of FastChat's instead")
    if key not in templates:
        known = ", ".join(f"chat:{each}" for each in templates)
        raise InputError(f"--template {name}: no such chat template{did_you_mean(key, templates)} (it has {known})")
    return ChatTemplate(templates[key], dict(tokenizer.named_tokens), name)
