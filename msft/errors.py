"""The two ways a command can fail, and the words it fails with."""

from difflib import get_close_matches


class MsftError(Exception):
    """A failure with a message for the user; the command line prints it without a traceback."""

    exit_code = 1


class InputError(MsftError):
    """What the user gave is wrong (exit code 2).

    `problems` are complete one-line messages, each saying what, where and the nearest right thing.
    """

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class RunError(MsftError):
    """A run that started well and failed (exit code 1)."""


class Stopped(KeyboardInterrupt):
    """A run that a signal has ended; `exit_code` is 128 + the signal's number, as in a shell."""

    def __init__(self, number: int):
        self.exit_code = 128 + number
        super().__init__(number)


def did_you_mean(word: str, choices) -> str:
    """Return ", did you mean 'x'?" for the choice nearest to `word`, or "" when none is near."""
    near = get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""
