"""`msft llama_preprocess`: conversations or running text -> MindRecord, with MindFormers' arguments."""

from collections.abc import Sequence

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_preprocess, argv)


def parser() -> guard.Parser:
    """Return the command's parser: MindFormers' arguments, `--template`, `--num_workers` and `--overwrite`."""
    result = guard.Parser(
        prog="llama_preprocess",
        description="Tokenize conversations (qa) or running text (wiki, wikipedia) into a MindRecord file.",
    )
    add = result.add_argument
    add("--dataset_type", choices=("qa", "wiki", "wikipedia"), default="wiki", help="what the files hold")
    add("--input_glob", required=True, help="the input: a file or a pattern; wikipedia: also a folder of parquet files")
    add("--model_file", required=True, help="a sentencepiece model, or a Hugging Face tokenizer folder")
    add("--output_file", required=True, help="the MindRecord file; the report goes to OUTPUT_FILE.report.json")
    add("--seq_length", type=int, default=2048, help="rows have one token more (default: 2048)")
    add(
        "--template",
        help="qa: chat (the tokenizer's own; default where it has one), a FastChat name (msft list), "
        "llama_factory:NAME or firefly:NAME",
    )
    add(
        "--decoder_start_id",
        type=int,
        help="qa: rows for an encoder-decoder that starts with this token (default: what the config.json beside "
        "--model_file says, none for other models)",
    )
    add("--file_partition", type=int, default=1, help="number of files to write (default: 1)")
    add("--repeat", type=int, default=1, help="wiki: how often the text is repeated (default: 1)")
    add("--samples_num", type=int, default=10000, help="wikipedia: number of rows to write (default: 10000)")
    add("--tokenizer", choices=("llama",), default="llama", help="accepted as in MindFormers; --model_file decides")
    add("--num_workers", type=int, help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="make an output anew that is there already, made from the same")
    return result


def _preprocess(argv: Sequence[str]) -> None:
    words = vars(parser().parse_args(argv))
    from msft.data.preprocess import Options, preprocess

    names = Options.__dataclass_fields__.keys()
    preprocess(Options(**{name: value for name, value in words.items() if name in names and value is not None}))
