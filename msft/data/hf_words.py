"""Which tokenizers of the `tokenizers` library take each word of a text by itself."""

import json

from msft.data.words import Words

# GPT-2's, Llama 3's and Qwen 2's. None matches a space that stands between two other characters except as the
# first character of a match, none looks behind, and only white space looks ahead.
_BY_WORDS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        for number in (r"\p{N}{1,3}", r"\p{N}")
    ),
}
_SINGLE_NUMBERS = r"\p{N}"


def words_of(tokenizer) -> Words | None:
    """Return the words of a byte-level BPE tokenizer, None when they depend on each other or may."""
    added = tokenizer.get_added_tokens_decoder().values()
    if tokenizer.normalizer is not None or tokenizer.model.dropout or not all(map(_is_plain, added)):
        return None
    if len({token.normalized for token in added}) > 1:
        return None  # they are looked for one kind after the other
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    kinds = {_kind(step) for step in state.get("pretokenizers", [state])}
    if "words" not in kinds or "other" in kinds:
        return None
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}

    def encode(words: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(words)]

    return Words(encode, special)


def _is_plain(token) -> bool:
    return bool(token.content) and not (token.lstrip or token.rstrip or token.single_word)


def _kind(step: dict) -> str:
    """Say what a step of the pre-tokenizer does: cut 'words', change 'nothing' about where they are cut, or 'other'."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else "nothing"
    if step["type"] == "Digits":
        return "nothing"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"].get("Regex")
        return "words" if pattern in _BY_WORDS else "nothing" if pattern == _SINGLE_NUMBERS else "other"
    return "other"
