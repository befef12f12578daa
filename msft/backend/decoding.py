"""Autoregressive generation in numpy over an engine's key-value cache: one loop for both engines."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from msft.backend.contract import OnToken, Sampling


class Session(Protocol):
    """A batch being generated on an engine; prompts are padded to a multiple of `bucket`."""

    bucket: int

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""


def generate(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
) -> list[list[int]]:
    """Return each prompt's new tokens; prompts are left-padded to one length.

    A row ends at a stop id, where `on_token` says so, or after `max_new_tokens`; the batch when all rows have ended.
    """
    rows = len(prompts)
    streams = [np.random.Philox(key=[sampling.seed, sampling.first_row + row]) for row in range(rows)]
    generators = [np.random.Generator(stream) for stream in streams]
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * rows
    logits = session.prefill(*padded(prompts, session.bucket))
    for step in range(sampling.max_new_tokens):
        tokens = np.array([choose(logits[row], sampling, generators[row]) for row in range(rows)], dtype=np.int32)
        for row in range(rows):
            token = int(tokens[row])
            running[row] = running[row] and token not in sampling.stop_ids
            if running[row]:
                answers[row].append(token)
                running[row] = not (on_token and on_token(row, token))
        if not any(running) or step + 1 == sampling.max_new_tokens:
            break
        logits = session.decode(tokens)
    return answers


def padded(texts: Sequence[Sequence[int]], bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts left-padded to one length, a multiple of `bucket`, int32 [rows, length], and each row's padding."""
    length = -(-max(map(len, texts)) // bucket) * bucket
    padding = np.array([length - len(text) for text in texts], dtype=np.int32)
    input_ids = np.zeros((len(texts), length), dtype=np.int32)
    for row, text in enumerate(texts):
        input_ids[row, padding[row] :] = text
    return input_ids, padding


class BegunAnew:
    """A session that is begun anew, with all its texts, when one of them gets longer than `border`.

    Beyond it a model turns all positions in another way (`rope.border`), those of cached keys too. `begin` makes a
    session for so many new tokens.
    """

    def __init__(self, begin: Callable[[int], Session], room: int, border: int):
        self.begin, self.room, self.border = begin, room, border
        self.session = begin(room)
        self.bucket = self.session.bucket

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """See `Session`."""
        self.texts = [ids[start:].tolist() for ids, start in zip(input_ids, padding, strict=True)]
        return self.session.prefill(input_ids, padding)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session`."""
        self.room -= 1
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.append(token)
        if self.border + 1 not in map(len, self.texts):
            return self.session.decode(tokens)
        self.session = self.begin(max(self.room, 1))
        return self.session.prefill(*padded(self.texts, self.bucket))


def choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """Choose a token from logits float32 [vocabulary]: the largest at temperature 0, else top-k, then top-p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    sums = np.cumsum(probabilities)
    # The last sum itself, because another order of adding may give more, which would be no token's share.
    return int(order[np.searchsorted(sums, generator.random() * sums[-1])])
