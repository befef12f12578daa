"""The frame around every command: parsing, error messages, exit codes."""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from msft.errors import MsftError, Stopped, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, knows `--debug` and names the nearest option."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            message += did_you_mean(unknown[1].split("=")[0], options)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def boolean(word: str) -> bool:
    """Read a boolean as MindFormers' flags write it: True, False, true, 1, no ..."""
    if word.lower() in ("true", "1", "yes", "on"):
        return True
    if word.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is not a boolean (True or False)")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Call `command` with its words; print a failure as one message and return the exit code.

    0 = done, 1 = a failed run, 2 = bad input, 130 = interrupted, 143 = ended by SIGTERM. `--debug` among the words adds
    the traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return command(argv) or 0
    except MsftError as error:
        _report(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}", argv)
        return error.exit_code
    except Stopped as stopped:
        _report("interrupted", argv)
        return stopped.exit_code
    except KeyboardInterrupt:
        _report("interrupted", argv)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        _report(f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)", argv)
        return 1


def _report(message: str, argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
