"""What the shared engine asks of a model: losses, gradients, log-probabilities, tuned tensors."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import random, routing, slices
from msft.backend.contract import IGNORE, Batch, Runtime, Tuning
from msft.backend.mindspore import attention, distributed, experts, ops, state_space
from msft.backend.mindspore.decoder import Decoder, Trace, by_position
from msft.backend.mindspore.device import bind_threads
from msft.models.spec import ModelSpec


class Model:
    """A decoder and its losses; `tuned` holds the tuned tensors under canonical names."""

    decoder_kind = Decoder

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        self.spec, self.runtime = spec, runtime
        self.cap = spec.head_cap or 0.0
        self.threads = bind_threads(runtime)
        self.kernels = ops.kernels(spec, runtime)
        self.decoder = self.decoder_kind(spec, source, tuning, runtime, self.kernels)
        self.has_adapter = tuning.lora is not None
        # Of the batches since the shared engine has set it to 0: the balance loss x supervised tokens.
        self.balance_sum = 0.0
        self.mesh = self.decoder.mesh
        # A block's norms see what one rank gives of the gradient.
        self.partial = {name for name in self.tuned if slices.is_partial(name, self.mesh) or "layernorm" in name}
        # Of a tied head each rank has a share of the gradient, and unless it has its own tokens alone, the whole one of
        # the embedding.
        self.shares_tied = self.mesh.shares_losses and self.decoder.is_head_tied() and self.spec.embedding in self.tuned
        self.partial |= {self.spec.embedding} if self.shares_tied else set()

    @property
    def tuned(self) -> dict[str, Tensor]:
        """The tuned tensors; the optimizer puts new ones in their place."""
        return self.decoder.tuned

    def loss_and_gradients(self, batch: Batch, scale: float, dropout_step: int | None):
        """Return the summed loss (float) and the gradients of `scale` x that sum for the tuned parameters.

        With `Runtime.balance` a supervised token's loss has the batch's balance loss times that in it.
        `dropout_step` is the optimizer step whose dropout masks apply; None means no dropout.
        """
        keys = None
        if dropout_step is not None:
            keys = random.token_keys(self.runtime.seed, dropout_step, batch.row_ids, batch.position_ids)

        weight, uneven = self.runtime.balance * batch.supervised, 0.0
        with self.decoder.mode(keys, adapter=True), self._counting() as balance:
            trace = self._forward(batch, keep=True)
            summed, by_hidden, by_head = self._head_gradients(trace, batch, scale)
            if balance:
                uneven = balance.close(scale * weight)
                self.balance_sum += batch.supervised * uneven
            gradients, _ = self.decoder.backward(by_hidden, trace)
        # The head's own gradient is known already; a tied head is reached through the embedding as well.
        if by_head is not None:
            name = self.spec.head if self.spec.head in self.tuned else self.spec.embedding
            if self.shares_tied and not self.mesh.is_sequence_cut:
                gradients[name] = gradients[name] / self.mesh.tensor
            gradients[name] = gradients[name] + by_head if name in gradients else by_head
        loss = float(ops.to_numpy(summed).astype(np.float64).sum())
        return loss + weight * uneven, {name: gradients[name] for name in self.tuned}

    def _counting(self):
        """What the balance loss of a batch is counted in, where one is asked for."""
        if not self.runtime.balance:
            return nullcontext()
        return self.decoder.counting(routing.Balance(self.spec.experts.count))

    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of the supervised tokens, without dropout."""
        with self.decoder.mode(None, adapter=True):
            return float(self._losses(batch).astype(np.float64).sum())

    def token_logprobs(self, batch: Batch, adapter: bool) -> np.ndarray:
        """Return each label's log-probability, float32 [rows, length], 0 where nothing is supervised."""
        logprobs = np.zeros(batch.labels.shape, dtype=np.float32)
        with self.decoder.mode(None, adapter):
            logprobs[batch.labels != IGNORE] = -self._losses(batch)
        return logprobs

    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        with self.decoder.mode(None, adapter=True):
            trace = self._forward(batch)
            logits = self.decoder.head(trace.hidden, self.decoder.head_weight())
            placed = by_position(logits, trace.line, batch.segment_ids)
            return distributed.join_along(placed, 2) if self.decoder.vocabulary else placed

    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        with self.decoder.mode(None, adapter):
            return dict(self.decoder.states(batch.input_ids, batch.position_ids, batch.segment_ids))

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """Return a tensor by its canonical name as it is computed with in a dtype, float32 values."""
        tensor = self.tuned[name] if name in self.tuned else self.decoder.parameter(name)
        return ops.to_numpy(tensor.astype(ops.dtype(dtype)))

    def export_tuned(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return copies of tuned tensors by name."""
        return {name: ops.to_numpy(self.tuned[name]) for name in names}

    def import_tuned(self, weights: Mapping[str, np.ndarray]) -> None:
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
            "softmax": "none" if self.spec.state_space else self.kernels.softmax,
            "norm": self.kernels.norm,
            "rotary": precision.rotary,
            "loss": f"float32, supervised positions only, {ops.LOSS_CHUNK} at a time",
            "attention": state_space.described(self.spec.state_space) if self.spec.state_space else self.kernels.name,
            "recompute": str(self.runtime.recompute),
            "threads": self.threads,
            **({"experts": experts.APPLIED, **routing.described(self.runtime.balance)} if self.spec.experts else {}),
        }

    def _forward(self, batch: Batch, keep: bool = False, taken: Tensor | None = None) -> Trace:
        arrays = batch.input_ids, batch.position_ids, batch.segment_ids
        return self.decoder.forward(*arrays, keep, batch.is_shared, taken)

    def _losses(self, batch: Batch) -> np.ndarray:
        """The cross-entropy of each supervised position in reading order, float32 [n]; logits for a chunk at a time."""
        trace, weight, entropy = self._forward(batch), self.decoder.head_weight(), self.decoder.vocabulary
        losses = []
        for positions, labels, _ in self._chunks(trace, batch):
            if entropy:
                found = entropy.token_losses(_chunk_logits(trace.hidden, weight, positions), labels)
            else:
                found = _chunk_losses(trace.hidden, weight, positions, labels, self.cap)
            losses.append(ops.to_numpy(found))
        own = self.mesh.own_losses(batch.supervised)
        found = np.zeros(batch.supervised, np.float32)
        found[own] = np.concatenate(losses)[: own.stop - own.start]
        is_shared = self.mesh.shares_losses and batch.supervised
        return ops.to_numpy(distributed.reduce(self.decoder.tensor(found))) if is_shared else found

    def _head_gradients(self, trace: Trace, batch: Batch, scale: float):
        """The losses by place in the line, the gradients of `scale` x their sum for the hidden states and the head.

        Logits and their gradient exist for a chunk at a time; the head's gradient is None where it is not tuned. On the
        ranks of a model that is cut, gradients of hidden states are shares.
        """
        weight, by_head = self.decoder.head_weight(), None
        total = Tensor(np.zeros((trace.hidden.shape[0], trace.hidden.shape[1] + 1), np.float32))
        gradients_of = self._cut_chunk if self.decoder.vocabulary else self._whole_chunk
        for positions, labels, real in self._chunks(trace, batch):
            chunk = positions, labels, self.decoder.tensor(real * np.float32(scale))
            total, found = gradients_of(total, trace.hidden, weight, chunk)
            by_head = found if by_head is None else by_head + found
        by_head = None if by_head is None else self.decoder.head_gradient(by_head)
        losses = _loss_part(total)
        losses = distributed.reduce(losses) if self.mesh.shares_losses else losses
        return losses, _hidden_part(total, trace.hidden), by_head

    def _whole_chunk(self, total: Tensor, hidden: Tensor, weight: Tensor, chunk: tuple[Tensor, ...]):
        """`total` with a chunk's gradients and losses, and the head's gradient."""
        total = _chunk_gradients(total, hidden, weight, *chunk, self.cap)
        return total, _chunk_head_gradient(hidden, weight, *chunk, self.cap) if self._is_head_tuned() else None

    def _cut_chunk(self, total: Tensor, hidden: Tensor, weight: Tensor, chunk: tuple[Tensor, ...]):
        """`_whole_chunk` by this rank's rows of the head."""
        positions, labels, scales = chunk
        logits = _chunk_logits(hidden, weight, positions)
        losses, by_logits = self.decoder.vocabulary.token_losses_and_gradient(logits, labels, scales)
        total = _with_chunk(total, weight, positions, losses, by_logits, scales)
        return total, _head_gradient(hidden, weight, positions, by_logits) if self._is_head_tuned() else None

    def _is_head_tuned(self) -> bool:
        return self.spec.head in self.tuned or (self.decoder.is_head_tied() and self.spec.embedding in self.tuned)

    def _chunks(self, trace: Trace, batch: Batch):
        """Places in the line of supervised positions, their labels, and which are real, `LOSS_CHUNK` at a time.

        The last chunk is filled up, so that one compiled function serves every batch; there is one at least. Where the
        ranks of a model share the losses, the places are those of this rank's share.
        """
        labels = batch.labels.reshape(-1)[trace.line.places]
        chosen = np.flatnonzero(labels != IGNORE).astype(np.int32)
        if len(chosen) != batch.supervised:
            raise ValueError("labels stand on padding")
        chosen = chosen[self.mesh.own_losses(len(chosen))]
        fill = (0, -len(chosen) % ops.LOSS_CHUNK if len(chosen) else ops.LOSS_CHUNK)
        arrays = np.pad(chosen, fill), np.pad(labels[chosen], fill), np.pad(np.ones(len(chosen), np.float32), fill)
        for start in range(0, len(arrays[0]), ops.LOSS_CHUNK):
            positions, answers, real = (array[start : start + ops.LOSS_CHUNK] for array in arrays)
            yield self.decoder.tensor(positions), self.decoder.tensor(answers), real


@mindspore.jit
def _chunk_losses(hidden, weight, positions, labels, cap):
    return ops.token_losses(attention.capped(_logits(hidden, weight, positions), cap), labels)


@mindspore.jit
def _chunk_gradients(total, hidden, weight, positions, labels, scales, cap):
    """`total` [length, hidden + 1] with a chunk's gradients for the hidden states, and its losses behind them."""
    losses, by_logits = _losses_and_gradient(_logits(hidden, weight, positions), labels, scales, cap)
    return _added(total, weight, positions, losses, by_logits, scales)


@mindspore.jit
def _with_chunk(total, weight, positions, losses, by_logits, scales):
    return _added(total, weight, positions, losses, by_logits, scales)


def _added(total, weight, positions, losses, by_logits, scales):
    by_hidden = ops.product(by_logits.astype(weight.dtype), weight).astype(mindspore.float32)
    real = (scales != 0).astype(mindspore.float32)
    rows = operators.concat((by_hidden, (losses * real).expand_dims(-1)), 1)
    return total + operators.unsorted_segment_sum(rows, positions, total.shape[0])


@mindspore.jit
def _chunk_head_gradient(hidden, weight, positions, labels, scales, cap):
    _, by_logits = _losses_and_gradient(_logits(hidden, weight, positions), labels, scales, cap)
    return _by_head(hidden, weight, positions, by_logits)


@mindspore.jit
def _head_gradient(hidden, weight, positions, by_logits):
    return _by_head(hidden, weight, positions, by_logits)


def _losses_and_gradient(logits, labels, scales, cap):
    """Losses, and the gradient of logits that are squashed to +-`cap` before."""
    squashed = attention.capped(logits, cap)
    losses, gradient = ops.token_losses_and_gradient(squashed, labels, scales)
    if cap:
        gradient = gradient * (1 - squashed * squashed / (cap * cap))
    return losses, gradient


def _by_head(hidden, weight, positions, by_logits):
    rows = operators.gather(hidden, positions, 0)
    return ops.product_a(by_logits.astype(weight.dtype), rows.astype(weight.dtype)).astype(mindspore.float32)


@mindspore.jit
def _chunk_logits(hidden, weight, positions):
    return _logits(hidden, weight, positions)


def _logits(hidden, weight, positions):
    rows = operators.gather(hidden, positions, 0).astype(weight.dtype)
    return ops.linear(rows, weight).astype(mindspore.float32)


@mindspore.jit
def _hidden_part(total, hidden):
    return total[:, :-1].astype(hidden.dtype)


@mindspore.jit
def _loss_part(total):
    return total[:, -1]
