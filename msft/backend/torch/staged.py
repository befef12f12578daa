"""The model of a rank that has the layers of one stage of a pipeline."""

from typing import NamedTuple

import numpy as np
import torch

from msft.backend import names, stages
from msft.backend.contract import Batch, Runtime, Tuning
from msft.backend.torch import distributed
from msft.backend.torch.model import Model
from msft.models.spec import ModelSpec


class _Way(NamedTuple):
    """A micro-batch's way through the stage: what came in and went out, the labels, whose step's dropout applies.

    `output` are hidden states for the next stage, or those of the supervised positions at the last one.
    """

    batch: Batch
    taken: torch.Tensor | None
    output: torch.Tensor
    labels: torch.Tensor | None
    dropout_step: int


class StagedModel(Model):
    """A stage's layers, and what the shared engine asks of them; `tuning` is what is trained of all stages.

    Hidden states between stages have no padding. Only the last stage has losses and logits; the others pass hidden
    states on and return zeros.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        stages.check(spec, distributed.mesh())
        self.tuning = tuning
        super().__init__(spec, source, tuning, runtime)
        # A tied head is no part of the way through the layers, though its tensor is the embedding.
        passed = (names.HEAD,) if self.mesh.stage == 0 else (names.HEAD, names.EMBEDDING)
        self.on_way = {name: tensor for name, tensor in self.tuned.items() if name not in passed}

    def stage_forward(self, batch: Batch, taken: torch.Tensor | None, dropout_step: int):
        """Return the hidden states for the next stage (None: there is none), and what `stage_backward` takes.

        `taken` are those of the stage before (None: there is none).
        """
        taken = None if taken is None else taken.requires_grad_()
        with self._dropout(batch, dropout_step):
            if self.mesh.is_last_stage:
                output, labels = self._supervised(batch, taken)
                return None, _Way(batch, taken, output, labels, dropout_step)
            output = self._through(batch, taken)
        return output.detach(), _Way(batch, taken, output, None, dropout_step)

    def stage_backward(self, way: _Way, taken: torch.Tensor | None, scale: float):
        """Return the summed loss, the gradient for the stage before, and those of `scale` x the loss for what is tuned.

        `taken` is the gradient of what `stage_forward` returned; the loss is 0 but at the last stage.
        """
        loss, d_head = 0.0, None
        with self._dropout(way.batch, way.dropout_step):
            self.decoder.set_dropout(way.batch.segment_ids, way.batch.is_shared)
            if self.mesh.is_last_stage:
                loss, taken, d_head = self._head_gradients(way.output.detach(), way.labels, scale)
            inputs = [*self.on_way.values(), *([] if way.taken is None else [way.taken])]
            found = torch.autograd.grad(way.output, inputs, taken) if inputs else ()
        gradients = dict(zip(self.on_way, found, strict=False))
        if d_head is not None:
            gradients[names.HEAD if names.HEAD in self.tuned else names.EMBEDDING] = d_head
        elif self.shares_tied and not self.mesh.is_sequence_cut:
            # The ranks of the stage have the whole one each, those of the last stage shares, and both are summed.
            gradients[names.EMBEDDING] = gradients[names.EMBEDDING] / self.mesh.tensor
        return loss, None if way.taken is None else found[-1], {name: gradients[name] for name in self.tuned}

    def exchange(self, given: torch.Tensor | None, batch: Batch | None, ahead: bool) -> torch.Tensor | None:
        """Give a tensor to the next stage or the one before (None: nothing); return what it gives of a micro-batch."""
        shape = None if batch is None else self.decoder.hidden_shape(batch.segment_ids, batch.is_shared)
        return distributed.exchange(given, shape, self.decoder.hidden_dtype, ahead)

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        if self.mesh.is_last_stage:
            return super().logits(batch)
        with self.decoder.mode(None, adapter=True):
            self._pass_on(batch)
        return np.zeros((*batch.labels.shape, self.decoder.spec.vocab_size), np.float32)

    def _losses(self, batch: Batch) -> torch.Tensor:
        if self.mesh.is_last_stage:
            return super()._losses(batch)
        self._pass_on(batch)
        return torch.zeros(batch.supervised)

    def _hidden(self, batch: Batch, taken: torch.Tensor | None = None) -> torch.Tensor:
        """The last stage's hidden states; where the way back is not asked for, what comes before them is taken here."""
        return super()._hidden(batch, self.exchange(None, batch, False) if taken is None else taken)

    def _pass_on(self, batch: Batch) -> None:
        taken = None if self.mesh.stage == 0 else self.exchange(None, batch, False)
        self.exchange(self._through(batch, taken), None, True)

    def _through(self, batch: Batch, taken: torch.Tensor | None) -> torch.Tensor:
        arrays = batch.input_ids, batch.position_ids, batch.segment_ids
        return self.decoder.through(*arrays, batch.is_shared, taken).to(self.decoder.hidden_dtype)
