"""The engine of `parallel_mode: 1`: the shared one, whose steps are one program that MindSpore cuts.

Every process feeds the whole batch. Written for Ascend, where it was never run; in one process on CPU it is the
shared engine's equal.
"""

from collections.abc import Sequence

import mindspore
import numpy as np

from msft.backend import cuts
from msft.backend.contract import Batch, OnToken, Place, Runtime, Sampling, StepResult, Tuning
from msft.backend.engine import FrameworkEngine
from msft.backend.mesh import Mesh
from msft.backend.mindspore import distributed
from msft.backend.mindspore.generation import Session
from msft.backend.mindspore.whole_model import WholeModel
from msft.backend.mindspore.whole_step import WholeAdamW
from msft.errors import RunError
from msft.models.spec import ModelSpec


class _OneProgram:
    """What the shared engine asks of `distributed`, where MindSpore sums gradients and processes have equal rows."""

    sum_numbers = staticmethod(distributed.sum_numbers)

    @staticmethod
    def mesh() -> Mesh:
        return Mesh()

    @staticmethod
    def sum_gradients(gradients: dict, partial) -> dict:
        return gradients

    @staticmethod
    def join(arrays: dict) -> dict:
        return arrays


class WholeEngine(FrameworkEngine):
    """Implements `contract.Engine`; between steps each process holds the slices that MindSpore gave it."""

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `contract.Engine.train_step`."""
        scale, supervised = self.scaler.value, sum(batch.supervised for batch in micro_batches)
        if supervised == 0:
            raise RunError(f"step {self.step + 1}: no token of the batch is supervised, so there is no loss")
        weighed, norm = self.optimizer.take(micro_batches, scale / supervised, scale, self.step, learning_rate)
        # The last stage alone knows the loss.
        loss = self.distributed.sum_numbers([weighed])[0] / scale
        finite = bool(np.isfinite(norm) and np.isfinite(loss))
        self.optimizer.step += finite
        self.scaler.update(not finite)
        self.step += 1
        return StepResult(loss, supervised, norm, not finite, scale)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[int]]:
        """Raises RunError: there is no program of it."""
        raise RunError("text is generated with parallel_mode 0")

    def _places(self) -> dict[str, Place]:
        """What this process gives of the tuned tensors, so that all give each number once."""
        plan, rank, found = self.model.plan, distributed.rank_and_world()[0], self.optimizer.cuts()
        if plan.devices == 1:
            shapes = self.model.tuned_shapes()
            return {name: Place(shape, (0,) * len(shape), shape) for name, shape in shapes.items()}
        if not found:
            raise RunError("MindSpore cuts the model in the first step, before which there is nothing to save")
        given = {name: cuts.given(plan, rank, name, found[parameter.name]) for name, parameter in self._held(found)}
        return {name: place for name, place in given.items() if place is not None}

    def _held(self, found: dict) -> list:
        """The tuned tensors that this process's stage has."""
        return [(name, parameter) for name, parameter in self.model.tuned.items() if parameter.name in found]

    def _whole(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whole tensors for slices, by a sum over all processes, each of which gives its places; all call it."""
        if self.model.plan.devices == 1:
            return arrays
        places, found = self._places(), {}
        for name, shape in self.model.whole_shapes.items():
            if name in arrays:
                flat = mindspore.Tensor(cuts.placed(arrays[name], places.get(name), shape).reshape(-1))
                found[name] = distributed.reduce(flat).asnumpy().reshape(shape)
        return found

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.model.whole_shapes


def build(spec: ModelSpec, source, tuning: Tuning, runtime: Runtime) -> WholeEngine:
    """Return an engine whose steps are one program for the runtime's plan; the device is set already."""
    if runtime.plan.devices > 1:
        mindspore.set_auto_parallel_context(**cuts.context(runtime.plan, distributed.rank_and_world()[0]))
    model = WholeModel(spec, source, tuning, runtime, runtime.plan)
    optimizer = WholeAdamW(model, runtime.optimizer, runtime.max_grad_norm)
    return WholeEngine(model, optimizer, _OneProgram, Session, runtime)
