"""What the shared engine asks of a model: losses, gradients, log-probabilities, tuned tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch

from msft.backend import random, routing, slices
from msft.backend.contract import IGNORE, Batch, Runtime, Tuning
from msft.backend.torch import block, distributed, experts, ops, state_space
from msft.backend.torch.decoder import Decoder
from msft.models.spec import ModelSpec


class Model:
    """A decoder and its losses; `tuned` holds the tuned tensors under canonical names."""

    decoder_kind = Decoder

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        self.spec, self.runtime = spec, runtime
        self.kernels = ops.kernels(spec, runtime)
        self.decoder = self.decoder_kind(spec, source, tuning, runtime, self.kernels)
        self.tuned = self.decoder.tuned
        self.has_adapter = tuning.lora is not None
        # Of the batches since the shared engine has set it to 0: the balance loss x supervised tokens.
        self.balance_sum = 0.0
        self.mesh = self.decoder.mesh
        self.entropy = self.decoder.vocabulary or ops
        self.partial = {name for name in self.tuned if slices.is_partial(name, self.mesh)}
        # Of a tied head each rank has a share of the gradient, and unless it has its own tokens alone, the whole one of
        # the embedding.
        self.shares_tied = self.mesh.shares_losses and self.decoder.is_head_tied() and self.spec.embedding in self.tuned
        self.partial |= {self.spec.embedding} if self.shares_tied else set()

    def loss_and_gradients(self, batch: Batch, scale: float, dropout_step: int | None):
        """Return the summed loss (float) and the gradients of `scale` x that sum for the tuned parameters.

        With `Runtime.balance` a supervised token's loss has the batch's balance loss times that in it.
        `dropout_step` is the optimizer step whose dropout masks apply; None means no dropout.
        """
        weight = self.runtime.balance * batch.supervised
        with self._dropout(batch, dropout_step), self._counting() as balance:
            hidden, labels = self._supervised(batch)
            loss, d_hidden, d_head = self._head_gradients(hidden.detach(), labels, scale)
            if balance:
                uneven = balance.close(scale * weight)
                self.balance_sum += batch.supervised * uneven
                loss += weight * uneven
            return loss, self._backward(hidden, d_hidden, d_head)

    def _counting(self):
        """What the balance loss of a batch is counted in, where one is asked for."""
        if not self.runtime.balance:
            return nullcontext()
        return self.decoder.counting(routing.Balance(self.spec.experts.count))

    def _dropout(self, batch: Batch, step: int | None):
        """The mode of training in a step; None: without dropout."""
        if step is None:
            return self.decoder.mode(None, adapter=True)
        keys = random.token_keys(self.runtime.seed, step, batch.row_ids, batch.position_ids)
        return self.decoder.mode(keys, adapter=True)

    def _backward(self, hidden: torch.Tensor, d_hidden: torch.Tensor, d_head: torch.Tensor | None):
        """The gradients of the tuned parameters, from those of the hidden states and of the head (None: not tuned)."""
        # The head's own gradient is known already; a tied head is reached through the embedding as well.
        below = {name: tensor for name, tensor in self.tuned.items() if name != self.spec.head}
        found = torch.autograd.grad(hidden, list(below.values()), d_hidden) if below else ()
        gradients = dict(zip(below, found, strict=True))
        if d_head is not None:
            name = self.spec.head if self.spec.head in self.tuned else self.spec.embedding
            if self.shares_tied and not self.mesh.is_sequence_cut:
                gradients[name] = gradients[name] / self.mesh.tensor
            gradients[name] = gradients[name] + d_head if name in gradients else d_head
        return {name: gradients[name] for name in self.tuned}

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of the supervised tokens, without dropout."""
        with self.decoder.mode(None, adapter=True):
            return self._losses(batch).sum().item()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch, adapter: bool) -> np.ndarray:
        """Return each label's log-probability, float32 [rows, length], 0 where nothing is supervised."""
        logprobs = np.zeros(batch.labels.shape, dtype=np.float32)
        with self.decoder.mode(None, adapter):
            logprobs[batch.labels != IGNORE] = -ops.to_numpy(self._losses(batch))
        return logprobs

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        with self.decoder.mode(None, adapter=True):
            return self._at_head(self._hidden(batch), self._logits)

    @torch.no_grad()
    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        with self.decoder.mode(None, adapter):
            states = self.decoder.states(batch.input_ids, batch.position_ids, batch.segment_ids)
            return {name: ops.to_numpy(state) for name, state in states}

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """Return a tensor by its canonical name as it is computed with in a dtype, float32 values."""
        tensor = self.tuned[name] if name in self.tuned else self.decoder.parameter(name)
        return ops.to_numpy(tensor.to(ops.dtype(dtype)))

    def export_tuned(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return copies of tuned tensors by name."""
        return {name: ops.to_numpy(self.tuned[name]) for name in names}

    @torch.no_grad()
    def import_tuned(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite tuned tensors by name."""
        for name, array in weights.items():
            self.tuned[name].copy_(ops.from_numpy(array, self.runtime.device, "float32"))

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
            "softmax": "float32",
            "norm": "float32",
            "rotary": "float32",
            "loss": "float32",
            "gradients": "float32",
        }

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        precision = self.runtime.precision
        norm = "float32" if precision.compute == "float32" else f"float32, result {precision.compute}"
        frozen = precision.parameters
        if frozen != precision.compute:
            frozen += f" (products' weights held in {precision.compute})"
        return {
            "device": self.runtime.device,
            "parameters": f"frozen {frozen}, tuned float32",
            "compute": precision.compute,
            "products": block.products(self.runtime.device, precision.compute),
            "softmax": "none" if self.spec.state_space else self.kernels.softmax,
            "norm": norm,
            "rotary": "float32 angles",
            "loss": f"float32, supervised positions only, up to {ops.LOSS_CHUNK} at a time",
            "attention": state_space.described(self.spec.state_space) if self.spec.state_space else self.kernels.name,
            "norm, rotation, SwiGLU": self._parts(),
            "recompute": str(self.runtime.recompute),
            **({"experts": experts.APPLIED, **routing.described(self.runtime.balance)} if self.spec.experts else {}),
        }

    def _parts(self) -> str:
        if not self.decoder.takes_parts:
            idle = " (torch_compile has no effect on this family)" if self.runtime.compile else ""
            own = "plain operators" if self.spec.state_space else "transformers' own"
            return own + idle
        seconds = self.decoder.compile_seconds
        return self.kernels.parts.name + (f" (took {seconds:.1f} s)" if seconds else "")

    def _hidden(self, batch: Batch, taken: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder.hidden(batch.input_ids, batch.position_ids, batch.segment_ids, batch.is_shared, taken)

    def _supervised(self, batch: Batch, taken: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states [n, hidden] of the supervised positions in reading order, and their labels [n].

        Where the ranks of a model share the losses, those of this rank's share.
        """
        places = np.flatnonzero(batch.labels != IGNORE)
        places = places[self.mesh.own_losses(len(places))]
        chosen, labels = self.decoder.tensor(places), self.decoder.tensor(batch.labels.flat[places])
        return self._hidden(batch, taken).flatten(0, 1).index_select(0, chosen), labels

    def _at_head(self, hidden: torch.Tensor, work: Callable, *arguments):
        """What `work` gives for hidden states and more, where the head's weight is at hand."""
        return work(hidden, *arguments)

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        logits = ops.to_numpy(self.decoder.head(hidden, self.decoder.head_weight()))
        return distributed.join_along(logits, 2) if self.decoder.vocabulary else logits

    def _losses(self, batch: Batch) -> torch.Tensor:
        """The cross-entropy of each supervised position in reading order, float32 [n]."""
        hidden, labels = self._supervised(batch)
        losses = self._at_head(hidden, self._losses_of, labels)
        if not self.mesh.shares_losses:
            return losses
        found = losses.new_zeros(batch.supervised)
        found[self.mesh.own_losses(batch.supervised)] = losses
        return distributed.reduce(found)

    def _losses_of(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of hidden states [n, hidden], float32 [n]; logits for a chunk at a time."""
        weight, chunks = self.decoder.head_weight(), _chunks(hidden, labels)
        losses = [self.entropy.token_losses(self.decoder.head(part, weight), answers) for part, answers in chunks]
        return torch.cat(losses) if losses else weight.new_zeros(0)

    @torch.no_grad()
    def _head_gradients(self, hidden: torch.Tensor, labels: torch.Tensor, scale: float):
        """The summed loss of hidden states [n, hidden], and the gradients of `scale` x it for them and the head.

        Logits and their gradient exist for a chunk at a time; the head's gradient is None where it is not tuned.
        """
        weight, summed, d_hidden = self.decoder.head_weight(), [], torch.empty_like(hidden)
        tuned = self.decoder.parameter(self.spec.head).requires_grad
        d_head = torch.zeros_like(weight, dtype=torch.float32) if tuned else None
        for part, answers, d_part in _chunks(hidden, labels, d_hidden):
            logits = self.decoder.head(part, weight)
            slope = 1 - (logits / self.spec.head_cap).square_() if self.spec.head_cap else None
            losses, d_logits = self.entropy.token_losses_and_gradient(logits, answers, scale)
            if slope is not None:
                d_logits = d_logits.mul_(slope)
            summed.append(losses.sum())
            d_logits = d_logits.to(weight.dtype)
            d_part.copy_(block.product(d_logits, weight.t()))
            if tuned:
                d_head += block.product(d_logits.t(), part.to(weight.dtype).t())
        d_head = self.decoder.head_gradient(d_head) if tuned else None
        loss = torch.stack(summed).sum() if summed else torch.zeros((), device=weight.device)
        return (distributed.reduce(loss) if self.mesh.shares_losses else loss).item(), d_hidden, d_head


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield equal parts of tensors [n, ...], none longer than `ops.LOSS_CHUNK` and none empty."""
    count = -(-len(tensors[0]) // ops.LOSS_CHUNK)
    return zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True) if count else iter(())
