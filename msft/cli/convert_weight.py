"""`convert_weight`: model weights between Hugging Face, Meta or GGUF and MindFormers' CKPT."""

from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_convert, argv)


def parser() -> guard.Parser:
    """Return the command's parser: MindFormers' arguments, and three more."""
    result = guard.Parser(
        prog="convert_weight",
        description="Convert Hugging Face, Meta or GGUF weights to a MindSpore CKPT with MindFormers' names, or back.",
    )
    flag = {"nargs": "?", "const": True, "default": False, "type": guard.boolean}
    result.add_argument("--model", required=True, help="model family, such as llama")
    result.add_argument("--input_path", required=True, type=Path, help="a model folder, or a file in it")
    result.add_argument(
        "--output_path", required=True, type=Path, help="the CKPT, or with --reversed the folder to write"
    )
    result.add_argument(
        "--src_strategy_path_or_dir",
        type=Path,
        metavar="PATH",
        help="MindSpore's strategy file, or the folder of all, when --input_path has slices in rank_0, rank_1, ...",
    )
    result.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="cast to this (default: keep the input's)")
    result.add_argument("--reversed", **flag, metavar="BOOL", help="write a Hugging Face folder")
    result.add_argument("--qkv_concat", **flag, metavar="BOOL", help="join wq, wk, wv and w1, w3 in the CKPT")
    result.add_argument(
        "--config", type=Path, help="config.json, its folder or MindFormers' YAML, for a CKPT without one"
    )
    result.add_argument("--max_shard_size", default="5GB", help="largest file of a Hugging Face folder (default: 5GB)")
    return result


def _convert(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    from msft import console
    from msft.cli.output import byte_size, ckpt_path, folder_path, gigabytes
    from msft.convert import companions
    from msft.convert.check import check_against
    from msft.convert.dtypes import WORDS
    from msft.convert.open import open_weights, sidecar, verifying
    from msft.convert.rank_folder import KEY, lowest_file, slices_explained
    from msft.convert.weights import write_ckpt, write_hf_folder
    from msft.errors import InputError
    from msft.models.families import family, named

    asked = named(words.model).model_type
    shard_bytes = byte_size(words.max_shard_size, "--max_shard_size")
    if words.reversed and words.qkv_concat:
        raise InputError("--qkv_concat is for CKPT files; a Hugging Face folder (--reversed) has no joined tensors")
    output = (folder_path if words.reversed else ckpt_path)(words.output_path, "--output_path")
    strategy = words.src_strategy_path_or_dir
    weights = lowest_file(words.input_path) if strategy else words.input_path
    spec = companions.load_spec(words.config, weights)
    if spec.family != asked:
        raise InputError(f"{words.input_path}: is a {spec.family} model, not {words.model} (--model)")
    if words.qkv_concat and not family(spec.family).mindformers.concatenated:
        console.note(f"--qkv_concat has no effect: MindFormers has no joined tensors of another form for {spec.family}")
    dtype = WORDS.get(words.dtype)
    with verifying(words.input_path, strategy) as verified:
        with slices_explained(None if strategy else words.input_path, f"give --{KEY}"):
            source = open_weights(words.input_path, spec, verify=False, strategy=strategy)
            check_against(spec, source)
        if words.reversed:
            files = companions.find(words.config, weights)
            size = write_hf_folder(source, spec, output, dtype, shard_bytes, files, verified=verified)
            names = "".join(f", {name}" for name in files)
            console.say(f"wrote {output}: {gigabytes(size)} of weights, config.json{names}")
        else:
            size = write_ckpt(source, spec, output, dtype, words.qkv_concat, verified)
            console.say(f"wrote {output}: {gigabytes(size)}, and {sidecar(output).name}")
