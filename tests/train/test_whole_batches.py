"""Protects what each process feeds where MindSpore cuts the model: the whole batch, in as many micro-batches."""

from dataclasses import replace

import numpy as np

from msft.backend.mesh import Mesh
from msft.backend.plan import Plan
from msft.config.load import load_recipe
from msft.train import setup
from msft.train.prepare import prepare


def test_every_process_has_the_rows_that_data_parallel_ones_share(write_recipe):
    prepared = prepare(load_recipe(write_recipe(), ["--runner_config.gradient_accumulation_steps", "2"]))
    plan = Plan(data=2, tensor=2, pipeline=2, micro_batches=2)
    streams = [setup.train_stream(replace(prepared, plan=plan), Mesh(2, 2, rank, pipeline=2)) for rank in (0, 5)]
    first, same = (next(iter(stream.steps(prefetch=0))) for stream in streams)
    shares = [next(iter(setup.train_stream(prepared, Mesh(2, 1, rank)).steps(prefetch=0))) for rank in range(2)]
    assert len(first) == len(same) == 2
    for one, other in zip(first, same, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
    supervised = sum(batch.supervised for share in shares for batch in share)
    assert sum(batch.supervised for batch in first) == supervised
    assert {batch.input_ids.shape for batch in first} == {(8, first[0].input_ids.shape[1])}
    numbers = sorted(set(np.concatenate([batch.row_ids[batch.segment_ids > 0] for batch in first])))
    assert numbers == list(range(16))


def test_a_mode_that_was_never_run_says_so(write_recipe, monkeypatch, capsys):
    monkeypatch.setattr("msft.train.prepare.processes", lambda: 2)
    keys = {"use_parallel": True, "parallel": {"parallel_mode": 1}, "parallel_config": {"model_parallel": 2}}
    prepared = prepare(load_recipe(write_recipe("mindspore", device="npu", **keys)))
    assert prepared.plan == Plan(tensor=2)
    assert "parallel_mode 1 was never run by msft's developers; parallel_mode 0" in capsys.readouterr().err
