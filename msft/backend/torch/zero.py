"""DeepSpeed: ZeRO stages 1 to 3 by its own engine, which sums, clips and applies the gradients."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from msft.backend import names
from msft.backend.contract import (
    IGNORE,
    Batch,
    EngineState,
    Optimizer,
    Place,
    Runtime,
    StepGradients,
    StepResult,
    Tuning,
)
from msft.backend.engine import FrameworkEngine
from msft.backend.torch import distributed, ops, zero_parts
from msft.backend.torch.generation import Session
from msft.backend.torch.model import Model
from msft.errors import RunError
from msft.models.spec import ModelSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
# What a checkpoint has of each tuned tensor: the weights, and these.
KINDS = (None, *MOMENTS)


class ZeroModel(Model):
    """A model in DeepSpeed's hands: what is computed goes through `network` and its head, whose hooks gather weights.

    All ranks make each call together; arrays go in whole, and come out whole on the first rank.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        super().__init__(spec, source, tuning, runtime)
        self.shapes = {name: zero_parts.whole_shape(parameter) for name, parameter in self.tuned.items()}
        network = self.decoder.network
        # Hooks stand around the calls of these two; what is to be done between them is brought along.
        network.forward = self.head_module.forward = lambda work, *arguments: work(*arguments)
        # Stage 3 gives a block's weights back when the gradient of its input is there, or at once where it needs none.
        network.enable_input_require_grads()

    @property
    def head_module(self):
        """The module of the head, whose call gathers its weight."""
        return self.decoder.network.get_output_embeddings()

    def training(self, batch: Batch, step: int):
        """Return the context of a training step: its dropout, and recomputing where it is asked for."""
        return self._dropout(batch, step)

    def scaled_loss(self, batch: Batch, scale: float) -> torch.Tensor:
        """Return `scale` x the summed loss, for DeepSpeed to differentiate."""
        hidden, labels = self._supervised(batch)
        return self.head_module(_Loss.apply, hidden, self.head_module.weight, self, labels, scale)

    def _at_head(self, hidden: torch.Tensor, work: Callable, *arguments):
        return _answer(self.head_module, work, hidden, *arguments)

    def loss_sum(self, batch: Batch) -> float:
        """Return the summed loss of the supervised tokens, without dropout."""
        return _answer(self.decoder.network, super().loss_sum, batch)

    def token_logprobs(self, batch: Batch, adapter: bool) -> np.ndarray:
        """Return each label's log-probability, float32 [rows, length], 0 where nothing is supervised."""
        return _answer(self.decoder.network, super().token_logprobs, batch, adapter)

    def logits(self, batch: Batch) -> np.ndarray:
        """Return all logits, float32 [rows, length, vocabulary]."""
        return _answer(self.decoder.network, super().logits, batch)

    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        return _answer(self.decoder.network, super().activations, batch, adapter)

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """Return a whole tensor by its canonical name as it is computed with in a dtype, on every rank."""
        tensor = self.tuned[name] if name in self.tuned else self.decoder.parameter(name)
        with zero_parts.gathered([tensor]):
            return ops.to_numpy(tensor.to(ops.dtype(dtype)))

    def export_tuned(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return tuned tensors by name, the float32 ones that the optimizer keeps."""
        from deepspeed.utils import safe_get_full_fp32_param

        return _on_first_rank({name: self.tuned[name] for name in names}, safe_get_full_fp32_param)

    @torch.no_grad()
    def import_tuned(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite tuned tensors by name: the optimizer's, and those that are computed with."""
        for name, array in weights.items():
            parameter = self.tuned[name]
            zero_parts.hold(parameter, array)
            with zero_parts.gathered([parameter], changed_by=0):
                parameter.copy_(ops.from_numpy(array, self.runtime.device, "float32"))

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole tuned tensors."""
        return self.shapes

    def dtypes(self) -> dict[str, str]:
        """Return what is held and computed in which dtype."""
        held = ops.dtypes(dict(self.decoder.network.named_parameters()))
        return {**super().dtypes(), "frozen": held, "tuned": f"{held}, float32 in the optimizer"}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        held = ops.dtypes(dict(self.decoder.network.named_parameters()))
        return {**super().describe(), "parameters": f"{held}, tuned ones float32 in the optimizer"}


def _answer(module: torch.nn.Module, work: Callable, *arguments):
    """What some work gives between a module's hooks, which take tensors, and look into a dict of anything."""
    return module(lambda *given: {"answer": work(*given)}, *arguments)["answer"]


class _Loss(torch.autograd.Function):
    """The summed loss of hidden states, times a scale; its gradients are made with it, a chunk of logits at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, model, labels, scale):
        loss, d_hidden, d_head = model._head_gradients(hidden, labels, scale)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(weight.dtype))
        return torch.tensor(loss * scale, device=hidden.device)

    @staticmethod
    def backward(ctx, factor):
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * factor, None if d_head is None else d_head * factor, None, None, None


class ZeroAdamW:
    """What the shared engine asks of an optimizer, of DeepSpeed's; moments are float32 by canonical name."""

    # The dealing out of moments is DeepSpeed's own.
    shard = False

    def __init__(self, model: ZeroModel, settings: Optimizer):
        self.model, self.settings = model, settings
        self.step = 0
        self.decayed = {
            name for name in model.tuned if settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
        }

    def groups(self) -> list[dict]:
        """Return the parameters that weight decay applies to, and the others."""
        tuned = self.model.tuned
        kinds = ((self.settings.weight_decay, self.decayed), (0.0, tuned.keys() - self.decayed))
        # The order must be the same on all ranks.
        return [
            {"params": [tuned[name] for name in tuned if name in chosen], "weight_decay": decay}
            for decay, chosen in kinds
            if chosen
        ]

    def moments(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return copies of the first and second moments; there are some after the first step only."""
        from deepspeed.utils import safe_get_full_optimizer_state as read

        first, second = (_on_first_rank(self.model.tuned, lambda part, key=key: read(part, key)) for key in MOMENTS)
        return first, second

    def shares(self) -> list[dict[str, np.ndarray]]:
        """Return copies of this rank's ranges of the tuned tensors, the first and the second moments, each flat."""
        tuned = self.model.tuned.items()
        return [{name: ops.to_numpy(zero_parts.held(part, kind)[1]) for name, part in tuned} for kind in KINDS]

    @torch.no_grad()
    def load(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], step: int) -> None:
        """Take over whole moments, one after another, and the number of steps taken."""
        for name, part in self.model.tuned.items():
            for key, arrays in zip(MOMENTS, (first, second), strict=True):
                zero_parts.hold(part, arrays[name], key)
        self.step = step

    def dtypes(self) -> dict[str, str]:
        """Return what is held in which dtype."""
        return {"moments": "float32"}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        form = "AdamW" if self.settings.bias_correction else "FP32StateAdamWeightDecay (no bias correction)"
        return {"optimizer": f"DeepSpeed's {form}, {len(self.decayed)} of {len(self.model.tuned)} tensors decayed"}


def _on_first_rank(parts: dict[str, torch.Tensor], read: Callable) -> dict[str, np.ndarray]:
    """Whole float32 arrays on the first rank, one after another, and none on the others."""
    found = {}
    for name, part in parts.items():
        whole = read(part)
        if distributed.mesh().rank == 0:
            found[name] = ops.to_numpy(whole)
    return found


class ZeroEngine(FrameworkEngine):
    """The shared engine, with DeepSpeed's step in place of its own."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        model = ZeroModel(spec, source, tuning, runtime)
        optimizer = ZeroAdamW(model, runtime.optimizer)
        super().__init__(model, optimizer, distributed, Session, runtime)
        self.zero = _initialize(model, optimizer, runtime)
        self._make_moments()

    def _make_moments(self) -> None:
        """DeepSpeed's optimizer makes them in its first step: one that changes nothing, of a token without a label."""
        token = np.zeros((1, 1), np.int32)
        nothing = Batch(token, token + IGNORE, token, token + 1, token)
        self._step([nothing] * self.zero.gradient_accumulation_steps(), 1, 0.0)
        self._count_steps(0)
        inner = self.zero.optimizer
        if hasattr(inner, "single_partition_of_fp32_groups"):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

            # DeepSpeed ties parameters to their moments after the step of the first group, when the second has none.
            for group, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
                link(group, flat, inner.optimizer.state)

    def _count_steps(self, taken: int) -> None:
        """Set what the bias of the moments is corrected by."""
        for state in self.zero.optimizer.optimizer.state.values():
            step = state["step"]
            state["step"] = torch.full_like(step, taken) if isinstance(step, torch.Tensor) else taken

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `contract.Engine.train_step`."""
        supervised = int(self.distributed.sum_numbers([sum(batch.supervised for batch in micro_batches)])[0])
        if supervised == 0:
            raise RunError(f"step {self.step + 1}: no token of the batch is supervised, so there is no loss")
        scale = self.scaler.value
        own, applied = self._step(micro_batches, supervised, learning_rate)
        self.optimizer.step += applied
        self.step += 1
        if self.zero.fp16_enabled():
            self.scaler.value = float(self.zero.optimizer.loss_scale)
        loss, norm = self.distributed.sum_numbers([own])[0], float(self.zero.get_global_grad_norm())
        return StepResult(loss, supervised, norm, not applied, scale)

    def _step(self, micro_batches: Sequence[Batch], supervised: int, rate: float) -> tuple[float, bool]:
        """This rank's part of the loss, and whether the step was taken."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = rate
        summed = 0.0
        for batch in micro_batches:
            # DeepSpeed takes the mean over the ranks.
            with self.model.training(batch, self.step):
                loss = self.zero(self.model.scaled_loss, batch, self.mesh.data / supervised)
                # Times 1: of the very tensor that the model gave, stage 1 in bfloat16 divides by the micro-batches.
                self.zero.backward(loss * 1, scale_wrt_gas=False)
            summed += loss.item() / self.mesh.data
            self.zero.step()
        return summed, self.zero.was_step_applied()

    def step_gradients(self, micro_batches: Sequence[Batch]) -> StepGradients:
        """See `contract.Engine.step_gradients`."""
        raise RunError("DeepSpeed keeps the gradients of a step to itself: run it with strategy ddp or fsdp")

    def _places(self) -> dict[str, Place]:
        found = {name: zero_parts.place(part) for name, part in self.model.tuned.items()}
        return {name: place for name, place in found.items() if place.shape[0]}

    def import_state(self, state: EngineState) -> None:
        """See `contract.Engine.import_state`."""
        super().import_state(state)
        self._count_steps(self.optimizer.step)
        if self.zero.fp16_enabled():
            self.zero.optimizer.loss_scale = self.scaler.value

    def describe(self) -> dict[str, str]:
        """See `contract.Engine.describe`."""
        zero = self.runtime.deepspeed["zero_optimization"]
        offloaded = [f"{what} on {zero[f'offload_{what}']['device']}" for what in ("optimizer", "param")]
        kept = ", ".join(place for place in offloaded if not place.endswith("none"))
        strategy = f"deepspeed: ZeRO stage {zero['stage']} over {self.mesh.data} ranks{kept and ', ' + kept}"
        return {**super().describe(), "strategy": strategy}


def _initialize(model: ZeroModel, optimizer: ZeroAdamW, runtime: Runtime):
    deepspeed = zero_parts.library(runtime.device)
    network, decoder, configuration = model.decoder.network, model.decoder, copy.deepcopy(runtime.deepspeed)
    if configuration["zero_optimization"]["stage"] == 3:
        # A block's operators take the weights of modules below it that are not called themselves.
        deepspeed.utils.set_z3_leaf_modules(
            network, [type(network.get_submodule(decoder.spec.layer(0).removesuffix(".")))]
        )
    groups = optimizer.groups()
    zero, *_ = deepspeed.initialize(model=network, model_parameters=groups, config=configuration)
    # Else a step of NaN would be taken in float32.
    zero.optimizer.check_grad_overflow = True
    # In 16 bits it has narrowed the rotary frequencies with everything else; each batch sets them anew.
    if hasattr(network.base_model, "rotary_emb"):
        network.base_model.rotary_emb.float()
    decoder.frequencies = None
    return zero
