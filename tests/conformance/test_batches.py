"""Padding, filling and dealing to ranks never change what is learnt, on either engine."""

import importlib

import numpy as np
import pytest

from msft.backend.contract import Runtime, Tuning
from msft.convert.random_weights import RandomWeights
from msft.data.batches import BatchStream, evaluation_batches
from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.models.families import spec_from_hf

SPEC = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.5,
}
LENGTH, ROWS = 13, 6


@pytest.fixture(scope="module", params=["torch", "mindspore"])
def engine(request):
    """A full-parameter engine over random weights."""
    pytest.importorskip(request.param)
    spec = spec_from_hf(SPEC)
    source = RandomWeights(spec, 0)
    build = importlib.import_module(f"msft.backend.{request.param}.engine").build
    return build(spec, source, Tuning(parameters=tuple(source.tensors)), Runtime())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six rows of 2 to 12 real tokens, the first tokens not supervised, as a MindRecord of rows of 13 tokens."""
    path, random = tmp_path_factory.mktemp("data") / "x.mindrecord", np.random.default_rng(0)
    with MindRecordWriter(path, {"input_ids": "int32", "labels": "int32"}) as writer:
        for real in (2, 12, 5, 7, 3, 9):
            ids = np.zeros(LENGTH, np.int32)
            ids[:real] = random.integers(1, 64, real)
            labels = np.where(np.arange(LENGTH) < real, ids, -100).astype(np.int32)
            labels[: real // 2] = -100
            writer.write({"input_ids": ids, "labels": labels})
    return open_mindrecord(path)


def loss(engine, data, **settings):
    """Summed loss and supervised tokens over all steps."""
    pairs = [engine.evaluate(batch) for batches in evaluation_batches(data, **settings).steps() for batch in batches]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def test_padding_and_filling_do_not_change_the_loss(engine, data):
    """One row at a time without padding is the truth; 4 rows a step leave two masked rows in the second."""
    expected = loss(engine, data, batch_size=1, pad_id=0)
    assert expected[1] == sum((data.row(index)["labels"] != -100).sum() for index in range(ROWS))
    for padding in ("longest", "bucket", "max_length"):
        found = loss(engine, data, batch_size=4, pad_id=63, padding=padding, bucket_size=8)
        assert found[1] == expected[1] and found[0] == pytest.approx(expected[0], rel=1e-5)


def test_ranks_add_up_to_one_process(engine, data):
    expected = loss(engine, data, batch_size=4, pad_id=0)
    parts = [loss(engine, data, batch_size=2, pad_id=0, rank=rank, world=2) for rank in range(2)]
    assert sum(part[1] for part in parts) == expected[1]
    assert sum(part[0] for part in parts) == pytest.approx(expected[0], rel=1e-5)


def test_a_step_learns_the_same_however_it_is_padded_and_split(engine, data):
    """The gradient of 6 rows at once, and the token-weighted mean over 3 micro-batches with bucketed padding."""

    def gradient(**settings):
        stream = BatchStream(data, pad_id=0, seed=3, **settings)
        [batches] = stream.steps()
        tokens = sum(batch.supervised for batch in batches)
        parts = [(engine.gradients(batch), batch.supervised / tokens) for batch in batches]
        return {name: sum(part[name] * share for part, share in parts) for name in parts[0][0]}

    whole = gradient(batch_size=6, padding="max_length")
    split = gradient(batch_size=2, gradient_accumulation_steps=3, padding="bucket", bucket_size=4)
    for name, values in whole.items():
        np.testing.assert_allclose(split[name], values, atol=1e-5 * np.abs(values).max(), err_msg=name)


def test_a_wholly_masked_batch_has_no_loss(engine, data):
    """5 rows of 6 a step on 2 ranks: the last rank's batch is only fill, of the same shape as the other's."""
    streams = [evaluation_batches(data, batch_size=1, pad_id=0, rank=rank, world=2, num_samples=5) for rank in range(2)]
    [last], [masked] = (list(stream.steps())[-1] for stream in streams)
    assert masked.input_ids.shape == last.input_ids.shape and masked.tokens == 0
    assert engine.evaluate(masked) == (0.0, 0)
