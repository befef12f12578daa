"""Protects memory where the optimizer's state is dealt out: updated rows are gathered a bucket at a time."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from msft.backend.buckets import BUCKET
from msft.backend.contract import Optimizer
from msft.backend.mesh import Mesh

SHAPES = {"a": (3, 2), "b": (4,), "large": (BUCKET // 8, 9), "c": (5, 3)}


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_rows_are_gathered_a_bucket_at_a_time(backend, monkeypatch):
    """One process, whose rows are all; 'large' is larger than a bucket."""
    distributed, framework = (import_module(name) for name in (f"msft.backend.{backend}.distributed", backend))
    make = framework.from_numpy if backend == "torch" else framework.Tensor
    sums = []
    monkeypatch.setattr(distributed, "_summed", lambda tensors, group: sums.append([*tensors]) or tensors)
    arrays = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors = {name: make(array) for name, array in arrays.items()}
    gathered = distributed.gather_rows(tensors, tensors)
    assert next(gathered)[0] == "a" and sums == [["a", "b"]]
    rest = dict(gathered)
    assert sums == [["a", "b"], ["large"], ["c"]]
    for name, whole in rest.items():
        np.testing.assert_array_equal(np.asarray(whole), arrays[name])


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_ranks_without_rows_of_a_tensor_take_part(backend, monkeypatch):
    """Two rows for four ranks: what each gives is summed to the whole."""
    distributed, framework = (import_module(name) for name in (f"msft.backend.{backend}.distributed", backend))
    make = framework.from_numpy if backend == "torch" else framework.Tensor
    monkeypatch.setattr(distributed, "_summed", lambda tensors, group: tensors)
    array, total = np.arange(1, 7, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32)
    for rank in range(4):
        mesh = Mesh(data=4, rank=rank)
        monkeypatch.setattr(distributed, "_joined", SimpleNamespace(mesh=mesh, replicas=None))
        own = array[mesh.rows(2)]
        given = dict(distributed.gather_rows({"a": make(own)} if len(own) else {}, {"a": make(array)}))
        total += np.asarray(given["a"])
    np.testing.assert_array_equal(total, array)


def test_mindspore_takes_moments_over_without_making_tensors_of_whole_ones(monkeypatch):
    """Its tensors' memory is kept until all are there; of four ranks this one keeps a row of 'a', and none of 'b'."""
    from msft.backend.mindspore import distributed, optimizer

    arrays = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones((1, 3), np.float32)}
    monkeypatch.setattr(distributed, "_joined", SimpleNamespace(mesh=Mesh(data=4, rank=2), replicas=None))
    model = SimpleNamespace(tuned={name: optimizer.Tensor(array) for name, array in arrays.items()})
    adamw = optimizer.AdamW(model, Optimizer(), shard=True)
    made, tensor = [], optimizer.Tensor
    monkeypatch.setattr(optimizer, "Tensor", lambda array: made.append(array.shape) or tensor(array))
    adamw.load(arrays, {name: array + 1 for name, array in arrays.items()}, 7)
    assert made == [(1, 3), (1, 3)] and adamw.step == 7
    np.testing.assert_array_equal(adamw.first["a"].asnumpy(), arrays["a"][2:3])
    np.testing.assert_array_equal(adamw.second["a"].asnumpy(), arrays["a"][2:3] + 1)
    assert adamw.first.keys() == adamw.second.keys() == {"a"}


def test_every_group_of_ranks_waits_equally_long(monkeypatch):
    """NCCL's default for a group of its own is 10 minutes, in which the first rank may not have written a model."""
    from msft.backend.torch import distributed

    waits = []
    monkeypatch.setattr(distributed.group, "init_process_group", lambda backend, timeout: waits.append(timeout))
    monkeypatch.setattr(distributed.group, "new_group", lambda ranks, timeout: waits.append(timeout))
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 4))
    monkeypatch.setattr(distributed, "_joined", type(distributed._joined)())
    monkeypatch.setenv("RANK", "1")
    assert distributed.initialize("cpu", 2) == (1, 4)
    assert waits == [distributed.WAIT] * 5
