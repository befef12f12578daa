"""Learning rates and sizes that a recipe implies must be the ones MindFormers derives from it."""

import json

import pytest

from msft.models.llama import hf_config_from_mindformers
from msft.train import schedules

pytestmark = pytest.mark.mindformers

PEAK, STEPS = 3e-4, 30
BLOCKS = [
    {"type": "CosineWithWarmUpLR", "warmup_steps": 0, "total_steps": 20},
    {"type": "CosineWithWarmUpLR", "warmup_steps": 7, "total_steps": 25, "lr_end": 1e-5},
    {"type": "CosineWithWarmUpLR", "warmup_ratio": 0.23, "total_steps": 30, "num_cycles": 1.5},
    {"type": "CosineWithWarmUpLR", "warmup_ratio": 0.03, "total_steps": 30, "warmup_lr_init": 1e-5},
    {"type": "LinearWithWarmUpLR", "warmup_steps": 4, "total_steps": 24},
    {"type": "LinearWithWarmUpLR", "warmup_ratio": 0.5, "total_steps": 28, "warmup_lr_init": 2e-5},
    {"type": "ConstantWarmUpLR", "warmup_steps": 5},
]
FFN = [(h, m, f) for h in (8, 24, 40, 64, 136) for m in (1, 4, 16, 256) for f in (None, 1.0, 1.1, 1.3, 2.0)]


@pytest.fixture(scope="module")
def derived(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formulas")
    blocks = [{"learning_rate": PEAK, **block} for block in BLOCKS]
    (folder / "cases.json").write_text(json.dumps({"schedules": blocks, "steps": STEPS, "ffn": FFN}))
    oracle("formulas.py", folder / "cases.json", folder / "out.json")
    return json.loads((folder / "out.json").read_text())


def ours(block: dict) -> schedules.Schedule:
    total = block.get("total_steps", 0)
    warmup = schedules.warmup_length(total, block.get("warmup_ratio"), block.get("warmup_steps"))
    after = {
        "CosineWithWarmUpLR": lambda: schedules.cosine(
            PEAK, total, warmup, block.get("lr_end", 0.0), block.get("num_cycles", 0.5)
        ),
        "LinearWithWarmUpLR": lambda: schedules.linear(PEAK, total, warmup),
        "ConstantWarmUpLR": lambda: schedules.constant(PEAK),
    }[block["type"]]()
    return schedules.with_warmup(after, PEAK, warmup, block.get("warmup_lr_init", 0.0))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_step_has_mindformers_learning_rate(derived, number):
    schedule = ours(BLOCKS[number])
    # MindFormers computes in float32: near the end of a cosine 1 + cos() keeps only the absolute precision.
    assert [schedule(step) for step in range(STEPS)] == pytest.approx(derived["schedules"][number], rel=1e-5, abs=1e-10)


def test_feed_forward_sizes_are_mindformers(derived):
    sizes = [
        hf_config_from_mindformers({"hidden_size": h, "num_heads": 2, "multiple_of": m, "ffn_dim_multiplier": f})
        for h, m, f in FFN
    ]
    assert [size["intermediate_size"] for size in sizes] == derived["ffn"]
