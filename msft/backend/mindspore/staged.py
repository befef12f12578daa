"""The model of a rank that has the layers of one stage of a pipeline."""

from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from msft.backend import line, names, random, stages
from msft.backend.contract import Batch, Runtime, Tuning
from msft.backend.mindspore import distributed, ops
from msft.backend.mindspore.decoder import Trace, by_position
from msft.backend.mindspore.model import Model
from msft.models.spec import ModelSpec


class _Way(NamedTuple):
    """A micro-batch's way through the stage, and the keys of its dropout."""

    batch: Batch
    trace: Trace
    keys: np.ndarray


class StagedModel(Model):
    """A stage's layers, and what the shared engine asks of them; `tuning` is what is trained of all stages.

    Hidden states between stages are [length of the line, hidden]. Only the last stage has losses and logits; the
    others pass hidden states on and return zeros.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        self.mesh, self.tuning = distributed.mesh(), tuning
        stages.check(spec, self.mesh)
        super().__init__(spec, source, tuning, runtime)

    def stage_forward(self, batch: Batch, taken: Tensor | None, dropout_step: int):
        """Return the hidden states for the next stage (None: there is none), and what `stage_backward` takes.

        `taken` are those of the stage before (None: there is none).
        """
        keys = random.token_keys(self.runtime.seed, dropout_step, batch.row_ids, batch.position_ids)
        with self.decoder.mode(keys, adapter=True):
            trace = self._through(batch, taken, keep=True)
        given = None if self.mesh.is_last_stage else trace.hidden.astype(self.decoder.hidden_dtype)
        return given, _Way(batch, trace, keys)

    def stage_backward(self, way: _Way, taken: Tensor | None, scale: float):
        """Return the summed loss, the gradient for the stage before, and those of `scale` x the loss for what is tuned.

        `taken` is the gradient of what `stage_forward` returned; the loss is 0 but at the last stage.
        """
        loss, by_head = 0.0, None
        with self.decoder.mode(way.keys, adapter=True):
            if self.mesh.is_last_stage:
                summed, taken, by_head = self._head_gradients(way.trace, way.batch, scale)
                loss = float(ops.to_numpy(summed).astype(np.float64).sum())
            gradients, given = self.decoder.backward(taken.astype(way.trace.hidden.dtype), way.trace)
        if by_head is not None:
            gradients[names.HEAD if names.HEAD in self.tuned else names.EMBEDDING] = by_head
        given = None if self.mesh.stage == 0 else given.astype(self.decoder.hidden_dtype)
        return loss, given, {name: gradients[name] for name in self.tuned}

    def exchange(self, given: Tensor | None, batch: Batch | None, ahead: bool) -> Tensor | None:
        """Give a tensor to the next stage or the one before (None: nothing); return what it gives of a micro-batch."""
        shape = (line.length(batch.tokens), self.decoder.spec.hidden_size) if batch else None
        return distributed.exchange(given, shape, self.decoder.hidden_dtype, ahead)

    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        with self.decoder.mode(None, adapter=True):
            trace = self._forward(batch)
            if not self.mesh.is_last_stage:
                return np.zeros((*batch.labels.shape, self.decoder.spec.vocab_size), np.float32)
            logits = self.decoder.head(trace.hidden, self.decoder.head_weight())
            return by_position(logits, trace.line, batch.segment_ids)

    def _losses(self, batch: Batch) -> np.ndarray:
        if self.mesh.is_last_stage:
            return super()._losses(batch)
        self._forward(batch)
        return np.zeros(batch.supervised, np.float32)

    def _forward(self, batch: Batch, keep: bool = False) -> Trace:
        """The way of what the stage before gives, whose end the next stage gets."""
        trace = self._through(batch, None if self.mesh.stage == 0 else self.exchange(None, batch, False), keep)
        if not self.mesh.is_last_stage:
            self.exchange(trace.hidden.astype(self.decoder.hidden_dtype), None, True)
        return trace

    def _through(self, batch: Batch, taken: Tensor | None, keep: bool) -> Trace:
        return self.decoder.forward(batch.input_ids, batch.position_ids, batch.segment_ids, keep, taken)
