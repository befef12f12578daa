"""AdamW over named gradients as torch defines it, or MindFormers' form without bias correction."""

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import names
from msft.backend.buckets import buckets
from msft.backend.contract import Optimizer
from msft.backend.mindspore import ops


class AdamW:
    """Updates a model's tuned parameters in place; moments are float32, several small tensors in one flat one."""

    def __init__(self, model, settings: Optimizer):
        self.model = model
        self.settings = settings
        self.step = 0
        self.decayed = {
            name for name in model.tuned if settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
        }
        self.groups = [
            group
            for names_of_kind in (self.decayed, model.tuned.keys() - self.decayed)
            for group in buckets({name: model.tuned[name].size for name in model.tuned if name in names_of_kind})
        ]
        self.first, self.second = ([_zeros(sum(self._sizes(group))) for group in self.groups] for _ in range(2))
        self.update = mindspore.jit(_update(settings))

    def zeros(self) -> dict[str, Tensor]:
        """Return gradients of zero, for a rank that has nothing to learn from in a step."""
        return {name: _zeros(parameter.shape) for name, parameter in self.model.tuned.items()}

    def add(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of two sets of gradients; `left` may be reused."""
        return {name: gradient + right[name] for name, gradient in left.items()}

    def global_norm(self, gradients: dict[str, Tensor]) -> float:
        """Return the L2 norm over all gradients, summed in float32 by `SUM_BLOCK` elements, then in float64."""
        sums = [_square_sums(_flat(gradients, group)) for group in self.groups]
        return float(np.sqrt(ops.to_numpy(operators.concat(sums)).astype(np.float64).sum()))

    def apply(self, gradients: dict[str, Tensor], factor: float, learning_rate: float) -> None:
        """Take one step with `factor` x gradients."""
        self.step += 1
        settings = self.settings
        correct_first = 1 - settings.beta1**self.step if settings.bias_correction else 1.0
        correct_second = 1 - settings.beta2**self.step if settings.bias_correction else 1.0
        scalars = [_scalar(value) for value in (factor, learning_rate / correct_first, correct_second**0.5)]
        decay, keep = _scalar(1 - learning_rate * settings.weight_decay), _scalar(1.0)
        for number, group in enumerate(self.groups):
            shrink = decay if group[0] in self.decayed else keep
            flat, gradient = _flat(self.model.tuned, group), _flat(gradients, group)
            moments = self.first[number], self.second[number]
            flat, self.first[number], self.second[number] = self.update(flat, gradient, *moments, shrink, *scalars)
            parts = operators.split(flat, self._sizes(group)) if len(group) > 1 else [flat]
            for name, part in zip(group, parts, strict=True):
                self.model.tuned[name] = part.reshape(self.model.tuned[name].shape)

    def moments(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return copies of the first and second moments."""
        return self._by_name(self.first), self._by_name(self.second)

    def load(self, first: dict[str, np.ndarray], second: dict[str, np.ndarray], step: int) -> None:
        """Take over moments and the number of steps taken."""
        for number, group in enumerate(self.groups):
            for held, given in ((self.first, first), (self.second, second)):
                held[number] = Tensor(np.concatenate([given[name].reshape(-1) for name in group]).astype(np.float32))
        self.step = step

    def _sizes(self, group: list[str]) -> list[int]:
        return [self.model.tuned[name].size for name in group]

    def _by_name(self, held: list[Tensor]) -> dict[str, np.ndarray]:
        arrays = {}
        for group, flat in zip(self.groups, held, strict=True):
            parts = np.split(ops.to_numpy(flat), np.cumsum(self._sizes(group))[:-1])
            arrays |= {
                name: part.reshape(self.model.tuned[name].shape) for name, part in zip(group, parts, strict=True)
            }
        return {name: arrays[name] for name in self.model.tuned}

    def to_numpy(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return float32 copies."""
        return {name: ops.to_numpy(tensor) for name, tensor in tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Return what is held in which dtype."""
        return {"moments": ops.dtypes(dict(enumerate(self.first + self.second)))}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        form = "torch's AdamW" if self.settings.bias_correction else "FP32StateAdamWeightDecay (no bias correction)"
        return {"optimizer": f"{form}, float32 moments, {len(self.decayed)} of {len(self.model.tuned)} tensors decayed"}


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


def _zeros(shape) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def _flat(tensors: dict[str, Tensor], group: list[str]) -> Tensor:
    parts = [tensors[name].reshape(-1) for name in group]
    return parts[0] if len(parts) == 1 else operators.concat(parts)


def _square_sums(flat: Tensor) -> Tensor:
    """The sums of the squares of `SUM_BLOCK` elements each, and of the rest; one long float32 sum is not exact."""
    squares, whole = operators.square(flat), flat.size - flat.size % ops.SUM_BLOCK
    sums = []
    if whole:
        ones = operators.ones((ops.SUM_BLOCK, 1), flat.dtype)
        sums.append(operators.matmul(squares[:whole].reshape(-1, ops.SUM_BLOCK), ones).reshape(-1))
    if whole < flat.size:
        sums.append(squares[whole:].sum().reshape(1))
    return operators.concat(sums)
