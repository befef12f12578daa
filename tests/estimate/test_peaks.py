"""Protects the estimate of memory against reality: peaks of real steps on this machine, within 15 %.

The numbers of msft/estimate/working.py were fitted on other sizes than these, which showed two terms to be missing: the
head that oneDNN rearranges, and MindSpore's dropout.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.common.process import run
from msft.config.load import load_recipe
from msft.estimate.run import estimate

PROGRAM = Path(__file__).parent / "real_step.py"
MODEL = "model.model_config"
FLOAT32 = dict.fromkeys(("compute_dtype", "param_init_type", "softmax_compute_type", "rotary_dtype"), "float32")
ALL = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


class Case(NamedTuple):
    """A step on random weights; `rank` None is full tuning."""

    engine: str
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    rank: int | None = None
    modules: str = "q_proj|k_proj|v_proj|o_proj"
    dropout: float = 0.0
    recompute: bool = False
    micro_batches: int = 1
    tied: bool = False

    def words(self) -> list[str]:
        """The recipe's flags."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.wide, "num_layers": self.layers}
        sizes |= {"num_heads": self.heads, "n_kv_heads": self.kv_heads, "vocab_size": self.vocabulary}
        sizes |= {"seq_length": self.length, "tie_word_embeddings": self.tied, **FLOAT32}
        words = [f"{MODEL}.{key}={value}" for key, value in sizes.items()]
        words += [f"--backend={self.engine}", f"--batch_size={self.rows}", "--device=cpu", "--run_mode=train"]
        words += [f"recompute_config.recompute={self.recompute}", "optimizer.type=AdamW"]
        words.append(f"--gradient_accumulation_steps={self.micro_batches}")
        if self.rank:
            pet = {"lora_rank": self.rank, "lora_dropout": self.dropout, "target_modules": self.modules}
            words += [f"{MODEL}.pet_config.{key}={value}" for key, value in pet.items()]
        return words


#                  hidden wide heads kv layers vocab rows length
SHORT = [
    (256, 1024, 4, 2, 6, 16000, 6, 256, 16),
    (320, 896, 5, 5, 4, 24000, 3, 384, None),
]
LONG = [
    Case("torch", 256, 768, 4, 4, 12, 32000, 8, 256, 8),
    Case("torch", 576, 1536, 9, 3, 6, 49152, 2, 512, 16, ALL, 0.05, tied=True),
    Case("torch", 384, 1024, 6, 6, 10, 8000, 4, 512),
    Case("torch", 512, 1408, 8, 8, 6, 16000, 2, 1024, recompute=True),
    Case("torch", 448, 1216, 7, 7, 8, 4096, 1, 2048, 32),
    Case("torch", 320, 1280, 5, 5, 8, 32000, 4, 256, micro_batches=2),
    Case("torch", 576, 1536, 9, 3, 4, 49152, 1, 1536, tied=True),
    Case("mindspore", 256, 768, 4, 4, 12, 32000, 8, 256, 8),
    Case("mindspore", 576, 1536, 9, 3, 6, 49152, 2, 512, 16, ALL, 0.05, tied=True),
    Case("mindspore", 384, 1024, 6, 6, 10, 8000, 4, 512),
    Case("mindspore", 512, 1408, 8, 8, 6, 16000, 2, 1024, recompute=True),
    Case("mindspore", 448, 1216, 7, 7, 8, 4096, 1, 2048, 32),
    Case("mindspore", 320, 1280, 5, 5, 8, 32000, 4, 256, micro_batches=2),
    Case("mindspore", 576, 1536, 9, 3, 4, 49152, 1, 1024, tied=True),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("peaks") / "recipe.yaml"
    path.write_text("model:\n  model_config: {type: LlamaConfig}\n")
    return path


def off(recipe, case):
    """How far the estimate is from a real step's peak, 0.1 = a tenth too much."""
    peak = run([sys.executable, PROGRAM, recipe, *case.words()]).peak
    found = estimate(load_recipe(recipe, case.words()), "cpu").asked.memory.total
    print(f"{case}: measured {peak / 1e6:.0f} MB, estimate {found / 1e6:.0f} MB, {100 * (found / peak - 1):+.1f} %")
    return found / peak - 1


@pytest.mark.parametrize("sizes", SHORT, ids=["adapters", "full"])
def test_peaks_of_both_engines(recipe, sizes):
    cases = [Case(engine, *sizes) for engine in ("torch", "mindspore")]
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda case: off(recipe, case), cases))
    assert max(map(abs, errors)) < 0.15, errors


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.engine}-{case.hidden}-{case.rows}x{case.length}")
def test_peaks_of_more_sizes(recipe, case):
    assert abs(off(recipe, case)) < 0.15
