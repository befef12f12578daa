"""Which sentencepiece models take each word of a text by itself.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Iterator

from msft.data.words import Words

SPACE = "\u2581"
_USER_DEFINED = b"\x18\x04"  # the field `type` of a piece, its last


def words_of(model, pieces: list[str]) -> Words | None:
    """Return the words of a model that changes no letters; None when they depend on each other or may.

    They do not where pieces are joined (BPE) that have spaces at their beginning only, and where the space that the
    model puts before a text makes its first word like any other. The best path of a unigram model is one of the
    whole text.
    """
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces) or SPACE not in pieces:
        return None
    if "".join(model.encode("a  b ", out_type=str)) != f"{SPACE}a{SPACE}{SPACE}b{SPACE}":
        return None
    if _has_best_paths(model) or any(map(_is_user_defined, _pieces(model.serialized_model_proto()))):
        return None
    return Words(lambda words: model.encode([word[1:] for word in words], num_threads=1), {}, lead=" ")


def _has_best_paths(model) -> bool:
    try:
        model.nbest_encode_as_ids("a", 2)
    except RuntimeError:
        return False
    return True


def _is_user_defined(piece: bytes) -> bool:
    """Whether a piece is looked for in the text before anything else, its space included."""
    return piece.endswith(_USER_DEFINED)


def _pieces(proto: bytes) -> Iterator[bytes]:
    """Yield the messages of a model's pieces: they come first, a key of one byte and a size before each."""
    position = 0
    while proto[position] == 0x0A:
        size = proto[position + 1]
        start = position + 2
        if size > 127:
            size = size - 128 + (proto[start] << 7)
            start += 1
        position = start + size
        yield proto[start:position]
