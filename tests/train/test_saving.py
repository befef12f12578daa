"""Protects the end of a run with dealt moments: results are made of the weights alone, by the ranks of one model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from msft.backend.contract import Lora, Tuning
from msft.backend.mesh import Mesh
from msft.config.load import load_recipe
from msft.convert.adapter import read_adapter
from msft.convert.open import read_spec
from msft.models import llama
from msft.models.adapters import peft_names
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

    def write(rank, engine):
        session = SimpleNamespace(engine=engine, rank=rank, mesh=Mesh(2, 2, rank), world=4)
        return Saver(prepared, session, None, {}, {}).results()

    return write


def test_the_first_rank_writes_what_the_ranks_of_its_model_export(results, tiny_model):
    rows, columns = llama.tensor_shapes(read_spec(tiny_model))[f"{MODULE}.weight"]
    shapes = dict(zip(peft_names(MODULE), ((2, columns), (rows, 2)), strict=True))
    arrays = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
    calls = []
    # The moments are not asked for.
    engine = SimpleNamespace(export_weights=lambda: calls.append(1) or arrays, is_sharded=False)
    adapter, model = results(1, engine)
    assert model is None and not Path(adapter).exists() and calls == [1]
    adapter, _ = results(0, engine)
    _, found = read_adapter(adapter, "llama")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_ranks_with_other_rows_have_nothing_to_give(results, tmp_path):
    assert results(2, SimpleNamespace(is_sharded=False)) == (tmp_path / "adapter", None)
