"""Protects the end of a run whose processes hold parts: results are made of the weights alone, one tensor at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from msft.backend.contract import Lora, Tuning
from msft.backend.mesh import Mesh
from msft.config.load import load_recipe
from msft.convert.adapter import read_adapter
from msft.convert.open import read_spec
from msft.models.adapters import peft_names
from msft.models.shapes import tensor_shapes
from msft.train.saving import Saver

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def results(write_recipe, tiny_model, tmp_path):
    """A function of a rank and an engine that writes a run's results to tmp_path."""
    weights = SimpleNamespace(path=tiny_model, base=None)
    prepared = SimpleNamespace(
        recipe=load_recipe(write_recipe()),
        output_dir=tmp_path,
        tuning=Tuning(lora=Lora(2, 4.0, 0.0, (MODULE,))),
        weights=weights,
        spec=read_spec(tiny_model),
    )

    def write(rank, engine, sums=None, mesh=None):
        distributed = SimpleNamespace(sum_numbers=sums)
        mesh = mesh or Mesh(2, 2, rank)
        session = SimpleNamespace(engine=engine, rank=rank, mesh=mesh, world=4, distributed=distributed)
        return Saver(prepared, session, None, {}, {}).results()

    return write


def test_the_first_rank_writes_what_the_ranks_gather_one_tensor_at_a_time(results, tiny_model):
    rows, columns = tensor_shapes(read_spec(tiny_model))[f"{MODULE}.weight"]
    shapes = dict(zip(peft_names(MODULE), ((2, columns), (rows, 2)), strict=True))
    arrays = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
    asked = []

    def export_weights(names):
        asked.append(names)
        return {name: arrays[name] for name in names}

    # The moments are not asked for.
    def engine():
        return SimpleNamespace(export_weights=export_weights, tuned_shapes=lambda: shapes, is_sharded=False)

    barrier, said, rank_of = threading.Barrier(4, timeout=20), [0.0] * 4, threading.local()

    def sums(numbers):
        said[rank_of.value] = numbers[0]
        barrier.wait()
        total = sum(said)
        barrier.wait()
        return [total]

    def write(rank):
        rank_of.value = rank
        return results(rank, engine(), sums)

    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write, range(4)))
    assert {model for _, model in written} == {None}
    assert all(len(names) == 1 for names in asked)
    _, found = read_adapter(written[0][0], "llama")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_processes_that_hold_no_parts_give_nothing_beside_the_first(results, tmp_path):
    """Each has the whole model: the first one's will do."""
    engine = SimpleNamespace(is_sharded=False)
    assert results(2, engine, mesh=Mesh(4, 1, 2)) == (tmp_path / "adapter", None)
