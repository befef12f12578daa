"""Packing computes what each example alone does: loss, log-probabilities, gradients, dropout; no neighbour is seen."""

import importlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from msft.backend.contract import Lora, Runtime, Tuning
from msft.convert.random_weights import RandomWeights
from msft.data.batches import BatchStream
from msft.data.dataset import InMemoryDataset
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from tests.conftest import TINY

ENGINES = ("torch", "mindspore")
SPEC = {**TINY, "vocab_size": 96, "tie_word_embeddings": True, "initializer_range": 0.1}
LENGTH, SIZES = 24, (9, 3, 25, 14, 6, 11, 2, 8, 17, 5)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    """A function that builds the engine under test: all weights tuned, or LoRA with a dropout and B not zero."""
    pytest.importorskip(request.param)

    @cache
    def build(dropout=None):
        spec = spec_from_hf(SPEC)
        modules = linear_modules(spec)
        full = Tuning(parameters=tuple(tensor_shapes(spec)))
        tuning = full if dropout is None else Tuning(lora=Lora(4, 8.0, dropout, tuple(modules)))
        module = importlib.import_module(f"msft.backend.{request.param}.engine")
        built = module.build(spec, RandomWeights(spec, 0), tuning, Runtime(seed=5))
        random = np.random.default_rng(1)
        factors = {name: array for name, array in built.export_state().weights.items() if ".lora_" in name}
        built.load_adapter({name: array + random.normal(0, 0.1, array.shape) for name, array in factors.items()})
        return built

    return build


def dataset():
    """Ten rows of 2 to 25 tokens; the first third of each is not supervised."""
    random = np.random.default_rng(0)
    rows = []
    for size in SIZES:
        ids = np.zeros(LENGTH + 1, np.int32)
        ids[:size] = random.integers(1, 96, size)
        labels = np.where((np.arange(LENGTH + 1) < size) & (np.arange(LENGTH + 1) > size // 3), ids, -100)
        rows.append({"input_ids": ids, "labels": labels.astype(np.int32)})
    return InMemoryDataset(rows)


def packed_and_plain():
    """The ten examples packed into four rows, and one a row in the same order, so that each has the same number."""
    stream = BatchStream(dataset(), batch_size=4, pad_id=0, packing=True, padding="max_length", seed=2)
    [[packed]] = stream.steps(prefetch=0)
    order = stream.row_numbers(0)
    rows = InMemoryDataset([dataset().row(row) for row in order])
    [[plain]] = BatchStream(rows, batch_size=10, pad_id=0, shuffle=False, padding="max_length").steps(prefetch=0)
    assert sorted(order) == list(range(10)) and packed.segment_ids.max() > 2
    assert (packed.tokens, packed.supervised) == (plain.tokens, plain.supervised)
    return packed, plain


def by_example(batch, values):
    """Per-token values as one array an example, by the example's number in the step."""
    return [values[(batch.row_ids == number) & (batch.segment_ids != 0)] for number in range(len(SIZES))]


def assert_equal_gradients(found, expected):
    for name, gradient in expected.items():
        distance, size = np.linalg.norm(found[name] - gradient), np.linalg.norm(gradient)
        assert distance <= 1e-6 * size, (name, distance / size)


def test_loss_logprobs_and_gradients_are_the_unpacked_ones(engine):
    packed, plain = packed_and_plain()
    full = engine()
    assert full.evaluate(packed)[0] == pytest.approx(full.evaluate(plain)[0], rel=1e-6)
    found, expected = (by_example(batch, full.token_logprobs(batch)) for batch in (packed, plain))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_equal_gradients(full.gradients(packed), full.gradients(plain))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_packed_step_with_dropout_is_the_unpacked_one(engine, dropout):
    """The same features are dropped of the same tokens, for the adapters' two factors in every module."""
    packed, plain = packed_and_plain()
    lora = engine(dropout)
    found, expected = lora.step_gradients([packed]), lora.step_gradients([plain])
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    assert_equal_gradients(found.gradients, expected.gradients)
    # And dropout is on: with other numbers for the examples the loss is another one.
    renumbered = replace(packed, row_ids=np.where(packed.segment_ids != 0, packed.row_ids + 7, 0).astype(np.int32))
    other = lora.step_gradients([renumbered]).losses[0]
    assert (abs(other / found.losses[0] - 1) > 1e-4) == (dropout > 0)


def test_neighbours_in_a_pack_do_not_see_each_other(engine):
    """Other tokens in one example leave the log-probabilities of all others as they were."""
    packed, _ = packed_and_plain()
    full = engine()
    before = by_example(packed, full.token_logprobs(packed))
    for changed in (0, 3, 9):
        ids = packed.input_ids.copy()
        place = (packed.row_ids == changed) & (packed.segment_ids != 0)
        ids[place] = 1 + (ids[place] + 40) % 95
        after = by_example(packed, full.token_logprobs(replace(packed, input_ids=ids)))
        moved = [float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True)]
        assert moved[changed] > 1e-3
        assert max(moved[:changed] + moved[changed + 1 :]) <= 1e-7


def test_padding_of_a_pack_is_not_seen(engine):
    packed, _ = packed_and_plain()
    ids = np.where(packed.segment_ids == 0, 77, packed.input_ids).astype(np.int32)
    assert (ids != packed.input_ids).any()
    full = engine()
    found, expected = full.token_logprobs(replace(packed, input_ids=ids)), full.token_logprobs(packed)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
