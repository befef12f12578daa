"""What the shared engine asks of a model: losses, gradients, log-probabilities, tuned tensors."""

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import random
from msft.backend.contract import IGNORE, Batch, Runtime, Tuning
from msft.backend.mindspore import ops
from msft.backend.mindspore.decoder import Decoder
from msft.models.spec import ModelSpec


class Model:
    """A decoder and its losses; `tuned` holds the tuned tensors under canonical names."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        self.runtime = runtime
        self.kernels = ops.kernels(spec, runtime)
        self.decoder = Decoder(spec, source, tuning, runtime, self.kernels)
        self.has_adapter = tuning.lora is not None
        self.select = mindspore.jit(_select)
        self.token_losses = mindspore.jit(ops.token_losses)

    @property
    def tuned(self) -> dict[str, Tensor]:
        """The tuned tensors; the optimizer puts new ones in their place."""
        return self.decoder.tuned

    def loss_and_gradients(self, batch: Batch, scale: float, dropout_step: int | None):
        """Return the summed loss (float) and the gradients of `scale` x that sum for the tuned parameters.

        `dropout_step` is the optimizer step whose dropout masks apply; None means no dropout.
        """
        keys = None
        if dropout_step is not None:
            keys = random.token_keys(self.runtime.seed, dropout_step, batch.row_ids, batch.position_ids)

        tuned = self.tuned

        def scaled_loss(*tensors):
            self.decoder.tuned = dict(zip(tuned, tensors, strict=True))
            loss = self._losses(batch).sum()
            return loss * scale, loss

        differentiate = mindspore.value_and_grad(scaled_loss, tuple(range(len(tuned))), has_aux=True)
        try:
            with self.decoder.mode(keys, adapter=True):
                (_, loss), gradients = differentiate(*tuned.values())
        finally:
            self.decoder.tuned = tuned
        # For a single argument MindSpore returns its gradient bare.
        gradients = (gradients,) if len(tuned) == 1 else gradients
        return float(loss.asnumpy()), dict(zip(tuned, gradients, strict=True))

    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of the supervised tokens, without dropout."""
        with self.decoder.mode(None, adapter=True):
            return float(self._losses(batch).sum().asnumpy())

    def token_logprobs(self, batch: Batch, adapter: bool) -> np.ndarray:
        """Return each label's log-probability, float32 [rows, length], 0 where nothing is supervised."""
        logprobs = np.zeros(batch.labels.shape, dtype=np.float32)
        with self.decoder.mode(None, adapter):
            logprobs[batch.labels != IGNORE] = -ops.to_numpy(self._losses(batch))[: batch.supervised]
        return logprobs

    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        with self.decoder.mode(None, adapter=True):
            return ops.to_numpy(self.decoder.head(self._hidden(batch), self.decoder.head_weight()))

    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        with self.decoder.mode(None, adapter):
            states = self.decoder.states(batch.input_ids, batch.position_ids, batch.segment_ids)
            return {name: ops.to_numpy(state) for name, state in states}

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """Return a tensor by its canonical name as it is computed with in a dtype, float32 values."""
        tensor = self.tuned[name] if name in self.tuned else self.decoder.parameter(name)
        return ops.to_numpy(tensor.astype(ops.dtype(dtype)))

    def export_tuned(self) -> dict[str, np.ndarray]:
        """Return copies of the tuned tensors."""
        return {name: ops.to_numpy(parameter) for name, parameter in self.tuned.items()}

    def import_tuned(self, weights: dict[str, np.ndarray]) -> None:
        """Overwrite tuned tensors by name."""
        for name, array in weights.items():
            self.tuned[name] = ops.from_numpy(array, self.runtime.device, "float32")

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tuned tensors."""
        return {name: tuple(parameter.shape) for name, parameter in self.tuned.items()}

    def dtypes(self) -> dict[str, str]:
        """Return what is held and computed in which dtype."""
        precision = self.runtime.precision
        return {
            "frozen": precision.parameters,
            "tuned": ops.dtypes(self.tuned),
            "compute": precision.compute,
            "softmax": self.kernels.softmax.split()[0],
            "norm": self.kernels.norm.split()[0],
            "rotary": precision.rotary,
            "loss": "float32",
            "gradients": "float32",
        }

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        precision = self.runtime.precision
        return {
            "device": self.runtime.device,
            "parameters": f"frozen {precision.parameters}, tuned float32",
            "compute": precision.compute,
            "softmax": self.kernels.softmax,
            "norm": self.kernels.norm,
            "rotary": precision.rotary,
            "loss": f"float32, supervised positions only, {ops.LOSS_CHUNK} at a time",
            "attention": self.kernels.name,
            "recompute": str(self.runtime.recompute),
        }

    def _hidden(self, batch: Batch) -> Tensor:
        return self.decoder.hidden(batch.input_ids, batch.position_ids, batch.segment_ids)

    def _losses(self, batch: Batch) -> Tensor:
        """The cross-entropy of each supervised position in reading order, then zeros, float32 [chunks x LOSS_CHUNK].

        Positions are padded to whole chunks, so that one compiled function serves every batch.
        """
        chosen = np.flatnonzero(batch.labels != IGNORE).astype(np.int32)
        fill = (0, -len(chosen) % ops.LOSS_CHUNK or (0 if len(chosen) else ops.LOSS_CHUNK))
        positions, labels = np.pad(chosen, fill), np.pad(batch.labels.reshape(-1)[chosen], fill)
        real = np.pad(np.ones(len(chosen), np.float32), fill)
        hidden = self._hidden(batch)
        losses, weight = [], self.decoder.head_weight()
        for start in range(0, len(labels), ops.LOSS_CHUNK):
            part = slice(start, start + ops.LOSS_CHUNK)
            logits = self.decoder.head(self.select(hidden, self.decoder.tensor(positions[part])), weight)
            entropies = self.token_losses(logits, self.decoder.tensor(labels[part]))
            losses.append(entropies * self.decoder.tensor(real[part]))
        return operators.concat(losses)


def _select(hidden: Tensor, positions: Tensor) -> Tensor:
    return operators.gather(hidden.reshape(-1, hidden.shape[-1]), positions, 0)
