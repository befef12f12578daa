"""`msft merge`: base weights plus a LoRA adapter, written as one model."""

from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_merge, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="msft merge",
        description="Add a LoRA adapter to its base model: W + alpha / rank * B A, computed in float32, streamed.",
    )
    result.add_argument("--model", required=True, type=Path, help="base model: a folder, CKPT or GGUF")
    result.add_argument(
        "--adapter", required=True, type=Path, help="PEFT folder, or MindFormers' CKPT with LoRA tensors"
    )
    result.add_argument(
        "--src_strategy_path_or_dir",
        type=Path,
        metavar="PATH",
        help="MindSpore's strategy file, or the folder of all, for --model and --adapter with rank_0, rank_1, ...",
    )
    result.add_argument("--output_path", required=True, type=Path, help="the Hugging Face folder to write, or X.ckpt")
    result.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="cast to this (default: keep the base's)")
    result.add_argument("--lora_alpha", type=float, help="alpha, for an adapter that does not say it (CKPT)")
    result.add_argument(
        "--config", type=Path, help="config.json, its folder or MindFormers' YAML, for a CKPT without one"
    )
    result.add_argument("--max_shard_size", default="5GB", help="largest file of a Hugging Face folder (default: 5GB)")
    return result


def _merge(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    from msft import console
    from msft.cli.output import byte_size, ckpt_path, folder_path, gigabytes
    from msft.convert import companions
    from msft.convert.adapter import adapter_lora, read_adapter
    from msft.convert.check import check_against
    from msft.convert.dtypes import WORDS
    from msft.convert.merged import MergedTensors
    from msft.convert.open import open_weights
    from msft.convert.rank_folder import KEY, lowest_file, ranks_in, slices_explained
    from msft.convert.weights import write_ckpt, write_hf_folder
    from msft.errors import InputError

    shard_bytes = byte_size(words.max_shard_size, "--max_shard_size")
    dtype, strategy = WORDS.get(words.dtype), words.src_strategy_path_or_dir
    of_model, of_adapter = (strategy if ranks_in(path) else None for path in (words.model, words.adapter))
    if strategy and not of_model and not of_adapter:
        raise InputError(f"--{KEY}: neither --model nor --adapter is a folder of rank_0, rank_1, ...")
    model = lowest_file(words.model) if of_model else words.model
    spec = companions.load_spec(words.config, model)
    with slices_explained(None if strategy else words.model, f"give --{KEY}"):
        base = open_weights(words.model, spec, strategy=of_model)
        check_against(spec, base)
    with slices_explained(None if strategy else words.adapter, f"give --{KEY}"):
        config, weights = read_adapter(words.adapter, spec.family, of_adapter)
        lora = adapter_lora(config, weights, str(words.adapter), words.lora_alpha)
        merged = MergedTensors(base, lora, weights, str(words.adapter), dtype, spec.block.is_transposed)
    if spec.tie_word_embeddings and spec.outside.head in lora.modules:
        raise InputError(
            f"{words.adapter}: tunes lm_head, which {words.model} shares with its embedding; cannot be merged"
        )
    if words.output_path.suffix == ".ckpt":
        size = write_ckpt(merged, spec, ckpt_path(words.output_path, "--output_path"), dtype)
    else:
        files = companions.find(words.config, model)
        size = write_hf_folder(merged, spec, folder_path(words.output_path, "--output_path"), dtype, shard_bytes, files)
    scale = f"alpha {lora.alpha:g} / rank {lora.rank}"
    console.say(f"wrote {words.output_path}: {gigabytes(size)}, {len(lora.modules)} modules merged with {scale}")
