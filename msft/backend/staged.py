"""The shared engine where a model's layers are dealt to the stages of a pipeline."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from msft.backend import names, pipeline, stages
from msft.backend.contract import Batch, Sampling, StepGradients
from msft.backend.engine import FrameworkEngine
from msft.errors import RunError
from msft.models.shapes import tensor_shapes


class StagedEngine(FrameworkEngine):
    """Every rank of a model makes each call; losses are known at the last stage, whole tensors everywhere."""

    def step_gradients(self, micro_batches: Sequence[Batch]) -> StepGradients:
        """See `contract.Engine.step_gradients`."""
        found = super().step_gradients(micro_batches)
        losses = self._of_last(np.array(found.losses, np.float32))
        return replace(found, losses=tuple(losses.tolist()))

    def _computed(self, micro_batches: Sequence[Batch], scale: float) -> tuple[list[float], dict | None]:
        step = _Step(self.model, list(filter(self._computes, micro_batches)), scale, self.step, self._add)
        pipeline.run(pipeline.schedule(self.mesh.stage, self.mesh.pipeline, len(step.batches)), step)
        losses = iter(step.losses)
        return [next(losses) if self._computes(batch) else 0.0 for batch in micro_batches], step.gradients

    def _add(self, left: dict | None, right: dict) -> dict:
        return self.optimizer.add(left, right) if left else right

    def _over_ranks(self, gradients: dict) -> dict:
        gradients = super()._over_ranks(gradients)
        # Last, because sums of two are equal on both: their embeddings must not drift apart.
        if self._spec.tie_word_embeddings and names.EMBEDDING in gradients:
            gradients |= self.distributed.sum_ends({names.EMBEDDING: gradients[names.EMBEDDING]})
        return gradients

    @property
    def _spec(self):
        return self.model.decoder.spec

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return stages.tuned_shapes(self._spec, self.model.tuning)

    def _whole(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._from_stages(super()._whole(arrays), self._shapes())

    def _from_stages(self, arrays: dict[str, np.ndarray], shapes: dict) -> dict[str, np.ndarray]:
        """The arrays that some stage has, of these shapes."""
        own = {name: array for name, array in arrays.items() if name != names.EMBEDDING or self.mesh.stage == 0}
        return self.distributed.join_stages(own, shapes)

    def export_weights(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """See `contract.Engine.export_weights`."""
        shapes, held = self._shapes(), self.model.tuned_shapes()
        chosen = list(shapes if names is None else names)
        own = self.model.export_tuned([name for name in chosen if name in held])
        return self._from_stages(self.distributed.join(own), {name: shapes[name] for name in chosen})

    def export_adapter(self) -> dict[str, np.ndarray]:
        """See `contract.Engine.export_adapter`."""
        return self.export_weights([name for name in self._shapes() if ".lora_" in name])

    def _parameter(self, name: str, dtype: str) -> np.ndarray:
        shapes = tensor_shapes(self._spec)
        shape = self._shapes().get(name) or shapes.get(name) or shapes[names.EMBEDDING]
        own = {name: self.model.parameter(name, dtype)} if stages.is_own(name, self._spec, self.mesh) else {}
        return self._from_stages(self.distributed.join(own), {name: shape})[name]

    def token_logprobs(self, batch: Batch, adapter: bool = True) -> np.ndarray:
        """See `contract.Engine.token_logprobs`."""
        return self._of_last(super().token_logprobs(batch, adapter))

    def logits(self, batch: Batch) -> np.ndarray:
        """See `contract.Engine.logits`."""
        return self._of_last(super().logits(batch))

    def _of_last(self, values: np.ndarray) -> np.ndarray:
        """What the last stage has found; the others' values are zeros."""
        return self.distributed.join_stages({"": values}, {"": values.shape})[""]

    def is_head_tied(self) -> bool:
        """See `contract.Engine.is_head_tied`."""
        return self._spec.tie_word_embeddings

    def decayed(self) -> tuple[str, ...]:
        """See `contract.Engine.decayed`."""
        every = self.optimizer.settings.decay_norms_and_biases
        return tuple(name for name in self._shapes() if every or not names.is_norm_or_bias(name))

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `contract.Engine.gradients`."""
        raise _needs_whole("gradients of one batch are")

    def activations(self, batch: Batch, adapter: bool = True) -> dict[str, np.ndarray]:
        """See `contract.Engine.activations`."""
        raise _needs_whole("hidden states are shown")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token=None) -> list[list[int]]:
        """See `contract.Engine.generate`."""
        raise _needs_whole("text is generated")


def _needs_whole(what: str) -> RunError:
    return RunError(f"{what} by a model that is whole: run it with pipeline_stage 1")


class _Step:
    """A step's micro-batches on their way through this rank's stage: see `pipeline.Stage`."""

    def __init__(self, model, batches: list[Batch], scale: float, dropout_step: int, add: Callable):
        self.model, self.batches, self.scale, self.dropout_step, self.add = model, batches, scale, dropout_step, add
        self.ways: dict[int, Any] = {}
        self.losses = [0.0] * len(batches)
        self.gradients: dict | None = None

    def forward(self, number: int, taken: Any) -> Any:
        output, self.ways[number] = self.model.stage_forward(self.batches[number], taken, self.dropout_step)
        return output

    def backward(self, number: int, taken: Any) -> Any:
        self.losses[number], given, new = self.model.stage_backward(self.ways.pop(number), taken, self.scale)
        self.gradients = self.add(self.gradients, new)
        return given

    def exchange(self, given: Any, taken: int | None, ahead: bool) -> Any:
        return self.model.exchange(given, None if taken is None else self.batches[taken], ahead)
