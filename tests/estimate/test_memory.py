"""Protects the estimate of memory against nonsense: it grows with what it must, and layouts make it smaller."""

from dataclasses import replace

import pytest

from msft.config import derive
from msft.config.load import load_recipe
from msft.estimate.layout import Layout
from msft.estimate.memory import memory
from msft.estimate.sizes import sizes_of, work_of
from tests.estimate.test_sizes import CONFIGS, sized

KINDS = [("cpu", "torch"), ("cpu", "mindspore"), ("npu", "mindspore"), ("cuda", "torch")]
FLOAT32 = ("model.model_config.compute_dtype=float32", "model.model_config.param_init_type=float32")
SMALL = ("model.model_config.hidden_size=512", "model.model_config.num_heads=8", "model.model_config.num_layers=4")
SPEC_AXES = {"num_hidden_layers": (1, 2, 8, 32), "vocab_size": (1000, 32000, 128000), "intermediate_size": (512, 4096)}
# Torch takes another kind of attention from 513 tokens on.
WORK_AXES = {"rows": (1, 2, 5, 64), "length": (64, 128, 500)}


@pytest.mark.parametrize(("kind", "backend"), KINDS)
@pytest.mark.parametrize("name", ["lora_llama2_7b", "finetune_llama2_7b"])
def test_more_of_anything_needs_more(kind, backend, name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml", (f"--backend={backend}", *FLOAT32, *SMALL))
    spec, work = derive.model_spec(recipe), work_of(recipe, kind)._replace(rows=32, length=256)

    def total(spec, work, layout=Layout()):  # noqa: B008
        return memory(sizes_of(spec, derive.tuning(recipe, spec)), work, layout).total

    for recompute in (False, True):
        base = work._replace(recompute=recompute)
        for key, values in SPEC_AXES.items():
            grows([total(replace(spec, **{key: value}), base) for value in values])
        for key, values in WORK_AXES.items():
            grows([total(spec, base._replace(**{key: value})) for value in values])
        grows([total(spec, base._replace(length=length)) for length in (600, 1024, 4096)])
        assert total(spec, base) <= total(spec, base, Layout(micro_batches=2))


def grows(values):
    assert values == sorted(values) and values[-1] > values[0], values


@pytest.mark.parametrize(("kind", "backend"), [("npu", "mindspore"), ("cuda", "torch")])
@pytest.mark.parametrize("name", ["lora_llama2_7b", "finetune_llama2_7b"])
def test_splitting_needs_less_on_a_device(kind, backend, name):
    sizes, work = sized(name, f"--backend={backend}", kind=kind)
    plain = memory(sizes, work, Layout(data=8)).total
    assert memory(sizes, work, Layout(data=8, optimizer_sharding=True)).total <= plain
    for tensor in (2, 4, 8):
        assert memory(sizes, work, Layout(8 // tensor, tensor)).total < plain
        less = memory(sizes, work, Layout(8 // tensor, tensor, sequence_parallel=True)).total
        assert less <= memory(sizes, work, Layout(8 // tensor, tensor)).total
    assert memory(sizes, work, Layout(4, 1, 2, micro_batches=1)).total < plain
    assert memory(sizes, work._replace(recompute=True), Layout(data=8)).total <= plain


@pytest.mark.parametrize(("kind", "backend"), KINDS)
def test_devices_that_share_rows_keep_their_part_of_the_activations(kind, backend):
    """Half of what blocks keep on two devices, a quarter on four; beside it keys and values of the whole rows."""
    sizes, work = sized("lora_llama2_7b", f"--backend={backend}", *FLOAT32, kind=kind)
    for length in (4096, 16384):
        whole = work._replace(rows=1, length=length)
        alone = memory(sizes, whole, Layout())
        for parts in (2, 4):
            dealt = memory(sizes, whole._replace(parts=parts), Layout(context=parts))
            assert dealt.activations == pytest.approx(alone.activations / parts, rel=0.03)
            assert alone.working / parts < dealt.working and dealt.total < alone.total


def test_parts_add_up_and_a_pipelines_first_stage_holds_more_micro_batches():
    sizes, work = sized("lora_llama2_70b")
    few = memory(sizes, work, Layout(2, 4, 8, True, 2, True))
    many = memory(sizes, work, Layout(2, 4, 8, True, 128, True))
    assert many.activations == 4 * few.activations
    assert many.total == sum(value for name, value in many._asdict().items() if name != "moment")
