"""The engine both frameworks share: one optimizer step, written once over a model and an optimizer."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np

from msft.backend import decoding, names, positions, prefix, slices
from msft.backend.contract import (
    Batch,
    EngineState,
    OnToken,
    Place,
    Runtime,
    Sampling,
    StateParts,
    StepGradients,
    StepResult,
)
from msft.backend.loss_scaler import LossScaler
from msft.errors import RunError
from msft.models import rope
from msft.models.shapes import tensor_shapes


class _Total(NamedTuple):
    """A step's loss and gradients on the device, summed over micro-batches and ranks; `norm` without the loss scale."""

    loss: float
    losses: tuple[float, ...]
    supervised: int
    gradients: dict
    norm: float
    balance: float | None = None


class FrameworkEngine:
    """Implements `contract.Engine` over the modules of `msft/backend/<engine>/`."""

    def __init__(self, model, optimizer, distributed: ModuleType, session, runtime: Runtime):
        self.model = model
        self.optimizer = optimizer
        self.distributed = distributed
        self.session = session
        self.runtime = runtime
        self.mesh = distributed.mesh()
        self.is_sharded = self.mesh.shards(runtime.strategy)
        # Whether every rank must call `export_state`, not those of one model alone.
        self.shares_state = optimizer.shard
        self.scaler = LossScaler(runtime.loss_scale)
        self.step = 0

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `contract.Engine.train_step`."""
        scale = self.scaler.value
        total = self._accumulate(micro_batches, scale)
        finite = math.isfinite(total.norm) and math.isfinite(total.loss)
        if finite:
            self.optimizer.apply(total.gradients, self._clip(total.norm) / scale, learning_rate)
        self.scaler.update(not finite)
        self.step += 1
        return StepResult(total.loss, total.supervised, total.norm, not finite, scale, total.balance)

    def step_gradients(self, micro_batches: Sequence[Batch]) -> StepGradients:
        """See `contract.Engine.step_gradients`."""
        scale = self.scaler.value
        total = self._accumulate(micro_batches, scale)
        found = self._whole(self.optimizer.to_numpy(total.gradients))
        gradients = {name: array / scale for name, array in found.items()}
        supervised = tuple(batch.supervised for batch in micro_batches)
        return StepGradients(total.loss, total.losses, supervised, gradients, total.norm, self._clip(total.norm))

    def _accumulate(self, micro_batches: Sequence[Batch], scale: float) -> "_Total":
        """Gradients of `scale` x the step's loss over all micro-batches and ranks."""
        if self.mesh.context > 1 and not all(batch.is_shared for batch in micro_batches):
            raise ValueError("ranks share rows here, and each takes its part of a batch (backend.context.share)")
        local = sum(batch.supervised for batch in micro_batches)
        supervised = int(self.distributed.sum_numbers([local])[0])
        if supervised == 0:
            raise RunError(f"step {self.step + 1}: no token of the batch is supervised, so there is no loss")
        self.model.balance_sum = 0.0
        losses, gradients = self._computed(micro_batches, scale / supervised)
        gradients = self._over_ranks(self.optimizer.zeros() if gradients is None else gradients)
        loss, balance = self.distributed.sum_numbers([sum(losses), self.model.balance_sum])
        balance = balance / supervised if self.runtime.balance else None
        return _Total(loss / supervised, tuple(losses), supervised, gradients, self._norm(gradients) / scale, balance)

    def _computed(self, micro_batches: Sequence[Batch], scale: float) -> tuple[list[float], dict | None]:
        """Each micro-batch's summed loss, and the gradients of `scale` x all of it (None: nothing was computed)."""
        losses, gradients = [], None
        for batch in micro_batches:
            if not self._computes(batch):
                losses.append(0.0)
                continue
            prefix.check_labels(self.model.spec, batch)
            summed, new = self.model.loss_and_gradients(batch, scale, self.step)
            losses.append(summed)
            gradients = new if gradients is None else self.optimizer.add(gradients, new)
        return losses, gradients

    def _over_ranks(self, gradients: dict) -> dict:
        """The gradients summed over all ranks that have some of them."""
        return gradients if self.is_sharded else self.distributed.sum_gradients(gradients, self.model.partial)

    def _computes(self, batch: Batch) -> bool:
        """Whether a batch is computed: without a label too where other ranks wait for this one.

        Those of a sharded model gather its parts together, those that share rows their keys and values.
        """
        return bool(batch.supervised) or self.is_sharded or (batch.is_shared and bool(batch.segment_ids.any()))

    def _norm(self, gradients: dict) -> float:
        """The global norm, in which what several ranks of a model hold counts once."""
        if self.mesh.parts == 1:
            return self.optimizer.global_norm(gradients)
        counted = {name: gradient for name, gradient in gradients.items() if slices.counts(name, self.mesh)}
        square = self.optimizer.global_norm(counted) ** 2 if counted else 0.0
        return math.sqrt(self.distributed.sum_over_parts([square])[0])

    def _whole(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whole tensors for this rank's slices; every rank of a model calls it."""
        return self.distributed.join(arrays)

    def _own(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """This rank's slices of whole tensors, which are read one at a time."""
        return slices.SlicedArrays(arrays, self.mesh, self.model.tuned_shapes())

    def _places(self) -> dict[str, Place]:
        """Where this process's share of each tuned tensor lies; no entry where it has none."""
        return slices.places(self._held_shapes(), self.mesh)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tuned tensors, whole."""
        return self._held_shapes()

    def _held_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole tensors of which this rank has slices."""
        found = self.model.tuned_shapes()
        return {name: slices.whole_shape(name, shape, self.mesh) for name, shape in found.items()}

    def _clip(self, norm: float) -> float:
        """The factor of torch's clip_grad_norm_."""
        limit = self.runtime.max_grad_norm
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """See `contract.Engine.evaluate`."""
        prefix.check_labels(self.model.spec, batch)
        return (self.model.loss_sum(batch) if self._computes(batch) else 0.0), batch.supervised

    def token_logprobs(self, batch: Batch, adapter: bool = True) -> np.ndarray:
        """See `contract.Engine.token_logprobs`."""
        if not adapter and not self.model.has_adapter:
            raise RunError("adapter=False asks for the reference model, but this engine has no adapter to leave out")
        return self.model.token_logprobs(batch, adapter)

    def logits(self, batch: Batch) -> np.ndarray:
        """See `contract.Engine.logits`."""
        return self.model.logits(batch)

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `contract.Engine.gradients`."""
        if self.mesh.tensor > 1 or self.is_sharded:
            raise RunError("gradients of one batch are for a model that is whole (model_parallel 1, strategy ddp)")
        _check_whole(batch, "gradients of one batch")
        prefix.check_labels(self.model.spec, batch)
        _, gradients = self.model.loss_and_gradients(batch, 1 / max(batch.supervised, 1), None)
        return self.optimizer.to_numpy(gradients)

    def activations(self, batch: Batch, adapter: bool = True) -> dict[str, np.ndarray]:
        """See `contract.Engine.activations`."""
        _check_whole(batch, "hidden states of modules")
        found = self.model.activations(batch, adapter or not self.model.has_adapter)
        return {name: _without_padding(state, batch) for name, state in found.items()}

    def parameters(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """See `contract.Engine.parameters`."""
        tuned, spec = self._shapes(), self.model.decoder.spec
        base = tensor_shapes(spec)
        adapters = [name for name in tuned if name not in base]
        for name in dict.fromkeys((*base, spec.head, *adapters)):
            dtype = names.computed_dtype(name, name in tuned, self.runtime.precision, spec)
            yield name, self._parameter(name, dtype), dtype

    def _parameter(self, name: str, dtype: str) -> np.ndarray:
        """A whole tensor as it is computed with."""
        return self._whole({name: self.model.parameter(name, dtype)})[name]

    def is_head_tied(self) -> bool:
        """See `contract.Engine.is_head_tied`."""
        return self.model.decoder.is_head_tied()

    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """See `contract.Engine.rotate`."""
        return self.model.decoder.rotate(hidden, position_ids)

    def decayed(self) -> tuple[str, ...]:
        """See `contract.Engine.decayed`."""
        return tuple(name for name in self.model.tuned_shapes() if name in self.optimizer.decayed)

    def dtypes(self) -> dict[str, str]:
        """See `contract.Engine.dtypes`."""
        return {**self.model.dtypes(), **self.optimizer.dtypes()}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[int]]:
        """See `contract.Engine.generate`."""
        if not prompts:
            return []
        if self.mesh.tensor > 1:
            raise RunError("text is generated by a model that is not cut: run it with model_parallel 1")
        if self.is_sharded:
            raise RunError("text is generated by a model that is whole: run it with strategy ddp, or in one process")
        if not all(prompts):
            raise RunError("a prompt has no token; start it with the begin token")
        largest, vocabulary = max(map(max, prompts)), self.model.decoder.spec.vocab_size
        if largest >= vocabulary:
            raise RunError(
                f"a prompt has the token id {largest}, but the model's vocabulary ends at {vocabulary - 1}: "
                "the tokenizer is another model's"
            )
        prefix.check_prompts(self.model.decoder.spec, prompts)
        positions.check_length(self.model.decoder.spec, max(map(len, prompts)) + sampling.max_new_tokens)
        return decoding.generate(self._session(sampling.max_new_tokens), prompts, sampling, on_token)

    def _session(self, room: int) -> decoding.Session:
        border = rope.border(self.model.decoder.spec)
        if border is None:
            return self.session(self.model, room)
        return decoding.BegunAnew(partial(self.session, self.model), room, border)

    def export_state(self) -> EngineState:
        """See `contract.Engine.export_state`."""
        first, second = map(self._whole, self.optimizer.moments())
        return EngineState(self.export_weights(), first, second, self._counters())

    def export_weights(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """See `contract.Engine.export_weights`."""
        return self._whole(self.model.export_tuned(self.tuned_names() if names is None else names))

    def _counters(self) -> dict[str, float]:
        return {
            "step": self.step,
            "optimizer_step": self.optimizer.step,
            "loss_scale": self.scaler.value,
            "good_steps": self.scaler.good_steps,
        }

    def export_parts(self) -> StateParts:
        """See `contract.Engine.export_parts`."""
        places = self._places()
        kinds = ({name: arrays[name] for name in places} for arrays in self.optimizer.shares())
        return StateParts(*kinds, places, self._counters())

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `contract.Engine.tuned_shapes`."""
        return self._shapes()

    def tuned_names(self) -> list[str]:
        """See `contract.Engine.tuned_names`."""
        return list(self._shapes())

    def export_adapter(self) -> dict[str, np.ndarray]:
        """See `contract.Engine.export_adapter`."""
        return self._whole(self.model.export_tuned([name for name in self.tuned_names() if ".lora_" in name]))

    def import_state(self, state: EngineState) -> None:
        """See `contract.Engine.import_state`."""
        for kind in (state.weights, state.first_moment, state.second_moment):
            _check_shapes(_shapes_of(kind), self._shapes())
        self.model.import_tuned(self._own(state.weights))
        first, second = map(self._own, (state.first_moment, state.second_moment))
        self.optimizer.load(first, second, int(state.counters["optimizer_step"]))
        self.step = int(state.counters["step"])
        self.scaler.value = float(state.counters["loss_scale"])
        self.scaler.good_steps = int(state.counters["good_steps"])

    def load_adapter(self, weights: dict[str, np.ndarray]) -> None:
        """See `contract.Engine.load_adapter`."""
        _check_shapes(_shapes_of(weights), {name: shape for name, shape in self._shapes().items() if ".lora_" in name})
        self.model.import_tuned(self._own(weights))

    def describe(self) -> dict[str, str]:
        """See `contract.Engine.describe`."""
        return {**self.model.describe(), **self.optimizer.describe()}


def _check_whole(batch: Batch, what: str) -> None:
    if batch.is_shared:
        raise RunError(f"{what} are for rows that one process computes (context_parallel 1)")


def _without_padding(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Values [rows, length, ...], 0 on padding, which an engine need not compute."""
    values[batch.segment_ids == 0] = 0
    return values


def _shapes_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes, without reading what is read when asked for."""
    known = getattr(arrays, "shapes", None)
    return known if known is not None else {name: tuple(array.shape) for name, array in arrays.items()}


def _check_shapes(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [f"'{name}' is missing" for name in expected if name not in given]
    problems += [f"'{name}' is not tuned here" for name in given if name not in expected]
    problems += [
        f"'{name}' has shape {shape}, here it is {expected[name]}"
        for name, shape in given.items()
        if name in expected and shape != tuple(expected[name])
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RunError(f"the state does not fit this engine: {shown}")
