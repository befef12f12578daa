"""Question 1: LoRA fine-tuning of SmolLM2-135M on torch against the trainers that a user would pick instead."""

from functools import partial
from pathlib import Path

from benchmarks.common.answer import Answer, Figure, Verdict, compare, compare_peaks
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import LENGTH, Rows, prepare
from benchmarks.common.settings import Settings
from benchmarks.common.training import STEPS_FILE, Training, figure, packed_steps, train_ours, train_peer
from benchmarks.peers import environments

QUESTION = "LoRA SFT on torch: real tokens/s and peak memory"
BATCH = 8
# As many real tokens as in BATCH rows of alpaca, nearly: a packed row is full.
PACKED_BATCH = 4
FP32, PACKED, BF16 = "msft fp32", "msft fp32 packed", "msft bf16 packed"
PADDED = "transformers Trainer"
PACKED_PEERS = ("TRL packing", "LLaMA-Factory packing", "LLaMA-Factory neat_packing")
BFLOAT16 = {"model__compute_dtype": "bfloat16", "model__param_init_type": "bfloat16"}


def measure(settings: Settings) -> Answer:
    """Run ours and all peers in turns on equal rows, from equal weights and an equal first adapter."""
    rows = prepare(settings.data, settings.model, settings.rows, settings.work / "lora")
    runs = interleave(ours(settings, rows) | peers(settings, rows), settings.repeats)
    figures = {name: figure(name, repeats) for name, repeats in runs.items()}
    raw = {name: [vars(run) for run in repeats] for name, repeats in runs.items()}
    return Answer(QUESTION, list(figures.values()), verdicts(figures), NOTES, raw)


def ours(settings: Settings, rows: Rows) -> dict[str, partial[Training]]:
    """Return our three runs."""
    # Packed runs see the same rows in fewer steps.
    padded = partial(train_ours, "torch", settings.model, rows, batch_size=BATCH, steps=steps(settings))
    packed = partial(train_ours, "torch", settings.model, rows, batch_size=PACKED_BATCH, train_dataset__packing=True)
    packed = partial(packed, steps=packed_steps(rows, PACKED_BATCH))
    folder = settings.work / "lora"
    return {
        FP32: partial(padded, folder=folder / "fp32"),
        PACKED: partial(packed, folder=folder / "packed"),
        BF16: partial(packed, folder=folder / "bf16", **BFLOAT16),
    }


def peers(settings: Settings, rows: Rows) -> dict[str, partial[Training]]:
    """Return the peers' runs; LLaMA-Factory tokenises the rows itself, with the same template."""
    trl, factory = environments.python("trl"), environments.python("llamafactory")
    model, adapter, folder = settings.model.resolve(), rows.adapter, settings.work / "lora" / "peers"
    few, padded, packed = rows.tokens, (BATCH, steps(settings)), (PACKED_BATCH, packed_steps(rows, PACKED_BATCH))
    # Rows of 512 predicted tokens have 513.
    long = LENGTH + 1

    def peer(python: Path, script: str, name: str, data: Path, *words) -> partial[Training]:
        return partial(train_peer, python, script, folder / name, model, data, adapter, STEPS_FILE, *words)

    return {
        PADDED: peer(trl, "hf_trainer.py", "trainer", few, *padded, 0),
        "transformers Trainer, padded to 512": peer(trl, "hf_trainer.py", "trainer-512", few, *padded, long),
        "TRL": peer(trl, "trl_sft.py", "trl", few, *padded, long, "padded", "fp32"),
        "TRL packing": peer(trl, "trl_sft.py", "trl-packing", few, *packed, long, "packed", "fp32"),
        "TRL packing, bf16 and checkpointing": peer(
            trl, "trl_sft.py", "trl-defaults", few, *packed, long, "packed", "defaults"
        ),
        "LLaMA-Factory": peer(factory, "llamafactory_sft.py", "factory", rows.alpaca, *padded, long, "padded"),
        "LLaMA-Factory packing": peer(
            factory, "llamafactory_sft.py", "factory-packing", rows.alpaca, *packed, LENGTH, "packing"
        ),
        "LLaMA-Factory neat_packing": peer(
            factory, "llamafactory_sft.py", "factory-neat", rows.alpaca, *packed, LENGTH, "neat_packing"
        ),
    }


def steps(settings: Settings) -> int:
    """Return the steps of an unpacked run."""
    return settings.rows // BATCH


def verdicts(figures: dict[str, Figure]) -> list[Verdict]:
    """Return the issue's four bars."""
    padded = figures[PADDED]
    best = max((figures[name] for name in PACKED_PEERS), key=lambda figure: figure.value)
    return [
        compare("fp32 packed against the padded Trainer", figures[PACKED], padded, 3.0, True),
        compare(f"fp32 packed against the best packed peer ({best.name})", figures[PACKED], best, 1.3, True),
        compare("bf16 packed against the padded fp32 Trainer", figures[BF16], padded, 6.0, True),
        compare_peaks("peak memory, fp32 packed against the padded Trainer", figures[PACKED], padded, 0.5),
    ]


NOTES = [
    "The Trainer of the bars has batches of 8 padded to their longest row, which is what its users get.",
    "The packed peers are the fp32 ones without recomputation; TRL's own defaults (bf16, recomputation) stand beside.",
    "LLaMA-Factory's `packing` lets packed examples see each other, its `neat_packing` and TRL's packing do not.",
]
