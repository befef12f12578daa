"""The tokenizer inside a GGUF file, written as Hugging Face's tokenizer.json and tokenizer_config.json.

Vocabulary kinds (`tokenizer.ggml.model`): 'gpt2', byte-level BPE with merges, split as `tokenizer.ggml.pre` says, and
'llama', sentencepiece BPE with scores and byte fallback. Meanings follow llama.cpp.
"""

import json
from pathlib import Path

from msft import console
from msft.convert.gguf_file import read_metadata
from msft.errors import InputError

# The ways to join a piece from two grow with its length squared.
MAX_TOKEN = 1000
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the expressions that cut text into words, one after the other.
_SPLITS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json, {} (said) when the file has no vocabulary.

    Raises InputError for a kind of vocabulary or word splitting that is not known.
    """
    metadata = read_metadata(path)
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        console.warn(f"{path}: holds no vocabulary, so no tokenizer is written")
        return {}
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: vocabulary of kind {kind!r} is not supported (known: gpt2, llama)")
    try:
        tokenizer = _byte_level(path, metadata) if kind == "gpt2" else _sentencepiece(path, metadata)
        _add_special(tokenizer, metadata)
        _add_template(tokenizer, metadata, kind)
        config = (json.dumps(_config(metadata), indent=2, ensure_ascii=False) + "\n").encode()
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{path}: its vocabulary is damaged: {error}") from error
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": config}


def _byte_level(path: Path, metadata: dict):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _SPLITS:
        raise InputError(f"{path}: splits words as {pre!r}, which is not known (known: {', '.join(sorted(_SPLITS))})")
    if not metadata.get("tokenizer.ggml.merges"):
        raise InputError(f"{path}: its vocabulary lacks merges")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 and tekken take a word that is a token as it is, even where the merges do not lead to it.
    whole_words = pre not in ("gpt-2", "smollm", "qwen2")
    tokenizer = Tokenizer(models.BPE(_vocabulary(metadata), merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, metadata: dict):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    types = metadata.get("tokenizer.ggml.token_type")
    if not scores or not types or not len(scores) == len(types) == len(vocabulary):
        raise InputError(f"{path}: its vocabulary lacks scores or types")
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges(metadata["tokenizer.ggml.tokens"], scores, types)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = [normalizers.Replace(" ", "▁")]
    strip = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        space.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(space)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _vocabulary(metadata: dict) -> dict[str, int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    if max(map(len, tokens)) > MAX_TOKEN:
        raise ValueError(f"a token has more than {MAX_TOKEN} characters")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("a token occurs twice")
    return vocabulary


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way a piece can be joined from two others; sentencepiece joins the pair with the best score first."""
    order = {token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for token, index in order.items():
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        ways = sorted((order[left], order[right]) for left, right in pairs if left in order and right in order)
        found += [(-scores[index], index, left, right) for left, right in ways]
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]


def _add_special(tokenizer, metadata: dict) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_template(tokenizer, metadata: dict, kind: str) -> None:
    from tokenizers import processors

    tokens = metadata["tokenizer.ggml.tokens"]
    ends = {}
    for end, default in (("bos", kind == "llama"), ("eos", False)):
        token_id = metadata.get(f"tokenizer.ggml.{end}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{end}_token", default) and token_id is not None:
            ends[end] = tokens[token_id]
    if ends:
        words = [ends.get("bos"), "{0}", ends.get("eos")]
        single = " ".join(word.format("$A") if word == "{0}" else word for word in words if word)
        pair = f"{single} {single.replace('$A', '$B')}"
        special = [(token, tokens.index(token)) for token in set(ends.values())]
        tokenizer.post_processor = processors.TemplateProcessing(single, pair.replace("$B", "$B:0"), special)


def _config(metadata: dict) -> dict:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[name] = tokens[token_id]
    config["model_max_length"] = metadata.get("llama.context_length", 2048)
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config
