"""What one side saw in one stage: the unit that is compared, written into a golden folder and read back."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from msft.parity.fingerprint import Fingerprint, fingerprint

STAGES = ("recipe", "data", "weights", "forward", "loss", "backward", "step", "trajectory", "generation")

# Elements of a stage that are kept whole for the other side (1 GiB of float32); above, fingerprints are compared.
KEPT_ELEMENTS = 2**28


@dataclass
class Observation:
    """Named things in the order in which they come about; the first that differs is the one that is reported.

    `facts` (JSON values) must be equal and `numbers` equal up to rounding. `arrays` are compared as the stage says,
    whole or by fingerprint. `checks` are errors that this side shows by itself, against a formula (0 = exact).
    `notes` are told and not compared.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray | Fingerprint] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def reduced(self) -> "Observation":
        """Return this with fingerprints in the place of whole arrays."""
        prints = {name: fingerprint(array) for name, array in self.arrays.items()}
        return Observation(self.facts, self.numbers, self.checks, prints, self.notes)

    def bounded(self) -> "Observation":
        """Return this, reduced when it holds more than `KEPT_ELEMENTS`."""
        return self.reduced() if sum(array.size for array in self.arrays.values()) > KEPT_ELEMENTS else self


def leads_of(answer: str) -> str:
    """Return the name of the note that holds how far ahead of the second best each token of an answer was."""
    return f"leads of {answer}"
