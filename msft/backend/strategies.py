"""How MindSpore's semi-automatic mode cuts a Llama: for each operator, into how many parts each axis of its inputs.

The strategies are those that MindFormers' Llama layers set for its `parallel_config`. Hidden states are [rows, length,
hidden] in norms and sums and [tokens, features] in matrix products. What is not cut is computed on every device.
"""

from collections.abc import Iterator

from msft.backend import slices
from msft.backend.plan import Plan
from msft.models.spec import ModelSpec

# One tuple for each input of an operator: into how many parts each of its axes is cut; () is a number.
Strategy = tuple[tuple[int, ...], ...]


def hidden_states(plan: Plan) -> tuple[int, int, int]:
    """Return the parts of hidden states [rows, length, hidden] where they are normed and summed."""
    # As in MindFormers, where context parallelism cuts the tokens already and wins.
    sequence = plan.tensor if plan.use_seq_parallel and plan.context == 1 else plan.context
    return plan.data, sequence, 1


def norm(plan: Plan) -> dict[str, Strategy]:
    """Return the strategies of RMSNorm's operators."""
    parts = hidden_states(plan)
    return {
        "square": (parts,),
        "mean": (parts,),
        "epsilon": (parts, ()),
        "rsqrt": (parts,),
        "scale": (parts, parts),
        "weight": (parts, (1,)),
    }


def column(plan: Plan) -> dict[str, Strategy]:
    """Return the strategies of a module that is cut by its outputs (q, k, v, gate, up), and of its adapter."""
    return _linear(plan.data * plan.context, inputs=1, outputs=plan.tensor)


def row(plan: Plan) -> dict[str, Strategy]:
    """Return the strategies of a module that is cut by its inputs (o, down), and of its adapter.

    With `use_seq_parallel` the product's output is dealt by tokens ("product_output") instead of being whole.
    """
    found = _linear(plan.data * plan.context, inputs=plan.tensor, outputs=1)
    if not plan.use_seq_parallel or plan.context > 1:
        return found
    tokens = plan.data * plan.tensor
    summed = {"bias": ((tokens, 1), (1,)), "add": ((tokens, 1), (tokens, 1)), "product_output": ((tokens, 1),)}
    return {**found, **summed}


def _linear(tokens: int, inputs: int, outputs: int) -> dict[str, Strategy]:
    hidden, result = (tokens, inputs), (tokens, outputs)
    return {
        "product": (hidden, (outputs, inputs)),
        "bias": (result, (outputs,)),
        "lora_a": (hidden, (1, inputs)),
        "lora_b": ((tokens, 1), (outputs, 1)),
        "scaling": (result, ()),
        "add": (result, result),
        "key": ((tokens, 1), (inputs,)),
        "bits": (hidden, hidden),
        "number": (hidden, ()),
        "mask": (hidden, hidden),
    }


def attention(plan: Plan) -> dict[str, Strategy]:
    """Return the strategies of what turns, weighs and mixes heads [rows, heads, length, size].

    Queries are cut by tokens under context parallelism, keys and values are then whole.
    """
    data, tensor, context = plan.data, plan.tensor, plan.context
    heads, whole, mask = (data, tensor, context, 1), (data, tensor, 1, 1), (data, 1, context, 1)
    return {
        "split_heads": ((data, context, tensor, 1),),
        "merge_heads": (heads,),
        "half": (heads,),
        "join_halves": (heads, heads),
        "turn": (heads, mask),
        "add": (heads, heads),
        "repeat": (whole,),
        "scores": (heads, whole),
        "number": (heads, ()),
        "same_segment": ((data, context, 1), (data, 1, 1)),
        "causal": ((data, context, 1), (1, context, 1)),
        "mask": (mask, heads),
        "softmax": (heads,),
        "mix": (heads, whole),
        "fused": (heads, whole, whole, mask),
    }


def feed_forward(plan: Plan) -> dict[str, Strategy]:
    """Return the strategies of SwiGLU between its modules, [tokens, intermediate]."""
    parts = (plan.data * plan.context, plan.tensor)
    return {"activation": (parts,), "multiply": (parts, parts)}


def residual(plan: Plan) -> Strategy:
    """Return the strategy of the sum of hidden states and what a block's half adds to them."""
    parts = hidden_states(plan)
    return parts, parts


def embedding(plan: Plan, vocab_size: int) -> Strategy:
    """Return the strategy of looking up (table, ids [rows, length])."""
    if plan.cuts_vocabulary(vocab_size):
        return (plan.tensor * plan.context, 1), (plan.data, 1)
    return (1, 1), (plan.data, plan.context)


def head(plan: Plan, vocab_size: int) -> Strategy:
    """Return the strategy of the product (hidden [tokens, hidden], weight [vocabulary, hidden])."""
    return (plan.data * plan.context, 1), (plan.tensor if plan.cuts_vocabulary(vocab_size) else 1, 1)


def loss(plan: Plan, vocab_size: int) -> dict[str, Strategy]:
    """Return the strategies of the cross-entropy of logits [tokens, vocabulary], which the loss cuts where it can."""
    tokens = plan.data * plan.context
    vocabulary = plan.tensor if vocab_size % plan.tensor == 0 else 1
    logits = (tokens, vocabulary)
    return {
        "reduce": (logits,),
        "subtract": (logits, (tokens, 1)),
        "one_by_one": (logits,),
        "one_hot": (logits, (), ()),
        "multiply": (logits, logits),
        "log": ((tokens,),),
        "of_tokens": ((tokens,), (tokens,)),
        "sum": ((tokens,),),
    }


def problems(plan: Plan, spec: ModelSpec, rows: int, length: int) -> Iterator[tuple[str, str]]:
    """Yield (key of `parallel_config`, what it does not divide) for a micro-batch of `rows` x `length` of all devices.

    The vocabulary is no problem: it is left whole where it does not divide.
    """
    if found := slices.undivided(spec, plan.tensor, vocabulary=False):
        yield "model_parallel", f"{plan.tensor} parts do not divide {', '.join(found)}"
    yield from _undivided("data_parallel", plan.data, {"rows of a micro-batch": rows})
    yield from _undivided("context_parallel", plan.context, {"seq_length": length})
    yield from _undivided("pipeline_stage", plan.pipeline, {"num_hidden_layers": spec.num_hidden_layers})
    if plan.use_seq_parallel and plan.context == 1:
        yield from _undivided("use_seq_parallel", plan.tensor, {"seq_length": length})
    if plan.micro_batches < plan.pipeline:
        short = f"{plan.micro_batches} micro-batches keep fewer than pipeline_stage {plan.pipeline} stages busy"
        yield "micro_batch_num", short


def _undivided(key: str, parts: int, counts: dict[str, int]) -> Iterator[tuple[str, str]]:
    found = ", ".join(f"{name} ({count})" for name, count in counts.items() if count % parts)
    if found:
        yield key, f"{parts} parts do not divide {found}"
