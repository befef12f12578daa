"""`msft alpaca_converter`: alpaca rows -> conversations, with MindFormers' arguments and bytes."""

from collections.abc import Sequence

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_convert, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="alpaca_converter", description="Turn alpaca rows (JSON or JSON Lines) into conversations for training."
    )
    result.add_argument("--data_path", required=True, help="alpaca rows: a JSON list or JSON Lines")
    result.add_argument("--output_path", required=True, help="the JSON file to write")
    return result


def _convert(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    import os
    import time

    from msft.data.alpaca import convert_file
    from msft.data.report import Report
    from msft.errors import InputError

    if not os.path.isfile(words.data_path):
        raise InputError(f"--data_path: no file {words.data_path!r}")
    if os.path.isdir(words.output_path):
        raise InputError(f"--output_path {words.output_path!r} is a folder")
    started = time.perf_counter()
    report = Report({})
    convert_file(words.data_path, words.output_path, report)
    report.seconds = time.perf_counter() - started
    report.show(bad_rows=None)
