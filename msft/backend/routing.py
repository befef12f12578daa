"""How evenly a micro-batch's tokens use the experts, and which they get: what both engines count alike."""

import numpy as np


class Balance:
    """The balance loss of a micro-batch over all its layers with experts, and its slope.

    Switch Transformers (arXiv 2101.03961, equations 4 to 6) as transformers computes it: the number of experts x the
    sum over experts of (choices of it a token and layer) x (its share in the router's softmax, mean over tokens and
    layers). Layers add to it on their way forward; after `close` it is what a batch had, whatever is computed again.
    """

    def __init__(self, count: int):
        self.choices, self.shares = np.zeros(count), np.zeros(count)
        self.rows = 0
        self.slope: np.ndarray | None = None

    def add(self, choices: np.ndarray, shares: np.ndarray, tokens: int) -> None:
        """Add a layer's choices and summed shares [experts] of so many tokens."""
        if self.slope is None:
            self.choices += choices
            self.shares += shares
            self.rows += tokens

    def close(self, weight: float) -> float:
        """Return the loss; `slope` [experts], float32, is the gradient of `weight` x it for each token's shares."""
        count, rows = len(self.choices), max(self.rows, 1)
        self.slope = (weight * count * self.choices / rows**2).astype(np.float32)
        return float(count * (self.choices * self.shares).sum() / rows**2)


def chosen(shares: np.ndarray, count: int) -> np.ndarray:
    """Return which experts are among the `count` of a token's largest shares, bool [tokens, experts].

    Of equal shares those of the first experts count as larger.
    """
    smallest = np.partition(shares, -count, axis=1)[:, -count, None]
    found = shares >= smallest
    tied = np.flatnonzero(found.sum(1) > count)
    if len(tied):
        order = np.argsort(-shares[tied], axis=1, kind="stable")[:, :count]
        found[tied] = False
        found[tied[:, None], order] = True
    return found


def described(balance: float) -> dict[str, str]:
    """Say which weight the balance loss has."""
    return {"balance loss": f"x {balance:g}, of all layers, by micro-batch" if balance else "none"}
