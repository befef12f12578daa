"""Protects what MindSpore is told for a plan (held against its own validation), and what each process saves."""

import mindspore
import numpy as np
import pytest

from msft.backend import cuts
from msft.backend.plan import Plan


@pytest.fixture
def parallel_context():
    yield mindspore.get_auto_parallel_context
    mindspore.reset_auto_parallel_context()


@pytest.mark.parametrize("stages", [1, 2])
def test_mindspore_takes_the_settings(parallel_context, stages):
    plan = Plan(data=2, tensor=4, pipeline=stages, micro_batches=stages, shard_optimizer=True)
    mindspore.set_auto_parallel_context(**cuts.context(plan, rank=3))
    expected = {"parallel_mode": "semi_auto_parallel", "pipeline_stages": stages, "full_batch": True}
    expected |= {"gradients_mean": False, "enable_parallel_optimizer": True}
    assert {key: parallel_context(key) for key in expected} == expected
    assert parallel_context("strategy_ckpt_config")["save_file"].endswith("ckpt_strategy_rank_3.ckpt")


# What MindSpore 2.10 says of parameters for data 2 x model 4: device matrix, which of its dimensions (counted from the
# last) cuts each axis, the slice, 0, True, group, the whole, the slice, and three facts of the optimizer's shards.
CUTS = {
    "columns": ([2, 4], [0, -1], [2, 6], 0, True, "", [8, 6], [2, 6], False, False, 0, 0),
    "rows": ([2, 4], [-1, 0], [6, 2], 0, True, "", [6, 8], [6, 2], False, False, 0, 0),
    "norm": ([2, 4], [-1], [6], 0, True, "", [6], [6], False, False, 0, 0),
    "dealt": ([2, 4], [0, -1], [2, 6], 0, True, "", [8, 6], [2, 6], False, False, 4, 2),
}


@pytest.mark.parametrize("name", CUTS)
def test_all_processes_give_each_number_once(name):
    plan, shape = Plan(data=2, tensor=4), tuple(CUTS[name][6])
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    places = [cuts.given(plan, rank, name, CUTS[name]) for rank in range(8)]
    parts = [None if place is None else place.of(whole) for place in places]
    joined = sum(cuts.placed(part, place, shape) for part, place in zip(parts, places, strict=True))
    np.testing.assert_array_equal(joined, whole)
    assert len([place for place in places if place]) == {"columns": 4, "rows": 4, "norm": 1, "dealt": 8}[name]


def test_a_tied_embedding_is_given_by_its_first_stage():
    plan = Plan(data=2, tensor=4, pipeline=2, micro_batches=2)
    assert cuts.given(plan, 0, cuts.EMBEDDING, CUTS["columns"]).shape == (2, 6)
    assert cuts.given(plan, 8, cuts.EMBEDDING, CUTS["columns"]) is None
    assert cuts.given(plan, 9, "model.layers.1.x", CUTS["columns"]).start == (2, 0)
