"""Published training speeds, tokens a second and device, that each device's efficiency is fitted on.

MindFormers: docs/model_cards/llama2.md on Atlas 800T A2, of its releases 1.0 (rows of 2048 tokens) and 1.2 (4096); the
layouts are those of its recipes, which configs/llama2 repeats. LLM Foundry: scripts/train/benchmarking/README.md,
"A100 80GB" and "H100 80GB BF16", fully sharded data parallelism. MPT's feed-forward layer has two matrices of 4 x
hidden instead of Llama's three, so that 8/3 x hidden stands for it; its head is the embedding.

`python -m tests.estimate.published` prints the fit and the errors.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from msft.config import derive
from msft.config.load import load_recipe
from msft.estimate.devices import DEVICES, Device
from msft.estimate.layout import layout_of, on_devices
from msft.estimate.sizes import sizes_of, work_of
from msft.estimate.speed import speed

CONFIGS = Path(__file__).parents[2] / "configs" / "llama2"


class Figure(NamedTuple):
    """A published speed, and the words that make the recipe of it."""

    name: str
    tokens: float
    recipe: str
    devices: int
    words: tuple[str, ...] = ()


def _mindformers(name: str, tokens: float, length: int, devices: int = 8) -> Figure:
    words = (f"model.model_config.seq_length={length}",)
    return Figure(f"{name}, rows of {length}", tokens, f"{name}.yaml", devices, words)


MINDFORMERS = [
    _mindformers("lora_llama2_7b", 4269, 2048),
    _mindformers("lora_llama2_13b", 2275, 2048),
    _mindformers("finetune_llama2_7b", 3523, 2048),
    _mindformers("finetune_llama2_13b", 1575, 2048),
    _mindformers("finetune_llama2_70b", 414, 4096, 64),
    _mindformers("lora_llama2_7b", 5217, 4096),
    _mindformers("lora_llama2_13b", 2322, 4096),
    _mindformers("finetune_llama2_7b", 4820, 4096),
    _mindformers("finetune_llama2_13b", 1883, 4096),
]

MPT = {"1b": (2048, 24, 16), "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40)}
MPT |= {"30b": (7168, 48, 56), "70b": (8192, 80, 64)}


def _mpt(size: str, tokens: float, rows: int, micro_batches: int, recompute: bool, devices: int = 8) -> Figure:
    hidden, layers, heads = MPT[size]
    model = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "vocab_size": 50432, "seq_length": 2048}
    model |= {"intermediate_size": 8 * hidden // 3 // 64 * 64, "tie_word_embeddings": True}
    model |= {"compute_dtype": "bfloat16", "param_init_type": "bfloat16"}
    words = [f"model.model_config.{key}={value}" for key, value in model.items()]
    words += [f"--batch_size={rows}", f"--gradient_accumulation_steps={micro_batches}", "--backend=torch"]
    words += [f"recompute_config.recompute={recompute}", f"parallel_config.data_parallel={devices}"]
    return Figure(f"MPT {size}", tokens, "finetune_llama2_7b.yaml", devices, tuple(words))


A100 = [
    _mpt("1b", 20513, 14, 4, False),
    _mpt("3b", 10811, 10, 2, False),
    _mpt("7b", 4641, 6, 2, False),
    _mpt("13b", 2262, 2, 3, False),
    _mpt("30b", 916, 3, 21, True),
    _mpt("70b", 410, 8, 4, True, 64),
]
H100 = [
    _mpt("1b", 45455, 14, 1, False),
    _mpt("3b", 24142, 10, 3, False, 16),
    _mpt("7b", 10643, 6, 1, False),
    _mpt("13b", 4792, 2, 1, False),
    _mpt("30b", 2002, 3, 21, True),
    _mpt("70b", 1039, 8, 4, True, 64),
]
FIGURES = {"ascend910b": MINDFORMERS, "a100": A100, "h100": H100}


@cache
def _prepared(figure: Figure, kind: str):
    recipe = load_recipe(CONFIGS / figure.recipe, figure.words)
    spec = derive.model_spec(recipe)
    layout = on_devices(recipe, layout_of(recipe), figure.devices, spec)
    # Both frameworks deal out weights and gradients with the optimizer's state.
    layout = layout._replace(weights_sharded=layout.optimizer_sharding, reduce_scatters=True)
    return sizes_of(spec, derive.tuning(recipe, spec)), work_of(recipe, kind), layout


def errors(device: Device) -> dict[str, float]:
    """Return how far off the estimate of each figure is, 0.1 = a tenth too fast."""
    return {
        figure.name: speed(*_prepared(figure, device.kind), device).tokens / figure.tokens - 1
        for figure in FIGURES[device.name]
    }


def fitted(name: str) -> float:
    """Return the efficiency with which the errors of a device's figures cancel (in logarithms)."""
    low, high = 0.01, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        found = errors(DEVICES[name]._replace(efficiency=middle))
        bias = sum(math.log1p(error) for error in found.values())
        low, high = (middle, high) if bias < 0 else (low, middle)
    return middle


if __name__ == "__main__":
    for name, figures in FIGURES.items():
        print(f"{name}: fitted {fitted(name):.3f}, set {DEVICES[name].efficiency}")
        found = errors(DEVICES[name])
        for figure in figures:
            print(f"  {figure.name:40} published {figure.tokens:6}, estimate {100 * found[figure.name]:+.0f} %")
