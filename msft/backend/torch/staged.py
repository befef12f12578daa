"""The model of a rank that has the layers of one stage of a pipeline."""

from typing import NamedTuple

import numpy as np
import torch

from msft.backend import names, stages
from msft.backend.contract import IGNORE, Batch, Runtime, Tuning
from msft.backend.torch import distributed
from msft.backend.torch.model import Model
from msft.models.spec import ModelSpec


class _Way(NamedTuple):
    """A micro-batch's way through the stage: what came in and went out, and the step whose dropout applies."""

    batch: Batch
    taken: torch.Tensor | None
    output: torch.Tensor
    dropout_step: int


class StagedModel(Model):
    """A stage's layers, and what the shared engine asks of them; `tuning` is what is trained of all stages.

    Hidden states between stages are [1, tokens, hidden], without padding. Only the last stage has losses and logits;
    the others pass hidden states on and return zeros.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        self.mesh, self.tuning = distributed.mesh(), tuning
        stages.check(spec, self.mesh)
        super().__init__(spec, source, tuning, runtime)
        # A tied head is no part of the way through the layers, though its tensor is the embedding.
        passed = (names.HEAD,) if self.mesh.stage == 0 else (names.HEAD, names.EMBEDDING)
        self.on_way = {name: tensor for name, tensor in self.tuned.items() if name not in passed}

    def stage_forward(self, batch: Batch, taken: torch.Tensor | None, dropout_step: int):
        """Return the hidden states for the next stage (None: there is none), and what `stage_backward` takes.

        `taken` are those of the stage before (None: there is none).
        """
        with self._dropout(batch, dropout_step):
            output = self._through(batch, None if taken is None else taken.requires_grad_())
        if self.mesh.is_last_stage:
            output = self._rows(output, batch, batch.labels != IGNORE)
        way = _Way(batch, taken, output, dropout_step)
        return None if self.mesh.is_last_stage else output.detach().to(self.decoder.hidden_dtype), way

    def stage_backward(self, way: _Way, taken: torch.Tensor | None, scale: float):
        """Return the summed loss, the gradient for the stage before, and those of `scale` x the loss for what is tuned.

        `taken` is the gradient of what `stage_forward` returned; the loss is 0 but at the last stage.
        """
        loss, d_head = 0.0, None
        with self._dropout(way.batch, way.dropout_step):
            self.decoder.set_dropout(np.flatnonzero(way.batch.segment_ids))
            if self.mesh.is_last_stage:
                labels = self.decoder.tensor(way.batch.labels[way.batch.labels != IGNORE])
                loss, taken, d_head = self._head_gradients(way.output.detach(), labels, scale)
            inputs = [*self.on_way.values(), *([] if way.taken is None else [way.taken])]
            found = torch.autograd.grad(way.output, inputs, taken.to(way.output.dtype)) if inputs else ()
        gradients = dict(zip(self.on_way, found, strict=False))
        if d_head is not None:
            gradients[names.HEAD if names.HEAD in self.tuned else names.EMBEDDING] = d_head
        return loss, None if way.taken is None else found[-1], {name: gradients[name] for name in self.tuned}

    def exchange(self, given: torch.Tensor | None, batch: Batch | None, ahead: bool) -> torch.Tensor | None:
        """Give a tensor to the next stage or the one before (None: nothing); return what it gives of a micro-batch."""
        shape = (1, batch.tokens, self.decoder.spec.hidden_size) if batch else None
        return distributed.exchange(given, shape, self.decoder.hidden_dtype, ahead)

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        found = np.zeros((*batch.labels.shape, self.decoder.spec.vocab_size), np.float32)
        with self.decoder.mode(None, adapter=True):
            real = batch.segment_ids != 0
            states = self._passed_through(batch)
            if self.mesh.is_last_stage:
                found[real] = self._logits(self._rows(states, batch, real))
        return found

    def _losses(self, batch: Batch) -> torch.Tensor:
        states = self._passed_through(batch)
        if not self.mesh.is_last_stage:
            return torch.zeros(batch.supervised)
        chosen = batch.labels != IGNORE
        return self._losses_of(self._rows(states, batch, chosen), self.decoder.tensor(batch.labels[chosen]))

    def _passed_through(self, batch: Batch) -> torch.Tensor:
        """The hidden states behind this stage, on to which they were passed where there is a next one."""
        states = self._through(batch, None if self.mesh.stage == 0 else self.exchange(None, batch, False))
        if not self.mesh.is_last_stage:
            self.exchange(states.to(self.decoder.hidden_dtype), None, True)
        return states

    def _through(self, batch: Batch, taken: torch.Tensor | None) -> torch.Tensor:
        return self.decoder.through(batch.input_ids, batch.position_ids, batch.segment_ids, taken)

    def _rows(self, states: torch.Tensor, batch: Batch, chosen: np.ndarray) -> torch.Tensor:
        """The hidden states [n, hidden] of chosen positions, bool [rows, length], in reading order."""
        return states[0].index_select(0, self.decoder.tensor(np.flatnonzero(chosen[batch.segment_ids != 0])))
