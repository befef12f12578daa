"""A tiny model that can be cut into two or four, or sharded, and what is measured of it, whole or shared out."""

from dataclasses import replace

import numpy as np

from msft.backend import names
from msft.backend.contract import IGNORE, EngineState, Lora, Precision, Tuning
from msft.models.shapes import linear_modules
from tests.conformance.tiny_engines import RUNTIME, TIED, UNTIED, batch, build, full, spec_of

LAYERS = {"num_hidden_layers": 4}
CONFIG = {**UNTIED, **LAYERS, "num_key_value_heads": 4}
TIED_CONFIG = {**TIED, **LAYERS}
RATE = 1e-2
MODULES = tuple(linear_modules(spec_of(CONFIG)))
# Families whose layers differ from Llama's in what can be cut all the same: biases, windows, norms of heads.
FAMILIES = {
    "mistral": {**TIED, **LAYERS, "model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 7},
    "qwen2": {
        **TIED,
        **LAYERS,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    },
    "qwen3": {**TIED, **LAYERS, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
}
# One rank of a model adds these.
BIASES = tuple(name for name in full(CONFIG).parameters if name.endswith("o_proj.bias"))
SOME = tuple(
    name
    for name in full(TIED_CONFIG).parameters
    if name == names.EMBEDDING or "norm" in name or name.startswith("model.layers.1.")
)
TUNINGS = {
    "lora": Tuning(lora=Lora(4, 8.0, 0.1, MODULES)),
    "full": full(CONFIG),
    "tied": full(TIED_CONFIG),
    "bias": Tuning(BIASES),
    # Of a tied model: adapters beside what is whole on each rank, and beside a layer whose weights are tuned too.
    "both": Tuning(SOME, Lora(4, 8.0, 0.1, MODULES)),
    **{name: full(config) for name, config in FAMILIES.items()},
    **{f"{name} lora": Tuning(lora=Lora(4, 8.0, 0.1, MODULES)) for name in FAMILIES},
}


def engine(backend, kind, compute="float32", **settings):
    """An engine of a kind of tuning, computing in a dtype, with settings of `Runtime`."""
    # So large an epsilon that AdamW makes no step of a gradient that is rounding alone.
    precision, optimizer = Precision(parameters=compute, compute=compute), replace(RUNTIME.optimizer, eps=1e-5)
    runtime = replace(RUNTIME, precision=precision, optimizer=optimizer, **settings)
    config = TIED_CONFIG if kind in ("tied", "both") else FAMILIES.get(kind.removesuffix(" lora"), CONFIG)
    return build(backend, config, TUNINGS[kind], runtime)


def micro_batches(step, staged=False):
    """Three of four rows each, with unequal numbers of labels: one example a row, two a row, three tokens in all.

    For a model in stages two more, of which one has no label.
    """
    one, two, few = (batch(3 * step + part, rows=4) for part in range(3))
    none = replace(one, labels=np.full_like(one.labels, IGNORE))
    return [one, _halved(two), _shortened(few), *([none, batch(100 + step, rows=4)] if staged else [])]


def _halved(whole):
    """A batch whose rows are of two examples each, the first of eight tokens."""
    behind = (np.arange(whole.labels.shape[1]) >= 8) & (whole.segment_ids > 0)
    positions = whole.position_ids - 8 * behind
    labels = np.where(np.arange(whole.labels.shape[1]) == 7, -100, whole.labels)
    found = {"labels": labels, "position_ids": positions, "segment_ids": whole.segment_ids + behind}
    found["row_ids"] = 2 * whole.row_ids + behind
    return replace(whole, **{name: array.astype(np.int32) for name, array in found.items()})


def _shortened(whole):
    """A batch of three tokens in its first row and nothing else: too few for a chunk to each of four processes."""
    real = np.zeros_like(whole.segment_ids)
    real[0, :3] = 1
    labels = np.where(real, whole.input_ids, -100).astype(np.int32)
    return replace(whole, input_ids=whole.input_ids * real, labels=labels, segment_ids=real)


def measure(engine, rows_of, gradients=True, staged=False):
    """Losses, norms, gradients and weights of some steps; `rows_of` a batch gives those that this process has."""
    steps = [[rows_of(whole) for whole in micro_batches(step, staged)] for step in range(3)]
    found = engine.step_gradients(steps[0]).gradients if gradients else {}
    taken = [engine.train_step(parts, RATE) for parts in steps]
    state = engine.export_state()
    kinds = {"weights": state.weights, "first": state.first_moment, "second": state.second_moment}
    return {
        "losses": np.array([(result.loss, result.grad_norm, result.supervised) for result in taken]),
        "logits": engine.logits(batch(7, rows=2)),
        **(_shown_by_stages(engine) if staged else {}),
        "counters": np.array(list(state.counters.values())),
        **{f"gradients {name}": array for name, array in found.items()},
        **{f"{kind} {name}": array for kind, arrays in kinds.items() for name, array in arrays.items()},
    }


def _shown_by_stages(engine):
    """What the stages of a model show as one."""
    found = {"logprobs": engine.token_logprobs(batch(8, rows=3), adapter=not engine.model.has_adapter)}
    found |= {f"adapter {name}": array for name, array in engine.export_adapter().items()}
    found |= {f"parameter {name} {dtype}": array for name, array, dtype in engine.parameters()}
    return found | {"decayed": np.array(engine.decayed()), "tuned": np.array(engine.tuned_names())}


def state(results):
    """The state at the end of `measure`, from its results."""

    def of(kind):
        return {name.split(" ", 1)[1]: results[name] for name in results if name.startswith(f"{kind} ")}

    counters = dict(zip(("step", "optimizer_step", "loss_scale", "good_steps"), results["counters"], strict=True))
    return EngineState(of("weights"), of("first"), of("second"), counters)
