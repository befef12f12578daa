"""The model of a rank that has the layers of one stage of a pipeline."""

from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from msft.backend import names, random, stages
from msft.backend.contract import Batch, Runtime, Tuning
from msft.backend.mindspore import distributed, ops
from msft.backend.mindspore.decoder import Trace
from msft.backend.mindspore.model import Model
from msft.models.spec import ModelSpec


class _Way(NamedTuple):
    """A micro-batch's way through the stage, and the keys of its dropout."""

    batch: Batch
    trace: Trace
    keys: np.ndarray


class StagedModel(Model):
    """A stage's layers, and what the shared engine asks of them; `tuning` is what is trained of all stages.

    Hidden states between stages are as long as the line. Only the last stage has losses and logits; the others pass
    hidden states on and return zeros.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        stages.check(spec, distributed.mesh())
        self.tuning = tuning
        super().__init__(spec, source, tuning, runtime)

    def stage_forward(self, batch: Batch, taken: Tensor | None, dropout_step: int):
        """Return the hidden states for the next stage (None: there is none), and what `stage_backward` takes.

        `taken` are those of the stage before (None: there is none).
        """
        keys = random.token_keys(self.runtime.seed, dropout_step, batch.row_ids, batch.position_ids)
        with self.decoder.mode(keys, adapter=True):
            trace = super()._forward(batch, True, taken)
        return None if self.mesh.is_last_stage else self._sent(trace.hidden), _Way(batch, trace, keys)

    def stage_backward(self, way: _Way, taken: Tensor | None, scale: float):
        """Return the summed loss, the gradient for the stage before, and those of `scale` x the loss for what is tuned.

        `taken` is the gradient of what `stage_forward` returned; the loss is 0 but at the last stage.
        """
        loss, by_head = 0.0, None
        with self.decoder.mode(way.keys, adapter=True):
            if self.mesh.is_last_stage:
                losses, taken, by_head = self._head_gradients(way.trace, way.batch, scale)
                loss = float(ops.to_numpy(losses).astype(np.float64).sum())
            gradients, given = self.decoder.backward(taken.astype(way.trace.hidden.dtype), way.trace)
        if by_head is not None:
            gradients[names.HEAD if names.HEAD in self.tuned else names.EMBEDDING] = by_head
        elif self.shares_tied and not self.mesh.is_sequence_cut:
            # The ranks of the stage have the whole one each, those of the last stage shares, and both are summed.
            gradients[names.EMBEDDING] = gradients[names.EMBEDDING] / self.mesh.tensor
        return loss, None if self.mesh.stage == 0 else self._sent(given), {name: gradients[name] for name in self.tuned}

    def exchange(self, given: Tensor | None, batch: Batch | None, ahead: bool) -> Tensor | None:
        """Give a tensor to the next stage or the one before (None: nothing); return what it gives of a micro-batch."""
        shape = None if batch is None else self.decoder.hidden_shape(batch.segment_ids, batch.is_shared)
        return distributed.exchange(given, shape, self.decoder.hidden_dtype, ahead)

    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        if self.mesh.is_last_stage:
            return super().logits(batch)
        with self.decoder.mode(None, adapter=True):
            self._pass_on(batch)
        return np.zeros((*batch.labels.shape, self.decoder.spec.vocab_size), np.float32)

    def _losses(self, batch: Batch) -> np.ndarray:
        if self.mesh.is_last_stage:
            return super()._losses(batch)
        self._pass_on(batch)
        return np.zeros(batch.supervised, np.float32)

    def _forward(self, batch: Batch, keep: bool = False, taken: Tensor | None = None) -> Trace:
        """The way of what the stage before gives now."""
        return super()._forward(batch, keep, None if self.mesh.stage == 0 else self.exchange(None, batch, False))

    def _pass_on(self, batch: Batch) -> None:
        self.exchange(self._sent(self._forward(batch).hidden), None, True)

    def _sent(self, values: Tensor) -> Tensor:
        return values.astype(self.decoder.hidden_dtype)
