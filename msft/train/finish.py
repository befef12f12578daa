"""The end of a training run: loss curve, summary, and the line that says what to do next."""

import shlex
from pathlib import Path

from msft import console
from msft.convert.hf_folder import weights_file
from msft.convert.rank_folder import KEY
from msft.data.tokenizer_files import has_tokenizer
from msft.data.turn_formats import is_turn_format
from msft.files import write_json
from msft.train import datasets, health, outputs, plot, tensorboard
from msft.train.loop import Progress
from msft.train.metrics import read_log
from msft.train.prepare import Prepared
from msft.train.reporter import clock_time
from msft.train.setup import Session, parameter_counts


def finish(
    prepared: Prepared,
    session: Session,
    progress: Progress,
    start: int,
    data: dict,
    adapter: Path | None,
    model: Path | None,
) -> None:
    """Write `training_loss.png` and `train_summary.json`, and tell what came out; called on the first rank.

    `start` is the step that the run began at, `data` the stream's report, `adapter` and `model` what was written.
    """
    with outputs.writable(prepared.output_dir):
        records = read_log(prepared.output_dir / outputs.LOG)
        if plot.installed() and records:
            plot.save_loss_curve(records, prepared.output_dir / outputs.CURVE)
        summary = _summary(prepared, session, progress, start, data, records)
        write_json(prepared.output_dir / outputs.SUMMARY, summary)
    _tell(prepared, summary, adapter, model)
    console.say(f"next: {next_command(prepared, adapter, model)}")


def _summary(
    prepared: Prepared, session: Session, progress: Progress, start: int, data: dict, records: list[dict]
) -> dict:
    steps = [record for record in records if "loss" in record and record["step"] > start]
    evals = [record for record in records if "eval_loss" in record]
    losses = [record["loss"] for record in steps if record["loss"] is not None]
    seconds = sum(record["seconds"] for record in steps)
    tokens = sum(record["tokens"] for record in steps)
    total, tuned = parameter_counts(prepared.spec, prepared.tuning)
    return {
        "steps": progress.step,
        "resumed_from": start or None,
        "skipped": progress.skipped,
        "epochs": steps[-1]["epoch"] if steps else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "loss_spikes": health.spikes(records),
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "perplexity": evals[-1]["perplexity"] if evals else None,
        "tokens": progress.tokens,
        "supervised_tokens": sum(record["supervised"] for record in steps),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "parameters": total,
        "tuned_parameters": tuned,
        "data": data,
        "applied": session.engine.describe(),
        "processes": session.world,
    }


def _tell(prepared: Prepared, summary: dict, adapter: Path | None, model: Path | None) -> None:
    output_dir = prepared.output_dir
    if summary["first_loss"] is not None:
        console.say(
            f"done: {summary['steps']} steps in {clock_time(summary['seconds'])}, loss {summary['first_loss']:.4f} -> "
            f"{summary['last_loss']:.4f}, {summary['tokens_per_second']:.0f} tokens/s"
        )
    if summary["skipped"]:
        why = "loss or gradients were not finite"
        console.warn(f"{summary['skipped']} of {summary['steps']} steps were skipped ({why})")
    if summary["loss_spikes"]:
        console.warn(f"the loss jumped at steps {', '.join(map(str, summary['loss_spikes']))}")
    silent = summary["data"]["unsupervised_rows"]
    if silent:
        console.warn(f"{silent} rows had no supervised token, so nothing was learned from them")
    absent = [name for name, module in (("matplotlib", plot), ("tensorboard", tensorboard)) if not module.installed()]
    if absent:
        missing = {"matplotlib": outputs.CURVE, "tensorboard": "TensorBoard events"}
        what = " and ".join(missing[name] for name in absent)
        console.note(f"not written: {what} (pip install {' '.join(absent)})")
    written = [str(path) for path in (adapter, model, output_dir / outputs.LOG) if path]
    console.say(f"written: {', '.join(written)}")


def next_command(prepared: Prepared, adapter: Path | None, model: Path | None) -> str:
    """Return the command that uses what was trained: generate where a Hugging Face folder is at hand, else merge."""
    base, strategy = model or prepared.weights.path, prepared.recipe.src_strategy_path_or_dir
    words = ["msft", "generate", "--model", str(base)]
    if adapter and not (base.is_dir() and weights_file(base)):
        block = prepared.recipe.model
        config = prepared.output_dir / outputs.RECIPE if block.config else block.pretrained
        words = ["msft", "merge", "--model", str(base), "--adapter", str(adapter), "--config", str(config)]
        if strategy and base == Path(prepared.recipe.load_checkpoint):
            words += [f"--{KEY}", strategy]
        return shlex.join([*words, "--output_path", str(prepared.output_dir / "merged")])
    if adapter:
        words += ["--adapter", str(adapter)]
    if not has_tokenizer(base):
        words += ["--tokenizer", prepared.recipe.processor.tokenizer.vocab_file or "TOKENIZER"]
    template = datasets.recorded_template(prepared.recipe.train_dataset)
    if template and is_turn_format(template):
        words += ["--template", template]
    return shlex.join([*words, "--backend", prepared.recipe.backend, "--prompt", "..."])
