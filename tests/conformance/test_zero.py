"""Protects DeepSpeed's ZeRO: its stages train as the whole model does, and take over what one process wrote."""

import numpy as np
import pytest

from msft.config import deepspeed, derive
from msft.config.load import load_recipe
from msft.train import sliced
from tests.conformance import cut_models
from tests.conformance.test_cut_models import check_equal_to_one_process, shared_out

pytestmark = pytest.mark.deepspeed
KINDS = ("weights", "first", "second")


@pytest.fixture
def settings(write_recipe):
    """Returns a function: the runtime's settings for a stage, from a recipe of what the tiny engines do."""

    def of(stage, workers, compute="float32", **zero):
        recipe = write_recipe(
            strategy="deepspeed",
            model__compute_dtype=compute,
            runner_config={"batch_size": 4 // workers, "gradient_accumulation_steps": len(cut_models.micro_batches(0))},
            optimizer={"type": "AdamW", "learning_rate": cut_models.RATE, "weight_decay": 0.1},
            runner_wrapper={"max_grad_norm": 0.5},
            deepspeed={"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero}},
        )
        loaded = load_recipe(recipe)
        whole = deepspeed.whole(loaded, derive.model_spec(loaded), workers, "cpu")
        return {"strategy": "deepspeed", "deepspeed": whole, "max_grad_norm": 0.5}, recipe

    return of


@pytest.mark.parametrize(
    ("kind", "stage", "workers"),
    [
        ("full", 1, 2),
        ("lora", 2, 2),
        ("full", 2, 4),
        ("lora", 3, 2),
        ("tied", 3, 2),
        ("full", 3, 4),
        ("full", 3, 3),
        ("tied", 2, 3),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_stage_trains_as_the_whole_model(kind, stage, workers, recompute, settings, tmp_path):
    chosen, recipe = settings(stage, workers)
    check_equal_to_one_process("torch", kind, 1, workers, recipe, tmp_path, {**chosen, "recompute": recompute})


@pytest.mark.parametrize(("kind", "stage"), [("full", 1), ("lora", 2), ("full", 3)])
def test_moments_offloaded_to_the_host(kind, stage, settings, tmp_path):
    """DeepSpeedCPUAdam, which g++ compiles at the first run; with stage 3 the weights are offloaded too."""
    places = {"offload_optimizer": {"device": "cpu"}, **({"offload_param": {"device": "cpu"}} if stage == 3 else {})}
    chosen, recipe = settings(stage, 2, **places)
    check_equal_to_one_process("torch", kind, 1, 2, recipe, tmp_path, chosen)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sixteen_bits(kind, stage, settings, tmp_path):
    """DeepSpeed computes with bfloat16 weights, tuned ones too, and keeps float32 ones in its optimizer."""
    whole = cut_models.engine("torch", kind, compute="bfloat16", max_grad_norm=0.5)
    expected = cut_models.measure(whole, lambda one: one, gradients=False)
    np.savez(tmp_path / "start.npz", **expected)
    chosen, recipe = settings(stage, 2, compute="bfloat16")
    found, _ = shared_out("torch", kind, 1, 2, recipe, tmp_path, {**chosen, "compute": "bfloat16"})
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-2)
    assert all(array.dtype == np.float32 for name, array in found.items() if name.startswith("weights "))


def test_its_ranges_are_taken_over_to_the_bit_by_slices_and_by_mindspore(settings, tmp_path):
    """ZeRO stage 3 on two processes, then one model cut over two, then one process of the other engine."""
    chosen, recipe = settings(3, 2)
    folders = [tmp_path / name for name in ("zero", "cut")]
    for folder in folders:
        folder.mkdir()
    check_equal_to_one_process("torch", "full", 1, 2, recipe, folders[0], chosen)
    state = parts_of(folders[0] / "parts")
    np.savez(folders[1] / "start.npz", counters=np.load(folders[0] / "result.npz")["counters"], **state)
    shared_out("torch", "full", 2, 2, recipe, folders[1], {})
    one = cut_models.engine("mindspore", "full")
    one.import_state(cut_models.state(np.load(folders[1] / "start.npz")))
    taken, found = parts_of(folders[1] / "taken"), one.export_state()
    for short, arrays in zip(KINDS, (found.weights, found.first_moment, found.second_moment), strict=True):
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, state[f"{short} {name}"], err_msg=name)
            np.testing.assert_array_equal(array, taken[f"{short} {name}"], err_msg=name)


def parts_of(folder):
    """Whole arrays by the names of `measure`."""
    kinds = zip(KINDS, (sliced.Tensors(folder, kind) for kind in sliced.KINDS), strict=True)
    return {f"{short} {name}": array for short, tensors in kinds for name, array in tensors.items()}
