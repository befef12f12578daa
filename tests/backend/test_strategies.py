"""Protects how MindSpore's semi-automatic mode is told to cut a Llama: against strategies written out by hand.

Those are what MindFormers' Llama layers set (`shard(parallel_config)`), worked out for 8 devices.
"""

from math import prod

import pytest

from msft.backend import strategies
from msft.backend.plan import Plan
from tests.conformance.tiny_engines import UNTIED, spec_of

ROWS, LENGTH = 8, 32
SIZES = {**UNTIED, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4, "num_hidden_layers": 4}
PLANS = {
    "data 2 x model 4": Plan(data=2, tensor=4, vocab_emb_dp=False),
    "model 8": Plan(tensor=8, vocab_emb_dp=False),
    "data 8": Plan(data=8),
    "2 stages of data 2 x model 2": Plan(data=2, tensor=2, pipeline=2, micro_batches=2),
    "sequence parallel": Plan(data=2, tensor=4, use_seq_parallel=True),
    "context 2": Plan(data=2, tensor=2, context=2),
}


def all_strategies(plan, spec):
    """(name, strategy, shapes of the operator's inputs) of every operator of the program."""
    tokens, hidden, vocab = ROWS * LENGTH, spec.hidden_size, spec.vocab_size
    heads, kv_heads, size = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    states, by_head = (ROWS, LENGTH, hidden), (ROWS, heads, LENGTH, size)
    keys, mask, scores = (ROWS, kv_heads, LENGTH, size), (ROWS, 1, LENGTH, LENGTH), (ROWS, heads, LENGTH, LENGTH)
    half, pair = (*by_head[:3], size // 2), ((ROWS, LENGTH, 1), (ROWS, 1, LENGTH))
    logits = (tokens, vocab)
    norm = dict.fromkeys(("square", "mean", "rsqrt"), (states,)) | {"epsilon": (states, ())}
    norm |= {"weight": (states, (hidden,)), "scale": (states, states)}
    attention = {
        "split_heads": ((ROWS, LENGTH, heads, size),),
        "merge_heads": (by_head,),
        "half": (by_head,),
        "join_halves": (half, half),
        "turn": (by_head, (ROWS, 1, LENGTH, size)),
        "add": (by_head, by_head),
        "repeat": ((ROWS, kv_heads, 1, LENGTH * size),),
        "scores": (by_head, by_head),
        "number": (by_head, ()),
        "same_segment": pair,
        "causal": ((ROWS, LENGTH, LENGTH), (1, LENGTH, LENGTH)),
        "mask": (mask, scores),
        "softmax": (scores,),
        "mix": (scores, by_head),
        "fused": (by_head, keys, keys, mask),
    }
    of_loss = dict.fromkeys(("reduce", "one_by_one"), (logits,)) | {"subtract": (logits, (tokens, 1))}
    of_loss |= {"one_hot": (logits, (), ()), "multiply": (logits, logits), "log": ((tokens,),)}
    of_loss |= {"of_tokens": ((tokens,), (tokens,)), "sum": ((tokens,),)}
    wide = (tokens, spec.intermediate_size)
    feed_forward = {"activation": (wide,), "multiply": (wide, wide)}
    groups = [
        (strategies.norm(plan), norm),
        (strategies.column(plan), linear(tokens, hidden, spec.intermediate_size)),
        (strategies.row(plan), linear(tokens, spec.intermediate_size, hidden)),
        (strategies.attention(plan), attention),
        (strategies.feed_forward(plan), feed_forward),
        (strategies.loss(plan, vocab), of_loss),
        ({"residual": strategies.residual(plan)}, {"residual": (states, states)}),
        ({"embedding": strategies.embedding(plan, vocab)}, {"embedding": ((vocab, hidden), (ROWS, LENGTH))}),
        ({"head": strategies.head(plan, vocab)}, {"head": ((tokens, hidden), (vocab, hidden))}),
    ]
    for parts, shapes in groups:
        yield from ((name, parts[name], shapes[name]) for name in parts)


def linear(tokens, inputs, outputs, rank=8):
    hidden, result = (tokens, inputs), (tokens, outputs)
    return {
        "product": (hidden, (outputs, inputs)),
        "product_output": (result,),
        "bias": (result, (outputs,)),
        "lora_a": (hidden, (rank, inputs)),
        "lora_b": ((tokens, rank), (outputs, rank)),
        "scaling": (result, ()),
        "add": (result, result),
        "key": ((tokens, 1), (inputs,)),
        "bits": (hidden, hidden),
        "number": (hidden, ()),
        "mask": (hidden, hidden),
    }


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_strategies_divide_shapes_and_devices(plan):
    for name, strategy, shapes in all_strategies(plan, spec_of(SIZES)):
        assert len(strategy) == len(shapes), name
        for parts, shape in zip(strategy, shapes, strict=True):
            assert len(parts) == len(shape), name
            assert all(length % count == 0 for count, length in zip(parts, shape, strict=True)), (name, parts, shape)
            assert plan.stage_devices % prod(parts) == 0, (name, parts)


def test_data_2_x_model_4_is_mindformers():
    plan = PLANS["data 2 x model 4"]
    assert strategies.column(plan)["product"] == ((2, 1), (4, 1))
    assert strategies.column(plan)["bias"] == ((2, 4), (4,))
    assert strategies.column(plan)["lora_a"] == ((2, 1), (1, 1))
    assert strategies.column(plan)["lora_b"] == ((2, 1), (4, 1))
    assert strategies.row(plan)["product"] == ((2, 4), (1, 4))
    assert strategies.row(plan)["lora_a"] == ((2, 4), (1, 4))
    assert strategies.row(plan)["lora_b"] == ((2, 1), (1, 1))
    assert "product_output" not in strategies.row(plan)
    attention = strategies.attention(plan)
    assert attention["split_heads"] == ((2, 1, 4, 1),)
    assert attention["scores"] == attention["mix"] == ((2, 4, 1, 1), (2, 4, 1, 1))
    assert attention["mask"] == ((2, 1, 1, 1), (2, 4, 1, 1))
    assert attention["fused"] == ((2, 4, 1, 1), (2, 4, 1, 1), (2, 4, 1, 1), (2, 1, 1, 1))
    assert strategies.feed_forward(plan)["multiply"] == ((2, 4), (2, 4))
    assert strategies.norm(plan)["weight"] == ((2, 1, 1), (1,))
    assert strategies.residual(plan) == ((2, 1, 1), (2, 1, 1))
    assert strategies.embedding(plan, 96) == ((4, 1), (2, 1))
    assert strategies.head(plan, 96) == ((2, 1), (4, 1))
    assert strategies.loss(plan, 96)["one_hot"] == ((2, 4), (), ())


def test_model_8_and_data_8_cut_one_way_alone():
    model, data = PLANS["model 8"], PLANS["data 8"]
    assert strategies.column(model)["product"] == ((1, 1), (8, 1))
    assert strategies.row(model)["product"] == ((1, 8), (1, 8))
    assert strategies.attention(model)["softmax"] == ((1, 8, 1, 1),)
    assert strategies.column(data)["product"] == ((8, 1), (1, 1)) == strategies.row(data)["product"]
    assert strategies.attention(data)["softmax"] == ((8, 1, 1, 1),)


def test_vocab_emb_dp_and_a_vocabulary_that_does_not_divide_are_left_whole():
    whole, cut = Plan(data=2, tensor=4), Plan(data=2, tensor=4, vocab_emb_dp=False)
    for plan, vocab in ((whole, 96), (cut, 98)):
        assert strategies.embedding(plan, vocab) == ((1, 1), (2, 1))
        assert strategies.head(plan, vocab) == ((2, 1), (1, 1))
    # The loss is cut wherever it can be, as in MindFormers.
    assert strategies.loss(whole, 96)["reduce"] == ((2, 4),)
    assert strategies.loss(cut, 98)["reduce"] == ((2, 1),)


def test_sequence_parallelism_deals_tokens_where_nothing_else_is_cut():
    plan = PLANS["sequence parallel"]
    assert strategies.norm(plan)["weight"] == ((2, 4, 1), (1,))
    assert strategies.residual(plan) == ((2, 4, 1), (2, 4, 1))
    assert strategies.row(plan)["product"] == ((2, 4), (1, 4))
    assert strategies.row(plan)["product_output"] == ((8, 1),)
    assert strategies.column(plan)["product"] == ((2, 1), (4, 1))
    both = Plan(data=2, tensor=2, context=2, use_seq_parallel=True)
    assert strategies.residual(both) == ((2, 2, 1), (2, 2, 1)) and "product_output" not in strategies.row(both)


def test_context_parallelism_cuts_queries_alone():
    plan = PLANS["context 2"]
    assert strategies.column(plan)["product"] == ((4, 1), (2, 1))
    assert strategies.attention(plan)["fused"] == ((2, 2, 2, 1), (2, 2, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1))


def test_stages_have_equally_many_layers():
    plan = Plan(data=1, tensor=4, pipeline=2, micro_batches=2)
    assert (plan.stage_devices, plan.devices) == (4, 8)
    assert [plan.stage_of_layer(layer, 6) for layer in range(6)] == [0, 0, 0, 1, 1, 1]


def test_every_problem_is_named():
    plan = Plan(data=3, tensor=5, pipeline=3, micro_batches=2, use_seq_parallel=True)
    found = dict(strategies.problems(plan, spec_of(SIZES), rows=8, length=32))
    assert set(found) == {"model_parallel", "data_parallel", "pipeline_stage", "use_seq_parallel", "micro_batch_num"}
    assert "num_attention_heads (8)" in found["model_parallel"] and "intermediate_size (48)" in found["model_parallel"]
    assert not [*strategies.problems(PLANS["data 2 x model 4"], spec_of(SIZES), rows=8, length=32)]
