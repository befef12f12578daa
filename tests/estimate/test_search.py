"""Protects the answers: the largest micro-batch, the best layout and the reason for it."""

import pytest

from msft.estimate import search
from msft.estimate.devices import DEVICES
from msft.estimate.layout import Layout
from msft.estimate.memory import memory
from tests.estimate.test_sizes import sized

ASCEND = DEVICES["ascend910b"]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(recompute):
    sizes, work = sized("lora_llama2_7b", "model.model_config.param_init_type=bfloat16")
    work = work._replace(recompute=recompute)
    rows = search.largest_rows(sizes, work, Layout(), ASCEND)
    assert memory(sizes, work._replace(rows=rows), Layout()).total <= ASCEND.usable
    assert memory(sizes, work._replace(rows=rows + 1), Layout()).total > ASCEND.usable
    assert rows > 4 if recompute else rows >= 1


def test_nothing_fits():
    sizes, work = sized("finetune_llama2_70b")
    assert search.largest_rows(sizes, work, Layout(), ASCEND) == 0
    best = search.best_layout(sizes, work, Layout(data=8), ASCEND)
    assert best.plan is None and best.fitting == 0 < best.tried
    assert best.reason.startswith("no layout fits: the least memory is ")
    assert best.least.memory.total > ASCEND.usable


def test_a_model_that_fits_is_not_split():
    sizes, work = sized("lora_llama2_7b", "model.model_config.param_init_type=bfloat16")
    best = search.best_layout(sizes, work, Layout(data=8), ASCEND)
    assert best.plan.layout[:3] == (8, 1, 1) and not best.plan.work.recompute
    assert not best.plan.layout.optimizer_sharding, "sharding 34 MB of moments is not worth a word"
    assert "splitting it only adds traffic" in best.reason


def test_a_model_that_does_not_fit_is_split():
    sizes, work = sized("finetune_llama2_70b")
    asked = Layout(2, 4, 8, True, 128, True, reduce_scatters=True)
    best = search.best_layout(sizes, work, asked, ASCEND)
    layout = best.plan.layout
    # The layout that MindFormers itself ships for Llama 2 70B on 64 devices.
    assert layout[:3] == (2, 4, 8) and layout.sequence_parallel and layout.optimizer_sharding
    assert best.plan.memory.total <= ASCEND.usable
    assert "unsplit, a device needs" in best.reason
    # It is the fastest of those that fit, by their own numbers.
    rates = [
        search.plan_of(sizes, tried, split, ASCEND).speed.tokens
        for split, tried in search.candidates(sizes, work, layout)
        if memory(sizes, tried, split).total <= ASCEND.usable
    ]
    assert len(rates) == best.fitting and best.plan.speed.tokens >= 0.995 * max(rates)


def test_more_memory_never_makes_the_best_layout_slower():
    sizes, work = sized("finetune_llama2_13b")
    layout, rates = Layout(data=8), []
    for memory_size in (40e9, 64e9, 80e9, 200e9):
        plan = search.best_layout(sizes, work, layout, ASCEND._replace(memory=memory_size)).plan
        rates.append(plan.speed.tokens if plan else 0)
    assert rates == sorted(rates) and rates[-1] > rates[0]
