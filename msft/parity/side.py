"""One engine with its recipe, data and weights, ready to be observed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from msft.backend.contract import Batch, Engine, StepGradients
from msft.backend.mesh import Mesh
from msft.convert.random_weights import generator
from msft.data.batches import BatchStream
from msft.train import schedules, setup
from msft.train.prepare import Prepared
from msft.train.schedules import Schedule

# Tokens of the batch that activations and logits are compared on: 1024 x 49152 float32 logits are 200 MB.
PROBE_TOKENS = 1024
# So that an adapter, which starts at zero, takes part in the forward pass: about a tenth of a weight's effect.
AWAKE_DEVIATION = 0.02


@dataclass
class Side:
    """A run that is stopped to be looked at; `label` is its name in reports, `steps` the length of the trajectory.

    `hashes` are the SHA-256 of the tensors as they were loaded.
    """

    label: str
    prepared: Prepared
    session: setup.Session
    steps: int
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """The engine under observation."""
        return self.session.engine

    @cached_property
    def stream(self) -> BatchStream:
        """The batches of the run."""
        return setup.train_stream(self.prepared, Mesh())

    @cached_property
    def schedule(self) -> Schedule:
        """The learning rate as a function of the step."""
        return schedules.build(setup.schedule(self.prepared.recipe, self.stream))

    @cached_property
    def adapters(self) -> dict[str, np.ndarray]:
        """The adapters before the first step; every stage but the trajectory leaves the engine as it was."""
        return {name: array for name, array in self.engine.export_state().weights.items() if ".lora_" in name}

    @cached_property
    def awake_step(self) -> StepGradients:
        """What the first step would apply with adapters awake; two stages look at it, the second one drops it."""
        with self.awake():
            return self.engine.step_gradients(self.first_step)

    @cached_property
    def first_step(self) -> list[Batch]:
        """The micro-batches of the first step."""
        return next(iter(self.batches(1)))

    @property
    def probe(self) -> Batch:
        """The first rows of the first micro-batch, `PROBE_TOKENS` at most."""
        batch = self.first_step[0]
        rows = max(1, PROBE_TOKENS // batch.input_ids.shape[1])
        return replace(batch, **{name: array[:rows, :PROBE_TOKENS] for name, array in vars(batch).items()})

    def batches(self, steps: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the first `steps` steps."""
        found = self.stream.steps(prefetch=0)
        for _, micro_batches in zip(range(steps), found, strict=False):
            yield micro_batches
        found.close()

    @contextmanager
    def awake(self):
        """Give the adapters' B values from the seed inside, so that a wrong adapter shows in the forward pass."""
        if not self.adapters:
            yield
            return
        self.engine.load_adapter({name: self._woken(name, array) for name, array in self.adapters.items()})
        try:
            yield
        finally:
            self.engine.load_adapter(self.adapters)

    def _woken(self, name: str, array: np.ndarray) -> np.ndarray:
        if not name.endswith(".lora_B.weight"):
            return array
        noise = generator(self.prepared.recipe.seed, name).standard_normal(array.shape, np.float32)
        return array + np.float32(AWAKE_DEVIATION) * noise


def open_side(prepared: Prepared, label: str, steps: int) -> Side:
    """Build the engine of a prepared recipe."""
    return Side(label, prepared, setup.start(prepared), steps)
