"""Protects what an estimate counts: parameters, bytes and FLOPs of well-known models, worked by hand or published."""

from pathlib import Path

import pytest

from msft.backend.contract import Lora, Tuning
from msft.config import derive
from msft.config.load import load_recipe
from msft.estimate import gathered
from msft.estimate.layout import Layout
from msft.estimate.memory import memory, stage_weights
from msft.estimate.sizes import sizes_of, work_of
from msft.estimate.speed import flops
from msft.models.families import spec_from_hf
from msft.models.shapes import tensor_shapes
from msft.models.sizes import config_of
from msft.models.sizes import published as published_size
from tests.estimate import published

CONFIGS = Path(__file__).parents[2] / "configs" / "llama2"
GIGA = 1e9


def sized(name, *words, kind="npu"):
    recipe = load_recipe(CONFIGS / f"{name}.yaml", words)
    spec = derive.model_spec(recipe)
    return sizes_of(spec, derive.tuning(recipe, spec)), work_of(recipe, kind)


@pytest.mark.parametrize(
    ("name", "parameters"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)]
)
def test_the_parameters_of_llama_2_are_those_that_meta_published(name, parameters):
    sizes, _ = sized(f"finetune_llama2_{name}")
    assert sizes.parameters == sizes.tuned == parameters


@pytest.mark.parametrize(
    ("family", "size", "active"),
    [("mixtral", "8x7b", 46_702_792_704 - 6 * 32 * 3 * 4096 * 14336), ("qwen3_moe", "30b-a3b", 3_353_032_704)],
)
def test_a_token_meets_as_many_parameters_as_the_releases_say(family, size, active):
    """12.9 and 3.35 billion: experts that a token does not have cost no products."""
    spec = spec_from_hf(config_of(family, published_size(family, size)))
    sizes = sizes_of(spec, Tuning(tuple(tensor_shapes(spec))))
    assert sizes.parameters - sizes.idle.all == active and sizes.idle.tuned == sizes.idle.all
    experts = spec.experts
    assert sizes.wide == experts.chosen * experts.width and sizes.routed == 1


def test_adapters_of_llama_2_7b():
    sizes, _ = sized("lora_llama2_7b")
    # q, k, v and o of 32 layers, each A 16 x 4096 and B 4096 x 16.
    assert sizes.tuned == sizes.adapters == 32 * 4 * 16 * 2 * 4096 == 16_777_216
    assert sizes.parameters == 6_738_415_616 + 16_777_216
    # Tensor parallelism splits the B of q, k and v, and the A of o.
    assert sizes.split_adapters == 16_777_216 / 2
    assert (sizes.keeps_normed, sizes.keeps_mixed, sizes.keeps_wide_normed, sizes.keeps_gated) == (1, 1, 0, 0)


def test_tuning_of_some_layers_keeps_the_inputs_of_those_alone():
    sizes, _ = sized("lora_llama2_7b")
    modules = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")
    few = sizes_of(sizes.spec, Tuning(("lm_head.weight",), Lora(8, 16.0, 0.0, modules)))
    assert (few.keeps_normed, few.keeps_mixed, few.keeps_gated) == (1 / 32, 0, 1 / 32)
    assert few.adapters == 8 * (4096 + 11008 + 4 * 4096) and few.ranks == 3 * 8
    assert few.tuned == few.adapters + 32000 * 4096 and few.head_tuned


def test_bytes_of_llama_2_7b_in_full_and_with_adapters():
    # Full tuning: float32 weights, gradients and two moments, 16 bytes a parameter.
    sizes, work = sized("finetune_llama2_7b")
    weights = stage_weights(sizes, work, Layout(), 0)
    assert weights.frozen == 0 and weights.tuned == 4 * 6_738_415_616
    found = memory(sizes, work._replace(recompute=True), Layout())
    assert found.tuned + found.moments == 12 * 6_738_415_616
    assert found.gradients == 4 * 6_738_415_616 and found.moment in ("the first block's way back", "the optimizer")
    # Adapters: frozen weights in 16 bits are the 13.48 GB that the checkpoint has.
    sizes, work = sized("lora_llama2_7b", "model.model_config.param_init_type=bfloat16")
    found = memory(sizes, work, Layout())
    assert found.frozen == 2 * 6_738_415_616 and found.frozen / GIGA == pytest.approx(13.48, abs=0.01)
    assert found.tuned + found.moments == 12 * 16_777_216


def test_a_layout_shares_weights_and_moments_out():
    sizes, work = sized("finetune_llama2_7b")
    matrices, embedding, norms = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096, 64 * 4096
    first = stage_weights(sizes, work, Layout(tensor=4, pipeline=2), 0)
    assert first.tuned == 4 * (matrices / 2 / 4 + norms / 2 + embedding / 4)
    last = stage_weights(sizes, work, Layout(tensor=4, pipeline=2), 1)
    assert last.tuned == 4 * (matrices / 2 / 4 + norms / 2 + 4096 + embedding / 4)
    whole = stage_weights(sizes, work, Layout(tensor=4, pipeline=2, whole_embedding=True), 0)
    assert whole.tuned - first.tuned == 4 * embedding * 3 / 4
    dealt = memory(sizes, work, Layout(data=8, optimizer_sharding=True))
    assert (dealt.tuned, dealt.moments) == (4 * 6_738_415_616, 6_738_415_616)
    sharded = memory(sizes, work, Layout(data=8, optimizer_sharding=True, weights_sharded=True))
    assert (sharded.tuned, sharded.moments) == ((4 / 8 + 2) * 6_738_415_616, 6_738_415_616)


def test_fsdp_divides_what_slices_leave():
    """Full 7B in bfloat16, whose tuned weights are float32, and adapters beside bfloat16 weights, over 8 devices."""
    sizes, work = sized("finetune_llama2_7b", "--backend=torch")
    whole, block, vocabulary = 6_738_415_616, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 2 * 32000 * 4096
    found = memory(sizes, work, Layout(data=8, fully_sharded=True))
    assert (found.tuned, found.moments) == (4 * whole / 8, 8 * whole / 8)
    # Embedding, head and last norm stay whole on the way; a block, the next one twice, its gradient twice.
    at_loss, on_way, at_end = gathered.whole(sizes, work, Layout(data=8, fully_sharded=True))
    assert at_loss == 4 * (vocabulary + 4096)
    assert on_way - at_loss == pytest.approx(5 * 4 * block)
    assert at_end - on_way == 4 * vocabulary
    # Norms are in every slice.
    norms, slices = 65 * 4096, Layout(data=4, tensor=2, fully_sharded=True)
    assert memory(sizes, work, slices).moments == 8 * ((whole - norms) / 2 + norms) / 4
    sizes, work = sized("lora_llama2_7b", "--backend=torch", "model.model_config.param_init_type=bfloat16")
    dealt = memory(sizes, work, Layout(data=8, fully_sharded=True))
    assert (dealt.frozen, dealt.moments) == (2 * whole / 8, 8 * 16_777_216 / 8)
    assert dealt.total < memory(sizes, work, Layout(data=8)).total


def test_flops_of_a_token_are_those_of_llm_foundrys_utilisation():
    # It computes 4.595e14 FLOP/s from 10643 tokens/s of MPT 7B in rows of 2048, whole squares of attention included.
    (figure,) = (figure for figure in published.H100 if figure.name == "MPT 7b")
    recipe = load_recipe(published.CONFIGS / figure.recipe, figure.words)
    spec = derive.model_spec(recipe)
    found = flops(sizes_of(spec, derive.tuning(recipe, spec)), work_of(recipe, "cuda"))
    other_half = 3 * 2 * 2 * spec.num_hidden_layers * spec.hidden_size * 2048 / 2
    assert found.needed + other_half == pytest.approx(4.595096e14 / 10643, rel=0.01)


def test_adapters_cost_two_thirds_of_full_tuning():
    full, work = sized("finetune_llama2_7b", "model.model_config.seq_length=64")
    adapted, _ = sized("lora_llama2_7b", "model.model_config.seq_length=64")
    assert flops(adapted, work).needed / flops(full, work).needed == pytest.approx(2 / 3, rel=0.01)
    assert flops(full, work).needed == pytest.approx(6 * 6_607_343_616, rel=0.005)  # without the embedding
