"""Everything a command says to its user: plain lines and progress bars, on the first rank only."""

import os
import sys


def is_first_rank() -> bool:
    """Whether this process speaks for the job (torchrun sets RANK, msrun sets RANK_ID)."""
    return os.environ.get("RANK", os.environ.get("RANK_ID", "0")) == "0"


def say(text: str) -> None:
    """Print one line of result to standard output."""
    if is_first_rank():
        print(text, flush=True)


def note(text: str) -> None:
    """Print one line about what is going on to standard error."""
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print one line about something the user should look at to standard error."""
    note(f"warning: {text}")


def show(*tables) -> None:
    """Print rich tables to standard output, 120 columns wide where that is no terminal."""
    from rich.console import Console

    if is_first_rank():
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in tables:
            console.print(table)


def progress(*columns, bar_width: int = 40):
    """Return a rich Progress on standard error with a bar (in characters), a count, the time left and `columns`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not is_first_rank(),
    )


def track(items, total: int, description: str):
    """Yield `items` while a progress bar on standard error counts them."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)
