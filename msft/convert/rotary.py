"""The order of query and key rows in a head: halves (Hugging Face) or pairs (Meta, GGUF)."""

import numpy as np


def pairs_to_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows (first axis) of a query or key weight or bias from rotary pairs to rotary halves."""
    width = array.shape[0] // heads
    return array.reshape(heads, width // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
