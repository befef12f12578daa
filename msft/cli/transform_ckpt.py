"""`msft transform_ckpt`: a checkpoint rewritten for another layout of processes."""

import re
from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_transform, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="msft transform_ckpt",
        description="Write a checkpoint as the parts of another layout of processes, one tensor in memory at a time. "
        "It need not be done before a run: every run reads the checkpoints of every layout. The stages of a pipeline "
        "need no parts of their own: each reads its layers of any.",
    )
    result.add_argument("--src", required=True, type=Path, help="the checkpoint, a folder step-N")
    result.add_argument("--dst", required=True, type=Path, help="the folder to write")
    result.add_argument(
        "--dst_layout",
        required=True,
        metavar="DxT",
        help="data_parallel x model_parallel, such as 4x2; 1x1 is one file",
    )
    result.add_argument(
        "--vocab_emb_dp",
        choices=("True", "False"),
        default="True",
        help="False: embedding and head are cut by model_parallel too (default: True)",
    )
    return result


def _transform(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    from msft import console
    from msft.cli.output import gigabytes
    from msft.errors import InputError
    from msft.train.transform import transform

    layout = re.fullmatch(r"([1-9]\d{0,3})[x*]([1-9]\d{0,3})", words.dst_layout)
    if not layout:
        raise InputError(f"--dst_layout: {words.dst_layout!r} is not data_parallel x model_parallel, such as 4x2")
    data, tensor = map(int, layout.groups())
    size = transform(words.src, words.dst, data, tensor, vocabulary=words.vocab_emb_dp == "False")
    console.say(f"wrote {words.dst}: the parts of {data * tensor} processes, {gigabytes(size)}")
