"""Templates by name: 'chat' is the tokenizer's own, every other name one of FastChat's."""

from msft.data.named_template import NamedTemplate
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError, did_you_mean

DEFAULT_TEMPLATE = "vicuna_v1.1"
CHAT = "chat"


def open_template(name: str, tokenizer: Tokenizer):
    """Return the template `name` for a tokenizer: a ChatTemplate or a NamedTemplate.

    'chat' is the tokenizer's own chat template, 'chat:NAME' one of several it has. Raises InputError.
    """
    if name == CHAT or name.startswith(CHAT + ":"):
        return _chat_template(name, name.partition(":")[2] or "default", tokenizer)
    tokens = {}
    for llama, own in (("<s>", "bos_token"), ("</s>", "eos_token")):
        if llama not in tokenizer.special_tokens:
            tokens[llama] = tokenizer.named_tokens.get(own, "")
    return NamedTemplate(name, tokens)


def _chat_template(name: str, key: str, tokenizer: Tokenizer):
    from msft.data.chat_template import ChatTemplate

    templates = tokenizer.chat_templates
    if not templates:
        raise InputError(f"--template {name}: the tokenizer has no chat template; name one of FastChat's instead")
    if key not in templates:
        known = ", ".join(f"chat:{each}" for each in templates)
        raise InputError(f"--template {name}: no such chat template{did_you_mean(key, templates)} (it has {known})")
    return ChatTemplate(templates[key], dict(tokenizer.named_tokens), name)
