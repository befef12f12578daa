"""Models that read a context in both directions: where it ends, and which positions tokens have (`spec.Prefix`).

As ChatGLM-6B's release does it, in numpy, once for both engines. A text without a `begin` is all context, whose
positions are its places; that is what the release's tokenizer does, whereas its model takes no such text. Masks are
looked for in contexts alone: one that an answer brings would turn what has been said.
"""

from collections.abc import Sequence

import numpy as np

from msft.backend.contract import IGNORE, Batch
from msft.backend.segments import spans
from msft.errors import RunError
from msft.models.spec import ModelSpec, Prefix


def contexts(spec: ModelSpec, input_ids: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Return for each token how many tokens the context of its text has, int64 [rows, length]; 0 on padding."""
    found = np.zeros(input_ids.shape, np.int64)
    for row, start, end in spans(segment_ids).tolist() if spec.prefix else ():
        found[row, start:end] = context(spec.prefix, input_ids[row, start:end])
    return found


def positions(spec: ModelSpec, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Return the positions of tokens of int32 [rows, length] arrays; where a model has two, [2, rows, length]."""
    if not spec.prefix:
        return position_ids
    found = np.zeros((2, *input_ids.shape), np.int32)
    for row, start, end in spans(segment_ids).tolist():
        found[:, row, start:end] = of_text(spec.prefix, input_ids[row, start:end])
    return found


def following(spec: ModelSpec, last: np.ndarray) -> np.ndarray:
    """Return the positions of the tokens behind the `last` ones of answers, as `positions` gives them."""
    return last + np.array([[[0]], [[1]]], np.int32) if spec.prefix else last + np.int32(1)


def context(prefix: Prefix, text: np.ndarray) -> int:
    """Return how many tokens the context of a text int32 [tokens] has."""
    begins = np.flatnonzero(text == prefix.begin)
    return int(begins[0]) if len(begins) else len(text)


def of_text(prefix: Prefix, text: np.ndarray) -> np.ndarray:
    """Return the two positions of each token of a text, int32 [2, tokens]."""
    end, places = context(prefix, text), np.arange(len(text))
    masks = [np.flatnonzero(text[:end] == mask) for mask in prefix.masks]
    mask = next((int(found[0]) for found in masks if len(found)), None)
    first = places if mask is None else np.where(places < end, places, mask)
    return np.stack((first, np.maximum(places - end + 1, 0))).astype(np.int32)


def check_labels(spec: ModelSpec, batch: Batch) -> None:
    """Raise RunError for labels inside a context, whose tokens would see what they are to say."""
    if not spec.prefix:
        return
    ends, places = contexts(spec, batch.input_ids, batch.segment_ids), np.zeros(batch.input_ids.shape, np.int64)
    for row, start, end in spans(batch.segment_ids).tolist():
        places[row, start:end] = np.arange(end - start)
    # The last token of a context says `begin`, which it does not see.
    seen = (batch.labels != IGNORE) & (places + 1 < ends)
    if seen.any():
        row = int(np.flatnonzero(seen.any(1))[0])
        raise RunError(
            f"row {row} of a batch has labels before <sop> (token {spec.prefix.begin}): "
            f"{spec.family} reads that in both directions, so that it would see what it is to learn; only what follows "
            "<sop> can be supervised"
        )


def check_prompts(spec: ModelSpec, prompts: Sequence[Sequence[int]]) -> None:
    """Raise RunError for a prompt whose answer has not begun: without `begin` a new token would change its context."""
    for number, prompt in enumerate(prompts):
        if spec.prefix and spec.prefix.begin not in prompt:
            raise RunError(
                f"prompt {number + 1} has no <sop> (token {spec.prefix.begin}), behind which {spec.family} answers: "
                "its tokenizer puts [gMASK] <sop> behind a prompt"
            )
