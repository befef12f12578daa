"""A small real engine in numpy: next token from the current one, softmax over a [vocabulary, vocabulary] table.

Exact gradients, AdamW with bias correction, counters as the contract says: what the loop needs, and nothing else.
"""

import math

import numpy as np

from msft.backend.contract import IGNORE, EngineState, StepResult

NAME = "table.weight"


class BigramEngine:
    """Implements the parts of `contract.Engine` that the training loop and checkpoints use."""

    is_sharded = False

    def __init__(self, vocabulary: int, beta1=0.9, beta2=0.999, eps=1e-8):
        self.table = np.zeros((vocabulary, vocabulary), np.float64)
        self.first, self.second = np.zeros_like(self.table), np.zeros_like(self.table)
        self.betas, self.eps, self.steps = (beta1, beta2), eps, 0
        self.rates: list[float] = []

    def _losses(self, batch):
        chosen = batch.labels != IGNORE
        inputs, labels = batch.input_ids[chosen], batch.labels[chosen]
        logits = self.table[inputs]
        logits = logits - logits.max(1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return inputs, labels, logprobs

    def train_step(self, micro_batches, learning_rate):
        total = sum(batch.supervised for batch in micro_batches)
        loss, gradient = 0.0, np.zeros_like(self.table)
        for batch in micro_batches:
            inputs, labels, logprobs = self._losses(batch)
            loss -= logprobs[np.arange(len(labels)), labels].sum()
            error = np.exp(logprobs)
            error[np.arange(len(labels)), labels] -= 1
            np.add.at(gradient, inputs, error)
        gradient /= total
        self.steps += 1
        self.rates.append(learning_rate)
        b1, b2 = self.betas
        self.first = b1 * self.first + (1 - b1) * gradient
        self.second = b2 * self.second + (1 - b2) * gradient**2
        corrected = np.sqrt(self.second / (1 - b2**self.steps)) + self.eps
        self.table -= learning_rate * self.first / (1 - b1**self.steps) / corrected
        return StepResult(loss / total, total, float(np.linalg.norm(gradient)), False, 1.0)

    def evaluate(self, batch):
        _, labels, logprobs = self._losses(batch)
        return float(-logprobs[np.arange(len(labels)), labels].sum()), batch.supervised

    def export_state(self):
        counters = {"step": self.steps, "optimizer_step": self.steps, "loss_scale": 1.0, "good_steps": 0}
        return EngineState({NAME: self.table.copy()}, {NAME: self.first}, {NAME: self.second}, counters)

    def import_state(self, state):
        self.table = state.weights[NAME].copy()
        self.first, self.second = state.first_moment[NAME], state.second_moment[NAME]
        self.steps = int(state.counters["step"])


class SkippingEngine(BigramEngine):
    """Skips the steps in `skips` (1-based), as an engine does when its gradients overflow, or their loss is `loss`."""

    def __init__(self, vocabulary, skips, loss=None, scale=1024.0):
        super().__init__(vocabulary)
        self.skips, self.loss, self.scale, self.calls = skips, loss, scale, 0

    def train_step(self, micro_batches, learning_rate):
        self.calls += 1
        if self.calls not in self.skips:
            return super().train_step(micro_batches, learning_rate)
        self.rates.append(learning_rate)
        loss, total = map(sum, zip(*(self.evaluate(batch) for batch in micro_batches), strict=True))
        return StepResult(loss / total if self.loss is None else self.loss, total, math.inf, True, self.scale)
