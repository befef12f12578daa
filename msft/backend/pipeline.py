"""In which order a stage of a pipeline computes a step's micro-batches, and passes hidden states and gradients on.

One forward, one backward (1F1B; Narayanan et al., arXiv:2006.09503): stage s of S keeps S - s micro-batches at most.
A stage and the next meet for every exchange, as both sides of a sum do. So where one gives hidden states and waits for
a gradient, the other gives that gradient and takes the hidden states, at once.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol


class Forward(NamedTuple):
    """Take micro-batch `number` through the stage's layers."""

    number: int


class Backward(NamedTuple):
    """Take the gradient of micro-batch `number` back through them."""

    number: int


class Exchange(NamedTuple):
    """Meet the next stage (`ahead`), or the one before.

    Hidden states of micro-batch `forward` go on, the gradient of `backward` goes back (None: nothing does).
    """

    ahead: bool
    forward: int | None
    backward: int | None


Action = Forward | Backward | Exchange


class Stage(Protocol):
    """What `run` drives: the computation of micro-batches by number, and the way to the neighbours."""

    def forward(self, number: int, taken: Any) -> Any:
        """Return what the next stage takes, for what the one before gave (None: the stage is the last, the first)."""

    def backward(self, number: int, taken: Any) -> Any:
        """Return the gradient that the stage before takes, for what the next one gave (None as above)."""

    def exchange(self, given: Any, taken: int | None, ahead: bool) -> Any:
        """Give something (None: nothing), and return what the neighbour gives of micro-batch `taken`."""


def schedule(stage: int, stages: int, count: int) -> Iterator[Action]:
    """Yield what a stage does, from 0, for `count` micro-batches."""
    is_first, is_last = stage == 0, stage == stages - 1
    before = min(stages - 1 - stage, count)
    for number in range(before):
        if not is_first:
            yield Exchange(False, number, None)
        yield Forward(number)
        yield Exchange(True, number, None)
    if not is_first and before < count:
        yield Exchange(False, before, None)
    for number in range(count):
        newest = number + before
        if newest < count:
            yield Forward(newest)
        if not is_last:
            yield Exchange(True, newest if newest < count else None, number)
        yield Backward(number)
        if not is_first:
            yield Exchange(False, newest + 1 if newest + 1 < count else None, number)


def run(actions: Iterable[Action], stage: Stage) -> None:
    """Do what a schedule says; what was computed is kept until it is given, what was taken until it is used."""
    hidden: dict[int, Any] = {}
    gradients: dict[int, Any] = {}
    for action in actions:
        match action:
            case Forward(number):
                hidden[number] = stage.forward(number, hidden.pop(number, None))
            case Backward(number):
                gradients[number] = stage.backward(number, gradients.pop(number, None))
            case Exchange(True, forward, backward):
                gradients[backward] = stage.exchange(hidden.pop(forward, None), backward, True)
            case Exchange(False, forward, backward):
                hidden[forward] = stage.exchange(gradients.pop(backward, None), forward, False)
