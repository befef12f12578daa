"""Repeats in turns: every variant once, then every variant again, so that a slow hour hits all of them alike."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def interleave(variants: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Return the results of each variant, called `repeats` times in rounds; progress goes to stderr."""
    results: dict[str, list[Result]] = {name: [] for name in variants}
    for turn in range(repeats):
        for name, measure in variants.items():
            began = time.perf_counter()
            results[name].append(measure())
            seconds = time.perf_counter() - began
            print(f"  round {turn + 1} of {repeats}: {name} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return results
