"""Question 3: the share of the machine's matrix-product rate that a LoRA step reaches."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.answer import Answer, Figure, absolute
from benchmarks.common.process import run
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import LEAVES, RANK, prepare
from benchmarks.common.settings import Settings
from benchmarks.common.training import packed_steps, train_ours
from benchmarks.lora_torch import PACKED_BATCH
from msft.backend.contract import IGNORE
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.spec import ModelSpec

QUESTION = "share of the machine's matrix-product rate"
LIMITS = {"torch": 80, "mindspore": 65}
GIGA = 1e9
PROGRAM = Path(__file__).parent / "programs" / "matrix_rate.py"
RATE = "matrix products"


def measure(settings: Settings) -> Answer:
    """Train packed rows on both engines and measure matrix products, in turns."""
    folder = settings.work / "limit"
    rows = prepare(settings.data, settings.model, settings.rows, folder)
    spec = spec_from_hf(json.loads((settings.model / "config.json").read_text()))
    cost = flops_per_token(spec, json.loads(rows.tokens.read_text()))
    variants = {RATE: partial(matrix_rates, spec)}
    for engine in LIMITS:
        words = (
            ("batch_size", PACKED_BATCH),
            ("steps", packed_steps(rows, PACKED_BATCH)),
            ("train_dataset__packing", True),
        )
        variants[engine] = partial(train_ours, engine, settings.model, rows, folder / engine, **dict(words))
    runs = interleave(variants, settings.repeats)
    best = [max(rates.values()) for rates in runs[RATE]]
    figures = [Figure(f"{RATE}, the best shape", "GFLOP/s", best)]
    verdicts = []
    for engine, limit in LIMITS.items():
        reached = [run.tokens_per_second * cost / GIGA for run in runs[engine]]
        figures.append(Figure(f"{engine} packed", "GFLOP/s", reached, [run.peak for run in runs[engine]]))
        share = 100 * figures[-1].value / figures[0].value
        verdicts.append(absolute(f"{engine} fp32, share of the best product", share, "%", limit, at_least=True))
    raw = {"matrix_products": runs[RATE], "flops_per_token": cost}
    raw |= {engine: [vars(run) for run in runs[engine]] for engine in LIMITS}
    return Answer(QUESTION, figures, verdicts, NOTES, raw)


def matrix_rates(spec: ModelSpec) -> dict[str, float]:
    """Return GFLOP/s of torch.mm for each matrix shape of the model, and for 2048 cubed."""
    shapes = {shape for shape in tensor_shapes(spec).values() if len(shape) == 2}
    words = [f"{rows}x{columns}" for rows, columns in sorted(shapes | {(2048, 2048)})]
    return json.loads(run([sys.executable, PROGRAM, *words]).out)


def flops_per_token(spec: ModelSpec, rows: Sequence[dict[str, list[int]]]) -> float:
    """Return what LoRA on q, k, v, o must compute for a real token of these rows, forward and backward, in FLOPs.

    No gradient of a frozen weight counts, and the first block's q, k and v pass none on. The head counts at
    supervised positions, attention for the causal half of each example's own square, nothing for padding. Element-wise
    work counts nothing.
    """
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    tokens = sum(lengths)
    supervised = sum(label != IGNORE for row in rows for label in row["labels"][1:])
    shapes = tensor_shapes(spec)
    modules = linear_modules(spec)
    sizes = {name: shapes[f"{name}.weight"] for name in modules if name != "lm_head"}
    frozen = sum(rows * columns for rows, columns in sizes.values())
    first = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
    backward = frozen - sum(sizes[name][0] * sizes[name][1] for name in first)
    adapters = RANK * sum(sum(shape) for name, shape in sizes.items() if name.endswith(LEAVES))
    head = spec.vocab_size * spec.hidden_size
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = spec.num_hidden_layers * 2 * pairs * spec.num_attention_heads * spec.head_dim
    # Two FLOPs a multiplication; the adapters have gradients of inputs and weights, attention's two products four.
    total = 2 * (frozen + backward + 3 * adapters) * tokens + 2 * 2 * head * supervised + 2 * 3 * attention
    return total / tokens


NOTES = [
    "FLOPs are those that LoRA must compute for real tokens: padding, recomputed and element-wise work count nothing.",
    "The limit is the best fp32 torch.mm of 2048 rows with the model's own matrices or with 2048 x 2048.",
]
