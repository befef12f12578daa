"""How far a model's positions reach: those that are learned end, rotation and ALiBi do not."""

import numpy as np

from msft.errors import RunError
from msft.models.spec import ModelSpec


def most_tokens(spec: ModelSpec) -> int | None:
    """Return how many tokens a text may have (None: any number)."""
    return spec.max_position_embeddings if spec.outside.positions else None


def check(spec: ModelSpec, position_ids: np.ndarray) -> None:
    """Raise RunError for positions that a model has not learned."""
    check_length(spec, int(position_ids.max(initial=-1)) + 1)


def check_length(spec: ModelSpec, tokens: int) -> None:
    """Raise RunError for a text of more tokens than a model has learned positions."""
    most = most_tokens(spec)
    if most is not None and tokens > most:
        raise RunError(f"a text has {tokens} tokens, but this {spec.family} model has learned {most} positions")
