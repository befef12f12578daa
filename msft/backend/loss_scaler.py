"""Dynamic loss scaling for float16, as a small state machine on plain numbers."""

from msft.backend.contract import LossScale

SMALLEST = 2.0**-14
LARGEST = 2.0**24


class LossScaler:
    """Holds the current scale; `update` is called once a step with whether the gradients overflowed."""

    def __init__(self, settings: LossScale):
        self.settings = settings
        self.value = settings.initial
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        """Shrink the scale after an overflow, grow it after `window` good steps in a row."""
        if not self.settings.window:
            return
        if overflow:
            self.value = max(self.value / self.settings.factor, SMALLEST)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.settings.window:
            self.value = max(self.value, min(self.value * self.settings.factor, LARGEST))
            self.good_steps = 0
