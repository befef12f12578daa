"""Protects embedding and cross-entropy of a vocabulary that is cut over ranks: slices by hand are the whole together.

What a rank hears of the others is worked out here; numpy in float64 is the oracle.
"""

from importlib import import_module

import numpy as np
import pytest

from msft.backend.mesh import Mesh
from msft.models import llama
from tests.conformance.tiny_engines import ENGINES, TIED

TOKENS, ROWS, RANKS, HIDDEN = 12, 5, 3, 4
LOGITS = np.random.default_rng(0).normal(0, 4, (ROWS, TOKENS)).astype(np.float32)
# A label on the first and on the last row of a slice; one logit that is nearly all of its sum.
LABELS = np.array([0, 3, 4, 11, 7], np.int32)
LOGITS[4, 7] = 40
TOP = LOGITS.max(1)


def tensor(backend, array):
    if backend == "torch":
        import torch

        return torch.from_numpy(array.copy())
    import mindspore

    return mindspore.Tensor(array)


def to_numpy(backend, values):
    return import_module(f"msft.backend.{backend}.ops").to_numpy(values)


def of_rank(backend, rank):
    """A rank's part of the vocabulary, and its slice of the logits; others' maxima and sums are given by hand."""
    size = TOKENS // RANKS
    own = slice(rank * size, (rank + 1) * size)
    others = np.delete(LOGITS.astype(float), np.arange(own.start, own.stop), 1)
    rest = np.exp(others - TOP[:, None]).sum(1)
    foreign = (LABELS < own.start) | (LABELS >= own.stop)
    chosen = np.where(foreign, LOGITS[np.arange(ROWS), LABELS] - TOP, 0)
    heard = []

    def largest(values):
        heard.append("largest")
        np.testing.assert_array_equal(to_numpy(backend, values), LOGITS[:, own].max(1))
        return tensor(backend, TOP)

    def reduce(values):
        heard.append("reduce")
        return values + tensor(backend, np.stack((rest, chosen)).astype(np.float32))

    made = import_module(f"msft.backend.{backend}.vocabulary").Vocabulary(own.start, largest, reduce)
    return made, own, heard


@pytest.mark.parametrize("backend", ENGINES)
def test_cross_entropy_of_slices_is_that_of_the_whole(backend):
    wide = LOGITS.astype(float)
    shares = np.exp(wide - wide.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    scale = 0.25
    expected = -np.log(shares[np.arange(ROWS), LABELS])
    gradient = scale * (shares - np.eye(TOKENS)[LABELS])
    scales = scale if backend == "torch" else tensor(backend, np.full(ROWS, scale, np.float32))
    for rank in range(RANKS):
        vocabulary, own, heard = of_rank(backend, rank)
        labels = tensor(backend, LABELS)
        losses = vocabulary.token_losses(tensor(backend, LOGITS[:, own]), labels)
        np.testing.assert_allclose(to_numpy(backend, losses), expected, atol=2e-6, rtol=1e-6)
        losses, found = vocabulary.token_losses_and_gradient(tensor(backend, LOGITS[:, own]), labels, scales)
        np.testing.assert_allclose(to_numpy(backend, losses), expected, atol=2e-6, rtol=1e-6)
        np.testing.assert_allclose(to_numpy(backend, found), gradient[:, own], atol=1e-7)
        # Two messages of a chunk, neither as long as a vocabulary.
        assert heard == ["largest", "reduce"] * 2


@pytest.mark.parametrize("backend", ENGINES)
def test_embeddings_of_slices_add_up_to_the_whole(backend):
    table = np.random.default_rng(1).normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    ids = np.array([[0, 3, 4, 11, 11, 7]], np.int32) if backend == "torch" else np.array([0, 3, 4, 11, 11, 7], np.int32)
    gradient = np.random.default_rng(2).normal(size=(*ids.shape, HIDDEN)).astype(np.float32)
    by_table = np.zeros_like(table)
    np.add.at(by_table, ids, gradient)
    total = np.zeros_like(gradient)
    for rank in range(RANKS):
        vocabulary, own, _ = of_rank(backend, rank)
        rows = tensor(backend, table[own])
        if backend == "torch":
            states = vocabulary.embed(rows.requires_grad_(), tensor(backend, ids))
            states.backward(tensor(backend, gradient))
            found = rows.grad
        else:
            states = vocabulary.embed(rows, tensor(backend, ids))
            found = vocabulary.embed_backward(tensor(backend, gradient), tensor(backend, ids), rows)
        total += to_numpy(backend, states)
        np.testing.assert_allclose(to_numpy(backend, found), by_table[own], rtol=1e-6)
    np.testing.assert_array_equal(total, table[ids])


@pytest.mark.parametrize("backend", ENGINES)
def test_a_rank_has_the_rows_that_its_slice_of_the_weights_has(backend):
    of = import_module(f"msft.backend.{backend}.vocabulary").own
    spec = llama.spec_from_hf(TIED)
    assert of(spec, Mesh(tensor=4, rank=7, vocabulary=True)).first == 3 * 96 // 4
    assert of(spec, Mesh(tensor=4, rank=7)) is None
    assert of(spec, Mesh(data=4, rank=3, vocabulary=True)) is None
