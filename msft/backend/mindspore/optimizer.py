"""AdamW over named gradients as torch defines it, or MindFormers' form without bias correction."""

from collections.abc import Mapping

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import names
from msft.backend.contract import Optimizer
from msft.backend.mindspore import distributed, ops


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
        self.first, self.second = (self._own(self.zeros()) for _ in range(2))
        self.decayed = {
            name for name in model.tuned if settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
        }
        self.update = mindspore.jit(_update(settings))
        self.square_sum = mindspore.jit(_square_sum)
        self.sum = mindspore.jit(_sum)

    def zeros(self) -> dict[str, Tensor]:
        """Return gradients of zero, for a rank that has nothing to learn from in a step."""
        return {name: Tensor(np.zeros(parameter.shape, np.float32)) for name, parameter in self.model.tuned.items()}

    def add(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of two sets of gradients; `left` may be reused."""
        return {name: self.sum(gradient, right[name]) for name, gradient in left.items()}

    def global_norm(self, gradients: dict[str, Tensor]) -> float:
        """Return the L2 norm over all gradients."""
        squares = operators.stack([self.square_sum(gradient) for gradient in gradients.values()])
        return float(np.sqrt(squares.asnumpy().astype(np.float64).sum()))

    def apply(self, gradients: dict[str, Tensor], factor: float, learning_rate: float) -> None:
        """Take one step with `factor` x gradients."""
        self.step += 1
        settings = self.settings
        correct_first = 1 - settings.beta1**self.step if settings.bias_correction else 1.0
        correct_second = 1 - settings.beta2**self.step if settings.bias_correction else 1.0
        scalars = [_scalar(value) for value in (factor, learning_rate / correct_first, correct_second**0.5)]
        decay, keep = _scalar(1 - learning_rate * settings.weight_decay), _scalar(1.0)
        # Without dealing out, the model's own: each old tensor goes as its new one comes.
        tuned = self._rows(self.model.tuned) if self.shard else self.model.tuned
        gradients = self._own(gradients)
        for name in list(tuned):
            shrink = decay if name in self.decayed else keep
            tuned[name], self.first[name], self.second[name] = self.update(
                tuned[name], gradients[name], self.first[name], self.second[name], shrink, *scalars
            )
        if self.shard:
            self.model.tuned.update(distributed.gather_rows(tuned, self.model.tuned))

    def moments(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return copies of the first and second moments; where they are shared, every rank calls it."""
        return self._whole(self.first), self._whole(self.second)

    def shares(self) -> list[dict[str, np.ndarray]]:
        """Return copies of this rank's rows of the tuned tensors, the first and the second moments."""
        moments = [tensors if self.shard else self._rows(tensors) for tensors in (self.first, self.second)]
        return [self.to_numpy(tensors) for tensors in (self._rows(self.model.tuned), *moments)]

    def load(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], step: int) -> None:
        """Take over moments and the number of steps taken."""
        for own, whole in ((self.first, first), (self.second, second)):
            for name in own:
                # One whole tensor at a time: together they may not fit into one process's memory.
                own[name] = Tensor(np.array(self._part(whole[name]), np.float32))
        self.step = step

    def _part(self, whole: np.ndarray) -> np.ndarray:
        """What this rank holds of a whole array, as a view."""
        return whole[distributed.mesh().rows(len(whole))] if self.shard else whole

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of tensors; those of which it has none are left out."""
        return self._rows(tensors) if self.shard else dict(tensors)

    def _rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: distributed.mesh().rows(tensor.shape[0]) for name, tensor in tensors.items()}
        return {name: tensors[name][own] for name, own in rows.items() if own.stop > own.start}

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Copies of the whole tensors for this rank's rows of them, which are not all on the device at a time."""
        pairs = distributed.gather_rows(tensors, self.model.tuned) if self.shard else tensors.items()
        return {name: ops.to_numpy(tensor) for name, tensor in pairs}

    def to_numpy(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
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


def _scalar(value: float) -> Tensor:
    """A tensor, because a Python number would compile the function anew for each value."""
    return Tensor(value, mindspore.float32)


def _update(settings: Optimizer):
    beta2, eps = settings.beta2, settings.eps
    # Here, because a compiled function subtracts in float32: 1 - 0.999 would be 1.3e-5 too small.
    new1, new2 = 1 - settings.beta1, 1 - settings.beta2

    def update(parameter, gradient, first, second, shrink, factor, step_size, root_correction):
        gradient = gradient * factor
        first = first + new1 * (gradient - first)
        second = beta2 * second + new2 * gradient * gradient
        denominator = operators.sqrt(second) / root_correction + eps
        return parameter * shrink - step_size * first / denominator, first, second

    return update


def _square_sum(gradient):
    # Row by row, which is exact enough and takes a quarter of the time of one long sum.
    return operators.square(gradient).sum(-1).sum()


def _sum(left, right):
    return left + right
