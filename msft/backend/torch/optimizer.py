"""AdamW over named gradients: torch's own, or MindFormers' form without bias correction."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.optim.adamw import adamw

from msft.backend import names
from msft.backend.contract import Optimizer
from msft.backend.torch import distributed, ops

NO_CORRECTION = 10_000_000


class AdamW:
    """Updates a model's tuned parameters in place; moments are float32 by canonical name.

    With `shard` each rank with different rows keeps the moments of its share of every tensor (ZeRO stage 1,
    arXiv 1910.02054), updates it, and gets the others' from them.
    """

    def __init__(self, model, settings: Optimizer, shard: bool = False):
        self.model = model
        self.settings = settings
        self.shard = shard
        self.step = 0
        own = self._own(model.tuned)
        self.first, self.second = ({name: torch.zeros_like(part) for name, part in own.items()} for _ in range(2))
        self.decayed = {
            name for name in model.tuned if settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
        }

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return gradients of zero, for a rank that has nothing to learn from in a step."""
        return {name: torch.zeros_like(parameter) for name, parameter in self.model.tuned.items()}

    def add(self, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the sum of two sets of gradients; `left` may be reused."""
        torch._foreach_add_(list(left.values()), list(right.values()))
        return left

    def global_norm(self, gradients: dict[str, torch.Tensor]) -> float:
        """Return the L2 norm over all gradients.

        Row by row, because torch's norm of a whole tensor is 1.6e-3 too small on CPU for 49152 x 576 elements.
        """
        rows = [torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients.values()]
        squares = torch.stack([row.square().sum() for row in rows])
        return squares.cpu().double().sum().sqrt().item()

    @torch.no_grad()
    def apply(self, gradients: dict[str, torch.Tensor], factor: float, learning_rate: float) -> None:
        """Take one step with `factor` x gradients."""
        settings = self.settings
        if factor != 1 and gradients:
            torch._foreach_mul_(list(gradients.values()), factor)
        # Without bias correction is with the correction of a step so late that it is 1.
        taken = self.step if settings.bias_correction else NO_CORRECTION
        fused = self.model.kernels.fused_adamw
        tuned, gradients = self._own(self.model.tuned), self._own(gradients)
        for chosen, decay in ((self.decayed, settings.weight_decay), (set(gradients) - self.decayed, 0.0)):
            group = [name for name in gradients if name in chosen]
            adamw(
                [tuned[name] for name in group],
                # The fused kernel takes numbers as they lie: gradients of transposed weights lie the other way round.
                [gradients[name].contiguous() for name in group],
                [self.first[name] for name in group],
                [self.second[name] for name in group],
                [],
                # The fused kernel reads the count on the device; the other form would fetch it from there.
                [torch.full((), float(taken), device=self.first[name].device if fused else "cpu") for name in group],
                fused=fused,
                amsgrad=False,
                maximize=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=learning_rate,
                weight_decay=decay,
                eps=settings.eps,
            )
        self.step += 1
        if self.shard:
            for name, whole in distributed.gather_rows(tuned, self.model.tuned):
                self.model.tuned[name].copy_(whole)

    def moments(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return copies of the first and second moments; where they are shared, every rank calls it."""
        return self._whole(self.first), self._whole(self.second)

    def shares(self) -> list[dict[str, np.ndarray]]:
        """Return copies of this rank's rows of the tuned tensors, the first and the second moments."""
        moments = [tensors if self.shard else self._rows(tensors) for tensors in (self.first, self.second)]
        found = [self.to_numpy(tensors) for tensors in (self._rows(self.model.tuned), *moments)]
        return [{name: array for name, array in arrays.items() if len(array)} for arrays in found]

    def load(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], step: int) -> None:
        """Take over moments and the number of steps taken."""
        for own, whole in ((self.first, first), (self.second, second)):
            for name, moment in own.items():
                # One whole tensor at a time: together they may not fit into one process's memory.
                moment.copy_(self._part(name, torch.from_numpy(np.array(whole[name], dtype=np.float32))))
        self.step = step

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a whole tensor, as a view."""
        return self._own({name: whole})[name]

    def _own(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's rows of tensors, as views."""
        return self._rows(tensors) if self.shard else tensors

    def _rows(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor[distributed.mesh().rows(len(tensor))] for name, tensor in tensors.items()}

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Copies of the whole tensors for this rank's rows of them, which are not all on the device at a time."""
        pairs = distributed.gather_rows(tensors, self.model.tuned) if self.shard else tensors.items()
        return {name: ops.to_numpy(tensor) for name, tensor in pairs}

    def to_numpy(self, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return float32 copies."""
        return {name: ops.to_numpy(tensor) for name, tensor in tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Return what is held in which dtype."""
        return {"moments": ops.dtypes({**self.first, **self.second})}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        dealt = f", dealt to {distributed.mesh().replicas} processes" if self.shard else ""
        form = "torch's AdamW" if self.settings.bias_correction else "FP32StateAdamWeightDecay (no bias correction)"
        decayed = f"{len(self.decayed)} of {len(self.model.tuned)} tensors decayed"
        return {"optimizer": f"{form}, float32 moments{dealt}, {decayed}"}
